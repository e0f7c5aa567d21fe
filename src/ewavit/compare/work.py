"""`Work`: what is compared, which runs of it are done, and how the others ended."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ewavit.compare.arms import Arm, arm_recipe
from ewavit.compare.contrasts import Contrasts
from ewavit.compare.engines import End, Engine, Kind
from ewavit.compare.results import (
    ArmRuns,
    Comparison,
    Run,
    evaluated_epochs,
    read_run,
    without_other_data,
)
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular, replacing
from ewavit.tasks.choice import task_for
from ewavit.tasks.judge import Judge
from ewavit.tasks.task import Task
from ewavit.training.recipe import Recipe, flag
from ewavit.training.report import say
from ewavit.training.run_folder import RunFolder

SETTINGS = "compare.yaml"
TUNING_SEEDS = 2
MOST_THREADS = 4096  # of a run, in the file of an earlier start
TUNING_HOLDOUT = 0.2  # of the training data, unless the recipe holds out a share of its own
# What may differ between two starts of a comparison: where things are, and how they are read and shown.
_FREE = {"output", "name", "data_dir", "workers", "log"}


@dataclass(frozen=True)
class Cell:
    """One run, and its row in the table."""

    row: str
    arm: Arm
    recipe: Recipe

    @property
    def run(self) -> RunFolder:
        return RunFolder.of(self.recipe)


@dataclass
class Work:
    """What is compared, which runs of it are done, and how others ended in this start."""

    recipe: Recipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    threads: int  # of each run: sums are rounded by it, so a later start keeps it
    command: str
    contrasts: Contrasts = field(default_factory=Contrasts)
    device: str = ""  # of all runs, "cpu" or "cuda"
    machines: list[str] = field(default_factory=list)  # in words
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides by arm, of all starts
    chosen: dict[str, float] = field(default_factory=dict)  # learning rates by tuned arm
    untuned: dict[str, str] = field(default_factory=dict)  # why there is no learning rate, by tuned arm
    ends: dict[RunFolder, End] = field(default_factory=dict)  # of the runs that are not done

    @property
    def folder(self) -> Path:
        return RunFolder.of(self.recipe).path

    @property
    def task(self) -> Task:
        return task_for(self.recipe.data, self.recipe.task)

    @property
    def judge(self) -> Judge:
        return self.task.judge

    def final(self) -> list[Cell]:
        """The runs of all arms with a known learning rate, seed by seed: an early stop leaves pairs."""
        return [self._run(arm, seed) for seed in self.seeds for arm in self.arms if self._lr(arm)]

    def tuning(self) -> list[Cell]:
        """The runs for the learning rates that are not known yet, seed by seed."""
        tuned = [arm for arm in self.arms if arm.tuned and arm.name not in self.chosen]
        return sorted((cell for arm in tuned for cell in self._tries(arm)), key=lambda cell: cell.recipe.seed)

    def _run(self, arm: Arm, seed: int) -> Cell:
        place = {"output": str(self.folder / "runs"), "name": f"{arm.name}-{seed}", "seed": seed}
        return Cell(arm.name, arm, arm_recipe(self.recipe, arm, lr=self._lr(arm), **place))

    def _tries(self, arm: Arm) -> Iterator[Cell]:
        place = {"output": str(self.folder / "tuning"), "holdout": self.recipe.holdout or TUNING_HOLDOUT}
        for seed in self.seeds[:TUNING_SEEDS]:
            for lr in self.lrs:
                name = f"{arm.name}-{lr!r}-{seed}"
                recipe = arm_recipe(self.recipe, arm, lr=lr, seed=seed, name=name, **place)
                yield Cell(f"{arm.name}, lr {lr:g}", arm, recipe)

    def _lr(self, arm: Arm) -> float | None:
        return self.chosen.get(arm.name) if arm.tuned else arm_recipe(self.recipe, arm).lr

    def choose(self) -> None:
        """Choose the learning rate of each tuned arm when its tuning runs have ended."""
        for arm in (arm for arm in self.arms if arm.tuned and arm.name not in self.chosen):
            scores: dict[float, list[float | None]] = {lr: [] for lr in self.lrs}
            problems = []
            for cell in self._tries(arm):
                end = self.ends.get(cell.run)
                if (found := self.found(cell)) and found.error is None:
                    scores[cell.recipe.lr].append(found.metric)
                elif found:
                    problems.append(f"no learning rate yet: tuning run {cell.run.path.name}: {found.error}")
                elif end and end.kind is Kind.DIVERGED:
                    scores[cell.recipe.lr].append(None)
                else:
                    what = end.error if end else "did not end"
                    problems.append(f"no learning rate yet: tuning run {cell.run.path.name} {what}")
            best = None if problems else best_lr(scores, self.judge)
            if best is None:
                self.untuned[arm.name] = [*problems, "every learning rate diverged: give lower --lrs"][0]
            else:
                self.chosen[arm.name] = best
                say(f"{arm.name}: learning rate {best:g}")
        self._save()

    def read(self) -> None:
        """Read the threads, device, arms and learning rates of an earlier start, if there was one.

        Raises:
            EwavitError: the folder exists and is no comparison, or another one.
        """
        file = self.folder / SETTINGS
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise EwavitError(f"{self.folder} exists and is no comparison: choose another --name")
            return
        if not any(run.is_dir() for part in ("runs", "tuning") for run in (self.folder / part).glob("*")):
            return  # nothing was trained yet: all may change
        try:
            saved = _checked(yaml.safe_load(regular(file).read_text()))
            difference = self._difference(saved)
            primary = saved.get("primary")
            self.threads, self.device, self.chosen = saved["threads"], saved["device"], saved["chosen"]
            self.known, self.machines = saved["arms"], saved["machines"]
            self.lrs = self.lrs or tuple(saved["lrs"])
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as problem:
            raise EwavitError(
                f"{file} cannot be read ({first_line(problem)}): undo the change, or choose another --name"
            ) from None
        if difference:
            raise EwavitError(f"{self.folder} holds another comparison ({difference}): choose another --name")
        if self._primary() != primary:
            raise EwavitError(
                f"{self.folder} has runs, and its primary contrast is {primary or 'none'}, not "
                f"{self._primary() or 'none'}: name the primary contrast before the first run"
            )

    def _primary(self) -> str | None:
        """The primary contrast as text."""
        return ":".join(self.contrasts.primary) if self.contrasts.primary else None

    def _difference(self, saved: dict[str, Any]) -> str | None:
        """The first setting that differs from the saved one, in words."""
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
        """Keep which machines the runs use, and write the settings of the comparison.

        Raises:
            EwavitError: earlier runs were on another kind of device.
        """
        if self.tuning() or not all(cell.run.is_finished for cell in self.final()):
            if self.device not in ("", engine.device):
                raise EwavitError(
                    f"{self.folder} has runs on {self.device}, which cannot be paired with runs on "
                    f"{engine.device}: go on with {self.device}, or choose another --name"
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
            "primary": self._primary(),
        }
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / SETTINGS) as partial:
                partial.write_text(yaml.safe_dump(settings, sort_keys=False))

    def write(self) -> Comparison:
        """Write the results of the runs that have finished or failed so far."""
        from ewavit.compare.report import write_results

        comparison = self.comparison()
        with self._writing():
            write_results(comparison, self.folder)
        return comparison

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise EwavitError(
                f"{self.folder} cannot be written ({problem.strerror or problem}): make room and start the "
                "same command again; finished runs are kept"
            ) from None

    def comparison(self) -> Comparison:
        """The runs that have finished or failed so far."""
        packages = ("ewavit", "torch", "timm", "numpy", "scipy", "statsmodels")
        return Comparison(
            name=self.folder.name,
            command=self.command,
            date=datetime.now().isoformat(" ", "minutes"),
            device=f"{', '.join(self.machines)}; CPU threads of each run: {self.threads}",
            versions={"python": platform.python_version()} | {name: version(name) for name in packages},
            data=self._data(),
            kind=self.task.kind,
            recipe=self._shared(),
            seeds=self.seeds,
            judge=self.judge,
            arms=self._results(),
            tuning=tuple(self._tried()),
            contrasts=self.contrasts,
        )

    def _data(self) -> str:
        recipe, kind = self.recipe, self.task.kind
        first = "" if recipe.resample else "the first "
        drawn = ", drawn anew with each seed," if recipe.resample else ""
        if recipe.limit:
            part = f"{first}{recipe.limit:,} training {kind}{drawn} of "
        else:
            part = f"{first}{recipe.shots:,} training {kind} of each class{drawn} of " if recipe.shots else ""
        other = "held-out" if recipe.holdout else "all other" if recipe.test_on_rest else ""
        return f"{part}{recipe.data}{f', by {other} training {kind},' if other else ''}"

    def found(self, cell: Cell) -> Run | None:
        """A finished run, with an error if its files are damaged; None if it is not finished."""
        if not cell.run.is_finished:
            return None
        seed = cell.recipe.seed
        try:
            epochs = None if cell.recipe.early_stop else evaluated_epochs(cell.recipe)
            return read_run(cell.run, seed, self.judge, epochs)
        except EwavitError as problem:
            return Run(seed, error=str(problem))

    def _results(self) -> tuple[ArmRuns, ...]:
        """The runs of all arms that have finished or failed."""
        ended = {arm.name: list(self._ended(arm)) for arm in self.arms}
        recipe = self.recipe
        by_seed = recipe.resample and bool(recipe.holdout or recipe.test_on_rest)
        checked = without_other_data(dict(pair for pairs in ended.values() for pair in pairs), by_seed)
        return tuple(
            ArmRuns(arm, self._lr(arm) or math.nan, tuple(checked[run] for run, _ in ended[arm.name]))
            for arm in self.arms
        )

    def _ended(self, arm: Arm) -> Iterator[tuple[RunFolder, Run]]:
        for seed in self.seeds:
            run = RunFolder(self.folder / "runs" / f"{arm.name}-{seed}")
            if error := self.untuned.get(arm.name):
                yield run, Run(seed, error=error)
            elif self._lr(arm) and (found := self.found(self._run(arm, seed))):
                yield run, found
            elif end := self.ends.get(run):
                yield run, Run(seed, error=end.error)

    def _tried(self) -> Iterator[dict[str, Any]]:
        for arm in (arm for arm in self.arms if arm.tuned):
            for cell in self._tries(arm):
                found = self.found(cell)
                if found or cell.run in self.ends or arm.name in self.chosen:
                    metric = found.metric if found and found.error is None else math.nan
                    facts = {"arm": arm.name, "lr": cell.recipe.lr, "seed": cell.recipe.seed}
                    yield {**facts, self.judge.column: metric}


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


_SAVED: dict[str, Callable[[Any], bool]] = {
    "recipe": lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value),
    "arms": lambda value: (
        isinstance(value, dict) and all(isinstance(overrides, dict) for overrides in value.values())
    ),
    "lrs": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "chosen": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "threads": lambda value: type(value) is int and 0 < value <= MOST_THREADS,
    "device": lambda value: isinstance(value, str),
    "machines": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}


def _checked(saved: Any) -> dict[str, Any]:
    """The settings that an earlier start saved, with values of the right types."""
    if not isinstance(saved, dict):
        raise ValueError("it holds no settings")
    for name, is_right in _SAVED.items():
        if name not in saved:
            raise ValueError(f"it has no {name}")
        if not is_right(saved[name]):
            raise ValueError(f"its {name} cannot be {str(saved[name])[:40]!r}")
    return saved


def best_lr(scores: Mapping[float, Sequence[float | None]], judge: Judge) -> float | None:
    """The learning rate with the best mean score, the smallest one of equals.

    Args:
        scores: the judging metric of each run, by learning rate; None for a run that diverged.
        judge: it says whether higher is better.

    Returns:
        The learning rate, or None if runs of all of them diverged.
    """
    means = {}
    for lr in sorted(scores):
        found = [score for score in scores[lr] if score is not None]
        if len(found) == len(scores[lr]):
            means[lr] = judge.sign * sum(found) / len(found)
    return max(means, key=means.__getitem__, default=None)
