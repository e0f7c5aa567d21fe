"""Published data sets: their layouts, counts and checksums, and the check of a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100

from ewavit.data.arrays import find_cifar
from ewavit.data.batches import Data
from ewavit.data.masks import ADE20K, VOC_2012
from ewavit.data.retrieval import COUNTS
from ewavit.files import regular
from ewavit.points.sources import is_points
from ewavit.training.opening import open_recipe_data
from ewavit.training.places import split_path
from ewavit.training.recipe import Recipe


@dataclass(frozen=True)
class Published:
    """A data set as published: training and evaluation samples, classes or parts, and what --data takes."""

    name: str
    train: int
    evaluation: int
    classes: int
    layout: str
    task: str | None = None


_FOLDERS = "PATH with train/ and val/, a folder of images for each class"
_POINTS = {
    "modelnet10": (3_991, 908, 10),
    "modelnet40": (9_843, 2_468, 40),
    "obj_bg": (2_309, 581, 15),
    "obj_only": (2_309, 581, 15),
    "pb_t50_rs": (11_416, 2_882, 15),
    "shapenetpart": (14_007, 2_874, 50),
}
PUBLISHED = (
    Published("cifar-10", 50_000, 10_000, 10, "PATH of cifar-10-batches-py, or the folder above"),
    Published("cifar-100", 50_000, 10_000, 100, "PATH of cifar-100-python, or the folder above"),
    Published("tiny-imagenet", 100_000, 10_000, 200, "PATH of tiny-imagenet-200, or the folder above"),
    Published("imagenet-1k", 1_281_167, 50_000, 1_000, _FOLDERS),
    Published("flowers-102", 2_040, 6_149, 102, f"{_FOLDERS}; train/ has both published parts"),
    Published("pets", 3_680, 3_669, 37, _FOLDERS),
    Published("cars", 8_144, 8_041, 196, _FOLDERS),
    *(Published(name, *counts, f"{name}:PATH") for name, counts in _POINTS.items()),
    Published("voc-2012", *VOC_2012, 21, "PATH of VOC2012 or VOCdevkit", "segmentation"),
    Published("ade20k", *ADE20K, 150, "PATH of ADEChallengeData2016", "segmentation"),
    *(
        Published(name, train, held, classes, f"PATH of {name}", "retrieval")
        for name, (train, classes, held, _) in COUNTS.items()
    ),
)


@dataclass(frozen=True)
class Report:
    """What a copy holds, and what is wrong with it."""

    spec: str
    train: int
    evaluation: int
    classes: int
    published: str | None  # the set that it is a copy of; None: no published set is known by this layout
    problems: tuple[str, ...]

    def __str__(self) -> str:
        held = f"{self.train:,} training, {self.evaluation:,} evaluation samples, {self.classes} classes"
        if self.published is None:
            return f"{self.spec}: {held}; no published set has this layout and number of classes"
        lines = [f"{self.spec}: {held}"]
        lines += [f"not as {self.published} was published: {problem}" for problem in self.problems]
        return "\n".join(lines if self.problems else [f"{lines[0]}, as {self.published} was published"])


def check(spec: str, task: str | None = None) -> Report:
    """Compare a copy of a published set with its counts, and the files of CIFAR with their MD5 sums.

    Args:
        spec: the data, as `--data` takes it.
        task: as `--task` takes it.

    Raises:
        EwavitError: the data cannot be read.
    """
    points = 32 if is_points(spec) else None  # clouds of any size are counted
    data = open_recipe_data(Recipe(data=spec, task=task, workers=0, num_points=points))  # type: ignore[arg-type]
    row = identify(spec, data, task)
    found = (data.num_train, data.num_eval, data.num_classes)
    problems: list[str] = []
    if row is not None:
        words = ("training samples", "evaluation samples", "classes")
        counts = (row.train, row.evaluation, row.classes)
        pairs = zip(words, found, counts, strict=True)
        problems = [f"{has:,} {word} in place of {wanted:,}" for word, has, wanted in pairs if has != wanted]
        problems += _other_files(spec)
    return Report(spec, *found, None if row is None else row.name, tuple(problems))


def identify(spec: str, data: Data, task: str | None = None) -> Published | None:
    """The published set of opened data, by their layout or number of classes; None if unknown."""
    rows = [row for row in PUBLISHED if row.task == (None if task == "classification" else task)]
    if is_points(spec):
        name = spec.partition(":")[0]
        return next((row for row in rows if row.name == name), None)
    if task is None and (folder := find_cifar(Path(spec).expanduser())) is not None:
        name = "cifar-100" if "100" in folder.name or (folder / "meta").exists() else "cifar-10"
        return next(row for row in rows if row.name == name)
    others = [row for row in rows if ":" not in row.layout and not row.name.startswith("cifar")]
    return next((row for row in others if row.classes == data.num_classes), None)


def _other_files(spec: str) -> Iterator[str]:
    """The files of CIFAR that differ from the published ones; torchvision knows their MD5 sums."""
    _, path = split_path(spec)
    folder = None if path is None or is_points(spec) else find_cifar(path)
    if folder is None:
        return
    kind = CIFAR100 if (folder / "meta").exists() else CIFAR10
    sums = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    for name, wanted in sums:
        found = hashlib.md5(regular(folder / name).read_bytes(), usedforsecurity=False).hexdigest()
        if found != wanted:
            yield f"{name} has the MD5 sum {found} in place of {wanted}"
