"""Files of point clouds: with known points, or damaged. Oracles: numpy, struct and plain text."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import trimesh
from fuzz_inputs import ACCEPTED, REFUSED, Draw, Wrong, answered, damaged, edited, outcome, target
from hypothesis import strategies as st

from ewavit.points.files import checked, load_file
from ewavit.points.sources import read_points
from point_sets import (
    cloud,
    mesh,
    write_h5,
    write_modelnet_h5,
    write_npz,
    write_pcd,
    write_scanobjectnn,
    write_shapenetpart,
    write_text,
)

POINTS = 8
_COORDINATE = st.one_of(
    st.floats(-100, 100),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1.0, -1.0, 1e30, 2e38, 1e-30, 1e300, 5e-324, 4e6, float("nan"), float("inf")]),
)
_ROWS = st.lists(st.tuples(_COORDINATE, _COORDINATE, _COORDINATE), min_size=1, max_size=12)
_SEEDS = st.integers(0, 2**32 - 1)


def _folder_of_clouds(folder: Path) -> Path:
    """A set with one file in each class and split; a case puts its file into train/a alone."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            place = folder / "set" / split / name
            place.mkdir(parents=True)
            np.save(place / "good.npy", cloud(1, 2 * POINTS))
    (folder / "set/train/a/good.npy").unlink()
    return folder


def _tried(folder: Path, name: str, content: bytes) -> tuple[Any, str]:
    """Read a file alone and in a set. Its points, None if it is refused alone, and the outcome."""
    file = folder / "set/train/a" / name
    file.write_bytes(content)
    try:
        try:
            points = load_file(file, 2 * POINTS, np.random.default_rng(0))
        except MemoryError:
            raise
        except Exception:  # as documented: the set's reader turns it into a refusal
            points = None
        found, refusal = answered(lambda: read_points(f"points:{folder / 'set'}", POINTS))
    finally:
        file.unlink()
    if found is not None:
        _check_normalised(found.train_points)
        if points is None:
            raise Wrong("the set accepts a file that its reader refuses")
    return points, outcome(refusal)


def _check_normalised(clouds: Any) -> None:
    if not np.isfinite(clouds).all():
        raise Wrong("points that are not finite")
    radii = np.sqrt((clouds.astype(np.float64) ** 2).sum(-1))
    if (radii > 1 + 1e-5).any():
        raise Wrong(f"a radius of {radii.max()}")


def _same(found: Any, expected: Any, what: str) -> None:
    """Compare the first three columns; NaN is equal to NaN."""
    found, expected = np.asarray(found)[..., :3], np.asarray(expected)[..., :3]
    if found.shape != expected.shape or not np.array_equal(found, expected, equal_nan=True):
        raise Wrong(f"{what}: {found.tolist()!s:.150} instead of {expected.tolist()!s:.150}")


@target("points: coordinates", 1.0)
def coordinates(draw: Draw, folder: Path) -> str:
    """The normalised cloud against the formula in extended precision."""
    rows = np.array(draw(_ROWS), np.float64)
    kind = draw(st.sampled_from(["f8", "f4", "f2", "i8", "u1", "c8"]))
    with np.errstate(all="ignore"):
        points = rows.astype(kind)
    found, refusal = answered(lambda: checked(points, "cloud", 3))
    if refusal is not None:
        return REFUSED
    exact = points.astype(np.longdouble)
    centred = exact - exact.mean(0)
    expected = centred / np.sqrt((centred**2).sum(1).max())
    if not np.allclose(found, expected.astype(np.float64), atol=1e-5):
        raise Wrong(f"{points.tolist()!s:.200} became {found.tolist()!s:.200}")
    return ACCEPTED


@target("points: text as it should be", 1.0, _folder_of_clouds)
def good_text(draw: Draw, folder: Path) -> str:
    rows = draw(st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 3), min_size=3, max_size=12))
    more = draw(st.integers(0, 3))
    delimiter = draw(st.sampled_from([" ", "\t", ",", ", ", ";", "  "]))
    names = draw(st.permutations(["x", "y", "z", *"abc"[:more]]))
    header, count, comment, end = (draw(st.booleans()), draw(st.booleans()), draw(st.booleans()), "\n")
    end = draw(st.sampled_from(["\n", "\r\n"]))
    places = [names.index(axis) for axis in "xyz"] if header else [0, 1, 2]
    lines = ["# made by a scanner"] if comment else []
    lines += [delimiter.join(names)] if header else [str(len(rows))] if count else []
    for row in rows:
        values = [0.25] * len(names)
        for place, value in zip(places, row, strict=True):
            values[place] = value
        text = delimiter.join(map(repr, values))
        lines.append(text.replace(".", ",") if delimiter == ";" and count else text)
    data = (b"\xef\xbb\xbf" if more == 3 else b"") + end.join([*lines, ""]).encode()
    found, how = _tried(folder, draw(st.sampled_from(["a.txt", "a.xyz", "a.csv", "a.pts"])), data)
    if found is None:
        raise Wrong(f"refused: {data!r:.300}")
    _same(found, rows, repr(data)[:300])
    return how


_TEXTS = (
    b"x,y,z,n\n" + b"".join(b"%d.5,%d,%d,1\n" % (i, i * i, -i) for i in range(10)),
    b"# c\n" + b"".join(b"%d.5 %d %d\n" % (i, i * i, -i) for i in range(10)),
    b"10\n" + b"".join(b"%d.5\t%d\t%d\t7\n" % (i, i * i, -i) for i in range(10)),
    b"".join(b"%d,5;%d;%d\n" % (i, i * i, -i) for i in range(10)),
)


def _plain_table(data: bytes) -> list[list[float]] | None:
    """The numbers of the simplest text: lines of three or more numbers, blanks or commas between."""
    rows = []
    for line in data.decode("ascii").splitlines():
        if line.strip():
            words = line.split(",") if "," in line else line.split()
            rows.append([float(word) for word in words])
    return rows if rows and len(rows[0]) >= 3 and len({len(row) for row in rows}) == 1 else None


@target("points: damaged text", 1.5, _folder_of_clouds)
def damaged_text(draw: Draw, folder: Path) -> str:
    data = damaged(draw, draw(st.sampled_from(_TEXTS)))
    found, how = _tried(folder, draw(st.sampled_from(["a.txt", "a.xyz", "a.csv", "a.pts"])), data)
    try:
        expected = None if b";" in data or b"_" in data or b"#" in data else _plain_table(data)
    except ValueError:
        expected = None
    if found is not None and expected is not None:
        _same(found, expected, repr(data)[:300])
    return how


def _pcd_oracle(data: bytes) -> Any:
    """The points of a .pcd file, by its specification, with struct."""
    head, _, rest = data.partition(b"DATA ")
    kind, _, body = rest.partition(b"\n")
    lines = (line.split() for line in head.decode("ascii").splitlines() if not line.startswith("#"))
    header = {words[0]: words[1:] for words in lines if words}
    count = int(header["POINTS"][0])
    if int(header["WIDTH"][0]) * int(header["HEIGHT"][0]) != count or count < 1:
        return None
    repeats = [int(word) for word in header.get("COUNT", ["1"] * len(header["FIELDS"]))]
    letters = {
        "F4": "f",
        "F8": "d",
        "U1": "B",
        "U2": "H",
        "U4": "I",
        "U8": "Q",
        "I1": "b",
        "I2": "h",
        "I4": "i",
        "I8": "q",
    }
    kinds = [letters[t + s] for t, s in zip(header["TYPE"], header["SIZE"], strict=True)]
    at = [sum(repeats[: header["FIELDS"].index(axis)]) for axis in "xyz"]
    if kind.strip() == b"ascii":
        rows = [[float(word) for word in line.split()] for line in body.decode("ascii").splitlines()[:count]]
        return [[row[place] for place in at] for row in rows if len(row) == sum(repeats)] or None
    row_format = "<" + "".join(f"{n}{k}" for n, k in zip(repeats, kinds, strict=True))
    size = struct.calcsize(row_format)
    rows = [struct.unpack_from(row_format, body, number * size) for number in range(count)]
    return [[float(row[place]) for place in at] for row in rows]


def _with_pcd(folder: Path) -> tuple[Path, list[bytes]]:
    texts = []
    for kind in ("ascii", "binary"):
        write_pcd(folder / "good.pcd", cloud(5, 10), kind)
        texts.append((folder / "good.pcd").read_bytes())
    return _folder_of_clouds(folder), texts


@target("points: pcd as it should be", 0.7, _folder_of_clouds)
def good_pcd(draw: Draw, folder: Path) -> str:
    rows = draw(st.lists(st.tuples(*[st.integers(-100, 100)] * 3), min_size=3, max_size=10))
    names = draw(st.permutations(["x", "y", "z", *draw(st.sampled_from(["", "a", "ab"]))]))
    types = draw(st.lists(st.sampled_from(["F4", "F8", "I1", "I2", "I4", "I8"]), min_size=5, max_size=5))
    counts = [1 if name in "xyz" else draw(st.integers(1, 3)) for name in names]
    letters = {"F4": "f", "F8": "d", "I1": "b", "I2": "h", "I4": "i", "I8": "q"}
    kinds = [types["xyzab".index(name)] for name in names]
    binary = draw(st.booleans())
    text = (
        f"VERSION .7\nFIELDS {' '.join(names)}\nSIZE {' '.join(k[1] for k in kinds)}\n"
        f"TYPE {' '.join(k[0] for k in kinds)}\nCOUNT {' '.join(map(str, counts))}\n"
        f"WIDTH {len(rows)}\nHEIGHT 1\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(rows)}\nDATA {'binary' if binary else 'ascii'}\n"
    ).encode()
    for row in rows:
        values = [row["xyz".index(name)] if name in "xyz" else 7 for name in names]
        flat = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
        row_format = "<" + "".join(f"{n}{letters[k]}" for n, k in zip(counts, kinds, strict=True))
        text += struct.pack(row_format, *flat) if binary else f"{' '.join(map(str, flat))}\n".encode()
    found, how = _tried(folder, "a.pcd", text)
    if found is None:
        raise Wrong(f"refused: {text!r:.300}")
    _same(found, rows, repr(text)[:300])
    return how


@target("points: damaged pcd", 1.5, _with_pcd)
def damaged_pcd(draw: Draw, shared: tuple[Path, list[bytes]]) -> str:
    folder, texts = shared
    data = damaged(draw, draw(st.sampled_from(texts)))
    found, how = _tried(folder, "a.pcd", data)
    try:
        expected = _pcd_oracle(data)
    except Exception:
        expected = None
    if found is not None and expected is not None:
        with np.errstate(all="ignore"):
            _same(found, np.array(expected, np.float64), repr(data)[:400])
    return how


_DTYPES = ("f8", "f4", "f2", "i8", "u1", "?", "c16", "O", "S3", "U2", "M8[s]", "f4,i4", ">f4", "V3")


@target("points: npy and npz of any type", 1.0, _folder_of_clouds)
def arrays(draw: Draw, folder: Path) -> str:
    sound = st.sampled_from([(9, 3), (40, 3), (9, 6), (5, 8, 3), (3, 9), (9, 2), (8, 3, 1)])
    shape = draw(st.one_of(sound, st.lists(st.sampled_from([0, 1, 2, 3, 4, 9, 40]), max_size=4)))
    kind = draw(st.sampled_from(_DTYPES))
    array = np.arange(math.prod(shape)).reshape(shape) % 7
    try:
        array = np.asarray(array, order=draw(st.sampled_from("CF"))).astype(kind)
    except (TypeError, ValueError):
        array = np.zeros(shape, kind)
    stored = io.BytesIO()
    names = draw(st.sampled_from([None, ["points"], ["a"], ["a", "b"], ["a", "points"], []]))
    if names is None:
        np.save(stored, array)
    else:
        np.savez(stored, **dict.fromkeys(names, array))
    found, how = _tried(folder, "a.npy" if names is None else "a.npz", stored.getvalue())
    if kind in ("O", "S3", "U2", "M8[s]", "f4,i4", "V3", "c16") and how == ACCEPTED:
        raise Wrong(f"an array of type {kind} was accepted as points")
    if found is not None:
        np.testing.assert_array_equal(found, array)
    return how


def _bombs(folder: Path) -> tuple[Path, list[tuple[str, bytes]]]:
    """Sound files to be damaged, and archives whose content is much larger than they are."""
    _folder_of_clouds(folder)
    files = []
    for number, kind in enumerate(("f4", "f8", "f2")):
        array, stored = cloud(number, 12).astype(kind), io.BytesIO()
        np.save(stored, array)
        files.append(("a.npy", stored.getvalue()))
        for save in (np.savez, np.savez_compressed):
            stored = io.BytesIO()
            save(stored, points=array)
            files.append(("a.npz", stored.getvalue()))
    for rows in (10**8, 10**12):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, {"descr": "<f8", "fortran_order": False, "shape": (rows, 3)}
        )
        files.append(("a.npy", head.getvalue()))
        bomb = io.BytesIO()
        with (
            zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("points.npy", "w", force_zip64=True) as entry,
        ):
            entry.write(head.getvalue())
            for _ in range(70 if rows == 10**8 else 1):  # 70 MiB: what is claimed is 35 times as much
                entry.write(bytes(2**20))
        files.append(("a.npz", bomb.getvalue()))
    return folder, files


@target("points: damaged npy and npz", 1.0, _bombs)
def damaged_arrays(draw: Draw, shared: tuple[Path, list[tuple[str, bytes]]]) -> str:
    folder, files = shared
    name, data = draw(st.sampled_from(files))
    data = data if draw(st.integers(0, 9)) == 0 else damaged(draw, data)
    found, how = _tried(folder, name, data)
    if found is not None:
        with np.lib.npyio.NpzFile(io.BytesIO(data)) if name == "a.npz" else io.BytesIO(data) as again:
            expected = again[next(iter(again))] if name == "a.npz" else np.load(again)
            if found.shape != expected.shape or found.tobytes() != expected.tobytes():
                raise Wrong("another array than numpy's")
    return how


def _meshes(folder: Path) -> tuple[Path, list[tuple[str, bytes]]]:
    box, points = mesh(), trimesh.PointCloud(cloud(3, 20))
    files = [("a.off", box.export(file_type="off").encode())]
    files += [("a.ply", box.export(file_type="ply", encoding=kind)) for kind in ("ascii", "binary")]
    files += [("a.ply", points.export(file_type="ply")), ("a.off", files[0][1].replace(b"OFF\n", b"OFF", 1))]
    return _folder_of_clouds(folder), [
        (name, data if isinstance(data, bytes) else data.encode()) for name, data in files
    ]


@target("points: ply as it should be", 0.5, _folder_of_clouds)
def good_ply(draw: Draw, folder: Path) -> str:
    rows = draw(st.lists(st.tuples(*[st.integers(-100, 100)] * 3), min_size=3, max_size=10))
    names = draw(st.permutations(["x", "y", "z", *draw(st.sampled_from(["", "r", "rs"]))]))
    how = draw(st.sampled_from(["ascii", "binary_little_endian", "binary_big_endian"]))
    kind, letter = draw(
        st.sampled_from([("float", "f"), ("double", "d"), ("int", "i"), ("short", "h"), ("char", "b")])
    )
    properties = "".join(f"property {kind} {name}\n" for name in names)
    data = f"ply\nformat {how} 1.0\ncomment c\nelement vertex {len(rows)}\n{properties}end_header\n".encode()
    for row in rows:
        values = [row["xyz".index(name)] if name in "xyz" else 7 for name in names]
        sign = ">" if "big" in how else "<"
        if how == "ascii":
            data += f"{' '.join(map(str, values))}\n".encode()
        else:
            data += struct.pack(f"{sign}{len(values)}{letter}", *values)
    found, end = _tried(folder, "a.ply", data)
    if found is None:
        raise Wrong(f"refused: {data!r:.300}")
    _same(found, rows, repr(data)[:300])
    return end


@target("points: damaged ply and off", 1.5, _meshes)
def damaged_meshes(draw: Draw, shared: tuple[Path, list[tuple[str, bytes]]]) -> str:
    folder, files = shared
    name, data = draw(st.sampled_from(files))
    data = damaged(draw, data)
    found, how = _tried(folder, name, data)
    if how == ACCEPTED and (found.ndim != 2 or found.shape[1] != 3):
        raise Wrong(f"a mesh gave the shape {found.shape}")
    return how


# --- published sets ---


def _sets(
    write: Callable[[Path], Any], spec: str, folder: Path
) -> tuple[str, Path, list[tuple[Path, bytes]]]:
    """A set that a writer of the tests lays down, and its files."""
    place = folder / "set"
    write(place)
    files = [file for file in sorted(place.rglob("*")) if file.is_file()]
    return f"{spec}:{place}", place, [(file, file.read_bytes()) for file in files]


@target("points: damaged modelnet text", 0.5, partial(_sets, write_text, "modelnet40"))
@target("points: damaged shapenetpart", 0.5, partial(_sets, write_shapenetpart, "shapenetpart"))
@target("points: damaged modelnet npz", 0.5, partial(_sets, write_npz, "modelnet10"))
@target("points: damaged modelnet h5", 0.7, partial(_sets, write_modelnet_h5, "modelnet40"))
@target("points: damaged scanobjectnn", 0.5, partial(_sets, write_scanobjectnn, "obj_bg"))
def damaged_set(draw: Draw, shared: tuple[str, Path, list[tuple[Path, bytes]]]) -> str:
    """One file of a published set is damaged, or gone, or JSON with edits."""
    spec, _, files = shared
    file, data = draw(st.sampled_from(files))
    how = draw(st.integers(0, 19))
    if how == 0:
        file.unlink()
    elif file.suffix == ".json" and how < 15:
        file.write_text(json.dumps(edited(draw, json.loads(data))))
    else:
        file.write_bytes(damaged(draw, data))
    try:
        found, refusal = answered(lambda: read_points(spec, POINTS))
    finally:
        file.write_bytes(data)
    if found is not None:
        _check_set(found)
    return outcome(refusal)


def _check_set(found: Any) -> None:
    for split in ("train", "eval"):
        points, labels = getattr(found, f"{split}_points"), getattr(found, f"{split}_labels")
        _check_normalised(points)
        if len(points) != len(labels) or labels.min() < 0 or labels.max() >= len(found.classes):
            raise Wrong(
                f"labels {labels.tolist()!s:.100} for {len(points)} clouds, {len(found.classes)} classes"
            )


def _h5_set(folder: Path) -> Path:
    write_scanobjectnn(folder / "set")
    write_h5(folder / "outside.h5", [0, 1])
    return folder


@target("points: h5 of any content", 0.7, _h5_set)
def odd_h5(draw: Draw, folder: Path) -> str:
    """Types, shapes, links and storage that an h5 file of clouds should not have."""
    file = folder / "set/main_split/training_objectdataset.h5"
    file.unlink(missing_ok=True)
    shape = draw(
        st.sampled_from(
            [(2, 20, 3), (2, 20, 6), (20, 3), (2,), (), (0, 20, 3), (2, 0, 3), (2, 20, 2), (1, 2, 20, 3)]
        )
    )
    kind = draw(st.sampled_from(["f4", "f8", "f2", "i4", "u1", "S4", "c8", ">f4", "f4,i4"]))
    what = draw(
        st.sampled_from(
            [
                "array",
                "array",
                "group",
                "external link",
                "soft link",
                "external storage",
                "huge",
                "none",
                "named type",
                "vlen",
            ]
        )
    )
    labels = draw(
        st.sampled_from(
            [
                [0, 14],
                [[0], [14]],
                [0],
                [0, 15],
                [-1, 3],
                [0.5, 1.5],
                [np.nan, 1],
                [b"0", b"1"],
                [],
                3,
                [[0, 1], [2, 3]],
            ]
        )
    )
    with h5py.File(file, "w") as stored:
        if what == "array":
            array = (np.arange(math.prod(shape)) * 17 % 101).reshape(shape)
            stored["data"] = array.astype(kind) if kind != "f4,i4" else np.zeros(shape, kind)
        elif what == "group":
            stored.create_group("data")
        elif what == "external link":
            stored["data"] = h5py.ExternalLink(str(folder / "outside.h5"), "data")
        elif what == "soft link":
            stored["data"] = h5py.SoftLink(draw(st.sampled_from(["/data", "/label", "/nowhere"])))
        elif what == "external storage":
            stored.create_dataset("data", (2, 20, 3), "f4", external=[(str(folder / "outside.h5"), 0, 480)])
        elif what == "huge":
            rows = draw(st.sampled_from([10**8, 10**12]))
            stored.create_dataset("data", (2, rows, 3), "f4", chunks=(1, 1000, 3), compression="gzip")
        elif what == "named type":
            stored["data"] = np.dtype("f4")
        elif what == "vlen":
            stored.create_dataset("data", (2,), h5py.vlen_dtype(np.float32))
        stored["label"] = np.array(labels)
    found, refusal = answered(lambda: read_points(f"obj_bg:{folder / 'set'}", POINTS))
    if found is not None:
        _check_set(found)
        if what in ("external link", "external storage"):
            raise Wrong(f"an {what} was followed")
        if np.asarray(labels).size != 2 or found.train_labels.tolist() != np.ravel(labels).tolist():
            raise Wrong(f"labels {labels} became {found.train_labels.tolist()}")
    return outcome(refusal)


@target("points: words in the place of a set", 0.05)
def words(draw: Draw, folder: Path) -> str:
    kind = draw(
        st.sampled_from(["points", "modelnet10", "modelnet40", "obj_bg", "shapenetpart", "solid", ""])
    )
    place = draw(
        st.one_of(
            st.text(max_size=6),
            st.sampled_from([".", "nowhere", "~nobody", "/dev/null", "a" * 300, "\ud800", "~nobody/x"]),
        )
    )
    if "\0" in place:
        return REFUSED  # the command line refuses it before
    _, refusal = answered(lambda: read_points(f"{kind}:{place}", POINTS), OSError)
    return outcome(refusal)
