"""`compare`: train every arm at every seed, here or on Ray, and write the results while runs end.

`DIR/NAME/` holds `compare.yaml` (what is compared), `runs/ARM-SEED/` and `tuning/ARM-SETTINGS-FOLD/` (runs
of `ewavit train`, each with a log beside it) and the results. A start reads from there all it needs to go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from ewavit.compare.arms import Arm, check_start
from ewavit.compare.contrasts import Contrasts
from ewavit.compare.engines import Engine, Kind, Processes, RayTasks, gpus_here
from ewavit.compare.results import Comparison
from ewavit.compare.terminal import Screen
from ewavit.compare.tuning import Grids
from ewavit.compare.work import Cell, Work
from ewavit.errors import EwavitError
from ewavit.training.opening import usable_cores
from ewavit.training.processes import collected_signals
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder

POLL = 0.5  # seconds between looks at signals and progress
# Permutation tests of many arms take seconds. The results are written again after this many times as long.
PAUSE = 20


class Stopped(Exception):
    """The comparison was stopped by a signal; its runs wrote a checkpoint first."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


def compare(
    recipe: Recipe,
    arms: Sequence[Arm],
    seeds: int = 5,
    *,
    grids: Grids | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    contrasts: Contrasts | None = None,
    command: str = "ewavit compare",
) -> Comparison:
    """Train every arm at the same seeds and write the results. A later start goes on where this one ended.

    Args:
        recipe: the settings that the arms share; `output` and `name` give the folder, `seed` the first seed.
        arms: from `make_arms`.
        seeds: how many, 2 or more. A later start may have more or fewer, and other arms: nothing is deleted.
        grids: tuned arms choose from them by the mean metric on held-out training data, at the first seed.
        jobs: runs at a time; one for each GPU or else each CPU core unless given.
        ray: address of a Ray cluster, "" for one on this machine; None runs without Ray.
        contrasts: what is judged against what; unless given, all arms against dense.
        command: the command that is quoted in the results.

    Returns:
        The comparison. Runs that failed have an error; the next start repeats them.

    Raises:
        EwavitError: wrong input, another comparison in the folder, or results that cannot be written.
        Stopped: SIGINT or SIGTERM. The second one ends the runs without a checkpoint.
    """
    grids, contrasts = grids or Grids(), contrasts or Contrasts()
    check_start(recipe, arms, seeds, jobs)
    grids.check(recipe, arms)
    contrasts.check(arm.name for arm in arms)
    jobs = jobs or usual_jobs()
    if not recipe.name:
        recipe = replace(recipe, name=f"{datetime.now():%Y%m%d-%H%M%S}-compare")
        command += f" --name {recipe.name}"
    work = Work(
        recipe=replace(recipe, output=str(Path(recipe.output).absolute())),
        arms=tuple(arms),
        seeds=tuple(range(recipe.seed, recipe.seed + seeds)),
        grids=grids,
        threads=max(1, usable_cores() // jobs),
        command=command,
        contrasts=contrasts,
    )
    work.read()
    engine: Engine = Processes(jobs, work.threads) if ray is None else RayTasks(ray, jobs, work.threads)
    with collected_signals(lambda signals: engine.kill() if len(signals) > 1 else None) as received:
        try:
            work.use(engine)
            _run_all(work, work.tuning(), engine, received)
            if (more := work.tuning()) and not all(cell.run.is_finished for cell in more):
                _run_all(work, more, engine, received)  # the first folds were too few
            work.choose()
            _run_all(work, work.final(), engine, received)
        finally:
            engine.stop()
    return _written(work, received)


def _written(work: Work, received: Sequence[int]) -> Comparison:
    comparison = work.write()
    if not received:
        return comparison
    done, total = sum(cell.run.is_finished for cell in work.final()), len(work.arms) * len(work.seeds)
    message = f"stopped, {done} of {total} runs are finished; go on with: {work.command}"
    raise Stopped(received[0], message)


def usual_jobs() -> int:
    """Runs at a time: one for each GPU, or else each CPU core."""
    return len(gpus_here()) or (1 if torch.accelerator.is_available() else usable_cores())


def _run_all(work: Work, cells: Sequence[Cell], engine: Engine, received: list[int]) -> None:
    """Train all runs that are not finished, and keep how they ended, until a signal comes."""
    waiting = deque(cell for cell in cells if not cell.run.is_finished and cell.run not in work.ends)
    running: dict[RunFolder, Cell] = {}
    due = 0.0
    with Screen(cells, work) as screen:
        while (waiting or running) and not received:
            while waiting and engine.start(waiting[0].recipe):
                cell = waiting.popleft()
                running[cell.run] = cell
            screen.show(running)
            for end in engine.ended(POLL):
                cell = running.pop(RunFolder.of(end.recipe))
                if end.kind is Kind.REFUSED:
                    raise EwavitError(f"arm {cell.arm.name!r}: {end.error}")
                if end.kind is not Kind.DONE:
                    work.ends[cell.run] = end
                screen.ended(cell)
                if (begin := time.monotonic()) >= due:
                    with suppress(EwavitError):  # a full disk now: the last write raises, if it still is full
                        work.write()
                    due = time.monotonic() + PAUSE * (time.monotonic() - begin)
