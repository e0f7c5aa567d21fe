"""`MaskData`: images with a class for each pixel, from files or generated.

Image and mask go through the same random crop and flip. A batch depends on the seed, the epoch and its number
alone, as for other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from ewavit.data.arrays import Ints
from ewavit.data.folders import VALIDATION_FOLDERS, files_below
from ewavit.data.loading import LoaderData, Samples
from ewavit.data.options import DataOptions
from ewavit.data.shapes import CLASSES, make_shapes
from ewavit.data.sources import FileImages, ImageSource
from ewavit.data.subsets import split
from ewavit.errors import EwavitError
from ewavit.files import regular

IGNORED = -100  # the label of pixels that count neither in the loss nor in the metrics
UNLABELLED = 255  # its value in masks, as in Pascal VOC
SHAPES = "shapes"
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOC_2012, ADE20K = (1464, 1449), (20_210, 2000)  # images for training and evaluation, as published
ADE20K_CLASSES = 150


class MaskImages(FileImages):
    """Image files with their masks, files of class numbers.

    Args:
        paths: the images.
        masks: the mask of each.
        classes: names of the classes.
        first: value of the first class in a mask. If it is 1, pixels of 0 are not labelled.
    """

    def __init__(
        self, paths: Sequence[str], masks: Sequence[str], classes: tuple[str, ...], first: int = 0
    ) -> None:
        super().__init__(paths, [0] * len(paths), classes)
        self.masks, self.first = FileImages(masks, [0] * len(masks), ()), first

    def mask(self, index: int, size: tuple[int, int]) -> Ints:
        """The labels of an image's pixels, (height, width).

        Args:
            index: number of the image.
            size: width and height of the image.

        Raises:
            ValueError: the mask is no mask of the image, or has a class that does not exist.
        """
        stored, where = self.masks.open(index)[0], self.masks.where(index)
        if stored.size != size:
            sides = ["x".join(map(str, each)) for each in (stored.size, size)]
            raise ValueError(f"its mask {where} has {sides[0]} pixels, the image {sides[1]}")
        values = class_numbers(stored, where)
        labels = np.where(values == UNLABELLED, IGNORED, values - self.first)
        labels[values < self.first] = IGNORED
        if (highest := labels.max()) >= len(self.classes):
            last = len(self.classes) - 1 + self.first
            raise ValueError(
                f"its mask {where} has the class {highest + self.first}, and the classes are {self.first} to "
                f"{last}"
            )
        return labels


class ShapeImages(ImageSource):
    """Generated images with their masks, (images, side, side, 3) and (images, side, side)."""

    classes = CLASSES

    def __init__(self, images: Any, masks: Any) -> None:
        self.images, self.stored = images, masks

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), 0

    def where(self, index: int) -> str:
        return str(index)

    def labels(self) -> Ints:
        return np.zeros(len(self), np.int64)

    def mask(self, index: int, size: tuple[int, int]) -> Ints:
        return np.asarray(self.stored[index], np.int64)


MaskSource = MaskImages | ShapeImages


def class_numbers(image: Image.Image, where: str) -> Ints:
    """The values of a mask, (height, width).

    Raises:
        ValueError: it has colours in place of class numbers.
    """
    if image.mode not in ("P", "L", "1", "I", "I;16"):
        raise ValueError(f"its mask {where} has mode {image.mode}; save it with one channel of class numbers")
    return np.asarray(image).astype(np.int64)


class MaskSamples(Samples):
    """As `Samples`, with masks (height, width) in place of labels; the transform takes image and mask."""

    def load(self, index: int) -> tuple[Any, Any]:
        assert isinstance(self.source, MaskSource)
        image, _ = self.source.load(index, self.mode)
        with self.source.readable(index):
            return image, self.source.mask(index, image.size)

    def prepare(self, image: Any, label: Any) -> tuple[Tensor, Any]:
        pair = self.transform(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(label)))
        return pair[0].as_subclass(Tensor), pair[1].as_subclass(Tensor)


class MaskData(LoaderData):
    """Images with masks; labels are int64 (batch, height, width), `IGNORED` where a pixel has no class.

    In evaluation, images and masks are resized to squares.
    """

    @classmethod
    def open(cls, spec: str, options: DataOptions) -> MaskData:
        """Open a set of images with masks, see `read_masks`.

        Raises:
            EwavitError: the set cannot be read, or an option does not work for it.
        """
        augmentation = options.augmentation
        for name, value in (("aa", augmentation.aa), ("reprob", augmentation.reprob)):
            if value:
                raise EwavitError(f"{name} {value} does not change masks: leave it out for segmentation")
        options = replace(options, interpolation="bilinear", crop_pct=1.0, crop_mode="squash")
        train: MaskSource
        val: MaskSource | None
        notes: tuple[str, ...] = ()
        if spec == SHAPES:
            images, masks, *held = make_shapes()
            train, val = ShapeImages(images, masks), ShapeImages(*held)
            options = replace(options, workers=0)
        else:
            train, val, notes = read_masks(Path(spec).expanduser(), options)
        indices, held_out = split(len(train), options)
        if held_out is not None:
            val = train
        assert val is not None  # read, where no training images are held out
        chosen = np.arange(len(val)) if held_out is None else held_out
        data = cls(
            spec if spec == SHAPES else Path(spec).resolve().name, train, indices, val, chosen, options
        )
        data.notes += notes
        return data

    def class_counts(self) -> None:
        return None

    def _samples(self, options: DataOptions) -> tuple[Samples, Samples]:
        side, mode = self.img_size, "L" if self.in_chans == 1 else "RGB"
        given = options.augmentation
        jitter = [given.color_jitter] * 3
        to_train = v2.Compose(
            [
                v2.RandomResizedCrop(side, given.scale, given.ratio, antialias=True),
                v2.RandomHorizontalFlip(given.hflip),
                *([v2.ColorJitter(*jitter)] if given.color_jitter else []),
            ]
        )
        to_eval = v2.Resize((side, side), antialias=True)
        train = MaskSamples(self._train, self._train_indices, to_train, mode, options.seed, self._skip)
        held = MaskSamples(self._val, self._eval_indices, to_eval, mode, options.seed, replace_bad=False)
        return train, held


def read_masks(path: Path, options: DataOptions) -> tuple[MaskImages, MaskImages | None, tuple[str, ...]]:
    """Find the images and masks of a folder.

    Args:
        path: a folder of Pascal VOC (JPEGImages/, SegmentationClass/, ImageSets/Segmentation/), also
            VOCdevkit/ above it; of ADE20K (images/training, annotations/training, ...); or with images/ and
            masks/, each with train/ and val/, or without them and `options.holdout`. A mask is the .png file
            with the name of its image; it has one channel of class numbers, and 255 is not labelled.
            `classes.txt` names the classes, one in a line.
        options: names of the splits, and `holdout`.

    Returns:
        The training and the evaluation images, None to hold out, and notes.

    Raises:
        EwavitError: the folder has another layout, or a mask is missing.
    """
    place = next(
        (
            p
            for p in (path, *sorted(path.glob("VOC*")), *sorted(path.glob("VOCdevkit/VOC*")))
            if (p / "SegmentationClass").is_dir()
        ),
        None,
    )
    if place is not None:
        pairs = [_voc(place, split) for split in ("train", "val")]
        counts = VOC_2012 if place.name == "VOC2012" else None
        return _checked(pairs, VOC_CLASSES, 0, counts, options)
    ade = next(
        (p for p in (path, path / "ADEChallengeData2016") if (p / "annotations" / "training").is_dir()), None
    )
    if ade is not None:
        pairs = [
            _pairs(ade / "images" / split, ade / "annotations" / split)
            for split in ("training", "validation")
        ]
        return _checked(pairs, _ade_classes(ade), 1, ADE20K, options)
    images, masks = path / "images", path / "masks"
    if not images.is_dir() or not masks.is_dir():
        raise EwavitError(
            f"{path} has no images/ and masks/: give a folder with both, or one of Pascal VOC or ADE20K, or "
            f"--data {SHAPES}"
        )
    names = [options.train_split, *dict.fromkeys([options.val_split, *VALIDATION_FOLDERS])]
    splits = [name for name in names if (images / name).is_dir()]
    if options.train_split not in splits:
        splits = [""]
    if len(splits) < 2 and not options.on_training_samples:
        raise EwavitError(
            f"{images} has no {options.train_split}/ and val/: add them, and the same in masks/, or give "
            "--holdout 0.2"
        )
    pairs = [
        _pairs(images / name, masks / name) for name in splits[: 1 if options.on_training_samples else 2]
    ]
    return _checked(pairs, _named_classes(path, pairs), 0, None, options)


Pairs = tuple[list[str], list[str]]  # images and masks


def _checked(
    pairs: Sequence[Pairs],
    classes: tuple[str, ...],
    first: int,
    counts: tuple[int, int] | None,
    options: DataOptions,
) -> tuple[MaskImages, MaskImages | None, tuple[str, ...]]:
    found = tuple(len(images) for images, _ in pairs)
    notes: tuple[str, ...] = ()
    if counts is not None and found != counts:
        notes = (f"{found[0]:,} and {found[1]:,} images, published are {counts[0]:,} and {counts[1]:,}",)
    sources = [MaskImages(images, masks, classes, first) for images, masks in pairs]
    return sources[0], None if options.on_training_samples else sources[1], notes


def _pairs(images: Path, masks: Path) -> Pairs:
    """The images of a folder, and for each its mask: the .png of its name at the same place below `masks`."""
    if not images.is_dir() or not masks.is_dir():
        raise EwavitError(f"no folder {images if masks.is_dir() else masks}: add it")
    found, _ = files_below(images, IMG_EXTENSIONS)
    if not found:
        raise EwavitError(f"{images} has no images: add some")
    return found, [
        _existing(masks / Path(name).relative_to(images).with_suffix(".png"), name) for name in found
    ]


def _existing(mask: Path, image: str) -> str:
    if not mask.is_file():
        raise EwavitError(f"{image} has no mask {mask}: add the mask or remove the image")
    return str(mask)


def _voc(place: Path, split: str) -> Pairs:
    file = place / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = _lines(file)
    images = [place / "JPEGImages" / f"{name}.jpg" for name in names]
    return list(map(str, images)), [
        _existing(place / "SegmentationClass" / f"{name}.png", str(image))
        for name, image in zip(names, images, strict=True)
    ]


def _lines(file: Path) -> list[str]:
    try:
        text = regular(file).read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise EwavitError(f"{file} cannot be read ({problem}): download the set again") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _ade_classes(place: Path) -> tuple[str, ...]:
    """The names in objectInfo150.txt, the last column; numbers without the file."""
    file = place / "objectInfo150.txt"
    if not file.is_file():
        return tuple(str(number) for number in range(1, ADE20K_CLASSES + 1))
    names = tuple(line.split("\t")[-1].strip() for line in _lines(file)[1:])
    if len(names) != ADE20K_CLASSES:
        raise EwavitError(f"{file} names {len(names)} classes, not {ADE20K_CLASSES}: download the set again")
    return names


def _named_classes(path: Path, pairs: Sequence[Pairs]) -> tuple[str, ...]:
    """The names in classes.txt; without it the numbers up to the highest in the masks, which are read."""
    file = path / "classes.txt"
    if file.is_file():
        names = tuple(_lines(file))
    else:
        highest = 0
        for _, masks in pairs:
            source = FileImages(masks, [0] * len(masks), ())
            for index, mask in enumerate(masks):
                try:
                    values = class_numbers(source.open(index)[0], mask)
                except (OSError, ValueError) as problem:
                    raise EwavitError(f"cannot read {mask} ({problem}): repair it") from None
                highest = max(highest, int(values[values != UNLABELLED].max(initial=0)))
        names = tuple(str(number) for number in range(highest + 1))
    if len(names) < 2 or len(set(names)) < len(names):
        raise EwavitError(
            f"{path} has the classes {', '.join(names)}: name two or more, each once, in {file}"
        )
    return names
