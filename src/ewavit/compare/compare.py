"""`compare`: train every arm at every seed, here or on Ray, and keep the results as they come.

`DIR/NAME/` holds `compare.yaml` (what is compared), `runs/ARM-SEED/` and `tuning/ARM-LR-SEED/` (runs of
`ewavit train`, each with a log beside it) and the results. A start reads from there all it needs to go on.
"""

from __future__ import annotations

import math
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import torch

from ewavit.compare.arms import Arm
from ewavit.compare.engines import Engine, Processes, RayTasks, gpus_here
from ewavit.compare.results import (
    Comparison,
)
from ewavit.compare.terminal import _Progress
from ewavit.compare.work import _Cell, _Work
from ewavit.errors import EwavitError
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder

POLL = 0.5  # seconds between looks at signals and progress


class Stopped(Exception):
    """The comparison was stopped by a signal, after its runs had been asked for a checkpoint."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


def compare(
    recipe: Recipe,
    arms: Sequence[Arm],
    seeds: int = 5,
    *,
    lrs: Sequence[float] = (),
    jobs: int | None = None,
    ray: str | None = None,
    limited: bool = False,
    command: str = "ewavit compare",
) -> Comparison:
    """Train every arm at the same seeds, go on where an earlier start ended, and write the results.

    Args:
        recipe: what the arms share; `output` and `name` say where, `seed` is the first seed.
        arms: from `make_arms`.
        seeds: how many, 2 or more. A later start may have more or fewer, and other arms: nothing is deleted.
        lrs: learning rates that tuned arms choose from, by the mean held-out top-1 at the first two seeds.
        jobs: runs at a time; one for each GPU or else each CPU core unless given.
        ray: address of a Ray cluster, "" for one on this machine; None runs without Ray.
        limited: mark the results as a quick look.
        command: what to quote in the results.

    Returns:
        The comparison. Runs that failed carry their error, and the next start repeats them.

    Raises:
        EwavitError: wrong input, another comparison in the folder, or no room for the results.
        Stopped: SIGINT or SIGTERM.
    """
    _check(arms, seeds, lrs, jobs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or len(gpus_here()) or (1 if torch.accelerator.is_available() else cores)
    if not recipe.name:
        recipe = replace(recipe, name=f"{datetime.now():%Y%m%d-%H%M%S}-compare")
        command += f" --name {recipe.name}"
    work = _Work(
        recipe=replace(recipe, output=str(Path(recipe.output).absolute())),
        arms=tuple(arms),
        seeds=tuple(range(recipe.seed, recipe.seed + seeds)),
        lrs=tuple(sorted(set(lrs))),
        threads=max(1, cores // jobs),
        limited=limited,
        command=command,
    )
    work.read()
    engine: Engine = Processes(jobs, work.threads) if ray is None else RayTasks(ray, jobs, work.threads)
    with _signals(engine) as received:
        try:
            work.use(engine)
            _run_all(work, work.tuning(), engine, received)
            work.choose()
            _run_all(work, work.final(), engine, received)
        finally:
            engine.stop()
    comparison = work.write()
    if received:
        done = sum(cell.run.is_finished for cell in work.final())
        count = f"{done} of {len(work.arms) * len(work.seeds)} runs are finished"
        raise Stopped(received[0], f"stopped, {count}; go on with: {command}")
    return comparison


def _check(arms: Sequence[Arm], seeds: int, lrs: Sequence[float], jobs: int | None) -> None:
    for module in ("scipy", "statsmodels"):
        if find_spec(module) is None:
            raise EwavitError(f"ewavit compare needs {module}: pip install 'ewavit[compare]'")
    if seeds < 2:
        raise EwavitError(f"--seeds {seeds} gives no interval: choose 2 or more")
    if jobs is not None and jobs < 1:
        raise EwavitError(f"--jobs {jobs} is too small: choose 1 or more")
    if wrong := [lr for lr in lrs if not 0 < lr < math.inf]:
        raise EwavitError(f"--lrs {wrong[0]} does not work: choose positive numbers")
    if not lrs and (tuned := [arm.name for arm in arms if arm.tuned]):
        raise EwavitError(f"arm {tuned[0]!r} chooses its learning rate: give --lrs, e.g. 5e-4,1e-3,2e-3")


@contextmanager
def _signals(engine: Engine) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; the second one does not wait for the runs' checkpoints."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            engine.kill()

    handlers = {}
    with suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run_all(work: _Work, cells: Sequence[_Cell], engine: Engine, received: list[int]) -> None:
    """Give the engine all runs that are not finished, and note how they end, until done or told to stop."""
    waiting = deque(cell for cell in cells if not cell.run.is_finished)
    running: dict[RunFolder, _Cell] = {}
    with _Progress(cells, work) as progress:
        while (waiting or running) and not received:
            while waiting and engine.start(waiting[0].recipe):
                cell = waiting.popleft()
                running[cell.run] = cell
            progress.show(running)
            for end in engine.ended(POLL):
                cell = running.pop(RunFolder.of(end.recipe))
                if end.refused:
                    raise EwavitError(f"arm {cell.arm.name!r}: {end.error}")
                if end.error:
                    work.errors[cell.run] = end.error
                progress.ended(cell)
                with suppress(EwavitError):  # no room now: said at the end, if there still is none
                    work.write()
