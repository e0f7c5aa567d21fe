"""The picture of a comparison with `--retain`: the new task against the old one."""

from __future__ import annotations

import io
from statistics import fmean

from ewavit.compare.results import Comparison


def two_axes(comparison: Comparison) -> str | None:
    """An SVG with a mark for each arm (mean over seeds) and a dot for each seed; None without `--retain`."""
    found = {
        runs.arm.name: [
            (run.curve[-1].retained, run.curve[-1].metric)
            for run in runs.runs
            if run.curve and run.curve[-1].retained is not None
        ]
        for runs in comparison.arms
    }
    found = {name: pairs for name, pairs in found.items() if pairs}
    if not found:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4.8), layout="constrained")
    for number, (name, pairs) in enumerate(found.items()):
        old, new = zip(*pairs, strict=True)
        axis.scatter(old, new, s=10, alpha=0.5, color=f"C{number % 10}")
        mean = fmean(old), fmean(new)
        axis.scatter(*mean, s=60, color=f"C{number % 10}", marker="os^Dv"[number // 10 % 5])
        axis.annotate(name, mean, xytext=(6, 4), textcoords="offset points", fontsize=9)
    axis.set_xlabel("old task: nearest-neighbour accuracy of the features, %")
    axis.set_ylabel(f"new task: {comparison.judge.name}, {comparison.judge.unit}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()
