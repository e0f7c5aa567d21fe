"""`Work`: what is compared, which runs of it are done, and how the others ended."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ewavit.compare.arms import Arm, arm_recipe
from ewavit.compare.contrasts import Contrasts
from ewavit.compare.engines import End, Engine, Kind
from ewavit.compare.reading import evaluated_epochs, read_run, without_other_data
from ewavit.compare.results import ArmRuns, Comparison, Run
from ewavit.compare.tuning import ENOUGH, FIRST_FOLDS, HOLDOUT, Choice, Grids, Settings, best, words
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular, replacing
from ewavit.tasks.choice import task_for
from ewavit.tasks.judge import Judge
from ewavit.tasks.task import Task
from ewavit.training.recipe import Recipe, kinds
from ewavit.training.report import say
from ewavit.training.run_folder import RunFolder
from ewavit.training.setting import flag

SETTINGS = "compare.yaml"
MOST_THREADS = 4096  # of a run, in the file of an earlier start
# What may differ between two starts of a comparison: where things are, and how they are read and shown.
_FREE = {"output", "name", "data_dir", "workers", "log"}


@dataclass(frozen=True)
class Cell:
    """One run, and its row and column in the table."""

    row: str
    column: str
    arm: Arm
    recipe: Recipe
    tried: Settings = field(default_factory=dict)  # by a tuned arm

    @property
    def run(self) -> RunFolder:
        return RunFolder.of(self.recipe)


@dataclass
class Work:
    """What is compared, which runs of it are done, and how others ended in this start."""

    recipe: Recipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    grids: Grids
    threads: int  # of each run: sums are rounded by it, so a later start keeps it
    command: str
    contrasts: Contrasts = field(default_factory=Contrasts)
    device: str = ""  # of all runs, "cpu" or "cuda"
    machines: list[str] = field(default_factory=list)  # in words
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides by arm, of all starts
    chosen: dict[str, Choice] = field(default_factory=dict)  # by tuned arm
    untuned: dict[str, str] = field(default_factory=dict)  # why nothing was chosen, by tuned arm
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
        """The runs of all arms with known settings, seed by seed: an early stop leaves pairs."""
        return [self._run(arm, seed) for seed in self.seeds for arm in self.arms if self._settled(arm)]

    def tuning(self) -> list[Cell]:
        """The runs for the settings that are not chosen yet, fold by fold.

        Call it again when these runs have ended: the first folds show whether the others are needed.
        """
        tuned = [arm for arm in self.arms if arm.tuned and arm.name not in self.chosen]
        cells = [cell for arm in tuned for cell in self._tries(arm, self._folds(arm))]
        return sorted(cells, key=lambda cell: cell.recipe.fold)

    def _run(self, arm: Arm, seed: int) -> Cell:
        place = {"output": str(self.folder / "runs"), "name": f"{arm.name}-{seed}", "seed": seed}
        settings = self.chosen[arm.name].settings if arm.tuned else {}
        recipe = arm_recipe(self.recipe, arm, **settings, **place)
        return Cell(arm.name, f"seed {seed}", arm, recipe)

    def _tries(self, arm: Arm, folds: int) -> list[Cell]:
        """The runs of all candidates of a tuned arm in so many folds, at the first seed, fold by fold."""
        base = replace(self._folded, output=str(self.folder / "tuning"))
        cells = []
        for fold, tried in product(range(folds), self.grids.candidates(arm)):
            name = "-".join(
                [arm.name, *(f"{setting}{value!r}" for setting, value in tried.items()), str(fold)]
            )
            recipe = arm_recipe(base, arm, **tried, fold=fold, name=name)
            cells.append(Cell(f"{arm.name}, {words(tried)}", f"fold {fold + 1}", arm, recipe, tried))
        return cells

    @property
    def _folded(self) -> Recipe:
        """The recipe with training images to hold out."""
        return replace(self.recipe, holdout=self.recipe.holdout or HOLDOUT, test_on_rest=False)

    def _folds(self, arm: Arm) -> int:
        """How many folds a tuned arm needs: the first ones, or all if these ended with too few readings."""
        first = self._tries(arm, min(FIRST_FOLDS, self._folded.folds))
        readings = self._readings(first)
        few = readings is not None and readings < ENOUGH
        ended = all(cell.run.is_finished or cell.run in self.ends for cell in first)
        return self._folded.folds if few and ended else first[-1].recipe.fold + 1

    def _readings(self, cells: Sequence[Cell]) -> int | None:
        """Held-out predictions of one candidate in the folds of these runs; None where they are unknown."""
        found = [(cell.recipe.fold, run.samples) for cell in cells if (run := self.found(cell))]
        return sum({fold: count for fold, count in found if count is not None}.values()) or None

    def choose(self) -> None:
        """Choose the settings of each tuned arm when its tuning runs have ended."""
        for arm in (arm for arm in self.arms if arm.tuned and arm.name not in self.chosen):
            candidates, folds = self.grids.candidates(arm), self._folds(arm)
            cells = self._tries(arm, folds)
            scores: list[list[float | None]] = [[] for _ in candidates]
            problems = []
            for cell in cells:
                end, of_candidate = self.ends.get(cell.run), scores[candidates.index(cell.tried)]
                if (found := self.found(cell)) and found.error is None:
                    of_candidate.append(found.metric)
                elif found:
                    problems.append(f"nothing chosen yet: tuning run {cell.run.path.name}: {found.error}")
                elif end and end.kind is Kind.DIVERGED:
                    of_candidate.append(None)
                else:
                    what = end.error if end else "did not end"
                    problems.append(f"nothing chosen yet: tuning run {cell.run.path.name} {what}")
            number_of_best = None if problems else best(scores, self.judge)
            if number_of_best is None:
                self.untuned[arm.name] = [*problems, "every candidate diverged: give lower learning rates"][0]
            else:
                settings, readings = candidates[number_of_best], self._readings(cells)
                self.chosen[arm.name] = Choice(settings, len(candidates), folds, readings)
                say(self.chosen[arm.name].sentence(arm.name))
        self._save()

    def read(self) -> None:
        """Read the threads, device, arms and grids of an earlier start, if there was one.

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
            self.threads, self.device = saved["threads"], saved["device"]
            self.known, self.machines = saved["arms"], saved["machines"]
            self.chosen = {arm: Choice(**choice) for arm, choice in saved["chosen"].items()}
            self.grids = Grids(
                self.grids.lrs or tuple(saved["lrs"]), self.grids.grid or saved.get("grid", {})
            )
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
        grid = {name: list(values) for name, values in self.grids.grid.items()}
        for name, old, new in (
            ("--lrs", saved["lrs"], list(self.grids.lrs)), ("--grid", saved.get("grid"), grid),
        ):  # fmt: skip
            pairs += [(name, old, new)] if old and new else []
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
            "lrs": list(self.grids.lrs),
            "grid": {name: list(values) for name, values in self.grids.grid.items()},
            "chosen": {arm: asdict(choice) for arm, choice in self.chosen.items()},
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
        recipe, chosen = self.recipe, self.chosen
        by_seed = recipe.resample and bool(recipe.holdout or recipe.test_on_rest)
        checked = without_other_data(dict(pair for pairs in ended.values() for pair in pairs), by_seed)
        return tuple(
            ArmRuns(
                arm, self._lr(arm), tuple(checked[run] for run, _ in ended[arm.name]), chosen.get(arm.name)
            )
            for arm in self.arms
        )

    def _lr(self, arm: Arm) -> float:
        """The learning rate of an arm's runs, nan where it is not chosen yet."""
        return self._run(arm, self.seeds[0]).recipe.lr if self._settled(arm) else math.nan

    def _settled(self, arm: Arm) -> bool:
        return not arm.tuned or arm.name in self.chosen

    def _ended(self, arm: Arm) -> Iterator[tuple[RunFolder, Run]]:
        for seed in self.seeds:
            run = RunFolder(self.folder / "runs" / f"{arm.name}-{seed}")
            if error := self.untuned.get(arm.name):
                yield run, Run(seed, error=error)
            elif self._settled(arm) and (found := self.found(self._run(arm, seed))):
                yield run, found
            elif end := self.ends.get(run):
                yield run, Run(seed, error=end.error)

    def _tried(self) -> Iterator[dict[str, Any]]:
        for arm in (arm for arm in self.arms if arm.tuned):
            folds = self.chosen[arm.name].folds if arm.name in self.chosen else self._folds(arm)
            for cell in self._tries(arm, folds):
                found = self.found(cell)
                if found or cell.run in self.ends or arm.name in self.chosen:
                    metric = found.metric if found and found.error is None else math.nan
                    facts = {"arm": arm.name, "tried": cell.tried, "fold": cell.recipe.fold + 1}
                    yield {**facts, self.judge.column: metric}


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_choice(value: object) -> bool:
    """Whether this is a `Choice` as a dictionary."""
    if not isinstance(value, dict) or value.keys() != {setting.name for setting in fields(Choice)}:
        return False
    settings, counts = value["settings"], (value["candidates"], value["folds"], value["readings"] or 0)
    known = isinstance(settings, dict) and settings.keys() <= kinds().keys()
    return known and all(map(_is_finite, settings.values())) and all(type(count) is int for count in counts)


_SAVED: dict[str, Callable[[Any], bool]] = {
    "recipe": lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value),
    "arms": lambda value: (
        isinstance(value, dict) and all(isinstance(overrides, dict) for overrides in value.values())
    ),
    "lrs": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "grid": lambda value: (
        isinstance(value, dict)
        and value.keys() <= kinds().keys()
        and all(isinstance(values, list) and all(map(_is_finite, values)) for values in value.values())
    ),
    "chosen": lambda value: isinstance(value, dict) and all(map(_is_choice, value.values())),
    "threads": lambda value: type(value) is int and 0 < value <= MOST_THREADS,
    "device": lambda value: isinstance(value, str),
    "machines": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}


def _checked(saved: Any) -> dict[str, Any]:
    """The settings that an earlier start saved, with values of the right types."""
    if not isinstance(saved, dict):
        raise ValueError("it holds no settings")
    for name, is_right in _SAVED.items():
        if name not in saved and name != "grid":  # which earlier versions did not write
            raise ValueError(f"it has no {name}")
        if name in saved and not is_right(saved[name]):
            raise ValueError(f"its {name} cannot be {str(saved[name])[:40]!r}")
    return saved
