"""What a comparison says in words: a verdict on each arm, and one sentence on all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ewavit.compare.differences import ALPHA, FEWEST_SEEDS, MOST_SEEDS, PairedDifference
from ewavit.compare.results import Comparison
from ewavit.tasks.judge import Judge

Outcome = Literal["helps", "hurts", "untold"]


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


def _outcome(pair: PairedDifference, judge: Judge) -> Outcome:
    low, high = sorted(judge.sign * bound for bound in pair.interval)
    if pair.p_value <= ALPHA:  # says the same as the interval
        return "helps" if low > 0 else "hurts" if high < 0 else "untold"
    return "untold"


def verdict_on(pairs: list[PairedDifference], best: str | None, comparison: Comparison) -> Verdict:
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
    interval = (
        f"95 % interval {judge.signed(low)} to {judge.signed(high)}" if len(pair.seeds) > 1 else "no interval"
    )
    difference = f"{judge.signed(pair.mean)} {judge.difference_unit}".rstrip()
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


def closing(
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
