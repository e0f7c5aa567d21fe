"""`Data`, what a training loop sees of a data set; the order of its images; and sets that lie in memory."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from ewavit.training.augmentation import Augmentation, TensorAugmentation
from ewavit.training.sources import Arrays, Ints

Batch = tuple[Tensor, Tensor]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


def entropy(seed: int, *more: int) -> np.random.SeedSequence:
    """Hash a seed and further numbers >= 0 into the state of a generator."""
    return np.random.SeedSequence([seed % 2**64, *more])


def seed_all(seed: int, *more: int) -> None:
    """Seed torch, numpy and random from (seed, ...), the same on every machine."""
    state = int(entropy(seed, *more).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


@dataclass(frozen=True)
class BatchPlan:
    """Which images make up which batch, for every epoch and rank.

    An epoch is one permutation drawn from (seed, epoch), of which rank r takes every `world_size`-th image
    from the r-th on; every rank has the same number of full batches. Evaluation takes the images in order,
    each on one rank.
    """

    num_train: int
    num_eval: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def batches_per_epoch(self) -> int:
        """Full training batches per rank."""
        return self.num_train // (self.batch_size * self.world_size)

    def train(self, epoch: int, start: int = 0) -> Iterator[Ints]:
        """Yield the indices (batch,) of each training batch of this rank, from batch `start` on."""
        order = np.random.default_rng(entropy(self.seed, epoch)).permutation(self.num_train)
        mine = order[self.rank :: self.world_size]
        for batch in range(start, self.batches_per_epoch):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size]

    def eval(self) -> Iterator[Ints]:
        """Yield the indices of each evaluation batch of this rank; the last may be smaller."""
        mine = np.arange(self.rank, self.num_eval, self.world_size)
        for first in range(0, len(mine), self.batch_size):
            yield mine[first : first + self.batch_size]


@dataclass(frozen=True)
class Inputs:
    """What a model is for: the number of classes, and images of `img_size` pixels or clouds of `num_points`.

    `parts` says that not clouds but their points are classified.
    """

    num_classes: int
    in_chans: int
    img_size: int
    num_points: int | None = None
    parts: bool = False

    @property
    def kind(self) -> str:
        """What one calls them."""
        return "images" if self.num_points is None else "clouds"

    @property
    def size(self) -> str:
        """Of one, in words."""
        sides = (self.img_size, self.img_size) if self.num_points is None else (self.num_points,)
        return "x".join(map(str, (*sides, self.in_chans)))

    def sample(self, batch: int = 1) -> Tensor:
        """Zeros, images (batch, channels, height, width) or clouds (batch, points, channels)."""
        if self.num_points is None:
            return torch.zeros(batch, self.in_chans, self.img_size, self.img_size)
        return torch.zeros(batch, self.num_points, self.in_chans)

    def __str__(self) -> str:
        return f"{self.size} {self.kind}, {self.num_classes} classes"


class Data(ABC):
    """A training and an evaluation set, as batches.

    Attributes:
        name: short name for logs.
        classes: class names, in the order of the labels.
        in_chans: channels of the images, 1 or 3, or of the points.
        img_size: height and width, pixels; 0 for clouds.
        num_points: points per cloud; None for images.
        categories: of clouds with labelled parts, the parts of each category; else empty.
        mean: mean of each channel that was subtracted, of values in 0..1.
        std: standard deviation of each channel that was divided by.
        num_train: training images (after `limit`).
        num_eval: evaluation images, over all ranks.
        batches_per_epoch: full training batches per rank.
    """

    name: str
    classes: tuple[str, ...]
    in_chans: int
    img_size: int
    num_points: int | None = None
    categories: tuple[tuple[int, ...], ...] = ()
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_eval: int
    batches_per_epoch: int

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def inputs(self) -> Inputs:
        """What a model for this data is for."""
        return Inputs(len(self.classes), self.in_chans, self.img_size, self.num_points, bool(self.categories))

    def voting(self, predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What evaluation asks for logits: `predict` itself, or its mean over several views of an input."""
        return predict

    def picture(self, predictions: Sequence[tuple[int, int]], path: Path) -> None:  # noqa: B027 (optional)
        """Draw a few evaluation inputs, given each one's label and predicted class, where there is a way."""

    @property
    def bad_images(self) -> int:
        """Distinct unreadable images skipped so far, on this rank."""
        return 0

    @abstractmethod
    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the training batches of this rank in one epoch; finish or drop one epoch before the next.

        Args:
            epoch: decides the order of the images, with the seed.
            start: number of the first batch, to resume within an epoch.

        Returns:
            An iterator of images (batch, channels, height, width), float32, normalised, or clouds (batch,
            points, channels), and labels (batch,), int64, all on the device. All batches are full.

        Raises:
            EwavitError: an image cannot be read and bad images are not skipped.
        """

    @abstractmethod
    def eval_batches(self) -> Iterator[Batch]:
        """Yield this rank's share of the evaluation set in order, unaugmented; shapes as in training.

        Raises:
            EwavitError: an image cannot be read and bad images are not skipped.
        """


class TensorData(Data):
    """A set that lies on the device as one uint8 tensor and is augmented there in batches.

    Augmentation draws from the global generators of torch and `random`: who seeds them before each batch
    gets the same batch again.
    Images per second: benchmarks/data_rate.py.

    Args:
        arrays: the images; resized once if `img_size` differs.
        indices: which training images are used, in the order that `plan` counts, (plan.num_train,).
        plan: the order of the images.
        augmentation: what happens to training images.
        img_size: height and width in pixels; None keeps the stored size.
        statistics: to normalise with; None takes those of the training images.
        device: where the tensor lies and the batches are made.
    """

    def __init__(
        self,
        arrays: Arrays,
        indices: Ints,
        plan: BatchPlan,
        augmentation: Augmentation,
        img_size: int | None,
        statistics: Statistics | None,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._train_images = _resized(arrays.train_images[indices], img_size, device)
        self._train_labels = torch.from_numpy(arrays.train_labels[indices]).to(device)
        self._eval_images = _resized(arrays.eval_images, img_size, device)
        self._eval_labels = torch.from_numpy(arrays.eval_labels).to(device)
        self.name = arrays.name
        self.classes = arrays.classes
        self.num_train, self.num_eval = plan.num_train, plan.num_eval
        self.batches_per_epoch = plan.batches_per_epoch
        self.in_chans, self.img_size = self._train_images.shape[1:3]
        self.mean, self.std = statistics or _channel_statistics(self._train_images)
        self._augment = TensorAugmentation(augmentation, self.img_size, self.mean, self.std, device)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for indices in self._plan.train(epoch, start):
            chosen = torch.from_numpy(indices).to(self._train_images.device)
            yield self._augment(self._train_images[chosen]), self._train_labels[chosen]

    def eval_batches(self) -> Iterator[Batch]:
        for indices in self._plan.eval():
            chosen = torch.from_numpy(indices).to(self._eval_images.device)
            yield self._augment.normalize(self._eval_images[chosen]), self._eval_labels[chosen]


def _resized(images: Any, img_size: int | None, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(images).to(device)
    if img_size is None or img_size == tensor.shape[-1]:
        return tensor
    resize = v2.Resize([img_size, img_size], antialias=True)
    return torch.cat([resize(part) for part in torch.split(tensor, 1000)])


def _channel_statistics(images: Tensor) -> Statistics:
    """Mean and standard deviation per channel of uint8 (images, channels, h, w), of values scaled to 0..1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).cpu().double()
        mean = (counts @ values / counts.sum()).item()
        std = (counts @ (values - mean) ** 2 / counts.sum()).sqrt().item()
        means.append(mean)
        stds.append(max(std, 1 / 255))  # a constant channel has none
    return tuple(means), tuple(stds)
