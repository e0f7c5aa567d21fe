"""`Inference`: what a task makes of a model's outputs for inputs without labels: rows, lines, a picture."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ewavit.data.batches import Data
from ewavit.data.input_files import InputFiles
from ewavit.errors import EwavitError
from ewavit.files import csv_text, replacing

Value = str | int | float | Sequence[str] | Sequence[int] | Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """What a prediction is made with, and what was asked for. A task uses what it needs.

    Attributes:
        classes: names of the model's classes.
        predict: the model: inputs -> outputs.
        data: opens the data set of the training, prepared for the model.
        topk: number of classes, or of neighbours, to show of each input.
        sheet: whether a contact sheet will be drawn.
        folder: where to write a file or more for each input; None if not asked for.
    """

    classes: tuple[str, ...]
    predict: Callable[[Tensor], Tensor]
    data: Callable[[], Data]
    topk: int = 5
    sheet: bool = False
    folder: Path | None = None


class Inference(ABC):
    """Accumulates a model's outputs for inputs without labels, and says, writes and draws what they mean.

    Args:
        files: the inputs.
        options: the model and what was asked for.

    Attributes:
        has_sheet: whether `draw` is implemented.
        has_files: whether `update` writes files into `options.folder`. That folder exists then, and gets the
            name that the user gave once all inputs are done.

    Raises:
        EwavitError: something was asked for that the task does not have.
    """

    has_sheet: ClassVar[bool] = False
    has_files: ClassVar[bool] = False

    def __init__(self, files: InputFiles, options: InferenceOptions) -> None:
        self.files, self.options = files, options
        if options.sheet and not self.has_sheet:
            raise EwavitError("the task of this model has no contact sheet: leave out --sheet")
        if options.folder is not None and not self.has_files:
            raise EwavitError("the task of this model has no file for each input: leave out --to")

    @abstractmethod
    def update(self, numbers: Sequence[int], inputs: Tensor, outputs: Tensor) -> None:
        """Add a batch.

        Args:
            numbers: of the inputs in `files`.
            inputs: the model's inputs.
            outputs: the model's outputs, float32.
        """

    @abstractmethod
    def rows(self) -> list[dict[str, Value]]:
        """One row for each input, in the order of `files`, with equal keys. The first is "input"."""

    @abstractmethod
    def line(self, row: dict[str, Value]) -> str:
        """A row as text, without the name of the input."""

    def stem(self, number: int) -> str:
        """The name of an input's files in a folder: its own, with its number where inputs share a name."""
        stems = [Path(name).stem for name in self.files.names]
        return stems[number] if stems.count(stems[number]) == 1 else f"{stems[number]}-{number}"

    def draw(self, path: Path) -> int:
        """Draw a contact sheet of the first inputs.

        Returns:
            The number of inputs in it.
        """
        raise NotImplementedError

    def write(self, path: Path) -> None:
        """Write the rows as a CSV file. See `csv_text` for text; lists are joined by |."""
        rows = self.rows()
        with (
            replacing(path) as partial,
            partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
        ):
            writer = csv.writer(handle)
            writer.writerow(rows[0])
            writer.writerows([_cell(value) for value in row.values()] for row in rows)


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, str | int):
        return csv_text(str(value))
    return csv_text("|".join(f"{each:.4f}" if isinstance(each, float) else str(each) for each in value))


def shown(text: str) -> str:
    """A text on one line of a terminal or in a picture: characters that cannot be printed are escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
