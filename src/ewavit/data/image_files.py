"""`ImageFiles`: images without labels, read and prepared by the classes that read a training's images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ewavit.data.batches import ImageInputs
from ewavit.data.input_files import InputFiles
from ewavit.data.loading import (
    BatchKeys,
    Samples,
    evaluation_transform,
    loader_of,
    look_at,
    normalize,
    refusal,
    usual_statistics,
)
from ewavit.data.options import DataOptions
from ewavit.data.sources import FileImages, UnreadableImage
from ewavit.errors import EwavitError


class ImageFiles(InputFiles):
    """Images from files, prepared as evaluation images are; see `InputFiles`.

    Args:
        names: the files.
        inputs: shape of the model's inputs.
        options: batch size, preparation, device, workers and `skip_bad_images`.
    """

    kind = "images"

    def __init__(self, names: Sequence[str], inputs: ImageInputs, options: DataOptions) -> None:
        self.names, self.skipped = tuple(names), {}
        self._source = FileImages(names, range(len(names)), ())  # the label of a file is its number
        self._options = options
        self._statistics = options.statistics(inputs.in_chans) or usual_statistics(inputs.in_chans)
        resizing = options.resizing(as_stored=look_at(self._source)[0] == inputs.img_size)
        transform = evaluation_transform(inputs.img_size, resizing, self._statistics[0])
        mode = "L" if inputs.in_chans == 1 else "RGB"
        self._samples = Samples(self._source, np.arange(len(names)), transform, mode, 0, replace_bad=False)

    def batches(self) -> Iterator[tuple[list[int], Tensor]]:
        keys, size, count = BatchKeys(), self._options.batch_size, len(self.names)
        keys.batches = [np.arange(first, min(first + size, count)) for first in range(0, count, size)]
        loader = loader_of(self._samples, keys, self._options)
        done = 0
        for images, numbers, bad in loader:
            if bad and not self._options.skip_bad_images:
                loader._iterator = None  # stops the workers now
                raise refusal(*bad[0])
            batch, reasons = range(done, min(done + size, count)), iter(bad)
            readable = set(numbers.tolist())
            self.skipped |= {number: next(reasons)[1] for number in batch if number not in readable}
            done = batch.stop
            if readable:
                inputs = normalize(images.to(self._options.device, non_blocking=True), self._statistics)
                yield numbers.tolist(), inputs
        if len(self.skipped) == count:
            raise EwavitError(f"none of the {count:,} images can be read ({self.skipped[0]}): give others")

    def show(self, number: int) -> Image.Image:
        try:
            return self._source.load(number, "RGB")[0]
        except UnreadableImage as problem:
            raise refusal(problem.where, problem.reason) from None
