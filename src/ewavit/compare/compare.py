"""`compare`: train every arm at every seed, here or on Ray, and keep the results as they come.

`DIR/NAME/` holds `compare.yaml` (what is compared), `runs/ARM-SEED/` and `tuning/ARM-LR-SEED/` (runs of
`ewavit train`, each with a log beside it) and the results. A start reads from there all it needs to go on.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from rich.live import Live
from rich.table import Table

from ewavit.compare.arms import arm_recipe
from ewavit.compare.results import Arm, ArmRuns, Comparison, Run, read_run
from ewavit.compare.runs import (
    Engine,
    Processes,
    RayTasks,
    gpus_here,
    is_finished,
    last_row,
    log_file,
    run_folder,
    top1,
)
from ewavit.errors import EwavitError
from ewavit.training.recipe import Recipe, flag
from ewavit.training.report import say
from ewavit.training.sources import is_points

SETTINGS = "compare.yaml"
TUNING_SEEDS = 2
TUNING_HOLDOUT = 0.2  # of the training images, unless the recipe holds out a share of its own
DIVERGED = "lower --lr"  # the training loop's advice when loss or weights are not finite
POLL = 0.5  # seconds between looks at signals and progress
# What may differ between two starts of a comparison: where things are, and how they are read and shown.
_FREE = {"output", "name", "data_dir", "workers", "tensorboard"}


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
        done = sum(is_finished(cell.folder) for cell in work.final())
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


@dataclass(frozen=True)
class _Cell:
    """One run, and its row in the table."""

    row: str
    arm: Arm
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return run_folder(self.recipe)


@dataclass
class _Work:
    """What is compared, what of it is done, and what went wrong in this start."""

    recipe: Recipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    threads: int  # of each run: sums are rounded by it, so a later start keeps it
    limited: bool
    command: str
    device: str = ""  # of all runs, "cpu" or "cuda"
    machines: list[str] = field(default_factory=list)  # in words
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides by arm, of all starts
    chosen: dict[str, float] = field(default_factory=dict)  # learning rates by tuned arm
    untuned: dict[str, str] = field(default_factory=dict)  # why there is no learning rate, by tuned arm
    errors: dict[Path, str] = field(default_factory=dict)  # by run

    @property
    def folder(self) -> Path:
        return run_folder(self.recipe)

    def final(self) -> list[_Cell]:
        """The runs of the arms whose learning rate is known, seed by seed: an early stop leaves pairs."""
        return [self._run(arm, seed) for seed in self.seeds for arm in self.arms if self._lr(arm)]

    def tuning(self) -> list[_Cell]:
        """The runs that find learning rates that are not known yet, seed by seed."""
        tuned = [arm for arm in self.arms if arm.tuned and arm.name not in self.chosen]
        return sorted((cell for arm in tuned for cell in self._tries(arm)), key=lambda cell: cell.recipe.seed)

    def _run(self, arm: Arm, seed: int) -> _Cell:
        place = {"output": str(self.folder / "runs"), "name": f"{arm.name}-{seed}", "seed": seed}
        return _Cell(arm.name, arm, arm_recipe(self.recipe, arm, lr=self._lr(arm), **place))

    def _tries(self, arm: Arm) -> Iterator[_Cell]:
        place = {"output": str(self.folder / "tuning"), "holdout": self.recipe.holdout or TUNING_HOLDOUT}
        for seed in self.seeds[:TUNING_SEEDS]:
            for lr in self.lrs:
                name = f"{arm.name}-{lr!r}-{seed}"
                recipe = arm_recipe(self.recipe, arm, lr=lr, seed=seed, name=name, **place)
                yield _Cell(f"{arm.name}, lr {lr:g}", arm, recipe)

    def _lr(self, arm: Arm) -> float | None:
        return self.chosen.get(arm.name) if arm.tuned else arm_recipe(self.recipe, arm).lr

    def choose(self) -> None:
        """Give the tuned arms whose tuning runs have ended their learning rates."""
        for arm in (arm for arm in self.arms if arm.tuned and arm.name not in self.chosen):
            scores: dict[float, list[float]] = {lr: [] for lr in self.lrs}
            problems = []
            for cell in self._tries(arm):
                error = self.errors.get(cell.folder, "did not end")
                if is_finished(cell.folder):
                    scores[cell.recipe.lr].append(top1(cell.folder))
                elif DIVERGED in error:
                    scores[cell.recipe.lr].append(-math.inf)
                else:
                    problems.append(f"no learning rate yet: tuning run {cell.folder.name} {error}")
            best = None if problems else best_lr(scores)
            if best is None:
                self.untuned[arm.name] = [*problems, "every learning rate diverged: give lower --lrs"][0]
            else:
                self.chosen[arm.name] = best
                say(f"{arm.name}: learning rate {best:g}")
        self._save()

    def read(self) -> None:
        """Take over the threads, device, arms and learning rates of an earlier start, if there was one.

        Raises:
            EwavitError: the folder holds something else, or another comparison.
        """
        file = self.folder / SETTINGS
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise EwavitError(f"{self.folder} holds something else: choose another --name")
            return
        if not any(run.is_dir() for part in ("runs", "tuning") for run in (self.folder / part).glob("*")):
            return  # nothing was trained yet: all may change
        try:
            saved: dict[str, Any] = yaml.safe_load(file.read_text())
            difference = self._difference(saved)
            self.threads, self.device, self.chosen = saved["threads"], saved["device"], saved["chosen"]
            self.known, self.machines = saved["arms"], saved["machines"]
            self.lrs = self.lrs or tuple(saved["lrs"])
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as problem:
            reason = f"{type(problem).__name__} {problem}".splitlines()[0]
            raise EwavitError(f"{file} cannot be read ({reason}): choose another --name") from None
        if difference:
            raise EwavitError(f"{self.folder} holds another comparison, {difference}: choose another --name")

    def _difference(self, saved: dict[str, Any]) -> str | None:
        """The first setting that differs from what is saved, in words."""
        recipe = asdict(Recipe.from_dict(saved["recipe"], SETTINGS))
        pairs = [(f"--{flag(name)}", recipe[name], value) for name, value in self._shared().items()]
        for arm in self.arms:
            theirs = saved["arms"].get(arm.name, arm.overrides)
            for name in {**theirs, **arm.overrides}:
                pairs.append((f"{name} of arm {arm.name}", theirs.get(name), arm.overrides.get(name)))
        if self.lrs and saved["lrs"]:
            pairs.append(("--lrs", saved["lrs"], list(self.lrs)))
        return next((f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new), None)

    def _shared(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.recipe).items() if name not in _FREE}

    def use(self, engine: Engine) -> None:
        """Note where the runs will be, and write what is compared.

        Raises:
            EwavitError: earlier runs were on another kind of device.
        """
        if self.tuning() or not all(is_finished(cell.folder) for cell in self.final()):
            if self.device not in ("", engine.device):
                raise EwavitError(
                    f"{self.folder} has runs on {self.device}, and runs on {engine.device} would be no pairs "
                    "for them: go on there, or choose another --name"
                )
            self.device = engine.device
            self.machines = list(dict.fromkeys([*self.machines, engine.machine]))
        self._save()

    def _save(self) -> None:
        self.known |= {arm.name: arm.overrides for arm in self.arms}
        settings = {
            "recipe": self._shared(),
            "arms": self.known,
            "seeds": list(self.seeds),
            "lrs": list(self.lrs),
            "chosen": self.chosen,
            "threads": self.threads,
            "device": self.device,
            "machines": self.machines,
        }
        with self._room():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{SETTINGS}.partial"
            partial.write_text(yaml.safe_dump(settings, sort_keys=False))
            os.replace(partial, self.folder / SETTINGS)

    def write(self) -> Comparison:
        """Write the results of what is finished or failed so far."""
        from ewavit.compare.report import write_results

        comparison = self.comparison()
        with self._room():
            write_results(comparison, self.folder)
        return comparison

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise EwavitError(
                f"{self.folder} could not be written ({problem.strerror or problem}): make room and start "
                "the same command again, what is finished is kept"
            ) from None

    def comparison(self) -> Comparison:
        """What is finished or failed so far."""
        packages = ("ewavit", "torch", "timm", "numpy", "scipy", "statsmodels")
        return Comparison(
            name=self.folder.name,
            command=self.command,
            date=datetime.now().isoformat(" ", "minutes"),
            device=f"{', '.join(self.machines)}; CPU threads of each run: {self.threads}",
            versions={"python": platform.python_version()} | {name: version(name) for name in packages},
            data=self._data(),
            kind=self._kind,
            recipe=self._shared(),
            seeds=self.seeds,
            arms=tuple(ArmRuns(arm, self._lr(arm) or math.nan, tuple(self._ended(arm))) for arm in self.arms),
            tuning=tuple(self._tried()),
            limited=self.limited,
        )

    @property
    def _kind(self) -> str:
        return "clouds" if is_points(self.recipe.data) else "images"

    def _data(self) -> str:
        recipe, kind = self.recipe, self._kind
        part = f"the first {recipe.limit:,} training {kind} of " if recipe.limit else ""
        return f"{part}{recipe.data}{f', by held-out training {kind},' if recipe.holdout else ''}"

    def _ended(self, arm: Arm) -> Iterator[Run]:
        for seed in self.seeds:
            folder = self.folder / "runs" / f"{arm.name}-{seed}"
            if is_finished(folder):
                yield read_run(folder, seed)
            elif error := self.untuned.get(arm.name) or self.errors.get(folder):
                yield Run(seed, error=error)

    def _tried(self) -> Iterator[dict[str, Any]]:
        for arm in (arm for arm in self.arms if arm.tuned):
            for cell in self._tries(arm):
                done = is_finished(cell.folder)
                if done or cell.folder in self.errors or arm.name in self.chosen:
                    found = top1(cell.folder) if done else math.nan
                    yield {"arm": arm.name, "lr": cell.recipe.lr, "seed": cell.recipe.seed, "top1": found}


def best_lr(scores: Mapping[float, Sequence[float]]) -> float | None:
    """The learning rate of the highest mean score, of equals the smallest; None if all are -inf."""
    means = {lr: sum(scores[lr]) / len(scores[lr]) for lr in sorted(scores)}
    best = max(means, key=lambda lr: means[lr])
    return best if means[best] > -math.inf else None


def _run_all(work: _Work, cells: Sequence[_Cell], engine: Engine, received: list[int]) -> None:
    """Give the engine all runs that are not finished, and note how they end, until done or told to stop."""
    waiting = deque(cell for cell in cells if not is_finished(cell.folder))
    running: dict[Path, _Cell] = {}
    with _Progress(cells, work) as progress:
        while (waiting or running) and not received:
            while waiting and engine.start(waiting[0].recipe):
                cell = waiting.popleft()
                running[cell.folder] = cell
            progress.show(running)
            for end in engine.ended(POLL):
                cell = running.pop(run_folder(end.recipe))
                if end.refused:
                    raise EwavitError(f"arm {cell.arm.name!r}: {end.error}")
                if end.error:
                    work.errors[cell.folder] = end.error
                progress.ended(cell)
                with suppress(EwavitError):  # no room now: said at the end, if there still is none
                    work.write()


class _Progress:
    """One table of all runs on a terminal; elsewhere a line for each run that ends."""

    def __init__(self, cells: Sequence[_Cell], work: _Work) -> None:
        self._cells, self._work = cells, work
        folders = [cell.folder for cell in cells]
        self._top1 = {folder: top1(folder) for folder in folders if is_finished(folder)}
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
        if error := self._work.errors.get(cell.folder):
            what = f"failed: {error} ({log_file(cell.folder)})"
        else:
            self._top1[cell.folder] = top1(cell.folder)
            what = f"top-1 {self._top1[cell.folder]:.2f} %"
        line = (
            f"{len(self._top1)} of {len(self._cells)} finished: {cell.row}, seed {cell.recipe.seed}, {what}"
        )
        if self._live is None:
            say(line)
        elif error:
            self._live.console.print(line, markup=False, highlight=False)

    def show(self, running: Collection[Path]) -> None:
        """Draw the table."""
        if self._live is None:
            return
        seeds = sorted({cell.recipe.seed for cell in self._cells})
        title = f"{self._work.folder.name}: {len(self._top1)} of {len(self._cells)} runs"
        table = Table("arm", *(f"seed {seed}" for seed in seeds), title=title)
        rows: dict[str, dict[int, str]] = {}
        for cell in self._cells:
            rows.setdefault(cell.row, {})[cell.recipe.seed] = self._state(cell, cell.folder in running)
        for name, states in rows.items():
            table.add_row(name, *(states[seed] for seed in seeds))
        self._live.update(table, refresh=True)

    def _state(self, cell: _Cell, running: bool) -> str:
        if (found := self._top1.get(cell.folder)) is not None:
            return f"[green]{found:.2f} %[/]"
        if cell.folder in self._work.errors:
            return "[red]failed[/]"
        row = last_row(cell.folder)
        if not running:
            return "begun" if row else "·"
        share = (int(float(row["epoch"])) + 1) / cell.recipe.epochs if row else 0.0
        return f"{share:4.0%}" + (f" [dim]{top1(cell.folder):.2f} %[/]" if row else "")


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
