"""Image sets for retrieval: the classes of the evaluation images are not those of the training images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from ewavit.data.arrays import Arrays, Ints, read_bundled
from ewavit.data.batches import Data
from ewavit.data.folders import split_folders
from ewavit.data.in_memory import BUNDLED, TensorData
from ewavit.data.loading import LoaderData
from ewavit.data.options import DataOptions
from ewavit.data.sources import FileImages, read_class_folders
from ewavit.data.subsets import bounds, choose
from ewavit.errors import EwavitError, first_line

BOTH, QUERY, GALLERY = 0, 1, 2  # what an evaluation image is; BOTH: a query against all other images
SPLITS = ("query", "gallery")  # folders that may stand beside val/
TRAINED = 5  # classes of the bundled set that are trained on; the others are evaluated
# Training images, training classes, evaluation images, evaluation classes, as published.
COUNTS = {
    "CUB-200": (5_864, 100, 5_924, 100),
    "Stanford Online Products": (59_551, 11_318, 60_502, 11_316),
    "In-shop": (25_882, 3_997, 26_830, 3_985),
}


class EvaluationImages(FileImages):
    """Evaluation images; a target is a pair of class and role (`BOTH`, `QUERY` or `GALLERY`)."""

    roles: Ints

    def open(self, index: int) -> tuple[Image.Image, int]:
        image, label = super().open(index)
        return image, (label, int(self.roles[index]))  # type: ignore[return-value]  # collated as (batch, 2)


@dataclass(frozen=True)
class Row:
    """One image of a published set: its file, the name of its class, and "train" or a role."""

    path: str
    name: str
    role: str | int


def open_retrieval(spec: str, options: DataOptions) -> Data:
    """Open a set for retrieval.

    Args:
        spec: "fashion-mnist-mini", or a folder: CUB-200-2011, Stanford Online Products or In-shop as
            published, or train/ and val/ (or query/ and gallery/) with a folder of images for each class.
        options: with `per_class`, training batches hold so many images of a class; `holdout` is the share of
            the training classes to evaluate on.

    Returns:
        The data. Evaluation targets are (batch, 2): class and role.

    Raises:
        EwavitError: the set is unknown or damaged, a class is in both splits, or a count is not as published.
    """
    if options.test_on_rest:
        raise EwavitError(
            "test_on_rest does not work with --task retrieval, evaluated on new classes: leave it out"
        )
    if spec == BUNDLED:
        arrays = read_bundled()
        train = arrays.train_labels < TRAINED
        later = arrays.eval_labels >= TRAINED
        images, labels = arrays.eval_images[later], arrays.eval_labels[later] - TRAINED
        return _in_memory(arrays, train, images, labels, options)
    path = Path(spec).expanduser()
    if not path.is_dir():
        raise EwavitError(
            f"unknown data {spec!r} for --task retrieval: give {BUNDLED}, or the folder of CUB-200-2011, "
            "Stanford Online Products or In-shop, or a folder with train/ and val/"
        )
    for is_published, read in PUBLISHED:
        if is_published(path):
            images_of, other = _split(read(path))
            break
    else:
        images_of, other = _read_folders(path, options)
    indices = choose(len(images_of), options, lambda: images_of.targets)
    if options.holdout:
        kept, held = held_out_classes(images_of.targets[indices], len(images_of.classes), options)
        chosen = indices[held]
        other = EvaluationImages(
            [images_of.where(index) for index in chosen],
            images_of.targets[chosen].tolist(),
            images_of.classes,
        )
        other.roles, indices = np.full(len(chosen), BOTH), indices[kept]
    data = LoaderData(path.resolve().name, images_of, indices, other, np.arange(len(other)), options)
    data.eval_classes = other.classes
    return data


def held_out_classes(labels: Ints, classes: int, options: DataOptions) -> tuple[Ints, Ints]:
    """Positions of the images to train on and of those held out; whole classes, the same every time.

    Raises:
        EwavitError: fewer than two classes would be left on a side.
    """
    first, end = bounds(classes, options)
    if not 2 <= end - first <= classes - 2:
        raise EwavitError(
            f"holdout {options.holdout} of {classes} classes leaves fewer than two on a side: change it"
        )
    held = np.isin(labels, np.random.default_rng(0).permutation(classes)[first:end])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _in_memory(arrays: Arrays, train: Any, images: Any, labels: Ints, options: DataOptions) -> Data:
    """The bundled set: the first classes train, the others are evaluated."""
    of_train, train_labels = arrays.train_images[train], arrays.train_labels[train]
    names = arrays.classes[TRAINED:]
    indices = choose(len(train_labels), options, lambda: train_labels)
    if options.holdout:
        kept, held = held_out_classes(train_labels[indices], TRAINED, options)
        images, labels = of_train[indices[held]], train_labels[indices[held]]
        names, indices = arrays.classes[:TRAINED], indices[kept]
    targets = np.stack([labels, np.full_like(labels, BOTH)], 1)
    chosen = replace(
        arrays, classes=arrays.classes[:TRAINED], train_images=of_train, train_labels=train_labels,
        eval_images=images, eval_labels=targets,
    )  # fmt: skip
    data = TensorData(chosen, indices, options)
    data.eval_classes = names
    return data


def _read_folders(path: Path, options: DataOptions) -> tuple[FileImages, EvaluationImages]:
    """train/ and val/ of class folders, or query/ and gallery/ in place of val/."""
    roles: tuple[int, ...] = (QUERY, GALLERY)
    folders = [path / name for name in SPLITS]
    if all(folder.is_dir() for folder in folders):
        train_folder = path / options.train_split
        if not train_folder.is_dir():
            raise EwavitError(f"{path} has query/ and gallery/, but no {options.train_split}/: add it")
    else:
        train_folder, val = split_folders(
            path, options.train_split, options.val_split, options.holdout > 0, "images"
        )
        folders, roles = [] if val is None else [val], (BOTH,)
    train = read_class_folders(train_folder)
    sets = [read_class_folders(folder) for folder in folders]
    names = sorted({name for images in sets for name in images.classes})
    if common := sorted(set(names) & set(train.classes)):
        more = f" and {len(common) - 3} more" if len(common) > 3 else ""
        raise EwavitError(
            f"{path} has {', '.join(common[:3])}{more} in training and in evaluation: retrieval is evaluated "
            "on new classes, so remove them from one side"
        )
    return train, _evaluation(
        [
            Row(images.where(index), images.classes[label], role)
            for images, role in zip(sets, roles, strict=False)
            for index, label in enumerate(images.targets.tolist())
        ]
    )


def _evaluation(rows: list[Row]) -> EvaluationImages:
    names = list(dict.fromkeys(row.name for row in rows))
    number = {name: label for label, name in enumerate(names)}
    images = EvaluationImages([row.path for row in rows], [number[row.name] for row in rows], tuple(names))
    images.roles = np.array([row.role for row in rows], dtype=np.int64)
    return images


def _split(rows: list[Row]) -> tuple[FileImages, EvaluationImages]:
    of_train = [row for row in rows if row.role == "train"]
    train = _evaluation([replace(row, role=BOTH) for row in of_train])
    images = FileImages([row.path for row in of_train], train.targets.tolist(), train.classes)
    return images, _evaluation([row for row in rows if row.role != "train"])


def _lines(file: Path, columns: int) -> list[list[str]]:
    """The words of each line.

    Raises:
        EwavitError: the file cannot be read, or a line has another number of words.
    """
    try:
        rows = [line.split() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise EwavitError(
            f"{file} cannot be read ({first_line(problem)}): unpack the archive again"
        ) from None
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise EwavitError(f"{file} line {number} has {len(row)} words, not {columns}: unpack it again")
    return rows


def _checked(name: str, folder: Path, rows: list[Row]) -> list[Row]:
    """The rows, if their counts are as published.

    Raises:
        EwavitError: they are not, or a path leads out of the folder.
    """
    sides = [[row for row in rows if (row.role == "train") is train] for train in (True, False)]
    found = tuple(n for side in sides for n in (len(side), len({row.name for row in side})))
    if found != COUNTS[name]:
        words = ("training images", "training classes", "evaluation images", "evaluation classes")
        what, has, published = next(
            each for each in zip(words, found, COUNTS[name], strict=True) if each[1] != each[2]
        )
        raise EwavitError(
            f"{folder} has {has:,} {what}, {name} as published has {published:,}: unpack the archive again"
        )
    for row in rows:
        if ".." in Path(row.path).parts or Path(row.path).suffix.lower() not in IMG_EXTENSIONS:
            raise EwavitError(f"{folder} lists {row.path}, which is no image in it: unpack the archive again")
    return [replace(row, path=str(folder / row.path)) for row in rows]


def _read_cub(folder: Path) -> list[Row]:
    """CUB-200-2011: classes 1 to 100 train, 101 to 200 are evaluated."""
    labels = dict(_lines(folder / "image_class_labels.txt", 2))
    names = dict(_lines(folder / "classes.txt", 2))
    rows = []
    for image, path in _lines(folder / "images.txt", 2):
        label = labels.get(image, "")
        if label not in names or not label.isdecimal():
            raise EwavitError(f"{folder}: image {image} has no class: unpack the archive again")
        rows.append(Row(f"images/{path}", names[label], "train" if int(label) <= 100 else BOTH))
    return _checked("CUB-200", folder, rows)


def _read_products(folder: Path) -> list[Row]:
    """Stanford Online Products: two lists of image, class, super-class and path."""
    rows = [
        Row(path, label, role)
        for file, role in (("Ebay_train.txt", "train"), ("Ebay_test.txt", BOTH))
        for _, label, _, path in _lines(folder / file, 4)[1:]
    ]
    return _checked("Stanford Online Products", folder, rows)


def _read_in_shop(folder: Path) -> list[Row]:
    """In-shop: one list of image, item and split (train, query, gallery)."""
    file = folder / "Eval" / "list_eval_partition.txt"
    file = file if file.is_file() else folder / file.name
    roles: dict[str, str | int] = {"train": "train", "query": QUERY, "gallery": GALLERY}
    try:
        lines = file.read_text().splitlines()[2:]  # their number and the header
    except (OSError, UnicodeDecodeError) as problem:
        raise EwavitError(
            f"{file} cannot be read ({first_line(problem)}): unpack the archive again"
        ) from None
    inside = "Img" if (folder / "Img").is_dir() else "."
    rows = []
    for number, line in enumerate(lines, 3):
        words = line.split()
        if len(words) != 3 or words[2] not in roles:
            raise EwavitError(f"{file} line {number} names no image with item and split: unpack it again")
        rows.append(Row(f"{inside}/{words[0]}", words[1], roles[words[2]]))
    return _checked("In-shop", folder, rows)


PUBLISHED: tuple[tuple[Callable[[Path], bool], Callable[[Path], list[Row]]], ...] = (
    (lambda folder: (folder / "image_class_labels.txt").is_file(), _read_cub),
    (lambda folder: (folder / "Ebay_train.txt").is_file(), _read_products),
    (
        lambda folder: any((folder / part / "list_eval_partition.txt").is_file() for part in ("Eval", ".")),
        _read_in_shop,
    ),
)
