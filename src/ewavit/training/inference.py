"""`predict`: what a trained model finds in files without labels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ewavit.data.input_files import find_inputs
from ewavit.data.options import DataOptions
from ewavit.errors import EwavitError
from ewavit.files import replacing
from ewavit.tasks.inference import Inference, InferenceOptions
from ewavit.training.evaluation import on_device
from ewavit.training.export import predictor
from ewavit.training.opening import open_for, usable_workers


@dataclass(frozen=True)
class Outputs:
    """Files that a prediction leaves, each unless None.

    Attributes:
        csv: one row for each input.
        sheet: a PNG picture with the first inputs and what was found in them.
        folder: a new folder with a file or more for each input, where the task makes such files.

    Raises:
        EwavitError: a name does not work.
    """

    csv: Path | None = None
    sheet: Path | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        for flag, file, suffix in (("--csv", self.csv, ".csv"), ("--sheet", self.sheet, ".png")):
            if file is not None and (file.suffix != suffix or not file.parent.is_dir() or file.is_dir()):
                raise EwavitError(
                    f"{flag} {file} does not work: give a path that ends in {suffix}, in an existing folder"
                )
        if self.folder is not None and (self.folder.exists() or not self.folder.parent.is_dir()):
            raise EwavitError(f"--to {self.folder} does not work: give a new folder in an existing one")

    def check(self, inputs: Sequence[str]) -> None:
        """Refuse to replace an input.

        Raises:
            EwavitError: a file to write is an input.
        """
        for file in (self.csv, self.sheet):
            if file is not None and file.exists() and any(Path(name).samefile(file) for name in inputs):
                raise EwavitError(f"{file} is one of the inputs: choose another name for the output")


def predict(
    source: Path,
    inputs: Sequence[str | Path],
    *,
    topk: int = 5,
    outputs: Outputs | None = None,
    batch_size: int = 128,
    workers: int = 4,
    skip_bad_images: bool = False,
) -> tuple[Inference, list[str]]:
    """Predict for files without labels, prepared as the run's evaluation prepared its own.

    Args:
        source: a run's folder, a checkpoint folder, a safetensors or an ONNX file that ewavit wrote.
        inputs: files, folders and patterns, see `ewavit.data.input_files.find_inputs`.
        topk: number of classes to show of each input.
        outputs: files to write; none unless given. A file is written whole or not at all.
        batch_size: inputs per batch.
        workers: processes that read images.
        skip_bad_images: leave out inputs that cannot be read instead of raising an error.

    Returns:
        The predictions, and what was written, in sentences.

    Raises:
        EwavitError: the source or an input cannot be read, or an output cannot be written. Nothing is left.
    """
    if topk < 1:
        raise EwavitError(f"--topk {topk} shows nothing: choose 1 or more")
    outputs = outputs or Outputs()
    predict, card = predictor(source)
    task = card.task
    names = find_inputs([str(place) for place in inputs], task.suffixes, task.kind)
    outputs.check(names)
    predict, device = on_device(predict)
    options = DataOptions(
        batch_size=batch_size, workers=min(usable_workers(workers), len(names) - 1), device=device,
        skip_bad_images=skip_bad_images, **card.preparation,
    )  # fmt: skip
    files = task.open_files(names, card.inputs, options, card.classes)
    with ExitStack() as stack:  # all files are written before the first one gets its name
        csv, sheet, folder = (
            None if path is None else stack.enter_context(replacing(path))
            for path in (outputs.csv, outputs.sheet, outputs.folder)
        )
        if folder is not None:
            folder.mkdir()
        of_task = InferenceOptions(
            classes=card.classes, predict=predict, data=lambda: open_for(card, None, options), topk=topk,
            sheet=sheet is not None, folder=folder,
        )  # fmt: skip
        found = task.inference(files, of_task)
        with torch.inference_mode():
            for numbers, batch in files.batches():
                found.update(numbers, batch, predict(batch).float())
        if csv is not None:
            found.write(csv)
        drawn = 0 if sheet is None else found.draw(sheet)
    return found, _said(outputs, len(names) - len(files.skipped), drawn, task.kind)


def _said(outputs: Outputs, count: int, drawn: int, kind: str) -> list[str]:
    """A sentence for each file or folder that was written."""
    of_all = f"{count:,} {kind}"
    first = of_all if drawn == count else f"the first {drawn:,} of {of_all}"
    written = ((outputs.folder, of_all), (outputs.csv, of_all), (outputs.sheet, first))
    return [f"wrote {path}: {what}" for path, what in written if path is not None]
