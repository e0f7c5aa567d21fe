"""`ewavit compare --pilot`: from a few runs, what a comparison will cost and how many seeds it needs.

The pilot trains two arms at three seeds, in a folder of its own: what is compared may change after it. It
reports how much their difference varies and not the difference: three seeds decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.power import TTestPower

from ewavit.compare.arms import Arm, arm_recipe, plain_name
from ewavit.compare.contrasts import Contrasts
from ewavit.compare.differences import ALPHA, MOST_SEEDS, POWER, paired_difference, seeds_needed
from ewavit.compare.results import Comparison
from ewavit.compare.tuning import HOLDOUT, Grids
from ewavit.errors import EwavitError
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder

SEEDS = 3
SURE = 0.8  # the bound of a spread that so few seeds show (Browne 1995, doi.org/10.1002/sim.4780141709)


@dataclass(frozen=True)
class Plan:
    """What is to be compared.

    Attributes:
        recipe, arms, grids, contrasts: as of `compare`.
        seeds: how many of each arm.
        jobs: runs at a time.
        detect: difference that is to be told, in the unit of the judging metric.
    """

    recipe: Recipe
    arms: Sequence[Arm]
    grids: Grids
    contrasts: Contrasts
    seeds: int
    jobs: int
    detect: float

    def __post_init__(self) -> None:
        if not 0 < self.detect < math.inf:
            raise EwavitError(f"--pilot {self.detect} is no difference to tell: give one above 0, e.g. 0.5")

    @property
    def pair(self) -> tuple[Arm, Arm]:
        """An arm and its reference, both without tuning; those of the first named contrast, if any."""
        arms = {arm.name: arm for arm in self.arms}
        if contrasts := self.contrasts.all():
            one, other = (arms[name] for name in contrasts[0])
        else:
            other = arms[self.contrasts.reference or "dense"]
            others = [arm for arm in self.arms if plain_name(arm.name) != plain_name(other.name)]
            if not others:
                raise EwavitError("--pilot needs two arms that differ in more than their tuning: add one")
            one = next((arm for arm in others if arm.role == "method"), others[0])
        one, other = (replace(arm, name=plain_name(arm.name), tuned=False) for arm in (one, other))
        if one == other:
            raise EwavitError(
                f"--pilot needs two arms, and {one.name} is judged against its tuned self: leave it out"
            )
        return one, other

    def pilot(self) -> tuple[Recipe, tuple[Arm, Arm], Contrasts, int]:
        """The recipe, the arms, the contrasts and the number of seeds of the pilot."""
        name = self.recipe.name and f"{self.recipe.name}-pilot"
        return replace(self.recipe, name=name), self.pair, Contrasts(self.pair[1].name), SEEDS


@dataclass(frozen=True)
class Forecast:
    """What a comparison will cost and tell, from a pilot.

    `sd` and `loss_sd` are those of the paired difference in the judging metric and in the loss, `sd_bound` is
    above the first one with 80 % certainty. `seeds_to_tell` tell `detect` at 80 % power, `safe_seeds` with a
    spread of `sd_bound`; None: more than MOST_SEEDS. `told` is what the planned seeds tell.
    """

    arms: tuple[str, str]
    pilot_seeds: int
    runs: int
    tuning_runs: int
    seconds_per_run: float
    hours: float
    jobs: int
    sd: float
    sd_bound: float
    loss_sd: float
    detect: float
    seeds: int
    seeds_to_tell: int | None
    safe_seeds: int | None
    told: float
    unit: str

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        unit, (one, other) = f" {self.unit}".rstrip(), self.arms
        pilot = f"pilot: {one} and {other}, {self.pilot_seeds} seeds"
        tuning = f", {self.tuning_runs} of them tuning" if self.tuning_runs else ""
        to_tell, safe = (
            f"more than {MOST_SEEDS:,}" if n is None else f"about {n:,}"
            for n in (self.seeds_to_tell, self.safe_seeds)
        )
        took = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{60 * self.hours:.0f} minutes"
        return (
            f"{pilot}\ncost: {self.runs} runs{tuning}, {self.seconds_per_run:.0f} s each, {self.jobs} at a "
            f"time: {took}\nspread: the difference has a standard deviation of {self.sd:.2f}{unit} over "
            f"seeds, below {self.sd_bound:.2f} with {SURE:.0%} certainty; that in loss {self.loss_sd:.3f}\n"
            f"seeds: {to_tell} would tell {self.detect:g}{unit}, {safe} to be on the safe side; the "
            f"{self.seeds} planned would tell {self.told:.2f}{unit}"
        )


def forecast(plan: Plan, pilot: Comparison) -> Forecast:
    """What a comparison will cost and tell.

    Args:
        plan: what is to be compared.
        pilot: the comparison of `plan.pair`, trained.

    Raises:
        EwavitError: fewer than two seeds were finished by both arms.
    """
    one, other = plan.pair
    runs = {each.arm.name: each for each in pilot.arms}
    pair = paired_difference(runs[one.name], runs[other.name])
    if len(pair.seeds) < 2:
        errors = [run.error for each in pilot.arms for run in each.runs if run.error]
        raise EwavitError(f"--pilot needs two seeds that both arms finished: {(errors or ['none ended'])[0]}")
    sd = max(_sd(pair.differences), (pair.step or 0.0) / math.sqrt(6))
    bound = sd * math.sqrt((len(pair.seeds) - 1) / stats.chi2.ppf(1 - SURE, len(pair.seeds) - 1))
    final, tuning = _costs(plan, pilot)
    total = sum(final) + sum(tuning)
    effect = TTestPower().solve_power(None, plan.seeds, ALPHA / 2, POWER, alternative="larger")
    return Forecast(
        arms=(one.name, other.name),
        pilot_seeds=len(pair.seeds),
        runs=len(final) + len(tuning),
        tuning_runs=len(tuning),
        seconds_per_run=total / (len(final) + len(tuning)),
        hours=total / plan.jobs / 3600,
        jobs=plan.jobs,
        sd=sd,
        sd_bound=bound,
        loss_sd=_sd(pair.loss.differences),
        detect=plan.detect,
        seeds=plan.seeds,
        seeds_to_tell=seeds_needed(plan.detect, sd),
        safe_seeds=seeds_needed(plan.detect, bound),
        told=float(effect) * sd,
        unit=pilot.judge.difference_unit,
    )


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1))


def _costs(plan: Plan, pilot: Comparison) -> tuple[list[float], list[float]]:
    """Seconds of every run of the comparison, and of every tuning run with all folds."""
    by_role = {  # of an epoch
        arm.role: _seconds(plan, arm, pilot) / arm_recipe(plan.recipe, arm).epochs for arm in plan.pair
    }
    usual = max(by_role.values())
    final, tuning = [], []
    folds = replace(plan.recipe, holdout=plan.recipe.holdout or HOLDOUT, test_on_rest=False).folds
    for arm in plan.arms:
        for tried in plan.grids.candidates(arm) if arm.tuned else ():
            epochs = arm_recipe(plan.recipe, arm, **tried).epochs
            tuning += [epochs * by_role.get(arm.role, usual)] * folds
        final += [arm_recipe(plan.recipe, arm).epochs * by_role.get(arm.role, usual)] * plan.seeds
    return final, tuning


def _seconds(plan: Plan, arm: Arm, pilot: Comparison) -> float:
    """Seconds from the first to the last file of a run, median over the seeds."""
    found = []
    for seed in pilot.seeds:
        run = RunFolder(Path(plan.recipe.output) / pilot.name / "runs" / f"{arm.name}-{seed}")
        if run.is_finished:
            found.append(run.model.stat().st_mtime - run.args.stat().st_mtime)
    return median(found)
