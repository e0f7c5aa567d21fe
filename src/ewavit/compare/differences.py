"""The difference of two arms, seed by seed: mean, interval, p-values, and how many seeds would tell it.

Arms are compared seed by seed, because the noise of a seed (initial weights, data order) is common to all of
them.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower

from ewavit.compare.results import ArmRuns, Run
from ewavit.errors import EwavitError
from ewavit.tasks.judge import ROUNDING

ALPHA = 0.05  # all intervals are 95 %
POWER = 0.8
MOST_SEEDS = 1000  # beyond this "how many seeds would tell" has no practical answer
RESAMPLES = 9999  # sign flips: all of them up to 13 pairs, a seeded sample beyond
EQUAL_SEEDS = math.ceil(1 - math.log2(ALPHA))  # of equal differences: the smallest n with 2 / 2^n <= ALPHA
FEWEST_SEEDS = 4  # below it a standard deviation is too uncertain to say "how many seeds would tell"
DECIMALS = 9  # of a difference: finer differences are rounding of the subtraction
LEAST_P = sys.float_info.min  # where a p-value is too small for a float

Interval = tuple[float, float]


@dataclass(frozen=True)
class McNemar:
    """How many samples only one of two arms got right, pooled over the paired seeds, with the exact p-value.

    The seeds share their test samples, so the pooled predictions are not independent: the p-value is about
    these trained models, not about training them again, and tends to be too small. No verdict rests on it.
    """

    only_arm: int
    only_reference: int
    p_value: float


@dataclass(frozen=True)
class LossDifference:
    """The second outcome: the evaluation loss of an arm minus a reference's, over the same seeds.

    A loss has no steps and less noise: it needs fewer seeds than the metric. Lower is better.
    """

    differences: tuple[float, ...]
    mean: float
    interval: Interval  # Student's t
    p_value: float  # paired t-test


@dataclass(frozen=True)
class PairedDifference:
    """The judging metric of an arm minus a reference's, over the seeds that both finished.

    With fewer than two pairs the interval and the p-values are nan. The interval and `p_value` follow from
    `standard_error`, with the step of the metric. Differences within one step of each other do not show their
    spread, and a few equal differences are no proof: `p_value` is then at least the permutation test's, and
    if it is above 0.05 the interval includes zero.
    """

    arm: str
    reference: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    step: float | None  # of the metric; None: not known
    coarse: bool  # the step, not the spread of the differences, makes the interval or `p_value`
    interval: Interval  # Student's t
    p_value: float  # paired t-test
    permutation_p: float  # sign flips; exact up to 13 pairs
    holm_p: float  # the t-test's, corrected over all arms against this reference, or all named contrasts
    mcnemar: McNemar | None  # None where predictions are missing
    seeds_needed: int | None  # see `seeds_needed`; None: more than MOST_SEEDS, or under FEWEST_SEEDS pairs
    loss: LossDifference


def paired_difference(runs: ArmRuns, reference: ArmRuns, rounding: float = ROUNDING) -> PairedDifference:
    """Compare two arms over the seeds that both finished; `holm_p` is that of this pair alone.

    Args:
        runs: of the arm.
        reference: runs of the other arm.
        rounding: of the metric, as in `Judge`.

    Raises:
        EwavitError: the arms were evaluated on different data.
    """
    ours, theirs = finished(runs), finished(reference)
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    our_metric, their_metric = np.array([[a.metric, b.metric] for a, b in pairs]).reshape(-1, 2).T
    step = step_of([run for pair in pairs for run in pair])
    differences = our_metric - their_metric
    # Metrics are written with four decimals, which makes equal differences unequal: whole steps are equal.
    steps = np.round(differences / step) * step if step else differences
    differences = np.round(steps, DECIMALS) + 0.0  # no -0
    test = _paired_test(differences, step or 0.0, rounding)
    losses = [a.curve[-1].eval_loss - b.curve[-1].eval_loss for a, b in pairs]
    loss = np.round(np.array(losses), DECIMALS) + 0.0
    of_loss = _paired_test(loss, 0.0)
    return PairedDifference(
        arm=runs.arm.name,
        reference=reference.arm.name,
        seeds=tuple(a.seed for a, _ in pairs),
        differences=tuple(differences.tolist()),
        mean=mean_of(differences.tolist()),
        step=step,
        coarse=test.coarse,
        interval=test.interval,
        p_value=test.p_value,
        permutation_p=test.permutation_p,
        holm_p=test.p_value,
        mcnemar=_mcnemar(pairs, runs.arm.name, reference.arm.name),
        seeds_needed=test.seeds_needed,
        loss=LossDifference(tuple(loss.tolist()), mean_of(loss.tolist()), of_loss.interval, of_loss.p_value),
    )


def finished(runs: ArmRuns) -> dict[int, Run]:
    """The runs that came to their end, by seed."""
    return {run.seed: run for run in runs.runs if run.error is None and run.curve}


def t_interval(values: list[float], step: float = 0.0) -> Interval:
    """95 % interval of the mean by Student's t; nan for fewer than two values.

    Args:
        values: of a metric, one per seed.
        step: of the metric, see `standard_error`.
    """
    if len(values) < 2:
        return (math.nan, math.nan)
    mean, half = mean_of(values), _quantile(len(values)) * standard_error(values, step)
    return (mean - half, mean + half)


def standard_error(values: list[float], step: float = 0.0, *, roundings: int = 1) -> float:
    """The standard error of a mean of values that come in steps.

    A value known to a step has at least the standard deviation of its rounding, step / sqrt(12) (Guide to the
    Expression of Uncertainty in Measurement, JCGM 100:2008, F.2.2.1), and step / sqrt(6) if it is a
    difference of two. The 95 % interval is at least one step wide.

    Args:
        values: two or more.
        step: 0 for a metric without steps.
        roundings: how many rounded values each value is made of, 2 for differences.
    """
    sd = 0.0 if np.ptp(values) == 0 else float(np.std(values, ddof=1))  # numpy's may be a rounding above 0
    floor = step * math.sqrt(roundings / 12)
    return max(max(sd, floor) / math.sqrt(len(values)), step / 2 / _quantile(len(values)))


def _quantile(seeds: int) -> float:
    """Of Student's t for a 95 % interval."""
    return float(special.stdtrit(seeds - 1, 1 - ALPHA / 2))


def step_of(runs: list[Run]) -> float | None:
    """The coarsest step of the runs' metrics: 100 / samples, None where they are no share of samples."""
    return max((100 / run.samples for run in runs if run.samples), default=None)


@dataclass(frozen=True)
class _PairedTest:
    """What the differences of the seeds say; the names are those of `PairedDifference`."""

    interval: Interval = (math.nan, math.nan)
    p_value: float = math.nan
    permutation_p: float = math.nan
    seeds_needed: int | None = None
    coarse: bool = False


def _paired_test(
    differences: npt.NDArray[np.float64], step: float, rounding: float = ROUNDING
) -> _PairedTest:
    """The paired t-test, which leaves differences that lie within one step to the sign-flip test."""
    values = differences.tolist()
    if len(values) < 2 or not np.isfinite(differences).all():
        return _PairedTest()
    mean, sd = mean_of(values), float(np.std(differences, ddof=1))
    flips = _sign_flip_p(np.round(differences / step) if step else differences)
    error = standard_error(values, step, roundings=2)
    half = _quantile(len(values)) * error
    p = float(2 * special.stdtr(len(values) - 1, -abs(mean) / error)) if error else 0.0
    coarse = step > 0 and error > (1 + 1e-9) * sd / math.sqrt(len(values))
    sd = max(sd, step / math.sqrt(6))
    needed = seeds_needed(mean, sd if step or np.ptp(differences) else 0.0)
    if float(np.ptp(differences)) <= max(step, rounding) * (1 + 1e-6):  # the spread does not show
        coarse = step > 0 and bool(differences.any())
        p = max(p, flips)
        if p > ALPHA:
            half = max(half, abs(mean))
        if needed is not None:
            needed = max(needed, EQUAL_SEEDS)
    return _PairedTest(
        interval=(mean - half, mean + half),
        p_value=max(p, LEAST_P),
        permutation_p=flips,
        seeds_needed=needed if len(values) >= FEWEST_SEEDS else None,
        coarse=coarse,
    )


def seeds_needed(mean: float, sd: float) -> int | None:
    """The smallest number of seeds that would tell a true difference of `mean` from none.

    To tell: 80 % power of the two-sided paired t-test at 5 % for differences of standard deviation `sd`. With
    sd = 0, where t says nothing, as many equal differences as make the sign-flip test significant.

    Returns:
        The number of seeds, or None if it is above MOST_SEEDS.
    """
    if mean == 0:
        return None
    if sd == 0:
        return EQUAL_SEEDS

    def power(seeds: int) -> float:
        # One tail: at 80 % power the other one is nothing, and scipy's far tail is nan.
        return float(TTestPower().power(abs(mean) / sd, seeds, ALPHA / 2, alternative="larger"))

    enough = bisect_left(range(MOST_SEEDS + 1), POWER, lo=2, key=power)
    return enough if enough <= MOST_SEEDS else None


def _sign_flip_p(differences: npt.NDArray[np.float64]) -> float:
    """Two-sided permutation test of paired samples: under no difference either sign was equally likely."""
    test = stats.permutation_test(
        (differences,),
        lambda flipped, axis: np.round(np.sum(flipped, axis), DECIMALS),  # so that ties are ties
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(0),
    )
    return float(test.pvalue)


def _mcnemar(pairs: list[tuple[Run, Run]], arm: str, reference: str) -> McNemar | None:
    only_arm = only_reference = pooled = 0
    for ours, theirs in pairs:
        if ours.labels is None or theirs.labels is None:
            continue  # a run keeps labels and predictions, or neither
        if not np.array_equal(ours.labels, theirs.labels):
            raise EwavitError(
                f"{arm} and {reference} were evaluated on different data at seed {ours.seed}; "
                "delete these two runs' folders and start the comparison again"
            )
        right, wanted = ours.predictions == ours.labels, theirs.predictions == theirs.labels
        only_arm += int(np.sum(right & ~wanted))
        only_reference += int(np.sum(~right & wanted))
        pooled += 1
    if not pooled:
        return None
    # The binomial is exact at any size, and cheap.
    p = mcnemar([[0, only_arm], [only_reference, 0]], exact=True).pvalue
    return McNemar(only_arm, only_reference, max(float(p), LEAST_P))


def mean_of(values: list[float]) -> float:
    """The mean, exactly 0 where it is nothing but rounding; nan of no values."""
    if not values:
        return math.nan
    if len(set(values)) == 1:
        return values[0]  # numpy's may be a rounding beside it
    mean = float(np.mean(values))
    return 0.0 if abs(mean) < 10.0**-DECIMALS else mean
