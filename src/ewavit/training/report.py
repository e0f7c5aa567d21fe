"""What a run leaves to read: lines, `summary.csv`, and pictures."""

from __future__ import annotations

import csv
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import nn

from ewavit.core.diagnostics import routing_statistics
from ewavit.core.routing import auxiliary_loss
from ewavit.files import csv_text, replacing
from ewavit.tasks.judge import Judge
from ewavit.tasks.task import Listed, Task
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder

if TYPE_CHECKING:  # these import this file
    from ewavit.data.batches import Data
    from ewavit.training.card import ModelCard

Row = dict[str, float]


def say(line: str) -> None:
    """Print one line of plain text at once."""
    print(line, flush=True)


def epoch_line(row: Row, epochs: int, task: Task) -> str:
    """One epoch in one line."""
    width = len(str(epochs))
    judge = task.judge
    found, average = row[f"eval_{judge.column}"], row.get(f"average_{judge.column}")
    averaged = "" if average is None else f"averaged {judge.text(average)}  "
    if (retained := row.get("eval_retained")) is not None:
        averaged += f"retained {retained:.2f} %  "
    return (
        f"epoch {int(row['epoch']) + 1:>{width}}/{epochs}  train loss {row['train_loss']:.4f}  "
        f"eval loss {row['eval_loss']:.4f}  {judge.name} {judge.text(found)}  {averaged}lr {row['lr']:.2e}  "
        f"share rate {row['share_rate']:.3f}  spread {row['expert_spread']:.4f}  "
        f"{row[f'{task.kind}_per_second']:.0f} {task.kind}/s"
    )


def opening(run: Path, card: ModelCard, data: Data, recipe: Recipe, num_mixtures: int) -> str:
    """What is trained on what."""
    mixtures = "1 mixture" if num_mixtures == 1 else f"{num_mixtures} mixtures"
    router = f", top-{recipe.k} router" if recipe.top_k else f", {recipe.router}"
    router = "" if recipe.router == "random" else router
    method = f"{mixtures} of {recipe.experts} experts{router}" if num_mixtures else "dense"
    return (
        f"{run}: {card.model} on {data.num_train:,} {data.inputs.kind} of {data.name} "
        f"({data.inputs.size}, {len(data.classes)} classes), {method}"
    )


def closing(run: Path, card: ModelCard, data: Data, row: Row, judged_on: str) -> str:
    """What came of it, and how to load it."""
    judge, kind = card.task.judge, card.task.kind
    skipped = f", {data.num_skipped} unreadable {kind} skipped" if data.num_skipped else ""
    found = judge.text(row[f"eval_{judge.column}"])
    lines = [f"{judge.name} {found} on {data.num_eval:,} {judged_on}{skipped}"]
    if (average := row.get(f"average_{judge.column}")) is not None:
        file = RunFolder(run).average
        lines.append(f"{judge.name} {judge.text(average)} of the averaged weights, {file}")
    what = "the plain model" if card.mixture is None else "the mixture of experts"
    file = RunFolder(run).model
    lines.append(f"{what} is {file}; load it with\n\n{card.loading_code(file)}\n")
    lines.append(f"and give it {card.input_text()}")
    return "\n".join(lines)


def write_summary(rows: list[Row], path: Path) -> None:
    """Write one CSV row per epoch, replacing the file at once."""
    with replacing(path) as partial, partial.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_predictions(
    task: Task, rows: Sequence[Listed], path: Path, classes: Sequence[str], spec: str
) -> None:
    """Write one CSV row per evaluation input, in the data's order. Text is written as `csv_text` does.

    Args:
        task: it says what is in a row.
        rows: the predictions.
        path: the file.
        classes: names of the classes.
        spec: data spec; names of inputs are paths relative to it if it is a folder.
    """
    folder = os.path.join(os.path.expanduser(spec), "")
    with (
        replacing(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
    ):
        writer = csv.writer(handle)
        names = [n if row.name is None else row.name.removeprefix(folder) for n, row in enumerate(rows)]
        header, lines = task.table(rows, classes, names)
        writer.writerow(header)
        for line in lines:
            writer.writerow([csv_text(cell) if isinstance(cell, str) else cell for cell in line])


def draw_curves(rows: list[Row], path: Path, title: str, judged_on: str, judge: Judge) -> None:
    """Draw loss, judging metric, schedules and expert spread over the epochs as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] + 1 for row in rows]
    panels: list[tuple[str, list[tuple[str, str]]]] = [
        (
            "loss",
            [("train_loss", "train, as optimised (smoothed, augmented)"), ("eval_loss", "test")],
        ),
        (
            f"{judge.name} on {judged_on}, {judge.unit}",
            [(f"eval_{judge.column}", "model"), (f"average_{judge.column}", "its averaged weights")],
        ),
        (
            "share rate and learning rate, of their peak",
            [("share_rate", "share rate"), ("lr", "learning rate")],
        ),
        (
            "expert spread, relative to the mean",
            [
                ("expert_spread", "measured, mean of the layers"),
                ("predicted_spread", "predicted by theory.py"),
            ],
        ),
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for axis, (label, series) in zip(axes.flat, panels, strict=True):
        for key, name in series:
            if key not in rows[0]:
                continue
            values = [row[key] for row in rows]
            if label.startswith("share rate"):
                values = [value / max(max(values), 1e-12) for value in values]
            axis.plot(epochs, values, marker="o" if len(rows) < 15 else "", label=name)
        axis.set_title(label, loc="left", fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(axis.lines) > 1:
            axis.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)


def routing_columns(model: nn.Module) -> Row:
    """What the routers did with the latest batch; nothing for a model without."""
    statistics = routing_statistics(model)
    if not statistics:
        return {}
    columns = {
        "auxiliary_loss": float(auxiliary_loss(model)),
        "dropped": fmean(layer.dropped for layer in statistics.values()),
        "router_entropy": fmean(layer.entropy for layer in statistics.values()),
    }
    for name, layer in statistics.items():
        columns |= {f"dropped/{name}": layer.dropped, f"router_entropy/{name}": layer.entropy}
        columns |= {f"load/{name}/{expert}": load for expert, load in enumerate(layer.load)}
    return columns


def peak_memory_mib(device: torch.device) -> float:
    """The largest memory held so far, on the GPU or else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
