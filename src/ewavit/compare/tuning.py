"""Tuned arms: NAME-lr and NAME-tuned choose settings by cross-validation over the training images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ewavit.compare.arms import LR, Arm, arm_recipe, check_names
from ewavit.errors import EwavitError
from ewavit.tasks.judge import Judge
from ewavit.training.recipe import Recipe, kinds
from ewavit.training.setting import flag

HOLDOUT = 0.2  # of the training images in each fold, unless the recipe holds out a share of its own
FIRST_FOLDS = 2  # all folds follow where these have fewer held-out predictions than ENOUGH
ENOUGH = 500  # with fewer, the difference of two accuracies has a standard error of about 2 points

Settings = dict[str, Any]  # what one candidate overrides


@dataclass(frozen=True)
class Choice:
    """What a tuned arm chose.

    Attributes:
        settings: the best candidate.
        candidates: how many were tried, each in every fold.
        folds: parts of the training images that were held out, one after the other.
        readings: held-out predictions of each candidate, over all folds; None if the metric is no share.
    """

    settings: Settings
    candidates: int
    folds: int
    readings: int | None

    def sentence(self, arm: str) -> str:
        """What the arm chose, and what the choice rests on."""
        by = "" if self.readings is None else f"{self.readings:,} readings on held-out data in "
        few = ""
        if self.readings is not None and self.readings < ENOUGH:
            few = f"; fewer than {ENOUGH} are little to choose by"
        chosen = f"{words(self.settings)}, the best of {self.candidates}"
        return f"{arm} chose {chosen} by {by}{self.folds} fold{'s' * (self.folds != 1)}{few}"


@dataclass(frozen=True)
class Grids:
    """What tuned arms choose from, the same candidates for each of them.

    Attributes:
        lrs: learning rates, for NAME-lr.
        grid: values by setting, for NAME-tuned: all combinations are tried.
    """

    lrs: tuple[float, ...] = ()
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, lrs: Iterable[float], grid: Iterable[str]) -> Grids:
        """Grids from learning rates and texts like "drop_path=0,0.2".

        Raises:
            EwavitError: a text is no setting with numbers, or a setting is there twice.
        """
        found: dict[str, tuple[float, ...]] = {}
        for text in grid:
            name, _, values = text.partition("=")
            name = name.strip().replace("-", "_")
            check_names(f"--grid {text}", [name])
            if kinds()[name] not in (int, float):
                raise EwavitError(f"--grid {text}: --{flag(name)} is no number, and a grid holds numbers")
            if name in found:
                raise EwavitError(f"--grid {text}: {name} is there twice, give all its values at once")
            found[name] = tuple(sorted({_number(value, text) for value in values.split(",")}))
        return cls(tuple(sorted(set(lrs))), found)

    def candidates(self, arm: Arm) -> list[Settings]:
        """What a tuned arm tries, from the smallest values to the largest."""
        grid = {"lr": self.lrs} if arm.name.endswith(LR) else self.grid
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def check(self, recipe: Recipe, arms: Iterable[Arm]) -> None:
        """Check that each tuned arm has something to choose from, and that its recipe takes it.

        Raises:
            EwavitError: a grid is missing, searches what the arm sets, or has a value out of range.
        """
        if wrong := [lr for lr in self.lrs if not 0 < lr < math.inf]:
            raise EwavitError(f"--lrs {wrong[0]} does not work: choose positive numbers")
        for arm in (arm for arm in arms if arm.tuned):
            by_rate = arm.name.endswith(LR)
            if not (self.lrs if by_rate else self.grid):
                give = (
                    "--lrs, e.g. 5e-4,1e-3,2e-3" if by_rate else "--grid, e.g. lr=5e-4,1e-3 drop_path=0,0.2"
                )
                what = "its learning rate" if by_rate else "its settings"
                raise EwavitError(f"arm {arm.name!r} chooses {what}: give {give}")
            if fixed := [name for name in self.grid if name in arm.overrides and not by_rate]:
                raise EwavitError(
                    f"arm {arm.name!r} sets {fixed[0]}, which --grid searches: leave out one of them"
                )
            for candidate in self.candidates(arm):
                arm_recipe(recipe, arm, **candidate)


def _number(value: str, text: str) -> float:
    try:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(value)
    except ValueError:
        raise EwavitError(
            f"--grid {text} is no setting with numbers: write NAME=X,X, e.g. drop_path=0,0.2"
        ) from None
    return int(number) if number.is_integer() else number


def words(settings: Settings) -> str:
    """Settings as text, e.g. "lr 0.001, drop_path 0.2"."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def best(scores: Sequence[Sequence[float | None]], judge: Judge) -> int | None:
    """The number of the candidate with the best mean score, the first one of equals.

    Args:
        scores: the judging metric in each fold, by candidate; None for a run that diverged.
        judge: it says whether higher is better.

    Returns:
        The number, or None if runs of all candidates diverged.
    """
    means = {}
    for number, found in enumerate(scores):
        known = [score for score in found if score is not None]
        if len(known) == len(found):
            means[number] = judge.sign * sum(known) / len(known)
    return max(means, key=means.__getitem__, default=None)
