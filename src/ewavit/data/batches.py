"""`Data`, which a training loop reads; `BatchPlan`, the order of its samples; `Inputs`, a model's inputs."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ewavit.data.arrays import Ints
from ewavit.errors import EwavitError

Batch = tuple[Tensor, Tensor]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


def entropy(seed: int, *more: int) -> np.random.SeedSequence:
    """Hash a seed and further numbers, 0 or more, into a seed sequence for numpy's generators."""
    return np.random.SeedSequence([seed % 2**64, *more])


def seed_all(seed: int, *more: int) -> None:
    """Seed torch, numpy and `random` from some numbers, alike on every machine."""
    state = int(entropy(seed, *more).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


@dataclass(frozen=True)
class BatchPlan:
    """Which samples make up which batch, for every epoch and rank.

    An epoch is one permutation, drawn from (seed, epoch). Rank r takes every `world_size`-th sample from the
    r-th on, so every rank has the same number of full batches. Evaluation takes the samples in order, each
    on one rank.

    Args:
        num_train: training samples.
        num_eval: evaluation samples.
        batch_size: samples per batch and rank.
        seed: seed of the permutations.
        rank: number of this process.
        world_size: number of processes.
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

    def train_indices(self, epoch: int, start: int = 0) -> Iterator[Ints]:
        """Yield the indices (batch,) of each training batch of this rank, from batch `start` on."""
        order = np.random.default_rng(entropy(self.seed, epoch)).permutation(self.num_train)
        mine = order[self.rank :: self.world_size]
        for batch in range(start, self.batches_per_epoch):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size]

    def eval_indices(self) -> Iterator[Ints]:
        """Yield the indices (batch,) of each evaluation batch of this rank; the last may be smaller."""
        mine = np.arange(self.rank, self.num_eval, self.world_size)
        for first in range(0, len(mine), self.batch_size):
            yield mine[first : first + self.batch_size]


@dataclass(frozen=True)
class ClassPlan(BatchPlan):
    """Batches with `per_class` images of each class in them, or of a class several times as many.

    The images of a class are shuffled and cut into groups of `per_class`; what is left over waits for another
    epoch, and a class with fewer images repeats them. An epoch is one permutation of all groups, drawn from
    (seed, epoch). The ranks share it as in `BatchPlan`.

    Args:
        labels: classes of the training samples.
        per_class: samples in a group; it divides `batch_size`.

    Raises:
        EwavitError: `per_class` does not divide `batch_size`.
    """

    labels: tuple[int, ...] = ()
    per_class: int = 4

    def __post_init__(self) -> None:
        if self.batch_size % self.per_class:
            raise EwavitError(
                f"--batch-size {self.batch_size} is no multiple of --per-class {self.per_class}: change one"
            )

    @property
    def batches_per_epoch(self) -> int:
        sizes = np.unique(np.array(self.labels), return_counts=True)[1]
        groups = int(np.maximum(sizes // self.per_class, 1).sum())
        return groups * self.per_class // (self.batch_size * self.world_size)

    def train_indices(self, epoch: int, start: int = 0) -> Iterator[Ints]:
        """Yield the indices (batch,) of each training batch of this rank, from batch `start` on."""
        generator = np.random.default_rng(entropy(self.seed, epoch))
        labels, groups = np.array(self.labels), []
        for label in np.unique(labels):
            mine = generator.permutation(np.flatnonzero(labels == label))
            mine = np.resize(mine, max(len(mine) // self.per_class, 1) * self.per_class)
            groups.append(mine.reshape(-1, self.per_class))
        of_rank = generator.permutation(np.concatenate(groups))[self.rank :: self.world_size]
        size = self.batch_size // self.per_class
        for batch in range(start, self.batches_per_epoch):
            yield of_rank[batch * size : (batch + 1) * size].ravel()


@dataclass(frozen=True)
class Inputs(ABC):
    """Shape of a model's inputs, and the number of classes.

    Attributes:
        num_classes: number of classes.
        in_chans: channels of an image or of a point.
        kind: the inputs in messages, "images" or "clouds".
    """

    num_classes: int
    in_chans: int

    kind: ClassVar[str]

    @property
    @abstractmethod
    def size(self) -> str:
        """Shape of one input in words, e.g. "28x28x1"."""

    @abstractmethod
    def sample(self, batch: int = 1) -> Tensor:
        """Zeros in the shape of a batch of `batch` inputs, float32."""

    def __str__(self) -> str:
        return f"{self.size} {self.kind}, {self.num_classes} classes"


@dataclass(frozen=True)
class ImageInputs(Inputs):
    """Images (batch, in_chans, img_size, img_size); `img_size` in pixels."""

    img_size: int

    kind = "images"

    @property
    def size(self) -> str:
        return f"{self.img_size}x{self.img_size}x{self.in_chans}"

    def sample(self, batch: int = 1) -> Tensor:
        return torch.zeros(batch, self.in_chans, self.img_size, self.img_size)


@dataclass(frozen=True)
class Resizing:
    """How images are resized and cropped for evaluation, in timm's words.

    Attributes:
        interpolation: filter of the resize, e.g. "bicubic".
        crop_pct: side of the crop, as a share of the resized image's side.
        crop_mode: "center" keeps the aspect ratio and cuts the longer side, "squash" does not keep it,
            "border" keeps it and pads the shorter side.
    """

    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"


class Data(ABC):
    """A training and an evaluation set, as batches. A sample is one image or point cloud with its label.

    Attributes:
        name: short name for logs.
        classes: class names, in the order of the labels.
        in_chans: channels of the images, 1 or 3, or of the points.
        img_size: height and width in pixels; 0 for clouds.
        num_points: points per cloud; None for images.
        categories: the parts of each category, for clouds with labelled parts; else empty.
        eval_classes: names of the evaluation classes, where they are others than `classes`; else empty.
        mean: mean of each channel, values in 0..1, subtracted from the images; empty for clouds.
        std: standard deviation of each channel, by which the images are divided; empty for clouds.
        resizing: how evaluation images are resized and cropped; None for clouds.
        num_train: training samples, after `limit` and `holdout`, over all ranks.
        num_eval: evaluation samples, over all ranks.
        batches_per_epoch: full training batches per rank.
        notes: what a user should know about the files, in sentences.
    """

    name: str
    classes: tuple[str, ...]
    in_chans: int
    img_size: int
    num_points: int | None = None
    categories: tuple[tuple[int, ...], ...] = ()
    eval_classes: tuple[str, ...] = ()
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resizing: Resizing | None = None
    num_train: int
    num_eval: int
    batches_per_epoch: int
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def inputs(self) -> Inputs:
        """Shape of the inputs, and the number of classes."""
        return ImageInputs(len(self.classes), self.in_chans, self.img_size)

    def voting(self, predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function that evaluation predicts with.

        Args:
            predict: maps a batch of inputs to logits.

        Returns:
            `predict` itself, or its mean over several views of each input.
        """
        return predict

    def eval_names(self) -> list[str] | None:
        """Names of the inputs of this rank's latest `eval_batches`, in order; None if they have none."""
        return None

    def class_counts(self) -> Ints | None:
        """Training samples of each class, (classes,), over all ranks; None where labels are not known yet."""
        return None

    @property
    def num_skipped(self) -> int:
        """Number of distinct unreadable samples skipped so far on this rank."""
        return 0

    @abstractmethod
    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the training batches of this rank in one epoch. Finish or drop one epoch before the next.

        Args:
            epoch: number of the epoch, from 0; with the seed it fixes the order of the samples.
            start: number of the first batch, to resume within an epoch.

        Returns:
            An iterator of inputs and labels on the device. Inputs are normalised float32 images (batch,
            channels, height, width) or float32 clouds (batch, points, channels). Labels are int64 (batch,),
            or (batch, points) for labelled parts. All batches are full.

        Raises:
            EwavitError: a sample cannot be read and unreadable samples are not skipped.
        """

    @abstractmethod
    def eval_batches(self) -> Iterator[Batch]:
        """Yield this rank's share of the evaluation set in order, unaugmented; shapes as in training.

        Raises:
            EwavitError: a sample cannot be read and unreadable samples are not skipped.
        """
