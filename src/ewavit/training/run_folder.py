"""`RunFolder`: the names of the files that a run writes."""

from __future__ import annotations

import csv
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ewavit.files import regular
from ewavit.training.recipe import Recipe


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
    def log(self) -> Path:
        """The output of a comparison's run, in a file beside the folder."""
        return self.path.with_name(self.path.name + ".log")

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.checkpoint.is_dir() or self.previous_checkpoint.is_dir()

    @property
    def is_finished(self) -> bool:
        """Whether the last files of a run are there."""
        return self.model.exists() and self.predictions.exists()

    def last_row(self) -> dict[str, str] | None:
        """The last row of `summary`, or None if it has none yet or cannot be read."""
        with suppress(OSError, ValueError, csv.Error), regular(self.summary).open(newline="") as handle:
            return next(iter(deque(csv.DictReader(handle), maxlen=1)), None)
        return None
