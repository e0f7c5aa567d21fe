"""A comparison on a terminal: the table of its runs, and the results in a few lines."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.live import Live
from rich.table import Table

from ewavit.compare.results import Comparison, latest_metric
from ewavit.compare.work import Cell, Work
from ewavit.training.report import say
from ewavit.training.run_folder import RunFolder


class Screen:
    """One table of all runs on a terminal; elsewhere a line for each run that ends."""

    def __init__(self, cells: Sequence[Cell], work: Work) -> None:
        self._cells, self._work = cells, work
        self._judge = work.judge
        self._found = {cell.run: self._latest(cell) for cell in cells if cell.run.is_finished}
        self._live = Live(auto_refresh=False) if sys.stdout.isatty() and cells else None

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        elif self._cells:
            kind = "tuning runs" if self._cells[0].recipe.holdout != self._work.recipe.holdout else "runs"
            say(f"{self._work.folder}: {len(self._cells)} {kind}, {len(self._found)} finished")
        return self

    def __exit__(self, *problem: object) -> None:
        if self._live:
            self.show(())
            self._live.stop()

    def ended(self, cell: Cell) -> None:
        """Print how a run ended."""
        end = self._work.ends.get(cell.run)
        if end:
            what = f"failed: {end.error} ({cell.run.log})"
        else:
            self._found[cell.run] = self._latest(cell)
            what = f"{self._judge.name} {self._judge.text(self._found[cell.run])}"
        line = (
            f"{len(self._found)} of {len(self._cells)} finished: {cell.row}, seed {cell.recipe.seed}, {what}"
        )
        if self._live is None:
            say(line)
        elif end:
            self._live.console.print(line, markup=False, highlight=False)

    def show(self, running: Collection[RunFolder]) -> None:
        """Draw the table."""
        if self._live is None:
            return
        seeds = sorted({cell.recipe.seed for cell in self._cells})
        title = f"{self._work.folder.name}: {len(self._found)} of {len(self._cells)} runs"
        table = Table("arm", *(f"seed {seed}" for seed in seeds), title=title)
        rows: dict[str, dict[int, str]] = {}
        for cell in self._cells:
            rows.setdefault(cell.row, {})[cell.recipe.seed] = self._state(cell, cell.run in running)
        for name, states in rows.items():
            table.add_row(name, *(states[seed] for seed in seeds))
        self._live.update(table, refresh=True)

    def _state(self, cell: Cell, running: bool) -> str:
        if (found := self._found.get(cell.run)) is not None:
            return f"[green]{self._judge.text(found)}[/]"
        if cell.run in self._work.ends:
            return "[red]failed[/]"
        row = cell.run.last_row()
        if not running:
            return "begun" if row else "·"
        share = (int(float(row["epoch"])) + 1) / cell.recipe.epochs if row else 0.0
        return f"{share:4.0%}" + (f" [dim]{self._judge.text(self._latest(cell))}[/]" if row else "")

    def _latest(self, cell: Cell) -> float:
        return latest_metric(cell.run, self._judge)


def as_text(comparison: Comparison, folder: Path) -> str:
    """The results in a few lines: a table, the runs that failed, the verdicts, and the path of the page."""
    from ewavit.compare.statistics import summarise

    summary, judge = summarise(comparison), comparison.judge
    pairs = {pair.arm: pair for pair in summary.against_reference}
    lines = [("arm", f"{judge.name}, mean ± sd", f"against {summary.reference} [95 %]", "p (Holm)", "s/run")]
    for arm in summary.arms:
        pair = pairs.get(arm.name)
        gain = f"{pair.mean:+.2f} [{pair.interval[0]:+.2f}, {pair.interval[1]:+.2f}]" if pair else ""
        p = f"{pair.holm_p:.3f}" if pair else ""
        lines.append((arm.name, f"{arm.mean:.2f} ± {judge.text(arm.sd)}", gain, p, f"{arm.seconds:.0f}"))
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
