"""What a comparison leaves behind: `results.csv`, `results.json` and `report.html`, the page for looking.

The page draws its charts as SVG with plain JavaScript from embedded JSON, because an inlined plotting library
takes megabytes and a picture drawn in Python can neither hide an arm nor follow the theme.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ewavit.compare.differences import EQUAL_SEEDS, finished
from ewavit.compare.results import ArmRuns, Comparison, Point, Run
from ewavit.compare.statistics import Summary, summarise, time_to_reference
from ewavit.compare.two_axes import two_axes
from ewavit.files import csv_text, replacing
from ewavit.tasks.judge import Judge

FACTS = (
    "name", "command", "date", "device", "versions", "data", "kind", "samples", "recipe", "seeds", "tuning",
    "choices", "limited",
)  # fmt: skip
COLUMNS = (
    "arm", "role", "seed", "lr", "{judge}", "mean_class", "eval_loss", "seconds", "images", "peak_memory_mib",
    "time_to_dense", "error",
)  # fmt: skip


def write_results(comparison: Comparison, folder: Path) -> None:
    """Write `results.csv`, `results.json` and `report.html`; if one cannot be written, none is touched.

    With `--retain` also `two_axes.svg`.

    Args:
        comparison: all arms and their runs; predictions stay out of the files.
        folder: where to write; made if missing.

    Raises:
        EwavitError: from `summarise`: no arm, or arms that were evaluated on different data.
        OSError: a file cannot be written.
    """
    summary = summarise(comparison)
    texts = {
        "results.csv": _csv(comparison, summary),
        "results.json": json.dumps(_everything(comparison, summary), allow_nan=False) + "\n",
        "report.html": _page(comparison, summary),
    }
    if picture := two_axes(comparison):
        texts["two_axes.svg"] = picture
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name, text in texts.items():
            partial = stack.enter_context(replacing(folder / name))
            partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def _csv(comparison: Comparison, summary: Summary) -> str:
    """One row per arm and seed; the numbers of a failed run are empty."""
    table = io.StringIO()
    columns = [column.format(judge=comparison.judge.column) for column in COLUMNS]
    if any(
        point.retained is not None for each in comparison.arms for run in each.runs for point in run.curve
    ):
        columns.append("retained")
    writer = csv.DictWriter(table, columns)  # its line ends, else a carriage return in a text is not quoted
    writer.writeheader()
    for runs in comparison.arms:
        of_arm = {"arm": runs.arm.name, "role": runs.arm.role, "lr": runs.lr}
        for row in _rows(runs, comparison, summary):
            cells = {**of_arm, **row}
            writer.writerow({k: csv_text(v) if isinstance(v, str) else v for k, v in cells.items()})
    return table.getvalue()


def _rows(runs: ArmRuns, comparison: Comparison, summary: Summary) -> list[dict[str, Any]]:
    """The final numbers of an arm's runs."""
    reference = finished(next(other for other in comparison.arms if other.arm.name == summary.reference))
    rows: list[dict[str, Any]] = [{"seed": run.seed, "error": run.error} for run in runs.runs]
    done = finished(runs)
    for row in rows:
        if run := done.get(row["seed"]):
            last = run.curve[-1]
            row |= {
                comparison.judge.column: last.metric,
                "mean_class": run.mean_class,
                "eval_loss": last.eval_loss,
                "seconds": last.seconds,
            }
            row |= {"images": last.images, "peak_memory_mib": run.peak_memory_mib}
            other = reference.get(run.seed)
            row |= {} if last.retained is None else {"retained": last.retained}
            row["time_to_dense"] = time_to_reference(run, other, comparison.judge) if other else None
    return rows


def _everything(comparison: Comparison, summary: Summary) -> Any:
    """The comparison with its curves and statistics, in the form of `results.json`."""
    arms = []
    for runs in comparison.arms:
        rows = _rows(runs, comparison, summary)
        curves = [[_point(point, comparison.judge) for point in run.curve] for run in runs.runs]
        made = [{**row, "curve": curve} for row, curve in zip(rows, curves, strict=True)]
        choice = {"choice": asdict(runs.choice)} if runs.choice else {}
        arms.append({**vars(runs.arm), "lr": runs.lr, **choice, "runs": made})
    return _plain({**_facts(comparison), "arms": arms, "statistics": summary.as_dict()})


def _point(point: Point, judge: Judge) -> dict[str, Any]:
    """A point of a curve; its metric has the name of the judge's column."""
    values = {judge.column if name == "metric" else name: value for name, value in vars(point).items()}
    if point.retained is None:
        del values["retained"]
    return values


def _page(comparison: Comparison, summary: Summary) -> str:
    """The page with its style, script and data inside; no part of the data can end its script element."""
    arms = []
    for runs in comparison.arms:
        rows = [row for row in _rows(runs, comparison, summary) if comparison.judge.column in row]
        of_arm: dict[str, Any] = {name: getattr(runs.arm, name) for name in ("name", "role", "overrides")}
        of_arm["chosen"] = runs.choice.settings if runs.choice else None
        arms.append({**of_arm, "runs": rows, **_curves(list(finished(runs).values()))})
    data = _plain({**_facts(comparison), "arms": arms, "statistics": summary.as_dict()}, digits=6)
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    room = resources.files(__package__)
    parts = {name: (room / f"report.{name}").read_text("utf-8") for name in ("css", "js")}
    parts["data"] = text.replace("<", "\\u003c")
    words = {
        "title": comparison.name,
        "kind": comparison.kind,
        "samples": comparison.kind if comparison.recipe else "samples",
        "pairing": _pairing(comparison),
        "metric": comparison.judge.name,
        "Metric": comparison.judge.name[:1].upper() + comparison.judge.name[1:],
        "unit": f", {comparison.judge.unit}" if comparison.judge.unit else "",
        "best_mean": f"{'highest' if comparison.judge.higher_is_better else 'lowest'} mean",
        "reference": summary.reference,
        "steps": _steps(comparison),
    }
    parts |= {name: html.escape(text) for name, text in words.items()}
    template = (room / "report.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # one pass: data is not searched


def _pairing(comparison: Comparison) -> str:
    """What two runs of a seed share."""
    luck = "so their difference contains little of the seed’s luck."
    if not comparison.recipe:
        return f"Runs are paired by seed. Two of them may share first weights and order of samples, {luck}"
    same = f"start from the same weights and see the same {comparison.kind} in the same order"
    return f"Two arms of a seed {same}, {luck}"


def _steps(comparison: Comparison) -> str:
    """A sentence about the step of the judging metric; empty if it has none."""
    if comparison.samples is None:
        return ""
    judge, step = comparison.judge, 100 / comparison.samples
    return (
        f" The {judge.name} of {comparison.samples:,} {comparison.kind} comes in steps of "
        f"{f'{step:.2g} {judge.difference_unit}'.rstrip()}. No interval is narrower. Where all differences "
        f"lie within one step, fewer than {EQUAL_SEEDS} seeds give no verdict."
    )


def _curves(runs: list[Run]) -> dict[str, Any]:
    """An arm's curves over its finished runs: the metric with its range, schedules, spread by layer."""
    points = list(zip(*(run.curve for run in runs), strict=False))  # by epoch, then by seed

    def over_seeds(value: Callable[[Point], float | None], reduce: Any = np.mean) -> list[float]:
        values = ([value(point) for point in epoch] for epoch in points)
        return [float(reduce(np.array(row, dtype=float))) for row in values]  # None becomes nan

    def spread_of(layer: str) -> list[float]:
        return over_seeds(lambda point: point.spread.get(layer))

    return {
        "curve": {
            "images": [epoch[0].images for epoch in points],
            "mean": over_seeds(lambda point: point.metric),
            "low": over_seeds(lambda point: point.metric, np.min),
            "high": over_seeds(lambda point: point.metric, np.max),
        },
        "schedule": {
            "share_rate": [epoch[0].share_rate for epoch in points],  # the same for every seed
            "lr": [epoch[0].lr for epoch in points],
        },
        "spread": {
            "layers": {layer: spread_of(layer) for layer in (points[0][0].spread if points else ())},
            "predicted": over_seeds(lambda point: point.predicted_spread),
        },
    }


def _facts(comparison: Comparison) -> dict[str, Any]:
    return {name: getattr(comparison, name) for name in FACTS} | {"judge": vars(comparison.judge)}


def _plain(value: Any, digits: int | None = None) -> Any:
    """What JSON can hold: numbers, rounded to significant digits if given; nan and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, digits) for item in value]
    if isinstance(value, (float, np.floating)):
        exact = float(value) if digits is None else float(f"{value:.{digits}g}")
        return exact if math.isfinite(exact) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
