"""The results of a comparison in a few lines of text."""

from __future__ import annotations

import math
from pathlib import Path

from ewavit.compare.differences import PairedDifference
from ewavit.compare.results import Comparison
from ewavit.compare.statistics import summarise
from ewavit.tasks.judge import Judge


def _gain(pair: PairedDifference, judge: Judge) -> str:
    """The difference and its interval as text, as far as the number of pairs gives them."""
    if len(pair.seeds) > 1:
        return f"{judge.signed(pair.mean)} [{', '.join(map(judge.signed, pair.interval))}]"
    return f"{judge.signed(pair.mean)}, no interval" if pair.seeds else "-"


def _loss(pair: PairedDifference) -> str:
    """The difference in loss and its interval, if it has one."""
    low, high = pair.loss.interval
    return "-" if math.isnan(low) else f"{pair.loss.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _p_text(p: float) -> str:
    """A p-value as text; never 0, which would claim more than any data can."""
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def as_text(comparison: Comparison, folder: Path) -> str:
    """The results in a few lines: a table, the runs that failed, the verdicts, and the path of the page."""
    summary, judge = summarise(comparison), comparison.judge
    pairs = {pair.arm: pair for pair in summary.against_reference}
    against = f"against {summary.reference} [95 %]"
    lines = [("arm", f"{judge.name}, mean ± sd", against, "loss [95 %]", "p (Holm)", "s/run")]
    for arm in summary.arms:
        pair = pairs.get(arm.name)
        gain, loss, p = (_gain(pair, judge), _loss(pair), _p_text(pair.holm_p)) if pair else ("", "", "")
        mean = (
            f"{arm.mean:.{judge.digits}f} ± {judge.text(arm.sd)}"
            if len(arm.seeds) > 1
            else judge.text(arm.mean)
        )
        lines.append(
            (
                arm.name,
                *(
                    (mean, gain, loss, p, "-" if math.isnan(arm.seconds) else f"{arm.seconds:.0f}")
                    if arm.seeds
                    else ("-",) * 5
                ),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in lines]
    text += comparison.choices
    failed = [(arm.name, seed, error) for arm in summary.arms for seed, error in arm.errors.items()]
    text += [f"failed: {name}, seed {seed}: {error}" for name, seed, error in failed]
    if failed:
        text.append("start the same command again to repeat what failed")
    methods = {arm.name for arm in summary.arms if arm.role == "method"}
    named = comparison.contrasts.named
    judged = [v.sentence for v in summary.verdicts if v.arm in methods or v.primary or named]
    return "\n".join(
        line.rstrip() for line in [*text, "", *judged, summary.sentence, str(folder / "report.html")]
    )
