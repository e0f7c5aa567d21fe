"""`CloudFiles`: point clouds without labels, one in each file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ewavit.data.input_files import InputFiles
from ewavit.data.options import DataOptions
from ewavit.errors import EwavitError
from ewavit.points.batches import CloudInputs
from ewavit.points.files import Floats
from ewavit.points.sources import read_cloud


class CloudFiles(InputFiles):
    """Point clouds from files, prepared as evaluation clouds are; see `InputFiles`.

    Args:
        names: the files.
        inputs: shape of the model's inputs.
        options: batch size, device and `skip_bad_images`.
    """

    kind = "clouds"

    def __init__(self, names: Sequence[str], inputs: CloudInputs, options: DataOptions) -> None:
        self.names, self.skipped = tuple(names), {}
        self._num_points, self._options = inputs.num_points, options

    def batches(self) -> Iterator[tuple[list[int], Tensor]]:
        for first in range(0, len(self.names), self._options.batch_size):
            clouds: dict[int, Floats] = {}
            for number in range(first, min(first + self._options.batch_size, len(self.names))):
                try:
                    clouds[number] = self._read(number)
                except EwavitError as problem:
                    if not self._options.skip_bad_images:
                        raise
                    self.skipped[number] = str(problem)
            if clouds:
                inputs = torch.from_numpy(np.stack(list(clouds.values())))
                yield list(clouds), inputs.to(self._options.device)
        if len(self.skipped) == len(self.names):
            raise EwavitError(f"none of the {len(self.names):,} clouds can be read: {self.skipped[0]}")

    def show(self, number: int) -> Floats:
        return self._read(number)[:, :3]

    def _read(self, number: int) -> Floats:
        return read_cloud(Path(self.names[number]), self._num_points, self._options.point_features)
