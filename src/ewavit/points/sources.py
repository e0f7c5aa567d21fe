"""Readers of point clouds: the published formats, a folder of clouds, and generated solids.

Each returns a `PointSet`: clouds of one size in memory, centred and scaled into the unit sphere. A cloud that
is corrupt, empty, not finite, collapsed or too small raises an EwavitError that names it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ewavit.data.folders import class_folders, files_below, split_folders
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular
from ewavit.points.features import checked_features
from ewavit.points.files import (
    TEXT_SUFFIXES,
    Floats,
    check_inflation,
    checked,
    library,
    load_file,
    read_npz,
    without_missing,
)
from ewavit.points.solids import make_solid_parts, make_solids

Ints = npt.NDArray[np.int64]
# wanted points and generator, for meshes, and features -> (points, 3 or more)
Load = Callable[[int, np.random.Generator, str | None], npt.NDArray[Any]]

MODELNET10 = (
    "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet",
)  # fmt: skip
SCANOBJECTNN = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow",
    "sink", "sofa", "toilet",
)  # fmt: skip
_SCANOBJECTNN_FILES = {  # variant: folder, rest of the file names
    "obj_bg": ("main_split", "objectdataset.h5"),
    "obj_only": ("main_split_nobg", "objectdataset.h5"),
    "pb_t50_rs": ("main_split", "objectdataset_augmentedrot_scale75.h5"),
}
SOLID_PARTS = "solid-parts"
FORMATS = (
    "solids", SOLID_PARTS, "modelnet10:PATH", "modelnet40:PATH",
    *(f"{name}:PATH" for name in _SCANOBJECTNN_FILES), "shapenetpart:PATH", "points:PATH",
)  # fmt: skip
SUFFIXES = (".ply", ".pcd", ".off", ".npy", ".npz", *TEXT_SUFFIXES)


@dataclass(frozen=True)
class PointSet:
    """A set of clouds in memory.

    Attributes:
        name: short name for logs.
        classes: names of the classes, or of the parts.
        train_points: (clouds, points, 3), each cloud in the unit sphere; features follow x, y, z.
        train_labels: classes (clouds,), or parts (clouds, points).
        eval_points: as `train_points`.
        eval_labels: as `train_labels`.
        bad: number of clouds that could not be read and were skipped.
        categories: the parts of each category; empty for a set without parts.
        train_category: category of each cloud, (clouds,); None for a set without parts.
        eval_category: as `train_category`.
        others: number of files beside the clouds in formats that are not read, by suffix.
    """

    name: str
    classes: tuple[str, ...]
    train_points: Floats
    train_labels: Ints
    eval_points: Floats
    eval_labels: Ints
    bad: int = 0
    categories: tuple[tuple[int, ...], ...] = ()
    train_category: Ints | None = None
    eval_category: Ints | None = None
    others: Mapping[str, int] = field(default_factory=dict)

    def holding_out(self, indices: Ints) -> PointSet:
        """The set with the training clouds of these indices in place of the evaluation clouds."""
        category = None if self.train_category is None else self.train_category[indices]
        return replace(
            self, eval_points=self.train_points[indices], eval_labels=self.train_labels[indices],
            eval_category=category,
        )  # fmt: skip


@dataclass(frozen=True)
class _Cloud:
    """One cloud before it is read: its place, for messages, its loader, and its class or category."""

    where: str
    load: Load
    label: int


def read_points(
    spec: str, num_points: int, skip_bad: bool = False, holdout: bool = False, features: str | None = None
) -> PointSet:
    """Read a set of point clouds.

    Args:
        spec: "solids" or "solid-parts" (generated); "modelnet10:PATH" or "modelnet40:PATH" (a folder of .off
            meshes, of the resampled text files or of the h5 files, or an .npz file that `save_points` wrote);
            "obj_bg:PATH", "obj_only:PATH" or "pb_t50_rs:PATH" (ScanObjectNN's h5 files); "shapenetpart:PATH";
            or "points:PATH" (train/ and val/, validation/, valid/ or test/, each with a folder per class of
            .ply, .pcd, .off, .npy, .npz, .txt, .xyz, .csv or .pts files). Missing points, NaN, are left out.
        num_points: points that a cloud must have; up to twice as many are kept. Clouds with labelled parts
            may have fewer and are filled up by repetition.
        skip_bad: skip and count bad clouds instead of raising an error.
        holdout: whether evaluation takes training clouds; a folder of clouds needs no val/ then.
        features: what follows the coordinates of each point, see `ewavit.points.features`.

    Raises:
        EwavitError: the format is unknown, files are missing, or a cloud is bad.
    """
    kind, _, place = spec.partition(":")
    if spec in ("solids", SOLID_PARTS) and features not in (None, "normals"):
        raise EwavitError(f"{spec} has no colours: give --point-features normals, or leave it out")
    normals = features is not None
    if kind == "solids":
        return PointSet("solids", *make_solids(num_points, normals=normals))
    if spec == SOLID_PARTS:
        names, categories, train, held = make_solid_parts(num_points, normals=normals)
        return PointSet(
            spec, names, train.points, train.parts, held.points, held.parts, 0, categories, train.category,
            held.category,
        )  # fmt: skip
    path = Path(place).expanduser()
    if not place or not path.exists():
        raise EwavitError(f"no folder or file {place!r}: give {kind}:PATH with the path of the set")
    reader = _Reader(num_points, skip_bad, features)
    if kind in ("modelnet10", "modelnet40"):
        return _read_modelnet(reader, kind, path)
    if kind in _SCANOBJECTNN_FILES:
        return _read_scanobjectnn(reader, kind, path)
    if kind == "shapenetpart":
        return _read_shapenetpart(reader, path)
    if kind == "points":
        return _read_folder(reader, path, holdout)
    raise EwavitError(f"unknown point data {spec!r}: give {', '.join(FORMATS)}")


def read_cloud(file: Path, num_points: int, features: str | None = None) -> Floats:
    """Read one cloud (num_points, 3 or more) from a file, the same points as evaluation takes from it.

    Args:
        file: of a format that `points:PATH` takes, see `read_points`.
        num_points: points to take.
        features: what follows the coordinates, see `ewavit.points.features`.

    Raises:
        EwavitError: the cloud is bad.
    """
    points = _Reader(num_points, False, features).load(_of_file(file, 0))
    assert points is not None
    return points[:num_points]


def read_whole(file: Path, num_points: int) -> tuple[npt.NDArray[Any], Floats]:
    """Read all points of one cloud.

    Args:
        file: as in `read_cloud`.
        num_points: points that `read_cloud` takes of it; a mesh gives twice as many.

    Returns:
        Coordinates (points, 3) as stored, and centred and scaled as those of `read_cloud`.

    Raises:
        EwavitError: the cloud is bad.
    """
    rows = _Reader(num_points, False, None).rows(_of_file(file, 0), 2 * num_points, np.random.default_rng(0))
    return rows[:, :3], checked(rows, str(file), 1)


def save_points(points: PointSet, file: Path) -> None:
    """Write a classification set as one .npz file; the spec `modelnet10:FILE` reads it again, quickly.

    Its arrays are `classes`, `train_points`, `train_label`, `test_points` and `test_label`.

    Args:
        points: the set, without parts.
        file: path of the .npz file.
    """
    np.savez_compressed(
        file, classes=np.array(points.classes), train_points=points.train_points,
        train_label=points.train_labels, test_points=points.eval_points,
        test_label=points.eval_labels,
    )  # fmt: skip


class _Reader:
    """Loads and checks clouds and cuts them to one size."""

    def __init__(self, num_points: int, skip_bad: bool, features: str | None) -> None:
        self.num_points, self.skip_bad, self.bad = num_points, skip_bad, 0
        self.features = features

    def read(self, clouds: Iterable[_Cloud]) -> tuple[Floats, Ints]:
        """Points (clouds, points, 3), cut to the smallest cloud and at most 2 num_points, and labels."""
        arrays, labels = [], []
        for cloud in clouds:
            points = self.load(cloud)
            if points is not None:
                arrays.append(points)
                labels.append(cloud.label)
        size = min((len(points) for points in arrays), default=0)
        stacked = (
            np.stack([points[:size] for points in arrays]) if arrays else np.empty((0, 0, 3), np.float32)
        )
        return stacked, np.array(labels, np.int64)

    def load(self, cloud: _Cloud) -> Floats | None:
        """One cloud (points, 3 or more), normalised, in a fixed random order; None if bad and skipped."""
        try:
            rng = np.random.default_rng(0)
            rows = self.rows(cloud, 2 * self.num_points, rng)
            points = checked(rows, cloud.where, self.num_points)
            points = np.concatenate([points, checked_features(rows, cloud.where, self.features)], 1)
        except EwavitError:
            if not self.skip_bad:
                raise
            self.bad += 1
            return None
        return points[rng.permutation(len(points))[: 2 * self.num_points]]

    def rows(self, cloud: _Cloud, wanted: int, rng: np.random.Generator) -> npt.NDArray[Any]:
        """What is stored of a cloud, without missing points."""
        try:
            return without_missing(cloud.load(wanted, rng, self.features))
        except EwavitError:
            raise
        except Exception as problem:  # readers raise many things on damaged files
            raise EwavitError(
                f"{cloud.where} cannot be read as a point cloud ({first_line(problem)}): replace or remove it"
            ) from None


def _of_file(path: Path, label: int) -> _Cloud:
    return _Cloud(str(path), lambda *wanted: load_file(path, *wanted), label)


def _of_array(array: Any, labels: Any, where: str) -> list[_Cloud]:
    """Clouds from an array (clouds, points, 3 or more) and labels (clouds,) or (clouds, 1)."""
    labels = np.asarray(labels).reshape(-1)
    if array.ndim != 3 or labels.dtype.kind not in "iu":
        raise EwavitError(
            f"{where} has clouds of shape {array.shape} and labels of type {labels.dtype}: give an array "
            "(clouds, points, 3) and whole numbers"
        )
    if len(array) != len(labels):
        raise EwavitError(f"{where} has {len(array)} clouds and {len(labels)} labels: download it again")

    def load(index: int) -> Load:
        return lambda *_: np.asarray(array[index])

    return [
        _Cloud(f"cloud {index} of {where}", load(index), int(label)) for index, label in enumerate(labels)
    ]


def _of_h5(files: Sequence[Path]) -> list[_Cloud]:
    h5py = library("h5py")
    clouds: list[_Cloud] = []
    for file in files:
        try:
            with h5py.File(regular(file), "r") as stored:
                data, label = (_h5_array(stored, name, file) for name in ("data", "label"))
        except Exception as problem:  # h5py raises what it likes for a damaged file
            raise EwavitError(
                f"{file} cannot be read as an h5 file of clouds ({first_line(problem)}): download it again"
            ) from None
        clouds += _of_array(data, label, str(file))
    return clouds


def _h5_array(stored: Any, name: str, file: Path) -> npt.NDArray[Any]:
    """A data set of an h5 file, from the file itself: links, virtual sets and outside storage are refused.

    Raises:
        ValueError: it is no such array of numbers, or the file is packed suspiciously tight.
    """
    h5py = library("h5py")
    link = stored.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        what = "missing" if link is None else f"a link ({type(link).__name__}), and links are not followed"
        raise ValueError(f"its {name} is {what}")
    found = stored[name]
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "fiu" or found.shape is None:
        raise ValueError(f"its {name} is no array of numbers")
    if found.is_virtual or found.external:
        raise ValueError(f"its {name} is in other files, and those are not read")
    chunk = math.prod(found.chunks or ()) * found.dtype.itemsize
    check_inflation(max(found.nbytes, chunk), file)
    return np.asarray(found[:])


# --- published sets ---


def _read_modelnet(reader: _Reader, kind: str, path: Path) -> PointSet:
    if path.is_file() or list(path.glob("*.npz")):
        file = path if path.is_file() else sorted(path.glob("*.npz"))[0]
        classes, train, test = _modelnet_npz(file)
    elif list(path.glob("*_shape_names.txt")) and list(path.glob("modelnet*_train.txt")):
        classes, train, test = _modelnet_text(kind, path)
    elif h5 := sorted(path.rglob("ply_data_train*.h5")):
        classes = _lines(h5[0].with_name("shape_names.txt"))
        train, test = _of_h5(h5), _of_h5(sorted(h5[0].parent.glob("ply_data_test*.h5")))
    elif meshes := sorted(path.glob("*/train/*.off")):
        classes = tuple(sorted({mesh.parent.parent.name for mesh in meshes}))
        label = {name: number for number, name in enumerate(classes)}
        train = [_of_file(mesh, label[mesh.parent.parent.name]) for mesh in meshes]
        tests = sorted(path.glob("*/test/*.off"))
        test = [_of_file(mesh, label.get(mesh.parent.parent.name, -1)) for mesh in tests]
    else:
        raise EwavitError(
            f"{path} does not hold ModelNet: give the folder of the .off meshes, of the resampled text files "
            "(modelnet40_train.txt), of the h5 files (ply_data_train0.h5), or an .npz file"
        )
    if kind == "modelnet10" and len(classes) > len(MODELNET10):
        chosen = [number for number, name in enumerate(classes) if name in MODELNET10]
        train, test = (
            [replace(cloud, label=chosen.index(cloud.label)) for cloud in clouds if cloud.label in chosen]
            for clouds in (train, test)
        )
        classes = tuple(classes[number] for number in chosen)
    return _classification(reader, kind, classes, train, test, path)


def _modelnet_npz(file: Path) -> tuple[tuple[str, ...], list[_Cloud], list[_Cloud]]:
    try:
        arrays = read_npz(file)
        classes = tuple(str(name) for name in arrays["classes"])
        train, test = ((arrays[f"{split}_points"], arrays[f"{split}_label"]) for split in ("train", "test"))
    except Exception as problem:  # zip, format and key errors of a damaged or foreign file
        raise EwavitError(
            f"{file} cannot be read as an .npz file of clouds ({first_line(problem)}): download it again"
        ) from None
    return classes, _of_array(*train, f"{file} (train)"), _of_array(*test, f"{file} (test)")


def _modelnet_text(kind: str, path: Path) -> tuple[tuple[str, ...], list[_Cloud], list[_Cloud]]:
    prefix = kind if (path / f"{kind}_train.txt").is_file() else "modelnet40"
    classes = _lines(path / f"{prefix}_shape_names.txt")
    label = {name: number for number, name in enumerate(classes)}

    def split(name: str) -> list[_Cloud]:
        clouds = []
        for shape in _lines(path / f"{prefix}_{name}.txt"):
            folder = shape.rpartition("_")[0]
            clouds.append(_of_file(path / folder / f"{shape}.txt", label.get(folder, -1)))
        return clouds

    return classes, split("train"), split("test")


def _read_scanobjectnn(reader: _Reader, kind: str, path: Path) -> PointSet:
    folder, rest = _SCANOBJECTNN_FILES[kind]
    places = [path / folder, path / "h5_files" / folder, *([path] if path.name == folder else [])]
    place = next(
        (p for p in places if (p / f"training_{rest}").is_file() and (p / f"test_{rest}").is_file()), None
    )
    if place is None:
        raise EwavitError(
            f"{path} has no {folder}/training_{rest} and test_{rest}: give ScanObjectNN's h5_files folder"
        )
    train, test = _of_h5([place / f"training_{rest}"]), _of_h5([place / f"test_{rest}"])
    return _classification(reader, kind, SCANOBJECTNN, train, test, path)


def _read_folder(reader: _Reader, path: Path, holdout: bool) -> PointSet:
    folders = [
        folder for folder in split_folders(path, "train", None, holdout, "clouds") if folder is not None
    ]
    names = [sorted(class_folders(folder)) for folder in folders]
    if names[0] != names[-1]:
        odd = sorted(set(names[0]) ^ set(names[-1]))
        raise EwavitError(
            f"{path}: train/ and {folders[-1].name}/ differ ({', '.join(odd[:5])}): make them the same"
        )
    splits: list[list[_Cloud]] = []
    others: Counter[str] = Counter()
    for folder in folders:
        clouds = []
        for label, name in enumerate(names[0]):
            files, beside = files_below(folder / name, SUFFIXES)
            if not files:
                raise EwavitError(
                    f"{folder / name} has no clouds: fill it with {', '.join(SUFFIXES)} files, or remove it"
                )
            clouds += [_of_file(Path(file), label) for file in files]
            others += beside
        splits.append(clouds)
    held = splits[1] if len(splits) > 1 else None
    found = _classification(reader, path.resolve().name, names[0], splits[0], held, path)
    return replace(found, others=others)


def _classification(
    reader: _Reader,
    name: str,
    classes: Sequence[str],
    train: list[_Cloud],
    test: list[_Cloud] | None,
    path: Path,
) -> PointSet:
    """The clouds of both splits; without a test split the set has no evaluation clouds yet."""
    if len(classes) < 2:
        raise EwavitError(f"{path} has {len(classes)} classes: give a set with at least two")
    splits = {"train": train} if test is None else {"train": train, "test": test}
    for split, clouds in splits.items():
        if not clouds:
            raise EwavitError(f"{path} has no {split} clouds: complete the set")
        if wrong := next((c for c in clouds if not 0 <= c.label < len(classes)), None):
            raise EwavitError(
                f"{wrong.where} belongs to none of the {len(classes)} classes: download the set again"
            )
    read = [reader.read(clouds) for clouds in splits.values()]
    if not all(len(points) for points, _ in read):
        raise EwavitError(f"{path} has no readable clouds ({reader.bad} bad): download the set again")
    held = read[1] if test is not None else reader.read(())
    return PointSet(name, tuple(classes), *read[0], *held, reader.bad)


def _lines(file: Path) -> tuple[str, ...]:
    try:
        text = regular(file).read_text()
    except (OSError, UnicodeDecodeError) as problem:
        what = f"cannot be read ({first_line(problem)})" if file.exists() else "is missing"
        raise EwavitError(f"{file} {what}: download the set again") from None
    return tuple(row.strip() for row in text.splitlines() if row.strip())


# --- ShapeNetPart ---

# Parts are numbered through the categories in this order.
_PARTS = {
    "Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2,
    "Lamp": 4, "Laptop": 2, "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3,
}  # fmt: skip


def _read_shapenetpart(reader: _Reader, path: Path) -> PointSet:
    """The published text files; training takes the training and validation clouds, as in the papers."""
    rows = [row.split() for row in _lines(path / "synsetoffset2category.txt")]
    folders = {row[1]: row[0] for row in rows if len(row) == 2}
    places = {folder: list(_PARTS).index(name) for folder, name in folders.items() if name in _PARTS}
    if not places:
        raise EwavitError(
            f"{path / 'synsetoffset2category.txt'} names no category of ShapeNetPart: download it again"
        )

    def split(*names: str) -> list[_Cloud]:
        clouds = []
        for name in names:
            file = path / "train_test_split" / f"shuffled_{name}_file_list.json"
            try:
                shapes = [shape.split("/")[-2:] for shape in json.loads(regular(file).read_text())]
                pairs = [(folder, identity) for folder, identity in shapes]
            except (OSError, ValueError, TypeError, AttributeError, RecursionError) as problem:
                raise EwavitError(
                    f"{file} cannot be read ({first_line(problem)}): download the set again"
                ) from None
            for folder, identity in pairs:
                if folder in places:
                    clouds.append(_of_file(path / folder / f"{identity}.txt", places[folder]))
        return clouds

    ends = np.cumsum(list(_PARTS.values())).tolist()
    categories = tuple(
        tuple(range(end - count, end)) for end, count in zip(ends, _PARTS.values(), strict=True)
    )
    classes = tuple(f"{name} {part}" for name, count in _PARTS.items() for part in range(count))
    train, test = (_read_parts(reader, split(*names), categories) for names in (("train", "val"), ("test",)))
    if not len(train[0]) or not len(test[0]):
        raise EwavitError(f"{path} has no readable training or test clouds: download the set again")
    return PointSet("shapenetpart", classes, *train[:2], *test[:2], reader.bad, categories, train[2], test[2])


def _read_parts(
    reader: _Reader, clouds: list[_Cloud], categories: tuple[tuple[int, ...], ...]
) -> tuple[Floats, Ints, Ints]:
    """Points, parts and categories; as in the public code, smaller clouds are filled up by repetition."""
    points, labels, category = [], [], []
    for cloud in clouds:
        rng = np.random.default_rng(0)
        try:
            rows = reader.rows(cloud, reader.num_points, rng)
            coordinates, parts = checked(rows, cloud.where, 1), rows[:, -1].astype(np.int64)
            features = checked_features(rows[:, :-1], cloud.where, reader.features)
            if not np.isin(parts, categories[cloud.label]).all():
                raise EwavitError(f"{cloud.where} has parts of another category: download the set again")
        except EwavitError:
            if not reader.skip_bad:
                raise
            reader.bad += 1
            continue
        order = rng.permutation(len(parts))
        chosen = np.resize(order, reader.num_points)
        points.append(np.concatenate([coordinates, features], 1)[chosen])
        labels.append(parts[chosen])
        category.append(cloud.label)
    if not points:
        return np.empty((0, 0, 3), np.float32), np.empty((0, 0), np.int64), np.empty(0, np.int64)
    return np.stack(points), np.stack(labels), np.array(category, np.int64)


# Specs of point clouds begin with one of these, then a colon and a path.
POINT_PREFIXES = ("modelnet10", "modelnet40", "obj_bg", "obj_only", "pb_t50_rs", "shapenetpart", "points")


def is_points(spec: str) -> bool:
    """Whether a data spec names point clouds."""
    return spec in ("solids", SOLID_PARTS) or spec.partition(":")[0] in POINT_PREFIXES


def has_parts(spec: str) -> bool:
    """Whether a data spec names point clouds with a part for each point."""
    return spec == SOLID_PARTS or spec.partition(":")[0] == "shapenetpart"
