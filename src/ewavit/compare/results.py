"""What a comparison holds: the runs of its arms, and what a run's folder says."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ewavit.compare.arms import Arm
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
    top1: float  # percent, of the weights that count: the average if the run keeps one
    lr: float
    share_rate: float
    spread: dict[str, float]  # by layer; empty for dense runs
    predicted_spread: float | None  # mean over layers, by theory.py


@dataclass(frozen=True)
class Run:
    """One arm at one seed. A run that failed has an error and no curve."""

    seed: int
    curve: tuple[Point, ...] = ()
    peak_memory_mib: float = float("nan")
    labels: npt.NDArray[np.int64] | None = None  # (images,), of the evaluation set
    predictions: npt.NDArray[np.int64] | None = None  # (images,), of the final weights that count
    error: str | None = None

    @property
    def top1(self) -> float:
        """Final accuracy in percent."""
        return self.curve[-1].top1

    @property
    def mean_class(self) -> float | None:
        """Mean over the classes of their final accuracy, in percent; None without predictions."""
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

    `tuning`: one entry per tuning run, {"arm", "lr", "seed", "top1"} on held-out training images.
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
    kind: str = "images"  # what the data are, in one word
    tuning: tuple[dict[str, Any], ...] = ()
    limited: bool = False  # a quick look: --limit was given


def read_run(run: RunFolder, seed: int) -> Run:
    """What a finished run's folder says."""
    points = []
    peak = float("nan")
    with run.summary.open() as handle:
        for row in csv.DictReader(handle):
            average = row.get("average_top1")
            loss = row.get("average_loss") if average else row["eval_loss"]
            predicted = row.get("predicted_spread")
            points.append(
                Point(
                    epoch=int(float(row["epoch"])),
                    images=int(float(row.get("images") or row["clouds"])),
                    seconds=float(row["seconds"]),
                    train_loss=float(row["train_loss"]),
                    eval_loss=float(loss or "nan"),
                    top1=float(average or row["eval_top1"]),
                    lr=float(row["lr"]),
                    share_rate=float(row["share_rate"]),
                    spread={k.removeprefix(SPREAD): float(v) for k, v in row.items() if k.startswith(SPREAD)},
                    predicted_spread=float(predicted) if predicted else None,
                )
            )
            peak = float(row["peak_memory_mib"])
    rows = run.predictions.read_text().split()[1:]
    if not rows:  # of part segmentation
        return Run(seed, tuple(points), peak)
    table = np.loadtxt(rows, delimiter=",", dtype=np.int64, ndmin=2)
    return Run(seed, tuple(points), peak, labels=table[:, 0], predictions=table[:, 1])


def top1(run: RunFolder) -> float:
    """The latest accuracy of a run that has one, in percent, as `read_run` takes it."""
    row = run.last_row()
    assert row is not None
    return float(row.get("average_top1") or row["eval_top1"])
