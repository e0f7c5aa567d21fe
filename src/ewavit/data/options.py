"""`DataOptions`: how a data set is opened, apart from its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ewavit.data.arrays import Ints
from ewavit.data.augmentation import Augmentation
from ewavit.data.batches import BatchPlan, ClassPlan, Resizing, Statistics
from ewavit.errors import EwavitError

PREPARATION = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # of images, in timm's words


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of `open_data`. A sample is one image or one point cloud with its label.

    Args:
        batch_size: samples per batch and rank.
        seed: seed of the order of the samples and of the augmentation of images read from files.
        augmentation: augmentation of the training samples.
        limit: use only the first `limit` training samples; a set stored class by class is interleaved first.
        shots: use only the first `shots` training samples of each class, in place of `limit`.
        resample: draw the samples of `limit` or `shots` at random, from `seed` alone.
        test_on_rest: evaluate on the training samples that `limit` or `shots` leaves out.
        holdout: share of the (limited) training samples to evaluate on in place of the evaluation set; they
            are not trained on. The choice depends only on the number of samples, not on the seed.
        fold: which share of that size is held out, counted from 0.
        img_size: height and width in pixels; None follows the images. Not for point clouds.
        mean: mean of each channel, values in 0..1, to normalise images with; needs `std`. None takes the
            training images' own for sets in memory, else ImageNet's (three channels) or 0.5 (one channel).
        std: standard deviation of each channel; needs `mean`.
        interpolation: filter that resizes evaluation images from files, by timm's name; None is bicubic.
        crop_pct: share of the side that evaluation keeps of images from files; None is 0.875, or 1 where all
            images have the wanted size already.
        crop_mode: timm's crop mode for evaluation images from files; None is "center".
        workers: processes that read training images, and as many for evaluation; 0 reads in this process.
        device: device of the batches, and of whole sets that are kept in memory.
        rank: number of this process, 0 to `world_size` - 1.
        world_size: number of processes that share each epoch.
        skip_bad_images: skip and count samples that cannot be read instead of raising an error.
        data_dir: root folder of timm's data sets.
        train_split: name of the training split of a timm set, or of the training folder.
        val_split: name of the evaluation split of a timm set, or of the evaluation folder.
        num_points: points per cloud; None takes 1,024, or 2,048 for clouds with labelled parts.
        point_features: "normals", "colours" or "normals,colours" of each point, after its coordinates.
        votes: evaluation passes over each cloud, averaged; all but the first are augmented.
        per_class: images of a class that stand together in a training batch; None deals single images.

    Raises:
        EwavitError: an option is out of range.
    """

    batch_size: int
    seed: int = 0
    augmentation: Augmentation = Augmentation()  # noqa: RUF009 (frozen)
    limit: int | None = None
    shots: int | None = None
    resample: bool = False
    test_on_rest: bool = False
    holdout: float = 0.0
    fold: int = 0
    img_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    workers: int = 2
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    rank: int = 0
    world_size: int = 1
    skip_bad_images: bool = False
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    num_points: int | None = None
    point_features: str | None = None
    votes: int = 1
    per_class: int | None = None

    def __post_init__(self) -> None:
        lowest = {"batch_size": 1, "limit": 1, "shots": 1, "img_size": 1, "workers": 0, "num_points": 1}
        lowest |= {"votes": 1, "fold": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise EwavitError(f"{name} {value} is too small: give {least} or more")
        if not 0 <= self.holdout < 1:
            raise EwavitError(f"holdout {self.holdout} is out of range: give 0 or more and less than 1")
        if (self.mean is None) != (self.std is None):
            missing = "mean" if self.mean is None else "std"
            raise EwavitError(f"mean and std belong together and {missing} is missing: give both or neither")

    @property
    def on_training_samples(self) -> bool:
        """Whether evaluation takes training samples, so that no evaluation set is needed."""
        return self.holdout > 0 or self.test_on_rest

    def statistics(self, in_chans: int) -> Statistics | None:
        """`mean` and `std` for so many channels; None unless given.

        One value stands for all channels. For images of one channel several values are averaged.

        Raises:
            EwavitError: there are neither one nor `in_chans` values.
        """
        if self.mean is None or self.std is None:
            return None
        return _for_channels("mean", self.mean, in_chans), _for_channels("std", self.std, in_chans)

    def resizing(self, as_stored: bool) -> Resizing:
        """How evaluation resizes images from files; `as_stored`: they all have the wanted size already."""
        crop_pct = (1.0 if as_stored else 0.875) if self.crop_pct is None else self.crop_pct
        return Resizing(self.interpolation or "bicubic", crop_pct, self.crop_mode or "center")

    def plan(self, num_train: int, num_eval: int, labels: Callable[[], Ints] | None = None) -> BatchPlan:
        """The batches of so many training and evaluation samples for this rank.

        Args:
            num_train: training samples.
            num_eval: evaluation samples.
            labels: gives the classes of the training samples, (samples,); called with `per_class` only.
        """
        numbers = (num_train, num_eval, self.batch_size, self.seed, self.rank, self.world_size)
        if self.per_class is None or labels is None:
            return BatchPlan(*numbers)
        return ClassPlan(*numbers, tuple(labels().tolist()), self.per_class)


def _for_channels(name: str, values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    if len(values) == 1:
        return values * in_chans
    if in_chans == 1:
        return (sum(values) / len(values),)
    if len(values) != in_chans:
        raise EwavitError(f"{name} has {len(values)} values for {in_chans} channels: give 1 or {in_chans}")
    return values
