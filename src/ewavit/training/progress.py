"""What a run shows within an epoch: a bar on a terminal, a line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ewavit.training.recipe import Recipe
from ewavit.training.report import say

SECONDS_BETWEEN_LINES = 30

Advance = Callable[[float], None]  # called after each batch with its loss


class RunProgress:
    """Shows how far a run is, and the time left until its last epoch ends.

    Args:
        recipe: of the run.
        batches: in an epoch, of each process.
        inputs_per_batch: over all processes.
        inputs: what the run trains on: "images" or "clouds".
        clock: returns seconds.
    """

    def __init__(
        self,
        recipe: Recipe,
        batches: int,
        inputs_per_batch: int,
        inputs: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recipe, self._batches = recipe, batches
        self._inputs_per_batch, self._inputs, self._clock = inputs_per_batch, inputs, clock
        self._first: tuple[float, int] | None = None  # when the first batch ended, and its number
        self._last_line = clock()

    @contextmanager
    def epoch(self, epoch: int, batch: int, shown: bool = True) -> Iterator[Advance]:
        """Show one epoch, beginning at this batch. Yields the function to call after each batch."""
        if epoch % self._recipe.val_interval == 0:  # the epoch before ended with a line of its own
            self._last_line = self._clock()
        if not shown:
            yield lambda loss: None
        elif sys.stdout.isatty():
            with self._bar(epoch, batch) as advance:
                yield advance
        else:
            yield self._lines(epoch, batch)

    @contextmanager
    def _bar(self, epoch: int, batch: int) -> Iterator[Advance]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns, TextColumn("{task.fields[text]}"), console=Console(), transient=True
        ) as progress:
            task = progress.add_task(self._title(epoch), total=self._batches, completed=batch, text="")

            def advance(loss: float) -> None:
                nonlocal batch
                batch += 1
                left = self._left(epoch * self._batches + batch)
                progress.update(task, completed=batch, text=f"loss {loss:.3f}{left}")

            yield advance

    def _lines(self, epoch: int, batch: int) -> Advance:
        since, done = self._clock(), batch  # of the latest line, for the rate

        def advance(loss: float) -> None:
            nonlocal batch, since, done
            batch += 1
            now, position = self._clock(), epoch * self._batches + batch
            left = self._left(position)
            if now - self._last_line < SECONDS_BETWEEN_LINES:
                return
            rate = (batch - done) * self._inputs_per_batch / (now - since)
            steps = self._recipe.epochs * self._batches // self._recipe.grad_accum_steps
            say(
                f"{self._title(epoch)}  step {position // self._recipe.grad_accum_steps}/{steps}  "
                f"loss {loss:.4f}  {rate:.0f} {self._inputs}/s{left}"
            )
            self._last_line, since, done = now, now, batch

        return advance

    def _title(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._recipe.epochs}"

    def _left(self, position: int) -> str:
        """The time left at the mean rate since the first batch, evaluation included; "" at that batch."""
        now = self._clock()
        if self._first is None:
            self._first = now, position
        begun, first = self._first
        if position == first:
            return ""
        batches_left = self._recipe.epochs * self._batches - position
        seconds = (now - begun) / (position - first) * batches_left
        return f"  {timedelta(seconds=round(seconds))} left of the run"
