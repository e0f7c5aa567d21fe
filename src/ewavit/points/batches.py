"""`PointData`: point clouds in memory, with the interface of `Data`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ewavit.data.arrays import Ints
from ewavit.data.batches import Batch, Data, Inputs
from ewavit.data.folders import formats_text
from ewavit.data.options import DataOptions
from ewavit.data.subsets import split
from ewavit.errors import EwavitError
from ewavit.points.augmentation import PointAugmentation
from ewavit.points.ops import gather_points
from ewavit.points.sources import PointSet, has_parts, read_points
from ewavit.points.transformer import NUM_CATEGORIES


@dataclass(frozen=True)
class CloudInputs(Inputs):
    """Clouds (batch, num_points, in_chans); with `parts` the model classifies points, not clouds.

    The channels are x, y, z, the features of a point and, with `parts`, the category of the cloud.
    """

    num_points: int
    parts: bool = False

    kind = "clouds"

    @property
    def size(self) -> str:
        return f"{self.num_points}x{self.in_chans}"

    @property
    def features(self) -> int:
        """Channels of the features of a point."""
        return self.in_chans - 3 - (NUM_CATEGORIES if self.parts else 0)

    def sample(self, batch: int = 1) -> Tensor:
        return torch.zeros(batch, self.num_points, self.in_chans)


class PointData(Data):
    """Clouds on the device, augmented there; draws come from torch's global generators.

    Inputs are (batch, num_points, 3), labels (batch,); features follow x, y, z. For part segmentation the
    category follows them as a one-hot vector, and labels are (batch, num_points).

    Args:
        points: the clouds.
        indices: the training clouds that are used, (clouds,).
        num_points: points per cloud; a random choice in training, the first ones in evaluation.
        options: batch size, seed, ranks, device, votes and `augmentation.aa`, a `PointAugmentation` policy.

    Raises:
        EwavitError: the augmentation policy is unknown.
    """

    def __init__(self, points: PointSet, indices: Ints, num_points: int, options: DataOptions) -> None:
        device, plan = options.device, options.plan(len(indices), len(points.eval_labels))
        self._augment = PointAugmentation.parse(options.augmentation.aa)
        self._plan, self._votes = plan, options.votes
        self._train_points = torch.from_numpy(points.train_points[indices]).to(device)
        self._train_labels = torch.from_numpy(points.train_labels[indices]).to(device)
        self._eval_points = torch.from_numpy(points.eval_points[:, :num_points]).to(device)
        self._eval_labels = torch.from_numpy(points.eval_labels).to(device)
        if points.categories:
            self._eval_labels = self._eval_labels[:, :num_points]
        self._categories = [
            None
            if category is None
            else F.one_hot(torch.from_numpy(category), NUM_CATEGORIES).float().to(device)
            for category in (
                points.train_category if points.train_category is None else points.train_category[indices],
                points.eval_category,
            )
        ]
        self.name, self.classes, self.categories = points.name, points.classes, points.categories
        self.num_train, self.num_eval = plan.num_train, plan.num_eval
        self.batches_per_epoch = plan.batches_per_epoch
        self.num_points = self._size = num_points
        self._channels = points.train_points.shape[-1]
        self._normals = (options.point_features or "").startswith("normals")
        self.in_chans = self._channels + (NUM_CATEGORIES if points.categories else 0)
        self.img_size, self.mean, self.std = 0, (), ()
        self._bad = points.bad
        if points.others:
            self.notes = (f"not read beside the clouds: {formats_text(points.others)}",)

    def class_counts(self) -> Ints | None:
        if self._train_labels.ndim > 1:
            return None
        return np.bincount(self._train_labels.cpu().numpy(), minlength=self.num_classes)

    @classmethod
    def open(cls, spec: str, options: DataOptions) -> PointData:
        """Open a set of point clouds, see `ewavit.points.sources.read_points`.

        Raises:
            EwavitError: the set cannot be read, or an option is for images or does not work for the set.
        """
        of_images = {
            name: getattr(options, name) for name in ("img_size", "mean", "interpolation", "crop_pct")
        }
        of_images["reprob"] = options.augmentation.reprob
        if given := [name for name, value in of_images.items() if value]:
            raise EwavitError(f"{given[0]} is for images: leave it out for the point clouds of {spec}")
        num_points = options.num_points or (2048 if has_parts(spec) else 1024)
        skip, holding, features = options.skip_bad_images, options.on_training_samples, options.point_features
        points = read_points(spec, num_points, skip, holding, features)
        by = points.train_labels if points.train_category is None else points.train_category
        indices, held = split(len(by), options, lambda: by)
        if held is not None:
            points = points.holding_out(held)
        return cls(points, indices, num_points, options)

    @property
    def inputs(self) -> CloudInputs:
        return CloudInputs(self.num_classes, self.in_chans, self._size, bool(self.categories))

    @property
    def num_skipped(self) -> int:
        return self._bad

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for indices in self._plan.train_indices(epoch, start):
            chosen = torch.from_numpy(indices).to(self._train_points.device)
            points, labels = self._train_points[chosen], self._train_labels[chosen]
            if points.shape[1] > self._size:
                draws = torch.rand(points.shape[:2], device=points.device)
                some = draws.topk(self._size, sorted=False)[1]
                points = gather_points(points, some)
                labels = labels.gather(1, some) if labels.ndim == 2 else labels
            points = self._augment(points, self._normals)
            yield self._with_category(points, self._categories[0], chosen), labels

    def eval_batches(self) -> Iterator[Batch]:
        for indices in self._plan.eval_indices():
            chosen = torch.from_numpy(indices).to(self._eval_points.device)
            points = self._with_category(self._eval_points[chosen], self._categories[1], chosen)
            yield points, self._eval_labels[chosen]

    def _with_category(self, points: Tensor, categories: Tensor | None, chosen: Tensor) -> Tensor:
        if categories is None:
            return points
        return torch.cat([points, categories[chosen].unsqueeze(1).expand(-1, points.shape[1], -1)], -1)

    def voting(self, predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`predict`, or its mean over each cloud and augmented views, the same views in every evaluation."""
        if self._votes == 1:
            return predict

        def vote(points: Tensor) -> Tensor:
            total = predict(points).float()
            devices = [points.device] if points.is_cuda else []
            for number in range(1, self._votes):
                with torch.random.fork_rng(devices):
                    torch.manual_seed(number)
                    view = self._augment(points, self._normals)
                total = total + predict(view).float()
            return total / self._votes

        return vote

    def evaluation_clouds(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """The evaluation clouds of these indices, (clouds, num_points, 3), on the CPU."""
        clouds: npt.NDArray[np.float32] = self._eval_points[list(indices), :, :3].cpu().numpy()
        return clouds
