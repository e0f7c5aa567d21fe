"""Readers of files with one point cloud, and the check of every cloud."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ewavit.errors import EwavitError

Floats = npt.NDArray[np.float32]


def checked(points: npt.NDArray[Any], where: str, least: int) -> Floats:
    """Check a cloud and normalise it.

    Args:
        points: (points, 3 or more); the first three columns are x, y, z.
        where: name of the cloud in messages.
        least: points that it must have.

    Returns:
        Coordinates (points, 3), float32, centred and scaled to radius 1.

    Raises:
        EwavitError: the array is no cloud, has too few points, or they are not finite or all the same.
    """
    if points.ndim != 2 or points.shape[1] < 3 or not len(points):
        what = "is empty" if points.ndim == 2 and not len(points) else f"has the shape {points.shape}"
        raise EwavitError(f"{where} {what}: a cloud is an array (points, 3), with at least {least} points")
    points = points[:, :3].astype(np.float32)
    if not np.isfinite(points).all():
        raise EwavitError(f"{where} has coordinates that are not finite: repair or remove it")
    if len(points) < least:
        raise EwavitError(
            f"{where} has {len(points)} points: remove it, or choose --num-points {len(points)}"
        )
    points = points - points.mean(0)
    radius = np.sqrt((points**2).sum(1).max())
    if not radius > 0:
        raise EwavitError(f"{where} has all its points in one place: remove it")
    return np.asarray(points / radius, np.float32)


def load_file(path: Path, wanted: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Read the points of a file.

    Args:
        path: .npy, .npz (one array, or one called `points`), .pcd, .txt (one point per line), or a mesh or
            cloud that trimesh reads, such as .ply and .off.
        wanted: number of points to sample from a mesh, uniformly by area.
        rng: random numbers for the sampling.

    Returns:
        Points (points, 3 or more).

    Raises:
        EwavitError: trimesh is not installed.
        ValueError: an .npz file holds several arrays, none of them called `points`.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.asarray(np.load(path, allow_pickle=False))
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            names = list(stored)
            if "points" not in names and len(names) != 1:
                raise ValueError(f"it holds {', '.join(names)} and no array called points")
            return np.asarray(stored["points" if "points" in names else names[0]])
    if suffix == ".pcd":
        return read_pcd(path)
    if suffix == ".txt":
        text = path.read_text()
        return np.loadtxt(text.splitlines(), delimiter="," if "," in text else None, ndmin=2)
    trimesh = library("trimesh")
    shape = trimesh.load(path, process=False)
    if len(getattr(shape, "faces", ())):
        return np.asarray(trimesh.sample.sample_surface(shape, wanted, seed=rng)[0])
    return np.asarray(getattr(shape, "vertices", np.empty((0, 3))))


_PCD_TYPES = {"F": "f", "I": "i", "U": "u"}


def read_pcd(path: Path) -> npt.NDArray[np.float64]:
    """Read x, y, z (points, 3) of a .pcd file, ascii or binary; missing points, NaN by convention, stay NaN.

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
    if kind == "ascii":
        columns = np.cumsum([0, *repeats])[[names.index(axis) for axis in "xyz"]]
        table = np.array([text.split() for text in body.decode("ascii").splitlines()[:count]], np.float64)
        return table.reshape(count, sum(repeats))[:, columns]
    if kind != "binary":
        raise ValueError(f"its DATA is {kind}; write it as ascii or binary")
    types = [f"<{_PCD_TYPES[t]}{size}" for t, size in zip(header["TYPE"], header["SIZE"], strict=True)]
    fields = [(f"{i}", t, (r,)) for i, (t, r) in enumerate(zip(types, repeats, strict=True))]
    rows = np.frombuffer(body, np.dtype(fields), count)
    return np.stack([rows[f"{names.index(axis)}"][:, 0] for axis in "xyz"], 1).astype(np.float64)


def library(name: str) -> Any:
    """Import a package of the extra `points`.

    Raises:
        EwavitError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise EwavitError(f"point clouds need the package {name}: pip install 'ewavit[points]'") from None
