"""The statistics of a comparison: each arm, all differences, and the verdicts.

Pure functions from `Comparison` to numbers. Its judge is the metric that arms are compared by: it gives the
units and says whether a higher value is better.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from statsmodels.stats.multitest import multipletests

from ewavit.compare.contrasts import Contrast
from ewavit.compare.differences import (
    ALPHA,
    Interval,
    PairedDifference,
    finished,
    mean_of,
    paired_difference,
    step_of,
    t_interval,
)
from ewavit.compare.results import ArmRuns, Comparison, Run
from ewavit.compare.sentences import Verdict, closing, verdict_on
from ewavit.errors import EwavitError
from ewavit.tasks.judge import Judge


@dataclass(frozen=True)
class ArmStatistics:
    """One arm over its finished runs. A number that needs more runs than there are is nan.

    `time_to_reference` is the mean over the seeds that became as good as the reference is at its end
    (`reached` of the `paired` seeds); see the function of that name.
    """

    name: str
    role: str
    lr: float
    seeds: tuple[int, ...]  # of the finished runs
    mean: float  # of the judging metric, and so are sd and interval
    sd: float  # ddof = 1
    interval: Interval  # of the mean, Student's t
    seconds: float  # of training, mean
    images: float  # seen in training, mean
    peak_memory_mib: float  # mean
    time_to_reference: float
    reached: int
    paired: int
    errors: dict[int, str]  # by seed, of the failed runs


@dataclass(frozen=True)
class Summary:
    """The statistics of a comparison; see `summarise`."""

    reference: str  # as named, "dense", else the first control, else the first arm
    best_control: str | None
    arms: tuple[ArmStatistics, ...]
    against: dict[
        str, tuple[PairedDifference, ...]
    ]  # by reference: all other arms, in the comparison's order
    verdicts: tuple[Verdict, ...]  # the primary contrast first, then the named ones, or all but the reference
    setting: str  # what was compared, in words
    claim: str  # what came out, in words

    @property
    def against_reference(self) -> tuple[PairedDifference, ...]:
        """All other arms against the reference."""
        return self.against[self.reference]

    @property
    def against_best_control(self) -> tuple[PairedDifference, ...]:
        """All other arms against the best control; empty without a control."""
        return self.against[self.best_control] if self.best_control else ()

    @property
    def sentence(self) -> str:
        """The setting and the claim as one sentence."""
        return f"{self.setting}: {self.claim}"

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers that any JSON reader takes: nan is None."""
        clean: dict[str, Any] = _json(asdict(self))
        return clean


def summarise(comparison: Comparison) -> Summary:
    """Compute all statistics of a comparison.

    Unless its contrasts say otherwise, every arm is compared with dense, and methods also with the best
    control: the control with the best mean over the seeds that all controls finished. It is chosen on the
    same test data that it is then judged on, so its result is biased towards better: that is conservative for
    methods, and other controls look worse beside it than they are. For Holm's correction all arms against one
    reference are a family, or all named contrasts. A primary contrast is no part of it.

    Args:
        comparison: arms and their runs; failed and missing runs are left out pair by pair.

    Returns:
        The statistics, with verdicts in words.

    Raises:
        EwavitError: there is no arm, or two arms of a seed were evaluated on different data.
    """
    if not comparison.arms:
        raise EwavitError(
            f"comparison {comparison.name!r} has no arms; give at least one, as in --arms dense"
        )
    arms, judge = {runs.arm.name: runs for runs in comparison.arms}, comparison.judge
    reference, best = _reference(comparison), _best_control(comparison)
    against = {name: _holm(_pairs(comparison, runs)) for name, runs in arms.items()}
    primary, judged = _judged(comparison, against, reference, best)
    verdicts = [verdict_on(pairs, best, comparison) for pairs in judged]
    if primary:
        verdicts.insert(0, replace(verdict_on([primary], best, comparison), primary=True))
    setting, claim = closing(comparison, reference, best, verdicts)
    return Summary(
        reference=reference,
        best_control=best,
        arms=tuple(arm_statistics(runs, arms[reference], judge) for runs in comparison.arms),
        against=against,
        verdicts=tuple(verdicts),
        setting=setting,
        claim=claim,
    )


def _judged(
    comparison: Comparison,
    against: dict[str, tuple[PairedDifference, ...]],
    reference: str,
    best: str | None,
) -> tuple[PairedDifference | None, list[list[PairedDifference]]]:
    """The primary contrast, and for each other verdict its differences, the best control's first."""
    contrasts = comparison.contrasts

    def found(contrast: Contrast) -> PairedDifference:
        return next(pair for pair in against[contrast[1]] if pair.arm == contrast[0])

    primary = found(contrasts.primary) if contrasts.primary else None
    if primary is not None:
        primary = replace(primary, holm_p=primary.p_value)
    if contrasts.named:
        others = [found(contrast) for contrast in contrasts.all() if contrast != contrasts.primary]
        return primary, [[pair] for pair in _holm(others)]
    judged = []
    for pair in against[reference]:
        if contrasts.primary == (pair.arm, reference):
            continue
        both = _role(comparison, pair.arm) == "method" and best not in (None, reference, pair.arm)
        harder = found((pair.arm, best)) if both and best and not contrasts.reference else None
        judged.append([harder, pair] if harder else [pair])  # the best control is harder to beat
    return primary, judged


def _role(comparison: Comparison, arm: str) -> str:
    return next(runs.arm.role for runs in comparison.arms if runs.arm.name == arm)


def arm_statistics(runs: ArmRuns, reference: ArmRuns, judge: Judge) -> ArmStatistics:
    """The metric and the cost of one arm; times are relative to the reference's run of the same seed."""
    done, others = finished(runs), finished(reference)
    metric = [run.metric for run in done.values()]
    times = [time_to_reference(done[seed], others[seed], judge) for seed in done if seed in others]
    reached = [time for time in times if time is not None]
    return ArmStatistics(
        name=runs.arm.name,
        role=runs.arm.role,
        lr=runs.lr,
        seeds=tuple(done),
        mean=mean_of(metric),
        sd=float(np.std(metric, ddof=1)) if len(metric) > 1 else math.nan,
        interval=t_interval(metric, step_of(list(done.values())) or 0.0),
        seconds=mean_of([run.curve[-1].seconds for run in done.values()]),
        images=mean_of([run.curve[-1].images for run in done.values()]),
        peak_memory_mib=mean_of([run.peak_memory_mib for run in done.values()]),
        time_to_reference=mean_of(reached),
        reached=len(reached),
        paired=len(times),
        errors={run.seed: run.error for run in runs.runs if run.error is not None},
    )


def time_to_reference(run: Run, reference: Run, judge: Judge) -> float | None:
    """How long a run takes to become as good as the reference is at its end, as a share of its training.

    Returns:
        The images or clouds seen up to the first evaluated epoch that is at least as good, not interpolated;
        1 stands for all that the reference saw. None if no epoch is as good.
    """
    total, end = reference.curve[-1].images, judge.sign * reference.metric
    return next((point.images / total for point in run.curve if judge.sign * point.metric >= end), None)


def _reference(comparison: Comparison) -> str:
    arms = [runs.arm for runs in comparison.arms]
    names = [arm.name for arm in arms]
    if comparison.contrasts.reference in names:
        return str(comparison.contrasts.reference)
    return "dense" if "dense" in names else next((a.name for a in arms if a.role == "control"), names[0])


def _best_control(comparison: Comparison) -> str | None:
    controls = {r.arm.name: finished(r) for r in comparison.arms if r.arm.role == "control" and finished(r)}
    if not controls:
        return None
    common = set.intersection(*(set(runs) for runs in controls.values()))

    def mean(name: str) -> float:
        # No common seed: each by what it has.
        return mean_of([run.metric for seed, run in controls[name].items() if seed in common or not common])

    return max(controls, key=lambda name: comparison.judge.sign * mean(name))


def _pairs(comparison: Comparison, reference: ArmRuns) -> list[PairedDifference]:
    """All other arms against one reference."""
    rounding = comparison.judge.rounding
    others = (runs for runs in comparison.arms if runs is not reference)
    return [paired_difference(runs, reference, rounding) for runs in others]


def _holm(pairs: list[PairedDifference]) -> tuple[PairedDifference, ...]:
    """The same differences, Holm-corrected together."""
    testable = [pair for pair in pairs if not math.isnan(pair.p_value)]
    if not testable:
        return tuple(pairs)
    corrected = multipletests([pair.p_value for pair in testable], ALPHA, "holm")[1].tolist()
    holm = {id(pair): p for pair, p in zip(testable, corrected, strict=True)}
    return tuple(replace(pair, holm_p=holm.get(id(pair), math.nan)) for pair in pairs)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
