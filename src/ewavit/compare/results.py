"""What a comparison holds: arms, their runs, and the points of a run's curve."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ewavit.compare.arms import Arm
from ewavit.compare.contrasts import Contrasts
from ewavit.compare.tuning import Choice
from ewavit.tasks.judge import Judge


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
    retained: float | None = None  # accuracy on the old task of --retain, of the same weights as `metric`


@dataclass(frozen=True)
class Run:
    """One arm at one seed. A run that failed has an error and no curve."""

    seed: int
    curve: tuple[Point, ...] = ()
    peak_memory_mib: float = float("nan")
    labels: npt.NDArray[np.int64] | None = None  # (samples,), of the evaluation set
    predictions: npt.NDArray[np.int64] | None = None  # (samples,), of the weights that `metric` is of
    samples: int | None = None  # evaluated; `metric` is the percentage of right ones; None: another metric
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
    """An arm's runs in the order of the seeds, its learning rate, and what it chose if it is tuned."""

    arm: Arm
    lr: float
    runs: tuple[Run, ...]
    choice: Choice | None = None


@dataclass(frozen=True)
class Comparison:
    """All arms of one comparison on the same seeds, and how it was made.

    `tuning`: one entry per tuning run: "arm", "tried" (settings), "fold" and, by the name of the judge's
    column, the metric on held-out training data.
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
    contrasts: Contrasts = field(default_factory=Contrasts)

    @property
    def limited(self) -> bool:
        """Whether it is a quick look: --limit is among the words of its command."""
        return re.search(r"\s--limit[= ]", self.command) is not None

    @property
    def choices(self) -> list[str]:
        """What the tuned arms chose, in words."""
        return [runs.choice.sentence(runs.arm.name) for runs in self.arms if runs.choice]

    @property
    def samples(self) -> int | None:
        """Number of evaluation samples; None if the judging metric is not a share of samples."""
        counts = [run.samples for arm in self.arms for run in arm.runs if run.samples is not None]
        return min(counts, default=None)
