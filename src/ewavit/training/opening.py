"""The door to every data set: `open_data` turns a spec into `Data`, training and evaluation batches."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from ewavit.data.augmentation import Augmentation
from ewavit.data.batches import Data
from ewavit.data.in_memory import TensorData, is_in_memory
from ewavit.data.loading import LoaderData, StreamData
from ewavit.data.options import DataOptions
from ewavit.data.relabelled import with_classes
from ewavit.data.sources import TIMM_PREFIXES, is_folder, is_streamed, is_timm
from ewavit.errors import EwavitError
from ewavit.points.batches import PointData
from ewavit.points.sources import POINT_PREFIXES, is_points
from ewavit.tasks.classification import DEFAULT_MODEL
from ewavit.training.card import ModelCard
from ewavit.training.places import spec_of_file
from ewavit.training.recipe import Recipe

PREPARATION = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # of images, in timm's words

# The first kind that a spec belongs to opens it.
OPENERS: tuple[tuple[Callable[[str], bool], Callable[[str, DataOptions], Data]], ...] = (
    (is_streamed, StreamData.open),
    (is_timm, LoaderData.open),
    (is_points, PointData.open),
    (is_in_memory, TensorData.open),
    (is_folder, LoaderData.open),
)
ACCEPTED = (
    "fashion-mnist-mini or solids, a folder with train/ and val/, of CIFAR-10/100 (python format) or "
    "Tiny-ImageNet, or timm's "
    + ", ".join(f"{prefix}/..." for prefix in TIMM_PREFIXES)
    + ", or point clouds, "
    + ", ".join(f"{prefix}:PATH" for prefix in POINT_PREFIXES)
)


def open_data(spec: str, options: DataOptions) -> Data:
    """Open a data set for training and evaluation.

    Args:
        spec: the data set. "fashion-mnist-mini" and "solids" are bundled. A path is a folder with train/ and
            val/ of class folders, a folder of CIFAR-10/100 in the python format, or of Tiny-ImageNet.
            "torch/...", "hfds/...", "hfids/...", "wds/..." and "tfds/..." are opened by timm's
            create_dataset. "modelnet10:PATH" and others are point clouds, see
            `ewavit.points.sources.read_points`.
        options: batch size, augmentation and everything else.

    Returns:
        The data, with the batches of this rank.

    Raises:
        EwavitError: the set is unknown, cannot be read, or does not go with an option.
    """
    for belongs, open_kind in OPENERS:
        if belongs(spec):
            return open_kind(spec, options)
    raise EwavitError(f"unknown data {spec!r}, and no folder either: give {ACCEPTED}")


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_workers(workers: int) -> int:
    """At most as many reading processes as usable cores."""
    return min(workers, usable_cores())


def open_recipe_data(
    recipe: Recipe,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    rank: int = 0,
    world_size: int = 1,
    card: ModelCard | None = None,
) -> Data:
    """Open the data of a recipe.

    Args:
        recipe: the settings.
        device: device of the batches.
        rank: number of this process.
        world_size: number of processes.
        card: of the run that is resumed; its images are prepared as before.

    Raises:
        EwavitError: as `open_data`.
    """
    preparation = _of_first_weights(recipe) if card is None else _preparation(card)
    given = {name: value for name in PREPARATION if (value := getattr(recipe, name, None)) is not None}
    options = DataOptions(
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        augmentation=Augmentation(
            aa=recipe.aa,
            hflip=recipe.hflip,
            reprob=recipe.reprob,
            crop_padding=recipe.crop_padding,
            scale=(recipe.scale[0], recipe.scale[1]),
            ratio=(recipe.ratio[0], recipe.ratio[1]),
            color_jitter=recipe.color_jitter,
        ),
        limit=recipe.limit,
        holdout=recipe.holdout,
        img_size=recipe.img_size,
        workers=usable_workers(recipe.workers),
        device=device,
        rank=rank,
        world_size=world_size,
        skip_bad_images=recipe.skip_bad_images,
        data_dir=recipe.data_dir,
        train_split=recipe.train_split,
        val_split=recipe.val_split,
        num_points=recipe.num_points,
        votes=recipe.votes,
        **{**preparation, **given},
    )
    return open_data(recipe.data, options)


def open_for(card: ModelCard, spec: str | None, options: DataOptions) -> Data:
    """Open a data set for a model: prepared as in its training, with its classes in its order.

    Args:
        card: of the model.
        spec: data spec; None is the one it was trained on.
        options: further options.

    Raises:
        EwavitError: the data cannot be read, or has other classes or channels.
    """
    options = replace(
        options, data_dir=options.data_dir or card.data_dir, workers=usable_workers(options.workers),
        **card.preparation,
    )  # fmt: skip
    data = open_data(spec or spec_of_file(card.data, card.absolute_data), options)
    if data.in_chans != card.in_chans:
        raise EwavitError(
            f"{data.name} has {data.in_chans} channels, the model {card.in_chans}: give the data that it was "
            "trained for"
        )
    return with_classes(data, card.classes)


def _preparation(card: ModelCard) -> dict[str, Any]:
    """How a card's images are prepared, as fields of `DataOptions`; empty for clouds."""
    return {name: value for name in PREPARATION if (value := getattr(card, name))}


def _of_first_weights(recipe: Recipe) -> dict[str, Any]:
    """How the images of the weights that a run starts from are prepared; empty without such weights.

    A file that ewavit wrote says it itself; for other weights timm knows it by the model's name.
    """
    if is_points(recipe.data) or not (recipe.pretrained or recipe.initial_checkpoint):
        return {}
    if recipe.initial_checkpoint and (card := ModelCard.of_file(Path(recipe.initial_checkpoint))):
        return _preparation(card)
    config = timm.get_pretrained_cfg(recipe.model or DEFAULT_MODEL)
    return {} if config is None else {name: getattr(config, name) for name in PREPARATION}
