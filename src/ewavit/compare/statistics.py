"""What a comparison says: paired differences with intervals, p-values, costs, and a verdict in plain words.

Pure functions from `Comparison` to numbers. Its judge is the metric that arms are compared by: it gives the
units and says whether a higher value is better. Arms are compared seed by seed, because the noise of a seed
(initial weights, data order) is common to all of them.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from ewavit.compare.contrasts import Contrast
from ewavit.compare.results import ArmRuns, Comparison, Run
from ewavit.errors import EwavitError
from ewavit.tasks.judge import Judge

ALPHA = 0.05  # all intervals are 95 %
POWER = 0.8
MOST_SEEDS = 1000  # beyond this "how many seeds would tell" has no practical answer
RESAMPLES = 9999  # sign flips: all of them up to 13 pairs, a seeded sample beyond
EQUAL_SEEDS = math.ceil(1 - math.log2(ALPHA))  # of equal differences: the smallest n with 2 / 2^n <= ALPHA
FEWEST_SEEDS = 4  # below it a standard deviation is too uncertain to say "how many seeds would tell"
DECIMALS = 9  # of a difference: finer differences are rounding of the subtraction
ROUNDING = 2e-4  # metrics are written with four decimals: so much may equal differences differ by
LEAST_P = sys.float_info.min  # where a p-value is too small for a float

Interval = tuple[float, float]
Outcome = Literal["helps", "hurts", "untold"]


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


@dataclass(frozen=True)
class Verdict:
    """What is known about one arm.

    `outcomes` judges it against each reference by the 95 % interval of the difference. `outcome` is "helps"
    if all of them are, "hurts" if one of them is, else "untold".
    """

    arm: str
    outcome: Outcome
    outcomes: dict[str, Outcome]  # by reference, the best control first
    survives_correction: bool  # the Holm-corrected p-values of what could be told are at most 0.05 too
    seeds_needed: int | None  # where untold, as in PairedDifference
    would_tell: str  # the same in words; empty unless untold
    sentence: str
    primary: bool = False  # named before the runs, and judged alone


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
    verdicts = [_verdict(pairs, best, comparison) for pairs in judged]
    if primary:
        verdicts.insert(0, replace(_verdict([primary], best, comparison), primary=True))
    setting, claim = _closing(comparison, reference, best, verdicts)
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
        mean=_mean(metric),
        sd=float(np.std(metric, ddof=1)) if len(metric) > 1 else math.nan,
        interval=t_interval(metric, _step(list(done.values())) or 0.0),
        seconds=_mean([run.curve[-1].seconds for run in done.values()]),
        images=_mean([run.curve[-1].images for run in done.values()]),
        peak_memory_mib=_mean([run.peak_memory_mib for run in done.values()]),
        time_to_reference=_mean(reached),
        reached=len(reached),
        paired=len(times),
        errors={run.seed: run.error for run in runs.runs if run.error is not None},
    )


def finished(runs: ArmRuns) -> dict[int, Run]:
    """The runs that came to their end, by seed."""
    return {run.seed: run for run in runs.runs if run.error is None and run.curve}


def time_to_reference(run: Run, reference: Run, judge: Judge) -> float | None:
    """How long a run takes to become as good as the reference is at its end, as a share of its training.

    Returns:
        The images or clouds seen up to the first evaluated epoch that is at least as good, not interpolated;
        1 stands for all that the reference saw. None if no epoch is as good.
    """
    total, end = reference.curve[-1].images, judge.sign * reference.metric
    return next((point.images / total for point in run.curve if judge.sign * point.metric >= end), None)


def paired_difference(runs: ArmRuns, reference: ArmRuns) -> PairedDifference:
    """Compare two arms over the seeds that both finished; `holm_p` is that of this pair alone.

    Raises:
        EwavitError: the arms were evaluated on different data.
    """
    ours, theirs = finished(runs), finished(reference)
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    our_metric, their_metric = np.array([[a.metric, b.metric] for a, b in pairs]).reshape(-1, 2).T
    step = _step([run for pair in pairs for run in pair])
    differences = our_metric - their_metric
    # Metrics are written with four decimals, which makes equal differences unequal: whole steps are equal.
    steps = np.round(differences / step) * step if step else differences
    differences = np.round(steps, DECIMALS) + 0.0  # no -0
    test = _paired_test(differences, step or 0.0)
    losses = [a.curve[-1].eval_loss - b.curve[-1].eval_loss for a, b in pairs]
    loss = np.round(np.array(losses), DECIMALS) + 0.0
    of_loss = _paired_test(loss, 0.0)
    return PairedDifference(
        arm=runs.arm.name,
        reference=reference.arm.name,
        seeds=tuple(a.seed for a, _ in pairs),
        differences=tuple(differences.tolist()),
        mean=_mean(differences.tolist()),
        step=step,
        coarse=test.coarse,
        interval=test.interval,
        p_value=test.p_value,
        permutation_p=test.permutation_p,
        holm_p=test.p_value,
        mcnemar=_mcnemar(pairs, runs.arm.name, reference.arm.name),
        seeds_needed=test.seeds_needed,
        loss=LossDifference(tuple(loss.tolist()), _mean(loss.tolist()), of_loss.interval, of_loss.p_value),
    )


def t_interval(values: list[float], step: float = 0.0) -> Interval:
    """95 % interval of the mean by Student's t; nan for fewer than two values.

    Args:
        values: of a metric, one per seed.
        step: of the metric, see `standard_error`.
    """
    if len(values) < 2:
        return (math.nan, math.nan)
    mean, half = _mean(values), _quantile(len(values)) * standard_error(values, step)
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


def _step(runs: list[Run]) -> float | None:
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


def _paired_test(differences: npt.NDArray[np.float64], step: float) -> _PairedTest:
    """The paired t-test, which leaves differences that lie within one step to the sign-flip test."""
    values = differences.tolist()
    if len(values) < 2 or not np.isfinite(differences).all():
        return _PairedTest()
    mean, sd = _mean(values), float(np.std(differences, ddof=1))
    flips = _sign_flip_p(np.round(differences / step) if step else differences)
    error = standard_error(values, step, roundings=2)
    half = _quantile(len(values)) * error
    p = float(2 * special.stdtr(len(values) - 1, -abs(mean) / error)) if error else 0.0
    coarse = step > 0 and error > (1 + 1e-9) * sd / math.sqrt(len(values))
    sd = max(sd, step / math.sqrt(6))
    needed = seeds_needed(mean, sd if step or np.ptp(differences) else 0.0)
    if float(np.ptp(differences)) <= max(step, ROUNDING) * (1 + 1e-6):  # the spread does not show
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
        return _mean([run.metric for seed, run in controls[name].items() if seed in common or not common])

    return max(controls, key=lambda name: comparison.judge.sign * mean(name))


def _pairs(comparison: Comparison, reference: ArmRuns) -> list[PairedDifference]:
    """All other arms against one reference."""
    return [paired_difference(runs, reference) for runs in comparison.arms if runs is not reference]


def _holm(pairs: list[PairedDifference]) -> tuple[PairedDifference, ...]:
    """The same differences, Holm-corrected together."""
    testable = [pair for pair in pairs if not math.isnan(pair.p_value)]
    if not testable:
        return tuple(pairs)
    corrected = multipletests([pair.p_value for pair in testable], ALPHA, "holm")[1].tolist()
    holm = {id(pair): p for pair, p in zip(testable, corrected, strict=True)}
    return tuple(replace(pair, holm_p=holm.get(id(pair), math.nan)) for pair in pairs)


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


def _outcome(pair: PairedDifference, judge: Judge) -> Outcome:
    low, high = sorted(judge.sign * bound for bound in pair.interval)
    if pair.p_value <= ALPHA:  # says the same as the interval
        return "helps" if low > 0 else "hurts" if high < 0 else "untold"
    return "untold"


def _verdict(pairs: list[PairedDifference], best: str | None, comparison: Comparison) -> Verdict:
    """Judge one arm; `pairs` has the best control first and the reference last."""
    judge, arm = comparison.judge, pairs[0].arm
    outcomes = {pair.reference: _outcome(pair, judge) for pair in pairs}
    found = set(outcomes.values())
    outcome: Outcome = "hurts" if "hurts" in found else "untold" if "untold" in found else "helps"
    names = [pair.reference + (", the best control" if pair.reference == best else "") for pair in pairs]
    numbers = ", and ".join(_numbers(pair, name, judge) for pair, name in zip(pairs, names, strict=True))
    untold = [pair for pair in pairs if outcomes[pair.reference] == "untold"]
    told = [pair.holm_p for pair in pairs if outcomes[pair.reference] != "untold"]
    corrected = max(told, default=math.nan)
    needed, would_tell = _would_tell(untold, judge) if outcome == "untold" else (None, "")
    fewest = _seeds(min(len(pair.seeds) for pair in pairs))
    claim = _claim(arm, outcomes) if told else f"Whether {arm} helps cannot be told with {fewest}"
    sentence = f"{claim}: {numbers}"
    if coarse := next((pair.step for pair in pairs if pair.coarse and pair.step), None):
        unit = judge.difference_unit
        sentence += f"; one of the {round(100 / coarse):,} {comparison.kind} is {coarse:.2f} {unit}".rstrip()
    if would_tell:
        sentence += f"; {would_tell}"
    if corrected > ALPHA:
        sentence += f"; a hint, not proof: corrected for the number of arms (Holm) p is {corrected:.2g}"
    return Verdict(arm, outcome, outcomes, corrected <= ALPHA, needed, would_tell, sentence + ".")


def _claim(subject: str, outcomes: dict[str, Outcome], many: bool = False) -> str:
    """What is known of one arm, or of many; `outcomes` as in Verdict."""
    s, be = ("", "are") if many else ("s", "is")
    found = set(outcomes.values())
    if found == {"untold"}:
        return f"whether {subject} help{s} cannot be told"
    if len(found) == 1:
        return f"{subject} {'help' if found == {'helps'} else 'hurt'}{s}"
    verbs = {"helps": f"help{s} against", "hurts": f"{be} worse than", "untold": "cannot be told from"}
    return f"{subject} " + " but ".join(f"{verbs[outcomes[other]]} {other}" for other in reversed(outcomes))


def _numbers(pair: PairedDifference, name: str, judge: Judge) -> str:
    if not pair.seeds:
        return f"no seed finished by both it and {name}"
    low, high = pair.interval
    interval = f"95 % interval {low:+.2f} to {high:+.2f}" if len(pair.seeds) > 1 else "no interval"
    difference = f"{pair.mean:+.2f} {judge.difference_unit}".rstrip()
    return f"{difference} against {name} ({interval}, {_seeds(len(pair.seeds))}{_loss(pair)})"


def _loss(pair: PairedDifference) -> str:
    """The second outcome in words, where there is one."""
    (low, high), loss = pair.loss.interval, pair.loss
    if math.isnan(low) or not any(loss.differences):
        return ""
    kind = "untold" if loss.p_value > ALPHA else "lower" if high < 0 else "higher"
    return f"; loss {loss.mean:+.3f}, {low:+.3f} to {high:+.3f}, {kind}"


def _would_tell(pairs: list[PairedDifference], judge: Judge) -> tuple[int | None, str]:
    """How many seeds would settle all of these, as a number where there is one, and in words."""
    if any(len(pair.seeds) < 2 for pair in pairs):
        return None, "an interval needs at least 2 seeds that both arms finished"
    if not any(any(pair.differences) for pair in pairs):
        return None, f"the {judge.name} is the same at every seed"
    if any(len(pair.seeds) < FEWEST_SEEDS for pair in pairs):
        return None, f"at least {FEWEST_SEEDS} seeds are needed to estimate how many would tell"
    hardest = max(pairs, key=lambda pair: pair.seeds_needed or math.inf)
    difference = f"a difference of the size found against {hardest.reference}"
    if hardest.seeds_needed is None:
        return None, f"more than {MOST_SEEDS:,} seeds would be needed to tell {difference}"
    return hardest.seeds_needed, f"about {hardest.seeds_needed} seeds would tell {difference}"


def _closing(
    comparison: Comparison, reference: str, best: str | None, verdicts: list[Verdict]
) -> tuple[str, str]:
    """What was compared, and what came out."""
    contrasts = comparison.contrasts
    where = f"{'A quick look (--limit): on' if comparison.limited else 'On'} {comparison.data}"
    where += f" with {_seeds(len(comparison.seeds))}"
    if contrasts.named:
        where += ", by named contrasts"
    elif best and best != reference and not contrasts.reference:
        where += f", against {reference} and the best control, {best}"
    else:
        where += f", against {reference}"
    parts = [f"primary contrast: {_named_claim(verdict)}" for verdict in verdicts if verdict.primary]
    methods = {runs.arm.name for runs in comparison.arms if runs.arm.role == "method"}
    others = [v for v in verdicts if not v.primary and (v.arm in methods or contrasts.named)]
    if not others and not parts:
        return where, "no method was judged."
    if contrasts.named:
        parts += map(_named_claim, others)
    else:
        for outcomes in sorted({tuple(v.outcomes.values()) for v in others}):
            alike = [v for v in others if tuple(v.outcomes.values()) == outcomes]
            parts.append(_claim(_names(alike), alike[0].outcomes, len(alike) > 1))
    if waiting := [v for v in verdicts if v.would_tell and (v.primary or v in others)]:
        soonest = min(waiting, key=lambda v: v.seeds_needed or math.inf)
        parts.append(f"for {soonest.arm} {soonest.would_tell}")
    return where, f"{'; '.join(parts)}."


def _named_claim(verdict: Verdict) -> str:
    """What is known of one named contrast."""
    (reference, outcome), hint = next(iter(verdict.outcomes.items())), ""
    if outcome == "untold":
        return f"whether {verdict.arm} helps against {reference} cannot be told"
    if not verdict.survives_correction:
        hint = " (a hint)"
    return f"{verdict.arm}{hint} {'helps against' if outcome == 'helps' else 'is worse than'} {reference}"


def _names(verdicts: list[Verdict]) -> str:
    """a, b and c; what was told but not after the correction for many arms is marked."""
    hints = [set(v.outcomes.values()) != {"untold"} and not v.survives_correction for v in verdicts]
    names = [v.arm + (" (a hint)" if hint else "") for v, hint in zip(verdicts, hints, strict=True)]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def _mean(values: list[float]) -> float:
    if not values:
        return math.nan
    if len(set(values)) == 1:
        return values[0]  # numpy's may be a rounding beside it
    mean = float(np.mean(values))
    return 0.0 if abs(mean) < 10.0**-DECIMALS else mean


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
