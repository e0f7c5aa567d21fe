"""Runs that other programs trained: from tables and logs to a `Comparison`.

A source is `TABLE:COLUMN`, a CSV file with the columns arm and seed, or `PATTERN:COLUMN`, where {arm} and
{seed} stand in the path of each run's log. Logs are read as timm, transformers and Lightning write them, and
TensorBoard's events. Nothing here needs torch.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ewavit.compare.arms import Arm
from ewavit.compare.contrasts import Contrasts
from ewavit.compare.results import ArmRuns, Comparison, Point, Run
from ewavit.errors import EwavitError
from ewavit.files import regular
from ewavit.tasks.judge import Judge

Row = Mapping[str, Any]
LOSSES = ("loss", "eval_loss", "val_loss", "valid_loss", "test_loss")  # names of the second outcome
STEPS = ("step", "epoch")  # names of the place in a run
LOWER = re.compile(r"loss|err|perplexity|nll|mse|mae", re.I)  # names that may mean: lower is better


@dataclass(frozen=True)
class Source:
    """Where the runs are, and the column of their metric."""

    path: str  # of a table, or with {arm} and {seed} in it
    column: str

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read `PATH:COLUMN`.

        Raises:
            EwavitError: no column, or one of {arm} and {seed} without the other.
        """
        path, colon, column = text.rpartition(":")
        if not (path and colon and column):
            raise EwavitError(f"--from {text} names no metric: write PATH:COLUMN, e.g. table.csv:accuracy")
        if ("{arm}" in path) != ("{seed}" in path):
            raise EwavitError(f"--from {text} has only one of {{arm}} and {{seed}}: give both, or a table")
        return cls(os.path.normpath(path), column)

    @property
    def is_table(self) -> bool:
        """Whether one file holds all runs."""
        return "{arm}" not in self.path

    def logs(self) -> Iterator[tuple[str, int, Path]]:
        """Each log that fits the path, in the order of the names: arm, seed, and file or folder."""
        parts = re.split(r"(\{arm\}|\{seed\}|\*)", self.path)
        groups = {"{arm}": r"(?P<arm>[^/]+?)", "{seed}": r"(?P<seed>\d+)", "*": "[^/]*"}
        seen: set[str] = set()
        words = []
        for part in parts:
            group = groups.get(part, re.escape(part))
            words.append(f"(?P={part[1:-1]})" if part in seen and part != "*" else group)
            seen.add(part)
        fits = re.compile("".join(words))
        start = Path(self.path[: self.path.index("{")].rpartition("/")[0] or ".")
        pattern = "".join("*" if part in groups else escape(part) for part in parts)
        place = Path("/") if self.path.startswith("/") else Path()
        if not start.is_dir():
            raise EwavitError(f"--from {self.path}: there is no folder {start}: repair the path")
        for found in sorted(place.glob(pattern.lstrip("/"))):
            if match := fits.fullmatch(str(found)):
                yield match["arm"], int(match["seed"]), found


def judge_of(column: str, values: Sequence[float], lower_is_better: bool | None) -> Judge:
    """The judge of a metric that is known by its column alone.

    Args:
        column: the name of the metric.
        values: all of its values; they say how many digits are shown, and how finely they were written.
        lower_is_better: None where the name tells.

    Raises:
        EwavitError: the name may mean that a lower value is better, and nobody said so.
    """
    if lower_is_better is None and LOWER.search(column):
        raise EwavitError(
            f"is a lower {column} better? say --lower-is-better, or --no-lower-is-better if it is worse"
        )
    largest = max(map(abs, values), default=0.0)
    digits = 2 if largest == 0 else min(8, max(2, 3 - math.floor(math.log10(largest))))
    decimals = max(
        (-int(Decimal(repr(value)).normalize().as_tuple().exponent) for value in values), default=0
    )
    return Judge(
        column,
        column,
        unit="",
        difference_unit="",
        higher_is_better=not lower_is_better,
        digits=digits,
        rounding=2 * 10.0 ** -max(0, decimals),
    )


def read_comparison(
    source: Source,
    *,
    name: str,
    command: str,
    contrasts: Contrasts | None = None,
    lower_is_better: bool | None = None,
) -> Comparison:
    """The comparison of runs that exist.

    The reference is the arm that `contrasts` names, else "dense" or "baseline", else the first arm.

    Args:
        source: where the runs are.
        name: of the comparison.
        command: the command that is quoted in the results.
        contrasts: what is judged against what; unless given, all arms against the reference.
        lower_is_better: of the metric; None where its name tells.

    Returns:
        The comparison; a run without a finite value of the metric has an error.

    Raises:
        EwavitError: a file that cannot be read, a missing column, a run that is there twice, or fewer than
            two arms.
    """
    logs = _from_table(source) if source.is_table else _from_logs(source)
    runs = {key: _run(key[1], rows, source.column) for key, rows in logs.items()}
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    if len(arms) < 2:
        found = f"only the arm {arms[0]!r}" if arms else "no run"
        raise EwavitError(f"--from {source.path} has {found}: a comparison needs two arms or more")
    contrasts = contrasts or Contrasts()
    if not (contrasts.reference or contrasts.named):
        usual = (each for each in ("dense", "baseline") if each in arms)
        contrasts = replace(contrasts, reference=next(usual, arms[0]))
    contrasts.check(arms)
    found_arms = [
        ArmRuns(
            Arm(arm, {}, "control" if arm == contrasts.reference else "method"),
            math.nan,
            tuple(run for (of, _), run in sorted(runs.items(), key=lambda item: item[0][1]) if of == arm),
        )
        for arm in arms
    ]
    values = [point.metric for run in runs.values() for point in run.curve]
    return Comparison(
        name=name,
        command=command,
        date=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
        device="",
        versions={"python": ".".join(map(str, sys.version_info[:3]))},
        data=f"the runs of {source.path}",
        recipe={},
        seeds=tuple(sorted({seed for _, seed in runs})),
        arms=tuple(found_arms),
        judge=judge_of(source.column, values, lower_is_better),
        kind="steps",
        contrasts=contrasts,
    )


def _from_table(source: Source) -> dict[tuple[str, int], list[Row]]:
    """The rows of each run in one table."""
    file = Path(source.path)
    found: dict[tuple[str, int], list[Row]] = {}
    for number, row in enumerate(_csv(file), 2):
        for column in ("arm", "seed", source.column):
            if row.get(column) is None:
                raise EwavitError(f"{file}, line {number}, has no {column}: the table needs that column")
        if not (seed := str(row["seed"]).strip()).isdecimal():
            raise EwavitError(f"{file}, line {number}: the seed {seed!r} is no whole number")
        rows = found.setdefault((str(row["arm"]).strip(), int(seed)), [])
        if rows and not any(row.get(step) for step in STEPS):
            raise EwavitError(
                f"{file}, line {number}: arm {row['arm']}, seed {seed} is there twice: leave one out, or add "
                "a column step"
            )
        rows.append({**row, "predictions": file.parent / p} if (p := row.get("predictions")) else row)
    return found


def _from_logs(source: Source) -> dict[tuple[str, int], list[Row]]:
    """The rows of each run, from a log of its own."""
    found: dict[tuple[str, int], list[Row]] = {}
    for arm, seed, file in source.logs():
        if (arm, seed) in found:
            raise EwavitError(f"{file} is a second log of arm {arm}, seed {seed}: leave one out")
        found[arm, seed] = list(_log(file, source.column))
    if not found:
        raise EwavitError(f"--from {source.path} fits no file: repair the path")
    return found


def _log(file: Path, column: str) -> Iterable[Row]:
    """The rows of a log in which the column has a value."""
    if file.is_dir() or "tfevents" in file.name:
        return _events(file, column)
    rows = _trainer_state(file) if file.suffix == ".json" else list(_csv(file))
    if not any(column in row for row in rows):
        known = sorted({str(name) for row in rows for name in row if name is not None})
        raise EwavitError(f"{file} has no column {column}: choose from {', '.join(known) or 'none'}")
    return [row for row in rows if row.get(column) not in (None, "")]


def _csv(file: Path) -> Iterator[Row]:
    try:
        with regular(file).open(newline="", encoding="utf-8-sig") as stream:
            yield from csv.DictReader(stream)
    except (OSError, ValueError, csv.Error) as problem:
        raise EwavitError(f"{file} cannot be read as CSV ({problem})") from None


def _trainer_state(file: Path) -> list[Row]:
    """The log in transformers' trainer_state.json."""
    try:
        rows = json.loads(regular(file).read_text("utf-8"))["log_history"]
        if not all(isinstance(row, dict) for row in rows):
            raise TypeError("log_history is no list of entries")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise EwavitError(f"{file} is no trainer_state.json of transformers ({problem!r})") from None
    return list(rows)


def _events(folder: Path, column: str) -> Iterator[Row]:
    """A scalar of TensorBoard's event files, with the losses beside it."""
    if find_spec("tensorboard") is None:
        raise EwavitError(f"{folder} holds events of TensorBoard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]
    if column not in known:
        raise EwavitError(f"{folder} has no scalar {column}: choose from {', '.join(known) or 'none'}")
    losses = {loss: {e.step: e.value for e in events.Scalars(loss)} for loss in LOSSES if loss in known}
    values = events.Scalars(column)
    for each in values:
        beside = {loss: steps[each.step] for loss, steps in losses.items() if each.step in steps}
        yield {
            column: each.value, "step": each.step, "seconds": each.wall_time - values[0].wall_time, **beside,
        }  # fmt: skip


def _run(seed: int, rows: Sequence[Row], column: str) -> Run:
    """A run from its rows; the last row of a step counts, because a resumed run writes it again."""
    step = next((name for name in STEPS if any(row.get(name) not in (None, "") for row in rows)), None)
    places = {_number(row, step) if step else 0.0: row for row in rows}
    if any(math.isnan(place) for place in places):
        return Run(seed, error=f"a {step} is no number")
    first = min(places, default=0.0)
    curve = []
    for epoch, place in enumerate(sorted(places)):
        row = places[place]
        if not math.isfinite(metric := _number(row, column)):
            return Run(seed, error=f"{column} is {row.get(column)!r}, which is no finite number")
        loss = next((_number(row, name) for name in LOSSES if name in row and name != column), math.nan)
        curve.append(
            Point(
                epoch=epoch,
                images=round(place) + (first <= 0),
                seconds=_number(row, "seconds"),
                train_loss=math.nan,
                eval_loss=loss,
                metric=metric,
                lr=math.nan,
                share_rate=math.nan,
                spread={},
                predicted_spread=None,
            )
        )
    if not curve:
        return Run(seed, error=f"no row has a value of {column}")
    labels, predictions = _predictions(places[max(places)].get("predictions"))
    return Run(seed, tuple(curve), labels=labels, predictions=predictions)


def _number(row: Row, column: str) -> float:
    """A number of a row; nan where there is none."""
    try:
        return float(row[column])
    except (KeyError, TypeError, ValueError, OverflowError):
        return math.nan


def _predictions(
    file: Path | None,
) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None]:
    """The labels and predictions in a CSV file with these columns: `label` and `prediction`, as numbers."""
    if file is None:
        return None, None
    rows = list(_csv(file))
    try:
        labels, predictions = ([int(row[name]) for row in rows] for name in ("label", "prediction"))
        return np.array(labels, dtype=np.int64), np.array(predictions, dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise EwavitError(f"{file} needs the columns label and prediction, with whole numbers") from None
