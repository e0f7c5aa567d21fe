"""Readers of files with one point cloud, and the check of every cloud."""

from __future__ import annotations

import importlib
import io
import math
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ewavit.errors import EwavitError
from ewavit.files import regular
from ewavit.points.features import named_columns

Floats = npt.NDArray[np.float32]
TEXT_SUFFIXES = (".txt", ".xyz", ".csv", ".pts")
FINEST = 1e-6  # distance in a cloud of radius 1 below which two points are one to a float32 model
MOST_COLUMNS = 32  # of a point; a last dimension above this is not one of points
MOST_INFLATION, ALWAYS_ALLOWED = 100, 2**26  # bytes read for each byte of a packed file; bytes of any file


def checked(points: npt.NDArray[Any], where: str, least: int) -> Floats:
    """Check a cloud and normalise it.

    Args:
        points: (points, 3 or more); the first three columns are x, y, z.
        where: name of the cloud in messages.
        least: points that it must have.

    Returns:
        Coordinates (points, 3), float32, centred and scaled to radius 1.

    Raises:
        EwavitError: the array is no cloud, has too few points, or they are not finite, all the same, or the
            same once they are scaled.
    """
    if points.dtype.kind not in "fiu":
        raise EwavitError(f"{where} holds values of type {points.dtype}: a cloud is an array of numbers")
    if points.ndim != 2 or points.shape[1] < 3 or not len(points):
        what = "is empty" if points.ndim == 2 and not len(points) else f"has the shape {points.shape}"
        raise EwavitError(f"{where} {what}: a cloud is an array (points, 3), with at least {least} points")
    points = points[:, :3].astype(np.float64)  # map coordinates have no room for the object in float32
    if not np.isfinite(points).all():
        raise EwavitError(f"{where} has coordinates that are not finite: repair or remove it")
    if len(points) < least:
        raise EwavitError(
            f"{where} has {len(points)} points: remove it, or choose --num-points {len(points)}"
        )
    centred = points / (np.abs(points).max() or 1.0)  # else the squares of large values overflow
    centred = centred - centred.mean(0)
    radius = np.sqrt((centred**2).sum(1).max())
    if not (points != points[0]).any() or not radius > 0:
        raise EwavitError(f"{where} has all its points in one place: remove it")
    scaled = np.asarray(centred / radius, np.float32)
    before, after = _distinct(centred), _distinct(np.round(scaled / FINEST))
    if 2 * after < before:
        raise EwavitError(
            f"{where} collapses when it is scaled to radius 1 ({before:,} places become {after:,}), as with "
            "an outlier far away: repair or remove it"
        )
    return scaled


def _distinct(points: npt.NDArray[Any]) -> int:
    """The number of distinct values along the axis that has the most."""
    return max(len(np.unique(axis)) for axis in points.T)


def without_missing(points: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The points of an organised cloud that were measured; the others are NaN by convention.

    Args:
        points: (points, 3 or more), or (rows, columns, 3 or more) as depth cameras write them.

    Returns:
        Points (points, 3 or more) without NaN in x, y or z. Arrays that are no such cloud, and clouds of NaN
        alone, are returned as they are.
    """
    if points.ndim == 3 and 3 <= points.shape[2] <= MOST_COLUMNS:
        points = points.reshape(-1, points.shape[2])
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind != "f":
        return points
    measured = ~np.isnan(points[:, :3]).any(1)
    return points[measured] if measured.any() else points


def load_file(
    path: Path, wanted: int, rng: np.random.Generator, features: str | None = None
) -> npt.NDArray[Any]:
    """Read the points of a file.

    Args:
        path: .npy, .npz (one array, or one called `points`), .pcd, text (see `read_text`), or a mesh or cloud
            that trimesh reads, such as .ply and .off.
        wanted: number of points to sample from a mesh, uniformly by area.
        rng: random numbers for the sampling.
        features: what follows x, y, z, see `ewavit.points.features`. Arrays, and text without a header, have
            these columns in this order; a mesh has normals.

    Returns:
        Points (points, 3 or more); of an organised .npy or .npz file (rows, columns, 3 or more).

    Raises:
        EwavitError: trimesh is not installed.
        OSError: it is missing, or a named pipe, a socket or a device.
        ValueError: an .npz file holds several arrays, none of them called `points`. Damaged files raise other
            errors as well.
    """
    suffix = regular(path).suffix.lower()
    if suffix == ".npy":
        with path.open("rb") as stream:
            return read_array(stream, path.stat().st_size)
    if suffix == ".npz":
        stored = read_npz(path, ("points",))
        if len(stored) != 1:
            raise ValueError(f"it holds {', '.join(stored)} and no array called points")
        return next(iter(stored.values()))
    if suffix == ".pcd":
        return read_pcd(path, features)
    if suffix in TEXT_SUFFIXES:
        return read_text(path, features)
    trimesh = library("trimesh")
    content = io.BytesIO(path.read_bytes())  # so trimesh finds no other file, whatever this one names
    shape = trimesh.load(content, suffix[1:], process=False, skip_materials=True)
    vertices, faces = getattr(shape, "vertices", np.empty((0, 3))), getattr(shape, "faces", ())
    if not len(faces):
        return _of_ply(shape, features) if features else np.asarray(vertices)
    if not np.isfinite(vertices).all():
        raise ValueError("a corner of its faces is not finite")
    if np.min(faces) < 0 or np.max(faces) >= len(vertices):
        raise ValueError(f"a face names a corner beyond its {len(vertices):,} vertices")
    if features not in (None, "normals"):
        raise ValueError("colours of a mesh are not read")
    points, chosen = trimesh.sample.sample_surface(shape, wanted, seed=rng)
    return np.concatenate([points, shape.face_normals[chosen]], 1) if features else np.asarray(points)


def _of_ply(shape: Any, features: str) -> npt.NDArray[Any]:
    """Points with features of a .ply file without faces, as trimesh keeps its vertices."""
    try:
        stored = shape.metadata["_ply_raw"]["vertex"]["data"]
    except (AttributeError, KeyError):
        raise ValueError(f"no {features} are read from its points") from None
    names = list(stored if isinstance(stored, dict) else stored.dtype.names)
    chosen = named_columns(names, features)
    return np.stack([np.asarray(stored[names[index]], np.float64).reshape(-1) for index in chosen], 1)


def read_array(stream: IO[bytes], size: int) -> npt.NDArray[Any]:
    """Read one array of numpy's .npy format; nothing is allocated before its header is checked.

    Args:
        stream: at the start of the array.
        size: its bytes, header included.

    Raises:
        ValueError: it is no such array, holds Python objects, or has another size than its header says.
    """
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of numpy's format is not read")
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, by_column, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which could run code: save an array of numbers")
    wanted, left = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if not dtype.itemsize or min(shape, default=0) < 0 or wanted != left:
        raise ValueError(f"its header says {wanted:,} bytes of shape {shape}, and {left:,} follow")
    return np.frombuffer(stream.read(left), dtype).reshape(shape, order="F" if by_column else "C")


def read_npz(path: Path, wanted: Collection[str] = ()) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays of an .npz file by name.

    Args:
        path: the file.
        wanted: read these arrays only, if the file has them.

    Raises:
        ValueError: an array is damaged or holds Python objects, or the file is packed suspiciously tight.
            Damaged files raise other errors as well.
    """
    with zipfile.ZipFile(regular(path)) as packed:
        members = {each.filename.removesuffix(".npy"): each for each in packed.infolist()}
        chosen = {name: member for name, member in members.items() if name in wanted} or members
        check_inflation(sum(member.file_size for member in chosen.values()), path)
        arrays = {}
        for name, member in chosen.items():
            with packed.open(member) as stream:
                arrays[name] = read_array(stream, member.file_size)
        return arrays


def check_inflation(size: int, path: Path) -> None:
    """Refuse a packed file that becomes far larger when it is read, as no cloud does.

    Args:
        size: bytes to read, as the file says.
        path: the file.

    Raises:
        ValueError: it would take more than 64 MiB and 100 times the file's size.
    """
    packed = path.stat().st_size
    if size > max(MOST_INFLATION * packed, ALWAYS_ALLOWED):
        raise ValueError(
            f"its {packed:,} bytes would become {size:,}, more than {MOST_INFLATION} times as many"
        )


def read_text(path: Path, features: str | None = None) -> npt.NDArray[np.float64]:
    """Read a text file with one point per line.

    Numbers are separated by blanks, commas or semicolons. Lines that begin with # or // are comments. A
    header with x, y and z gives their columns; without one they are the first three. A line with one number
    before the points is their count.

    Args:
        path: the file.
        features: what a header also has to name, see `ewavit.points.features`.

    Returns:
        Points (points, columns), x, y, z and the named features first.

    Raises:
        ValueError: the header names no x, y and z, lines differ in length, or a number cannot be read.
    """
    lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    lines = [line for line in lines if line]
    start = next((number for number, line in enumerate(lines) if _numbers(line)), len(lines))
    if start + 1 < len(lines) and len(_words(lines[start])) == 1 < len(_words(lines[start + 1])):
        start += 1  # the count of the points
    rows, text = lines[start:], "\n".join(lines[start : start + 100])
    delimiter = next((sign for sign in ";," if sign in text), None)
    if delimiter == ";":
        rows = [line.replace(",", ".") for line in rows]  # then a comma is a decimal point
    elif re.search(r"\d,\d\S*(?<!,)[ \t]+[-+]?\d+,\d", text):
        raise ValueError("blanks and commas both separate its numbers; write decimal points")
    table = np.loadtxt(rows, delimiter=delimiter, comments=["#", "//"], ndmin=2)
    for line in lines[:start]:
        names = [name.strip(" \t\"'").lower() for name in line.lstrip("#/ ").split(delimiter)]
        if {"x", "y", "z"} <= set(names) and len(names) == table.shape[1]:
            first = named_columns(names, features)
            return table[:, first + [number for number in range(len(names)) if number not in first]]
        if not line.startswith(("#", "//")) and len(names) > 1:
            raise ValueError(f"its header {line[:40]!r} does not name x, y, z and every other column")
    return table


def _words(line: str) -> list[str]:
    return re.split(r"[\s,;]+", line.strip())


def _numbers(line: str) -> bool:
    """Whether a line of a text file begins with a number."""
    try:
        float(_words(line)[0])
    except ValueError:
        return False
    return True


_PCD_TYPES = {"F": "f", "I": "i", "U": "u"}


def read_pcd(path: Path, features: str | None = None) -> npt.NDArray[np.float64]:
    """Read x, y, z and features (points, 3 or more) of a .pcd file, ascii or binary.

    Missing points, NaN by convention, stay NaN. Colours that are packed into one number are not read.

    Raises:
        ValueError: the data is neither ascii nor binary. Damaged files raise other errors as well.
    """
    header: dict[str, list[str]] = {}
    with path.open("rb") as stream:
        for row in stream:
            words = row.decode("ascii").split()
            if words and not words[0].startswith("#"):
                header[words[0]] = words[1:]
            if words[:1] == ["DATA"]:
                break
        body = stream.read()
    names, kind, count = header["FIELDS"], header["DATA"][0], int(header["POINTS"][0])
    repeats = [int(number) for number in header.get("COUNT", ["1"] * len(names))]
    if min(count, *repeats) < 0:
        raise ValueError(f"its header says POINTS {count} and COUNT {repeats}")
    if kind == "ascii":
        columns = np.cumsum([0, *repeats])[named_columns(names, features)]
        table = np.array([text.split() for text in body.decode("ascii").splitlines()[:count]], np.float64)
        return table.reshape(count, sum(repeats))[:, columns]
    if kind != "binary":
        raise ValueError(f"its DATA is {kind}; write it as ascii or binary")
    types = [f"<{_PCD_TYPES[t]}{size}" for t, size in zip(header["TYPE"], header["SIZE"], strict=True)]
    fields = [(f"{i}", t, (r,)) for i, (t, r) in enumerate(zip(types, repeats, strict=True))]
    rows = np.frombuffer(body, np.dtype(fields), count)
    chosen = named_columns(names, features)
    return np.stack([rows[f"{index}"][:, 0] for index in chosen], 1).astype(np.float64)


def library(name: str) -> Any:
    """Import a package of the extra `points`.

    Raises:
        EwavitError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise EwavitError(f"point clouds need the package {name}: pip install 'ewavit[points]'") from None
