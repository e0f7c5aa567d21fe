"""The door to every data set: `open_data` turns a spec into `Data`, training and evaluation batches."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ewavit.data.augmentation import Augmentation
from ewavit.data.batches import Data
from ewavit.data.options import PREPARATION, DataOptions
from ewavit.data.relabelled import with_classes
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular
from ewavit.tasks.choice import task_for
from ewavit.training.card import ModelCard
from ewavit.training.places import spec_of_file
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder


def open_data(spec: str, options: DataOptions, task: str | None = None) -> Data:
    """Open a data set for training and evaluation.

    Args:
        spec: the data set. "fashion-mnist-mini" and "solids" are bundled. A path is a folder with train/ and
            val/ of class folders, a folder of CIFAR-10/100 in the python format, or of Tiny-ImageNet.
            "torch/...", "hfds/...", "hfids/...", "wds/..." and "tfds/..." are opened by timm's
            create_dataset. "modelnet10:PATH" and others are point clouds, see
            `ewavit.points.sources.read_points`.
        options: batch size, augmentation and everything else.
        task: name of the task; None for the default of these data.

    Returns:
        The data, with the batches of this rank.

    Raises:
        EwavitError: the set is unknown, cannot be read, or does not go with an option or the task.
    """
    return task_for(spec, task).open_data(spec, options)


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
        augmentation=Augmentation(
            aa=recipe.aa,
            hflip=recipe.hflip,
            reprob=recipe.reprob,
            crop_padding=recipe.crop_padding,
            scale=(recipe.scale[0], recipe.scale[1]),
            ratio=(recipe.ratio[0], recipe.ratio[1]),
            color_jitter=recipe.color_jitter,
        ),
        img_size=recipe.img_size,
        workers=usable_workers(recipe.workers),
        device=device,
        rank=rank,
        world_size=world_size,
        skip_bad_images=recipe.skip_bad_images,
        data_dir=recipe.data_dir,
        num_points=recipe.num_points,
        point_features=recipe.point_features,
        votes=recipe.votes,
        per_class=recipe.per_class
        if "per_class" in task_for(recipe.data, recipe.task).own_settings
        else None,
        **{**preparation, **given},
        **splits(recipe),
    )
    return open_data(recipe.data, options, recipe.task)


def splits(recipe: Recipe) -> dict[str, Any]:
    """Which samples a run trains and is evaluated on, as fields of `DataOptions`."""
    names = (
        "train_split",
        "val_split",
        "limit",
        "shots",
        "resample",
        "test_on_rest",
        "holdout",
        "fold",
        "seed",
    )
    return {name: getattr(recipe, name) for name in names}


def recipe_of(source: Path) -> Recipe | None:
    """The recipe of a run, of which `source` is the folder or the checkpoint; None for another file.

    Raises:
        EwavitError: its settings cannot be read.
    """
    for file in (RunFolder(folder).args for folder in (source, source.parent)):
        if file.exists():
            try:
                return Recipe.from_dict(yaml.safe_load(regular(file).read_text()), str(file))
            except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as problem:
                raise EwavitError(f"{file} cannot be read ({first_line(problem)}): undo the change") from None
    return None


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
    data = open_data(spec or spec_of_file(card.data, card.absolute_data), options, card.task.name)
    if data.in_chans != card.in_chans:
        raise EwavitError(
            f"{data.name} has {data.in_chans} channels, the model {card.in_chans}: give the data that it was "
            "trained for"
        )
    return with_classes(data, card.classes) if card.task.fixed_classes else data


def _preparation(card: ModelCard) -> dict[str, Any]:
    """How a card's images are prepared, as fields of `DataOptions`; empty for clouds."""
    return {name: value for name in PREPARATION if (value := getattr(card, name))}


def _of_first_weights(recipe: Recipe) -> dict[str, Any]:
    """How the images of the weights that a run starts from are prepared; empty without such weights.

    A file that ewavit wrote says it itself; for other weights timm knows it by the model's name.
    """
    if not (recipe.pretrained or recipe.initial_checkpoint):
        return {}
    if recipe.initial_checkpoint and (card := ModelCard.of_file(Path(recipe.initial_checkpoint))):
        return _preparation(card)
    return task_for(recipe.data, recipe.task).preparation(recipe.model)
