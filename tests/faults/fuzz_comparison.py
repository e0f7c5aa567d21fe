"""The files of a comparison: summaries, predictions, settings, results with hostile names. Oracle: csv."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from fuzz_inputs import ACCEPTED, Draw, Wrong, answered, damaged, edited, outcome, target
from hypothesis import strategies as st
from safetensors.torch import save

from comparisons import make_comparison
from ewavit.compare.arms import make_arms
from ewavit.compare.reading import latest_metric, read_run
from ewavit.compare.report import write_results
from ewavit.compare.tuning import Grids
from ewavit.compare.work import Work
from ewavit.tasks.judge import TOP1
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder

EPOCHS, IMAGES = 3, 10


def _run(folder: Path) -> tuple[RunFolder, dict[str, bytes]]:
    """The files of a finished run; in its last epoch 6 of 10 images were right."""
    run = RunFolder(folder / "ewa-0")
    run.path.mkdir()
    columns = [
        "epoch",
        "images",
        "seconds",
        "train_loss",
        "eval_loss",
        "eval_top1",
        "lr",
        "share_rate",
        "peak_memory_mib",
        "spread/blocks.1.mlp",
        "predicted_spread",
    ]
    table = [",".join(columns)]
    for epoch in range(EPOCHS):
        values = [
            epoch,
            100 * (epoch + 1),
            epoch + 0.5,
            2.1,
            2.0,
            40.0 + 10 * epoch,
            0.001,
            0.3,
            310.5,
            0.01,
            0.012,
        ]
        table.append(",".join(map(str, values)))
    rows = ["index,label,prediction", *(f"{i},{i % 3},{(i + (i > 5)) % 3}" for i in range(IMAGES))]
    card = {"classes": ["a", "b", "c"], "metric": 60.0}
    files = {
        run.summary.name: "\n".join([*table, ""]).encode(),
        run.predictions.name: "\n".join([*rows, ""]).encode(),
        run.model.name: save({"a": torch.zeros(1)}, {"ewavit": json.dumps(card)}),
    }
    for name, data in files.items():
        (run.path / name).write_bytes(data)
    return run, files


@target("comparison: files of a run", 1.0, _run)
def files_of_a_run(draw: Draw, shared: tuple[RunFolder, dict[str, bytes]]) -> str:
    run, files = shared
    name = draw(st.sampled_from(sorted(files)))
    file = run.path / name
    if name == run.model.name and draw(st.booleans()):
        card = edited(draw, {"classes": ["a", "b", "c"], "metric": 60.0})
        data = save({"a": torch.zeros(1)}, {"ewavit": json.dumps(card)})
    else:
        data = damaged(draw, files[name])
    file.write_bytes(data)
    try:
        _, unread = answered(lambda: latest_metric(run, TOP1))
        found, refusal = answered(lambda: read_run(run, 0, TOP1, range(EPOCHS)))
        if found is not None:
            _check_run(found, run)
            if unread:
                raise Wrong(f"the run is read, its last row is not: {unread}")
    finally:
        file.write_bytes(files[name])
    return outcome(refusal)


def _check_run(found: Any, run: RunFolder) -> None:
    with run.summary.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row, point in zip(rows, found.curve, strict=True):
        if float(row["eval_top1"]) != point.metric or float(row["lr"]) != point.lr:
            raise Wrong(f"another metric or rate than {row}")
    with run.predictions.open(newline="") as handle:
        labels = [int(row["label"]) for row in csv.DictReader(handle)]
    if found.labels.tolist() != labels:
        raise Wrong("other labels")
    right = 100 * float((found.labels == found.predictions).mean())
    if abs(right - found.metric) > 100 / len(labels):
        raise Wrong(f"{right} % of the predictions are right, the metric is {found.metric}")


def _work(folder: Path, recipe: Recipe) -> Work:
    return Work(recipe, make_arms(["dense", "ewa"], recipe), (0, 1), Grids(), 1, "ewavit compare")


def _comparison(folder: Path) -> tuple[Path, Recipe, dict[str, Any]]:
    recipe = Recipe(output=str(folder), name="c", epochs=EPOCHS)
    work = _work(folder, recipe)
    (work.folder / "runs/dense-0").mkdir(parents=True)
    work.device, work.machines = "cpu", ["a machine"]
    work._save()
    return folder, recipe, yaml.safe_load((work.folder / "compare.yaml").read_text())


@target("comparison: its settings", 0.15, _comparison)
def settings_of_a_comparison(draw: Draw, shared: tuple[Path, Recipe, dict[str, Any]]) -> str:
    folder, recipe, content = shared
    file = folder / "c/compare.yaml"
    try:
        text = yaml.safe_dump(edited(draw, content) if draw(st.integers(0, 9)) else content, sort_keys=False)
        data = text.encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, UnicodeEncodeError):
        return "not written"
    file.write_bytes(data if draw(st.integers(0, 2)) else damaged(draw, data))
    work = _work(folder, recipe)
    _, refusal = answered(work.read)
    if refusal is None:
        for part in (work.tuning, work.final, work.choose):  # what is read must do for what follows
            answered(part)
    return outcome(refusal)


_TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "</script><script>alert(1)</script>",
            "=1+1",
            "@SUM(A1)",
            "+1",
            "-2",
            "\t=1",
            "{{data}}",
            "<!--",
            "a,b\"c'",
            "\u2028",
            "\ud800",
            "\0",
            "\r\n",
        ]
    ),
)
_FLOATS = st.floats(allow_nan=True, allow_infinity=True)


@target("comparison: results with hostile words", 0.01)
def results(draw: Draw, folder: Path) -> str:
    name, command, error, device, version = (draw(_TEXTS) for _ in range(5))
    made = make_comparison(("dense", "ewa"), seeds=3, epochs=2, failed={("ewa", 1): error or "x"})
    recipe = made.recipe | {"select": draw(_TEXTS), "lr": draw(_FLOATS)}
    made = replace(made, name=name, command=command, device=device, versions={"a": version}, recipe=recipe)
    place = folder / "results"
    _, refusal = answered(partial(write_results, made, place))
    if refusal is not None:
        return outcome(refusal)
    held = json.loads((place / "results.json").read_text("utf-8"), parse_constant=lambda word: 1 / 0)
    if (held["name"], held["command"], held["device"]) != (name, command, device):
        raise Wrong("other words in results.json")
    with (place / "results.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if len(rows) != 6 or [row["error"] for row in rows].count("") != 5:
        raise Wrong(f"{len(rows)} rows in results.csv")
    if [
        cell
        for row in rows
        for cell in row.values()
        if cell and cell[0] in "=+@\t\r" and not _is_number(cell)
    ]:
        raise Wrong("a cell of results.csv is a formula")
    page = (place / "report.html").read_text("utf-8")
    if page.count("<script") != make_page(folder).count("<script") or "<script>alert" in page:
        raise Wrong("a name became a script")
    return ACCEPTED


def make_page(folder: Path) -> str:
    """The page of a harmless comparison."""
    place = folder / "plain"
    if not place.exists():
        write_results(make_comparison(("dense", "ewa"), seeds=3, epochs=2), place)
    return (place / "report.html").read_text("utf-8")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
