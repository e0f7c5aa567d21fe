"""A comparison on a terminal: the table of its runs, as they train."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table

from ewavit.compare.reading import latest_metric
from ewavit.compare.results import Run
from ewavit.compare.work import Cell, Work
from ewavit.training.report import say
from ewavit.training.run_folder import RunFolder

if TYPE_CHECKING:
    pass


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
