"""The door to every data set: `open_data` turns a spec into `Data`, training and evaluation batches.

Small sets are one uint8 tensor on the training device, augmented there in batches (`TensorData`); images in
files go through worker processes and timm's transforms (`LoaderData`); timm's streamed sets are `StreamData`;
point clouds are `PointData`.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ewavit.data import sources
from ewavit.data.augmentation import Augmentation
from ewavit.data.batches import BatchPlan, Data, _first, _hold_out
from ewavit.data.in_memory import TensorData
from ewavit.data.loading import LoaderData, StreamData
from ewavit.data.sources import TIMM_PREFIXES, Arrays, ImageSource
from ewavit.errors import EwavitError
from ewavit.points.sources import POINT_PREFIXES, is_points
from ewavit.training.recipe import Recipe

__all__ = ["Augmentation", "Data", "open_data", "open_recipe_data"]


def open_data(
    spec: str,
    *,
    batch_size: int,
    seed: int = 0,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
    limit: int | None = None,
    holdout: float = 0.0,
    img_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    workers: int = 2,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    rank: int = 0,
    world_size: int = 1,
    skip_bad_images: bool = False,
    data_dir: str | None = None,
    train_split: str = "train",
    val_split: str = "validation",
    num_points: int | None = None,
    votes: int = 1,
) -> Data:
    """Open a data set for training and evaluation.

    Args:
        spec: "fashion-mnist-mini" (bundled); a folder with train/ and val/ of class folders, of CIFAR-10/100
            in the python format, or of Tiny-ImageNet; or what timm's create_dataset takes: "torch/...",
            "hfds/...", "wds/...", "tfds/..."; or point clouds: "solids" (bundled), "modelnet10:PATH" and the
            others of `ewavit.points.sources.read_points`.
        batch_size: images per batch and rank.
        seed: decides the order of the images and the augmentation of images read from files.
        augmentation: what happens to training images.
        limit: use the first so many training images only; sets stored class by class are first interleaved.
        holdout: this share of the (limited) training images is not trained on but evaluated in the place of
            the evaluation images; which ones depends on their number alone.
        img_size: height and width in pixels; None follows the images.
        mean: of each channel, values in 0..1, given together with `std`, as a trained model wants them; None
            takes those of the training images for sets in memory, else ImageNet's or (one channel) 0.5.
        std: standard deviation of each channel.
        workers: processes that read images, for training and as many for evaluation; 0 reads in this one.
        device: where sets in memory lie and batches are put.
        rank: number of this process among `world_size`.
        world_size: processes that share each epoch.
        skip_bad_images: count and skip images that cannot be read, instead of an error.
        data_dir: folder of timm's sets.
        train_split: training split, of timm's sets and folders.
        val_split: evaluation split, of timm's sets and folders.
        num_points: points per cloud; None takes 1,024, or 2,048 where parts are labelled.
        votes: passes over each cloud in evaluation that are averaged.

    Returns:
        The data, with batches for this rank.

    Raises:
        EwavitError: the set or an option is wrong; one line says what to do.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("limit", limit, 1),
        ("img_size", img_size, 1),
        ("workers", workers, 0),
    ):
        if value is not None and value < least:
            raise EwavitError(f"{name} {value} is too small: give {least} or more")

    statistics = (mean, std) if mean is not None and std is not None else None
    if not 0 <= holdout < 1:
        raise EwavitError(f"holdout {holdout} is out of range: give 0 or more and less than 1")
    is_timm = "/" in spec and spec.split("/")[0].lower() in sources.TIMM_PREFIXES
    if is_timm and sources.is_streamed(spec):
        if limit is not None or holdout:
            option = "holdout" if limit is None else "limit"
            raise EwavitError(
                f"{option} does not apply to {spec}, which is streamed: name a smaller --train-split"
            )
        splits = (train_split, val_split)
        return StreamData(
            spec,
            data_dir,
            splits,
            batch_size,
            seed,
            augmentation,
            img_size,
            statistics,
            device,
            workers,
            world_size,
        )

    def plan(num_train: int, num_eval: int) -> BatchPlan:
        return BatchPlan(num_train, num_eval, batch_size, seed, rank, world_size)

    if is_points(spec):
        options = {"img_size": img_size, "reprob": augmentation.reprob}
        if given := [name for name, value in options.items() if value]:
            raise EwavitError(f"{given[0]} is for images: leave it out for the point clouds of {spec}")
        from ewavit.points.augmentation import PointAugmentation
        from ewavit.points.batches import PointData
        from ewavit.points.sources import read_points

        num_points = num_points or (2048 if spec.startswith("shapenetpart") else 1024)
        points = read_points(spec, num_points, skip_bad_images)
        by = points.train_labels if points.train_category is None else points.train_category
        indices, held = _hold_out(_first(by, limit), holdout)
        if holdout:
            points = points.holding_out(held)
        order = plan(len(indices), len(points.eval_labels))
        return PointData(
            points, indices, order, PointAugmentation.parse(augmentation.aa), num_points, votes, device
        )

    arrays: Arrays | None = None
    train: ImageSource
    val: ImageSource
    path = Path(spec).expanduser()
    if spec == "fashion-mnist-mini":
        arrays = sources.read_bundled()
    elif is_timm:
        train, val = sources.read_timm(spec, data_dir, train_split, val_split)
    elif not path.is_dir():
        raise EwavitError(f"unknown data {spec!r}, and no folder either: give {ACCEPTED}")
    elif cifar := sources.find_cifar(path):
        arrays = sources.read_cifar(cifar)
    else:
        train, val = sources.read_folder(path, train_split, val_split)

    if arrays is not None:
        indices, held = _hold_out(_first(arrays.train_labels, limit), holdout)
        if holdout:
            images, labels = arrays.train_images[held], arrays.train_labels[held]
            arrays = replace(arrays, eval_images=images, eval_labels=labels)
        order = plan(len(indices), len(arrays.eval_labels))
        return TensorData(arrays, indices, order, augmentation, img_size, statistics, device)
    indices = np.arange(len(train)) if limit is None else _first(train.labels(), limit)
    indices, held = _hold_out(indices, holdout)
    if not holdout:
        held = np.arange(len(val))
    return LoaderData(
        spec if is_timm else path.resolve().name,
        train,
        indices,
        train if holdout else val,
        held,
        plan(len(indices), len(held)),
        augmentation,
        img_size,
        statistics,
        device,
        workers,
        skip_bad_images,
    )


def open_recipe_data(
    recipe: Recipe,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    rank: int = 0,
    world_size: int = 1,
) -> Data:
    """The data of a recipe on a device, for one of several processes; raises what `open_data` does."""
    return open_data(
        recipe.data,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        augmentation=Augmentation(
            aa=recipe.aa, hflip=recipe.hflip, reprob=recipe.reprob, crop_padding=recipe.crop_padding
        ),
        limit=recipe.limit,
        holdout=recipe.holdout,
        img_size=recipe.img_size,
        workers=min(recipe.workers, os.cpu_count() or 1),
        device=device,
        rank=rank,
        world_size=world_size,
        skip_bad_images=recipe.skip_bad_images,
        data_dir=recipe.data_dir,
        train_split=recipe.train_split,
        val_split=recipe.val_split,
        num_points=recipe.num_points,
        votes=recipe.votes,
    )


ACCEPTED = (
    "fashion-mnist-mini or solids, a folder with train/ and val/, of CIFAR-10/100 (python format) or "
    "Tiny-ImageNet, or timm's "
    + ", ".join(f"{prefix}/..." for prefix in TIMM_PREFIXES)
    + ", or point clouds, "
    + ", ".join(f"{prefix}:PATH" for prefix in POINT_PREFIXES)
)
