"""Reads the runs of a comparison from their folders, and checks them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ewavit.compare.results import Point, Run
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular
from ewavit.tasks.judge import Judge
from ewavit.training.places import portable_spec
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder

SPREAD = "spread/"  # columns of summary.csv that begin so are the spread of one layer
# A second evaluation on a GPU may round differently and change predictions between two nearly equal classes.
UNSTEADY = 0.001  # share of the predictions that may differ


def read_run(run: RunFolder, seed: int, judge: Judge, epochs: Sequence[int] | None = None) -> Run:
    """Read a finished run from its folder and check it.

    Args:
        run: the folder.
        seed: of the run.
        judge: the judging metric.
        epochs: the epochs that the run evaluated, from `evaluated_epochs`; None leaves them unchecked.

    Raises:
        EwavitError: a file is missing or cannot be parsed, has impossible values, or contradicts another
            file. The message names the file and the remedy.
    """
    with _reading(run, run.summary):
        rows = _table(run.summary)
        points = tuple(_point(run, row, judge) for row in rows)
        _check_curve(points, epochs)
        memory = _number(rows[-1], "peak_memory_mib", 0)
    labels, predictions = _predictions(run, judge)
    with _reading(run, run.model):
        classes, metric = _model_card(run, averaged="average_loss" in rows[-1])
    with _reading(run, run.summary):
        if metric is not None and metric != points[-1].metric:
            raise ValueError(f"its last {judge.name} is {points[-1].metric}, the model's file says {metric}")
    finished = Run(seed, points, memory, labels, predictions)
    if labels is not None and predictions is not None:
        with _reading(run, run.predictions):
            _check_predictions(labels, predictions, classes, judge, points[-1].metric)
        finished = replace(finished, samples=len(labels) if judge.share_of_samples else None)
    for file in (run.summary, run.predictions):
        with _reading(run, file):
            if damage := run.damage(file):
                raise ValueError(damage)
    return finished


def verdict_of(run: Path) -> str | None:
    """What a comparison says of a run's arm; None if the run belongs to no comparison with results.

    Args:
        run: the folder of the run.
    """
    file = run.absolute().parent.parent / "results.json"
    try:
        found = json.loads(regular(file).read_text())
        statistics, data = found["statistics"], str(found["recipe"]["data"])
        arm = run.name.rpartition("-")[0]
        of_arm = [each["sentence"] for each in statistics["verdicts"] if each["arm"] == arm]
        text = " ".join([*of_arm, f"{statistics['setting']}, {statistics['claim']}"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    averaged = RunFolder(run).average.exists()
    what = " It judges the averaged weights of the run, which are not in this file." if averaged else ""
    return text.replace(data, portable_spec(data)) + what


def latest_metric(run: RunFolder, judge: Judge) -> float:
    """The judging metric in the last row of a run's summary, of the same weights as in `read_run`.

    Raises:
        EwavitError: the summary has no row, no column of the judge, or an impossible value.
    """
    with _reading(run, run.summary):
        return _metric(run, run.last_row() or {}, judge)


def evaluated_epochs(recipe: Recipe) -> tuple[int, ...]:
    """The epochs in the summary of a finished run."""
    last = recipe.epochs - 1
    return tuple(e for e in range(recipe.epochs) if (e + 1) % recipe.val_interval == 0 or e == last)


def without_other_data(runs: Mapping[RunFolder, Run], by_seed: bool = False) -> dict[RunFolder, Run]:
    """Turn runs with other labels than most runs into failed runs.

    All runs of a comparison are evaluated on the same samples. If two sets of labels are equally frequent,
    neither is known to be right, and all runs fail.

    Args:
        runs: the ended runs by their folders.
        by_seed: whether each seed has evaluation samples of its own.

    Returns:
        The same runs, the ones with other labels as failed runs with an error.
    """
    if by_seed:
        groups = [
            {r: f for r, f in runs.items() if f.seed == seed} for seed in {f.seed for f in runs.values()}
        ]
        checked = {run: found for group in groups for run, found in without_other_data(group).items()}
        return {run: checked[run] for run in runs}
    held = {run: found.labels.tobytes() for run, found in runs.items() if found.labels is not None}
    ranking = Counter(held.values()).most_common(2)
    if len(ranking) < 2:
        return dict(runs)
    common = ranking[0][0] if ranking[0][1] > ranking[1][1] else None
    checked = dict(runs)
    for run, labels in held.items():
        if labels != common:
            what = f"its {len(labels) // 8:,} labels are not those of the other runs"
            checked[run] = Run(runs[run].seed, error=str(_damaged(run, run.predictions, what)))
    return checked


_DAMAGE = (
    OSError, ValueError, OverflowError, TypeError, AttributeError, RecursionError, csv.Error, SafetensorError,
)  # fmt: skip


@contextmanager
def _reading(run: RunFolder, file: Path) -> Iterator[None]:
    """Context manager: an error of parsing or of values becomes one that names the file and the remedy."""
    try:
        yield
    except EwavitError:
        raise
    except _DAMAGE as problem:
        raise _damaged(run, file, "it is missing" if not file.exists() else first_line(problem)) from None


def _damaged(run: RunFolder, file: Path, what: str) -> EwavitError:
    return EwavitError(
        f"{file.name} is damaged: {what}; delete the run's folder {run.path} to train it again"
    )


def _table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; each has a value for every column."""
    text = regular(file).read_bytes().decode()
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has another number of values than the header")
    if rows and not text.endswith("\n"):
        raise ValueError("it ends within a row")
    return rows


def _point(run: RunFolder, row: Mapping[str, str], judge: Judge) -> Point:
    """A row of a summary, every value checked. Each task's loss is a cross-entropy, so none is negative."""
    return Point(
        epoch=_whole(row, "epoch", 0),
        images=_whole(row, "images" if row.get("images") else "clouds", 1),
        seconds=_number(row, "seconds", 0),
        train_loss=_number(row, "train_loss", 0),
        eval_loss=_number(row, f"{_weights(row)}_loss", 0),
        metric=_metric(run, row, judge),
        lr=_number(row, "lr", 0),
        share_rate=_number(row, "share_rate", 0, 1),
        spread={k.removeprefix(SPREAD): _number(row, k, 0) for k in row if k.startswith(SPREAD)},
        predicted_spread=_number(row, "predicted_spread", 0) if row.get("predicted_spread") else None,
        retained=_number(row, f"{_weights(row)}_retained", 0, 100)
        if row.get(f"{_weights(row)}_retained")
        else None,
    )


def _number(row: Mapping[str, str], column: str, lowest: float, highest: float = math.inf) -> float:
    """A finite number of a row, from `lowest` to `highest`."""
    where = f"in epoch {row['epoch']}" if column != "epoch" and "epoch" in row else "in a row"
    if column not in row:
        raise ValueError(f"it has no column {column}")
    try:
        value = float(row[column])
    except ValueError:
        raise ValueError(f"{column} is {row[column]!r} {where}, not a number") from None
    if not (math.isfinite(value) and lowest <= value <= highest):
        possible = f"{lowest:g} or more" if highest == math.inf else f"{lowest:g} to {highest:g}"
        raise ValueError(f"{column} is {row[column]} {where}, possible is {possible}")
    return value


def _whole(row: Mapping[str, str], column: str, lowest: int) -> int:
    value = _number(row, column, lowest)
    if not value.is_integer():
        raise ValueError(f"{column} is {row[column]}, not a whole number")
    return int(value)


def _check_curve(points: Sequence[Point], epochs: Sequence[int] | None) -> None:
    if not points:
        raise ValueError("it has no rows")
    for before, after in pairwise(points):
        if after.epoch <= before.epoch or after.images <= before.images or after.seconds < before.seconds:
            raise ValueError(f"epoch {after.epoch} follows epoch {before.epoch} without progress")
    found = [point.epoch for point in points]
    if epochs is not None and found != list(epochs):
        wrong = min(set(found) ^ set(epochs))
        there = f"has no row of epoch {wrong}" if wrong in epochs else f"has a row of epoch {wrong}"
        raise ValueError(f"it {there}; the run has {len(epochs)} evaluated epochs, the last is {epochs[-1]}")


Classes = npt.NDArray[np.int64]


def _predictions(run: RunFolder, judge: Judge) -> tuple[Classes | None, Classes | None]:
    """The labels and the predicted classes; None if the task writes no predictions."""
    with _reading(run, run.predictions):
        rows = _table(run.predictions)
        if not rows and judge.share_of_samples:
            raise ValueError("it has no rows")
        if not rows or (not judge.share_of_samples and "label" not in rows[0]):
            return None, None
        inputs = [row["input"] for row in rows if row.get("input", "").isdecimal()]
        if len(inputs) == len(rows) and inputs != [str(number) for number in range(len(rows))]:
            raise ValueError("its inputs are not numbered in order: rows are missing or there twice")
        columns = []
        for column in ("label", "prediction"):
            if column not in rows[0]:
                raise ValueError(f"it has no column {column}")
            columns.append(np.array([int(row[column]) for row in rows], dtype=np.int64))
    return columns[0], columns[1]


def _check_predictions(
    labels: Classes, predictions: Classes, classes: int | None, judge: Judge, metric: float
) -> None:
    highest = math.inf if classes is None else classes - 1
    for column, values in (("label", labels), ("prediction", predictions)):
        if wrong := [value for value in values.tolist() if not 0 <= value <= highest]:
            raise ValueError(f"{column} {wrong[0]} is out of range, the classes are 0 to {highest}")
    if not judge.share_of_samples:
        return
    right, samples = int(np.sum(labels == predictions)), len(labels)
    if abs(right - metric * samples / 100) > 0.5 + samples * UNSTEADY:
        raise ValueError(
            f"{right} of its {samples:,} predictions are right, that is {judge.text(100 * right / samples)}; "
            f"the summary's {judge.name} is {judge.text(metric)}"
        )


def _model_card(run: RunFolder, averaged: bool) -> tuple[int | None, float | None]:
    """The number of classes and the judging metric in the file of the deployed weights, if it says them."""
    file = run.average if averaged else run.model
    if not file.exists():
        return None, None
    with safe_open(regular(file), "np") as handle:
        card = json.loads((handle.metadata() or {}).get("ewavit", "{}"))
    classes = card.get("classes")
    return len(classes) if classes else None, card.get("metric")


def _weights(row: Mapping[str, str]) -> str:
    """Which weights of a run are judged, as the columns of its summary name them."""
    return "average" if "average_loss" in row else "eval"


def _metric(run: RunFolder, row: Mapping[str, str], judge: Judge) -> float:
    column = f"{_weights(row)}_{judge.column}"
    if not row.get(column):
        raise EwavitError(
            f"{run.summary} has no {column}: another version of ewavit wrote it; delete {run.path} and start "
            "the same command again"
        )
    return _number(row, column, *(judge.bounds or (-math.inf, math.inf)))
