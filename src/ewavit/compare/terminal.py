"""What a comparison shows on a terminal: a table of its runs, and the results in a few lines."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.live import Live
from rich.table import Table

from ewavit.compare.results import (
    Comparison,
    top1,
)
from ewavit.compare.work import _Cell, _Work
from ewavit.training.report import say
from ewavit.training.run_folder import RunFolder


class _Progress:
    """One table of all runs on a terminal; elsewhere a line for each run that ends."""

    def __init__(self, cells: Sequence[_Cell], work: _Work) -> None:
        self._cells, self._work = cells, work
        self._top1 = {cell.run: top1(cell.run) for cell in cells if cell.run.is_finished}
        self._live = Live(auto_refresh=False) if sys.stdout.isatty() and cells else None

    def __enter__(self) -> _Progress:
        if self._live:
            self._live.start()
        elif self._cells:
            kind = "tuning runs" if self._cells[0].recipe.holdout != self._work.recipe.holdout else "runs"
            say(f"{self._work.folder}: {len(self._cells)} {kind}, {len(self._top1)} finished")
        return self

    def __exit__(self, *problem: object) -> None:
        if self._live:
            self.show(())
            self._live.stop()

    def ended(self, cell: _Cell) -> None:
        """Say how a run ended."""
        if error := self._work.errors.get(cell.run):
            what = f"failed: {error} ({cell.run.log})"
        else:
            self._top1[cell.run] = top1(cell.run)
            what = f"top-1 {self._top1[cell.run]:.2f} %"
        line = (
            f"{len(self._top1)} of {len(self._cells)} finished: {cell.row}, seed {cell.recipe.seed}, {what}"
        )
        if self._live is None:
            say(line)
        elif error:
            self._live.console.print(line, markup=False, highlight=False)

    def show(self, running: Collection[RunFolder]) -> None:
        """Draw the table."""
        if self._live is None:
            return
        seeds = sorted({cell.recipe.seed for cell in self._cells})
        title = f"{self._work.folder.name}: {len(self._top1)} of {len(self._cells)} runs"
        table = Table("arm", *(f"seed {seed}" for seed in seeds), title=title)
        rows: dict[str, dict[int, str]] = {}
        for cell in self._cells:
            rows.setdefault(cell.row, {})[cell.recipe.seed] = self._state(cell, cell.run in running)
        for name, states in rows.items():
            table.add_row(name, *(states[seed] for seed in seeds))
        self._live.update(table, refresh=True)

    def _state(self, cell: _Cell, running: bool) -> str:
        if (found := self._top1.get(cell.run)) is not None:
            return f"[green]{found:.2f} %[/]"
        if cell.run in self._work.errors:
            return "[red]failed[/]"
        row = cell.run.last_row()
        if not running:
            return "begun" if row else "·"
        share = (int(float(row["epoch"])) + 1) / cell.recipe.epochs if row else 0.0
        return f"{share:4.0%}" + (f" [dim]{top1(cell.run):.2f} %[/]" if row else "")


def as_text(comparison: Comparison, folder: Path) -> str:
    """The results in a few lines: a table, what failed, what it means, and where the rest is."""
    from ewavit.compare.statistics import summarise

    summary = summarise(comparison)
    pairs = {pair.arm: pair for pair in summary.against_reference}
    lines = [("arm", "top-1, mean ± sd", f"against {summary.reference} [95 %]", "p (Holm)", "s/run")]
    for arm in summary.arms:
        pair = pairs.get(arm.name)
        gain = f"{pair.mean:+.2f} [{pair.interval[0]:+.2f}, {pair.interval[1]:+.2f}]" if pair else ""
        p = f"{pair.holm_p:.3f}" if pair else ""
        lines.append((arm.name, f"{arm.mean:.2f} ± {arm.sd:.2f} %", gain, p, f"{arm.seconds:.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in lines]
    failed = [(arm.name, seed, error) for arm in summary.arms for seed, error in arm.errors.items()]
    text += [f"failed: {name}, seed {seed}: {error}" for name, seed, error in failed]
    if failed:
        text.append("start the same command again to repeat what failed")
    methods = {arm.name for arm in summary.arms if arm.role == "method"}
    judged = [verdict.sentence for verdict in summary.verdicts if verdict.arm in methods]
    return "\n".join(
        line.rstrip() for line in [*text, "", *judged, summary.sentence, str(folder / "report.html")]
    )
