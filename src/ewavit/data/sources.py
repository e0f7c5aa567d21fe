"""Readers of image sets whose images are decoded one by one: folders and timm's data sets.

Each split is an `ImageSource`. Missing, damaged and wrong files raise an EwavitError when a set is opened.
"""

import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.data import create_dataset
from timm.data.dataset import ImageDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

from ewavit.data.arrays import Ints
from ewavit.data.folders import class_folders, files_below, formats_text, split_folders
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular

# timm prefix -> the package that timm reads it with
TIMM_PREFIXES = {
    "torch": "torchvision",
    "hfds": "datasets",
    "hfids": "datasets",
    "wds": "webdataset",
    "tfds": "tensorflow_datasets",
}


class UnreadableImage(Exception):
    """An image cannot be decoded; `where` names it and `reason` says why."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason


_UPRIGHT = {  # EXIF's orientation -> what brings the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decoded(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image upright, as EXIF says, in PIL mode "L" or "RGB".

    16-bit values are scaled from 0..65535. PIL would cut them, and all other values above 255, off at 255.

    Raises:
        ValueError: the values are of a type without a fixed range (32 bits, floats).
    """
    image.load()  # PIL brings some formats upright itself, and removes the orientation
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF beside good pixels
        orientation = None
    wide = is_16_bit(image)
    if image.mode[0] in "IF" and not wide:
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(
            f"its values are {kind} (mode {image.mode}) without a fixed range; save it with 8 or 16 bits"
        )
    if wide:
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return image.convert(mode)


def is_16_bit(image: Image.Image) -> bool:
    """Whether the values of an image are 0..65535; PIL opens such .pgm, and older PIL .png, as 32 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))


@cache
def _image_formats() -> tuple[str, ...]:
    """What files of images may hold, by PIL's names, whatever their suffix; PIL runs a program for EPS."""
    names = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")
    Image.init()
    return tuple(name for name in names if name in Image.OPEN)


class ImageSource(ABC):
    """One split of an image set; images are decoded one by one, on request."""

    classes: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> tuple[Image.Image, int]:
        """Open image `index`, with its label; PIL may decode its pixels later."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Name image `index` for a message."""

    @abstractmethod
    def labels(self) -> Ints:
        """All labels, (images,)."""

    def load(self, index: int, mode: str) -> tuple[Image.Image, int]:
        """Decode image `index`, see `decoded`.

        Raises:
            UnreadableImage: the file is missing or damaged, or its values have no fixed range.
        """
        with self.readable(index):
            image, label = self.open(index)
            return decoded(image, mode), label

    @contextmanager
    def readable(self, index: int) -> Iterator[None]:
        """A context manager that raises `UnreadableImage` for any error in reading image `index`."""
        try:
            yield
        except Exception as error:  # decoders raise many things on damaged bytes
            reason = (
                "no image that PIL can read"
                if isinstance(error, UnidentifiedImageError)
                else first_line(error)
            )
            raise UnreadableImage(self.where(index), reason) from error


class FileImages(ImageSource):
    """Image files with their labels.

    Args:
        paths: the files, (images,).
        labels: their classes, (images,).
        classes: names of the classes.
        others: number of files beside them in formats that are not read, by suffix.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        classes: tuple[str, ...],
        others: Mapping[str, int] | None = None,
    ) -> None:
        # arrays, not lists: forked workers share the memory; bytes take a quarter of str
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.targets = np.array(labels, dtype=np.int64)
        self.classes = classes
        self.others = others or {}

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> tuple[Image.Image, int]:
        file = regular(Path(self.where(index)))
        return Image.open(file, formats=_image_formats()), int(self.targets[index])

    def where(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def labels(self) -> Ints:
        return self.targets


class TimmImages(ImageSource):
    """A map-style set from timm's create_dataset: timm's ImageDataset or one of torchvision's.

    `classes` is empty if the set does not name them.
    """

    def __init__(self, dataset: Any, spec: str) -> None:
        self.dataset = dataset
        self.spec = spec
        self.reader = dataset.reader if isinstance(dataset, ImageDataset) else None
        self.classes = class_names(dataset if self.reader is None else self.reader)

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            image, label = self.dataset[index]
            return image, int(label)
        file: IO[bytes]
        file, label = self.reader[index]
        return Image.open(file, formats=_image_formats()), int(label)

    def where(self, index: int) -> str:
        samples = getattr(self.dataset, "samples", None)
        return str(samples[index][0]) if samples else f"image {index} of {self.spec}"

    def labels(self) -> Ints:
        if self.reader is not None:
            return np.array(list(self.reader.iter_targets()), dtype=np.int64)
        targets = getattr(self.dataset, "targets", None)
        if targets is None:
            raise EwavitError(
                f"{self.spec} has no list of labels: unpack the set to a folder of class folders"
            )
        return np.array(targets, dtype=np.int64)


def class_names(holder: Any) -> tuple[str, ...]:
    """Class names of a timm reader or a torchvision set; empty if it has none."""
    names = getattr(holder, "classes", None)
    if names is None:
        mapping = getattr(holder, "class_to_idx", None) or {}
        names = sorted(mapping, key=mapping.__getitem__)
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)


# --- folders ---


def _natural_key(name: str) -> list[int | str]:
    """timm's order of classes: its tools agree about labels. timm's own key fails on a name with ²."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def read_class_folders(folder: Path) -> FileImages:
    """The images in the class folders of a folder.

    Raises:
        EwavitError: there are fewer than two classes, or one without images.
    """
    classes = tuple(sorted(class_folders(folder), key=_natural_key))
    if len(classes) < 2:
        has = f"one class only ({classes[0]})" if classes else "no class folders"
        raise EwavitError(f"{folder} holds {has}: give at least two folders of images, one per class")
    paths: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(classes):
        images, beside = files_below(folder / name, IMG_EXTENSIONS)
        if not images:
            but = f", but {formats_text(beside)}" if beside else ""
            raise EwavitError(
                f"class folder {folder / name} has no images{but}: fill it with {', '.join(IMG_EXTENSIONS)} "
                "files, or remove it from all splits"
            )
        paths += images
        labels += [label] * len(images)
        others += beside
    return FileImages(paths, labels, classes, others)


def _is_no_name(text: str) -> bool:
    return text in ("", ".", "..") or "/" in text or "\0" in text


def _read_tiny_imagenet_val(folder: Path, classes: tuple[str, ...]) -> FileImages:
    annotations = folder / "val_annotations.txt"
    index = {name: label for label, name in enumerate(classes)}
    try:
        text = annotations.read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise EwavitError(
            f"{annotations} cannot be read ({first_line(problem)}): unpack the archive again"
        ) from None
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or row[1] not in index or _is_no_name(row[0]):
            raise EwavitError(
                f"{annotations} line {number} names no image, or no class of train/: unpack the archive again"
            )
    if not rows:
        raise EwavitError(f"{annotations} is empty: unpack the archive again")
    paths = [str(folder / "images" / row[0]) for row in rows]
    return FileImages(paths, [index[row[1]] for row in rows], classes)


def read_folder(
    path: Path, train_split: str, val_split: str, holdout: bool = False
) -> tuple[FileImages, FileImages | None]:
    """Find the training and the evaluation images of a folder of class folders or of Tiny-ImageNet.

    Args:
        path: see `split_folders`. Or Tiny-ImageNet or the folder that contains it; there val/ has one folder
            of images and val_annotations.txt.
        train_split: name of the training folder.
        val_split: name of the evaluation folder, tried before the usual names.
        holdout: whether evaluation takes training images; then there are no evaluation images here.

    Raises:
        EwavitError: a split is missing, has fewer than two classes or an empty class, or the classes differ.
    """
    tiny = path / "tiny-imagenet-200"
    path = tiny if tiny.is_dir() else path
    train_folder, val_folder = split_folders(path, train_split, val_split, holdout, "images")
    train = read_class_folders(train_folder)
    if val_folder is None:
        return train, None
    if (val_folder / "val_annotations.txt").is_file() and (val_folder / "images").is_dir():
        return train, _read_tiny_imagenet_val(val_folder, train.classes)
    val = read_class_folders(val_folder)
    check_same_classes(train.classes, val.classes, str(path))
    return train, val


def check_same_classes(train: tuple[str, ...], val: tuple[str, ...], where: str) -> None:
    """Compare the class names of both splits.

    Raises:
        EwavitError: they differ; the message names the classes that only one split has.
    """
    if train == val:
        return
    parts = []
    for split, names in (("train", sorted(set(train) - set(val))), ("val", sorted(set(val) - set(train)))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"only in {split}: {', '.join(names[:5])}{more}")
    raise EwavitError(
        f"{where} has {len(train)} classes to train on and {len(val)} to evaluate ({'; '.join(parts)}): "
        "make them the same"
    )


def open_timm(spec: str, data_dir: str | None, split: str, **options: Any) -> Any:
    """Call timm's create_dataset without downloading torch/ sets; hfds/ sets follow the rules of `datasets`.

    Args:
        spec: "torch/...", "hfds/...", "hfids/...", "wds/..." or "tfds/...".
        data_dir: root folder of timm's sets.
        split: name of the split, as the set names it.
        options: further arguments of create_dataset.

    Raises:
        EwavitError: the package for this kind of set is not installed, or the set cannot be opened.
    """
    package = TIMM_PREFIXES[spec.split("/")[0].lower()]
    if importlib.util.find_spec(package) is None:
        raise EwavitError(f"{spec} needs the package {package}: install it with pip install {package}")
    try:
        return create_dataset(spec, root=data_dir, split=split, download=False, **options)
    except Exception as error:  # timm, torchvision and datasets each raise their own
        raise EwavitError(
            f"cannot open {spec}, split {split}, in {data_dir or 'no --data-dir'} ({first_line(error)}): "
            "check the name, --data-dir and the split"
        ) from error


def is_timm(spec: str) -> bool:
    """Whether a data spec names a set that timm opens."""
    return "/" in spec and spec.split("/")[0].lower() in TIMM_PREFIXES


def is_streamed(spec: str) -> bool:
    """Whether a data spec names a set that timm reads as a stream, without random access."""
    return is_timm(spec) and spec.split("/")[0].lower() in ("hfids", "wds", "tfds")


def is_folder(spec: str) -> bool:
    """Whether a data spec is the path of a folder."""
    return Path(spec).expanduser().is_dir()


def _timm_images(spec: str, data_dir: str | None, split: str) -> ImageSource:
    """One split of a map-style set of timm's."""
    dataset = open_timm(spec, data_dir, split)
    if not isinstance(dataset, ImageFolder):
        return TimmImages(dataset, spec)
    # torchvision counts hidden folders and follows every link, and its loader cuts 16-bit values off.
    folders = set(class_folders(Path(dataset.root)))
    classes = tuple(name for name in dataset.classes if name in folders)
    label = {dataset.class_to_idx[name]: number for number, name in enumerate(classes)}
    below = {file for name in classes for file in files_below(Path(dataset.root) / name, IMG_EXTENSIONS)[0]}
    samples = [(path, label[number]) for path, number in dataset.samples if path in below]
    return FileImages([path for path, _ in samples], [number for _, number in samples], classes)


def read_timm(
    spec: str, data_dir: str | None, train_split: str, val_split: str, holdout: bool = False
) -> tuple[ImageSource, ImageSource | None]:
    """Open both splits of a map-style set of timm's; with `holdout` the training split alone.

    Raises:
        EwavitError: the set cannot be opened, has one class only, or its splits have different classes.
    """
    train = _timm_images(spec, data_dir, train_split)
    val = None if holdout else _timm_images(spec, data_dir, val_split)
    if not train.classes:  # without names: count them
        train.classes = tuple(str(i) for i in range(int(train.labels().max()) + 1))
        if val is not None:
            val.classes = train.classes
    if len(train.classes) < 2:
        raise EwavitError(f"{spec} has one class only: give a set with at least two")
    if val is not None:
        check_same_classes(train.classes, val.classes, spec)
    return train, val
