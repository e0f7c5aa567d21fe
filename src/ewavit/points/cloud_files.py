"""`CloudFiles`: point clouds without labels, one in each file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ewavit.data.input_files import InputFiles
from ewavit.data.options import DataOptions
from ewavit.errors import EwavitError
from ewavit.points.batches import CloudInputs
from ewavit.points.files import Floats
from ewavit.points.sources import read_cloud, read_whole
from ewavit.points.transformer import NUM_CATEGORIES


class CloudFiles(InputFiles):
    """Point clouds from files, prepared as evaluation clouds are; see `InputFiles`.

    Args:
        names: the files.
        inputs: shape of the model's inputs.
        options: batch size, device and `skip_bad_images`.
        categories: names of the categories, for a model of parts; the folder of a file has one of them.

    Raises:
        EwavitError: the folder of a file has the name of no category.
    """

    kind = "clouds"

    def __init__(
        self,
        names: Sequence[str],
        inputs: CloudInputs,
        options: DataOptions,
        categories: Sequence[str] = (),
    ) -> None:
        self.names, self.skipped = tuple(names), {}
        self._num_points, self._options = inputs.num_points, options
        self._categories = []
        for name in names if categories else ():
            folder = Path(name).absolute().parent.name
            if folder not in categories:
                raise EwavitError(
                    f"the category of {name} is the name of its folder, and {folder} is none: put the file "
                    f"into a folder {', '.join(categories)}"
                )
            self._categories.append(categories.index(folder))

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
                if self._categories:
                    category = torch.tensor([self._categories[number] for number in clouds])
                    one_hot = F.one_hot(category, NUM_CATEGORIES).float().unsqueeze(1)
                    inputs = torch.cat([inputs, one_hot.expand(-1, inputs.shape[1], -1)], -1)
                yield list(clouds), inputs.to(self._options.device)
        if len(self.skipped) == len(self.names):
            raise EwavitError(f"none of the {len(self.names):,} clouds can be read: {self.skipped[0]}")

    def show(self, number: int) -> Floats:
        return self._read(number)[:, :3]

    def whole(self, number: int) -> tuple[npt.NDArray[Any], Floats]:
        """All points of a file (points, 3), as stored, and as the model gets those that it sees."""
        return read_whole(Path(self.names[number]), self._num_points)

    def _read(self, number: int) -> Floats:
        return read_cloud(Path(self.names[number]), self._num_points, self._options.point_features)
