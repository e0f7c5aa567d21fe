"""A comparison on a terminal: the table of its runs, and the results in a few lines."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table

from ewavit.compare.results import Comparison, Run, latest_metric
from ewavit.compare.work import Cell, Work
from ewavit.training.report import say
from ewavit.training.run_folder import RunFolder

if TYPE_CHECKING:
    from ewavit.compare.differences import PairedDifference


class Screen:
    """One table of all runs on a terminal; elsewhere a line for each run that ends."""

    def __init__(self, cells: Sequence[Cell], work: Work) -> None:
        self._cells, self._work = cells, work
        self._judge = work.judge
        self._found: dict[RunFolder, Run] = {}
        for cell in cells:
            self._look(cell)
        self._live = Live(auto_refresh=False) if sys.stdout.isatty() and cells else None

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        elif self._cells:
            kind = "tuning runs" if self._cells[0].tried else "runs"
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
            found = self._look(cell)
            what = found.error or f"{self._judge.name} {self._judge.text(found.metric)}"
        line = f"{len(self._found)} of {len(self._cells)} finished: {cell.row}, {cell.column}, {what}"
        if self._live is None:
            say(line)
        elif end:
            self._live.console.print(line, markup=False, highlight=False)

    def show(self, running: Collection[RunFolder]) -> None:
        """Draw the table."""
        if self._live is None:
            return
        columns = list(dict.fromkeys(cell.column for cell in self._cells))
        title = f"{self._work.folder.name}: {len(self._found)} of {len(self._cells)} runs"
        table = Table("arm", *columns, title=title)
        rows: dict[str, dict[str, str]] = {}
        for cell in self._cells:
            rows.setdefault(cell.row, {})[cell.column] = self._state(cell, cell.run in running)
        for name, states in rows.items():
            table.add_row(name, *(states.get(column, "") for column in columns))
        self._live.update(table, refresh=True)

    def _state(self, cell: Cell, running: bool) -> str:
        if (found := self._found.get(cell.run)) is not None:
            return "[red]damaged[/]" if found.error else f"[green]{self._judge.text(found.metric)}[/]"
        if cell.run in self._work.ends:
            return "[red]failed[/]"
        row = cell.run.last_row()
        if not running:
            return "begun" if row else "·"
        share, latest = 0.0, ""
        with suppress(
            KeyError, ValueError, TypeError, OverflowError
        ):  # a damaged summary, which the run will write again
            if row:
                share = (int(float(row["epoch"])) + 1) / cell.recipe.epochs
                latest = f" [dim]{self._judge.text(latest_metric(cell.run, self._judge))}[/]"
        return f"{share:4.0%}{latest}"

    def _look(self, cell: Cell) -> Run:
        """Read a run; keep it if it is finished."""
        if found := self._work.found(cell):
            self._found[cell.run] = found
        return found or Run(cell.recipe.seed, error="not finished")


def _gain(pair: PairedDifference) -> str:
    """The difference and its interval as text, as far as the number of pairs gives them."""
    if len(pair.seeds) > 1:
        return f"{pair.mean:+.2f} [{pair.interval[0]:+.2f}, {pair.interval[1]:+.2f}]"
    return f"{pair.mean:+.2f}, no interval" if pair.seeds else "-"


def _loss(pair: PairedDifference) -> str:
    """The difference in loss and its interval, if it has one."""
    low, high = pair.loss.interval
    return "-" if math.isnan(low) else f"{pair.loss.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _p_text(p: float) -> str:
    """A p-value as text; never 0, which would claim more than any data can."""
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def as_text(comparison: Comparison, folder: Path) -> str:
    """The results in a few lines: a table, the runs that failed, the verdicts, and the path of the page."""
    from ewavit.compare.statistics import summarise

    summary, judge = summarise(comparison), comparison.judge
    pairs = {pair.arm: pair for pair in summary.against_reference}
    against = f"against {summary.reference} [95 %]"
    lines = [("arm", f"{judge.name}, mean ± sd", against, "loss [95 %]", "p (Holm)", "s/run")]
    for arm in summary.arms:
        pair = pairs.get(arm.name)
        gain, loss, p = (_gain(pair), _loss(pair), _p_text(pair.holm_p)) if pair else ("", "", "")
        mean = f"{arm.mean:.2f} ± {judge.text(arm.sd)}" if len(arm.seeds) > 1 else judge.text(arm.mean)
        lines.append((arm.name, *((mean, gain, loss, p, f"{arm.seconds:.0f}") if arm.seeds else ("-",) * 5)))
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
