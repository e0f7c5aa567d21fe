"""`RunFolder`: the names of the files that a run writes, their digests, and the lock of the run."""

from __future__ import annotations

import csv
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ewavit.files import link_or_copy, locked, partial_of, regular, remove, replacing
from ewavit.training.recipe import Recipe
from ewavit.training.seal import check, digest, digests, said, sealed, unsealed


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, and the paths of the files in it.

    Attributes:
        path: the folder; neither it nor its files need to exist.
    """

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunFolder:
        """The folder of a recipe that has a name."""
        return cls(Path(recipe.output) / str(recipe.name))

    @property
    def checkpoint(self) -> Path:
        """The folder of the newest checkpoint."""
        return self.path / "checkpoint"

    @property
    def previous_checkpoint(self) -> Path:
        """The folder of the checkpoint before it."""
        return self.path / "checkpoint-previous"

    @property
    def new_checkpoint(self) -> Path:
        """The folder of a checkpoint that is being written."""
        return self.path / "checkpoint-new"

    @property
    def damaged_checkpoint(self) -> Path:
        """The folder of a damaged newest checkpoint, after the run went on from the one before it."""
        return self.path / "checkpoint-damaged"

    @property
    def model(self) -> Path:
        """The weights of the finished run."""
        return self.path / "model.safetensors"

    @property
    def config(self) -> Path:
        """What timm needs beside `model` to load the folder; not for clouds and mixtures."""
        return self.path / "config.json"

    @property
    def average(self) -> Path:
        """The averaged weights of a finished run that keeps an average."""
        return self.path / "model-average.safetensors"

    @property
    def best(self) -> Path:
        """The weights of the best epoch, of a run that keeps them."""
        return self.path / "model-best.safetensors"

    @property
    def history(self) -> Path:
        """The folder of the checkpoints of earlier epochs, of a run that keeps some."""
        return self.path / "checkpoint-hist"

    @property
    def args(self) -> Path:
        """The recipe, as YAML."""
        return self.path / "args.yaml"

    @property
    def summary(self) -> Path:
        """One row per evaluated epoch."""
        return self.path / "summary.csv"

    @property
    def predictions(self) -> Path:
        """What was predicted for every evaluated sample; without rows for some tasks."""
        return self.path / "predictions.csv"

    @property
    def picture(self) -> Path:
        """Some samples with their predictions."""
        return self.path / "predictions.png"

    @property
    def curves(self) -> Path:
        """The columns of `summary`, drawn."""
        return self.path / "curves.png"

    @property
    def trackers(self) -> Path:
        """The numbers of the run's logs in experiment trackers."""
        return self.path / "trackers.json"

    @property
    def digests(self) -> Path:
        """The digests of the files of a finished run."""
        return self.path / "digests.json"

    @property
    def lock(self) -> Path:
        """The file that a process locks while it trains the run."""
        return self.path / ".lock"

    @property
    def log(self) -> Path:
        """The output of a comparison's run, in a file beside the folder."""
        return self.path.with_name(self.path.name + ".log")

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.checkpoint.is_dir() or self.previous_checkpoint.is_dir()

    @property
    def is_used(self) -> bool:
        """Whether a run was trained here, to whatever step."""
        return self.has_checkpoint or self.model.exists()

    @property
    def is_finished(self) -> bool:
        """Whether the last files of a run are there."""
        return self.model.exists() and self.predictions.exists()

    @property
    def _files(self) -> tuple[Path, ...]:
        """The files of a finished run, the model last."""
        read = (self.args, self.summary, self.predictions, self.config, self.average, self.best)
        return (*read, self.picture, self.curves, self.model)

    def keep_checkpoint(self, epoch: int, most: int) -> None:
        """Keep the newest checkpoint as that of an epoch, and the last `most` in all; files are shared.

        Raises:
            OSError: a file cannot be linked or written.
        """
        self.history.mkdir(exist_ok=True)
        kept = self.history / f"epoch-{epoch:05d}"
        remove(kept)  # of a run that was killed here
        with replacing(kept) as partial:
            shutil.copytree(self.checkpoint, partial, copy_function=link_or_copy)
        for old in sorted(self.history.glob("epoch-*"))[:-most]:
            remove(old)

    def seal(self, model: Path) -> None:
        """Write the digests of the files that are there, with those of the file that becomes `model`.

        Raises:
            OSError: a file cannot be read or written.
        """
        names = [file.name for file in self._files if file.exists() and file != self.model]
        found = {**digests(self.path, names), self.model.name: digest(model)}
        with replacing(self.digests) as partial:
            partial.write_text(sealed({"files": found}) + "\n")

    def damage(self, *files: Path) -> str | None:
        """Compare files of a finished run, all unless given, with their digests.

        Returns:
            What is wrong, in words; None if nothing is, and for a run of version 0.1.0, which has no digests.
        """
        if not self.digests.exists():
            return None
        try:
            listed = unsealed(regular(self.digests).read_text())["files"]
            expected = {file.name: listed[file.name] for file in files} or dict(listed)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            return f"{self.digests.name}: {said(problem)}"
        try:
            check(self.path, expected, self.digests.name)
        except ValueError as problem:
            return said(problem)
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context manager for training the run: in it, no other process does. Removes what a kill left.

        Raises:
            EwavitError: another process trains it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.lock, str(self.path)):
            for left in (self.new_checkpoint, *map(partial_of, (*self._files, self.digests))):
                remove(left)
            yield

    def last_row(self) -> dict[str, str] | None:
        """The last row of `summary`, or None if it has none yet or cannot be read."""
        with suppress(OSError, ValueError, csv.Error), regular(self.summary).open(newline="") as handle:
            return next(iter(deque(csv.DictReader(handle), maxlen=1)), None)
        return None


def weights_of(source: Path) -> Path:
    """The file with the weights of a run, of a checkpoint folder, or of a file itself; it need not exist."""
    if not source.is_dir():
        return source
    run = RunFolder(source)
    if (source / "state.json").exists() or run.model.exists():
        return run.model
    return run.checkpoint / run.model.name
