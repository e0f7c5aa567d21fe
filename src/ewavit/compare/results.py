"""What a comparison holds: the runs of its arms, which are read from the runs' folders."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ewavit.compare.arms import Arm
from ewavit.errors import EwavitError
from ewavit.tasks.judge import Judge
from ewavit.training.run_folder import RunFolder

SPREAD = "spread/"  # columns of summary.csv that begin so are the spread of one layer


@dataclass(frozen=True)
class Point:
    """One evaluated epoch of a run; `images` and `seconds` count from the start of training."""

    epoch: int
    images: int
    seconds: float
    train_loss: float
    eval_loss: float
    metric: float  # in the judge's unit; of the averaged weights if the run keeps an average
    lr: float
    share_rate: float
    spread: dict[str, float]  # by layer; empty for dense runs
    predicted_spread: float | None  # by theory, mean over layers


@dataclass(frozen=True)
class Run:
    """One arm at one seed. A run that failed has an error and no curve."""

    seed: int
    curve: tuple[Point, ...] = ()
    peak_memory_mib: float = float("nan")
    labels: npt.NDArray[np.int64] | None = None  # (samples,), of the evaluation set
    predictions: npt.NDArray[np.int64] | None = None  # (samples,), of the weights that `metric` is of
    error: str | None = None

    @property
    def metric(self) -> float:
        """The judging metric at the end of training."""
        return self.curve[-1].metric

    @property
    def mean_class(self) -> float | None:
        """The mean of the classes' shares of right predictions, in percent; None without predictions."""
        if self.labels is None or self.predictions is None:
            return None
        right = self.predictions == self.labels
        return 100 * float(np.mean([right[self.labels == label].mean() for label in np.unique(self.labels)]))


@dataclass(frozen=True)
class ArmRuns:
    """An arm's runs in the order of the seeds, and its learning rate."""

    arm: Arm
    lr: float
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Comparison:
    """All arms of one comparison on the same seeds, and how it was made.

    `tuning`: one entry per tuning run: "arm", "lr", "seed" and, by the name of the judge's column, the metric
    on held-out training data.
    """

    name: str
    command: str
    date: str
    device: str
    versions: dict[str, str]
    data: str
    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    arms: tuple[ArmRuns, ...]
    judge: Judge
    kind: str = "images"  # the samples of the data, in one word
    tuning: tuple[dict[str, Any], ...] = ()
    limited: bool = False  # a quick look: --limit was given


def read_run(run: RunFolder, seed: int, judge: Judge) -> Run:
    """Read a finished run from its folder.

    Raises:
        EwavitError: its summary has no column of the judge.
    """
    points = []
    peak = float("nan")
    with run.summary.open(newline="") as handle:
        for row in csv.DictReader(handle):
            predicted = row.get("predicted_spread")
            points.append(
                Point(
                    epoch=int(float(row["epoch"])),
                    images=int(float(row.get("images") or row["clouds"])),
                    seconds=float(row["seconds"]),
                    train_loss=float(row["train_loss"]),
                    eval_loss=float(row[f"{_weights(row)}_loss"] or "nan"),
                    metric=_metric(run, row, judge),
                    lr=float(row["lr"]),
                    share_rate=float(row["share_rate"]),
                    spread={k.removeprefix(SPREAD): float(v) for k, v in row.items() if k.startswith(SPREAD)},
                    predicted_spread=float(predicted) if predicted else None,
                )
            )
            peak = float(row["peak_memory_mib"])
    rows = run.predictions.read_text().split()[1:]
    if not rows:  # the task keeps none
        return Run(seed, tuple(points), peak)
    table = np.loadtxt(rows, delimiter=",", dtype=np.int64, ndmin=2)
    return Run(seed, tuple(points), peak, labels=table[:, 0], predictions=table[:, 1])


def latest_metric(run: RunFolder, judge: Judge) -> float:
    """The judging metric in the last row of a run's summary, of the same weights as in `read_run`.

    Raises:
        EwavitError: the summary has no row, or no column of the judge.
    """
    return _metric(run, run.last_row() or {}, judge)


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
    return float(row[column])
