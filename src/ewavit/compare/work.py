"""`Work`: what is compared, what of it is done, and what went wrong."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ewavit.compare.arms import Arm, arm_recipe
from ewavit.compare.engines import Engine
from ewavit.compare.results import (
    ArmRuns,
    Comparison,
    Run,
    read_run,
    top1,
)
from ewavit.errors import EwavitError
from ewavit.points.sources import is_points
from ewavit.training.recipe import Recipe, flag
from ewavit.training.report import say
from ewavit.training.run_folder import RunFolder

SETTINGS = "compare.yaml"
TUNING_SEEDS = 2
TUNING_HOLDOUT = 0.2  # of the training images, unless the recipe holds out a share of its own
DIVERGED = "lower --lr"  # the training loop's advice when loss or weights are not finite
# What may differ between two starts of a comparison: where things are, and how they are read and shown.
_FREE = {"output", "name", "data_dir", "workers", "tensorboard"}


@dataclass(frozen=True)
class _Cell:
    """One run, and its row in the table."""

    row: str
    arm: Arm
    recipe: Recipe

    @property
    def run(self) -> RunFolder:
        return RunFolder.of(self.recipe)


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
    errors: dict[RunFolder, str] = field(default_factory=dict)  # by run

    @property
    def folder(self) -> Path:
        return RunFolder.of(self.recipe).path

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
                error = self.errors.get(cell.run, "did not end")
                if cell.run.is_finished:
                    scores[cell.recipe.lr].append(top1(cell.run))
                elif DIVERGED in error:
                    scores[cell.recipe.lr].append(-math.inf)
                else:
                    problems.append(f"no learning rate yet: tuning run {cell.run.path.name} {error}")
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
        if self.tuning() or not all(cell.run.is_finished for cell in self.final()):
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
            run = RunFolder(self.folder / "runs" / f"{arm.name}-{seed}")
            if run.is_finished:
                yield read_run(run, seed)
            elif error := self.untuned.get(arm.name) or self.errors.get(run):
                yield Run(seed, error=error)

    def _tried(self) -> Iterator[dict[str, Any]]:
        for arm in (arm for arm in self.arms if arm.tuned):
            for cell in self._tries(arm):
                done = cell.run.is_finished
                if done or cell.run in self.errors or arm.name in self.chosen:
                    found = top1(cell.run) if done else math.nan
                    yield {"arm": arm.name, "lr": cell.recipe.lr, "seed": cell.recipe.seed, "top1": found}


def best_lr(scores: Mapping[float, Sequence[float]]) -> float | None:
    """The learning rate of the highest mean score, of equals the smallest; None if all are -inf."""
    means = {lr: sum(scores[lr]) / len(scores[lr]) for lr in sorted(scores)}
    best = max(means, key=lambda lr: means[lr])
    return best if means[best] > -math.inf else None
