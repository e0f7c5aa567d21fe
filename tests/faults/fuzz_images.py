"""Images, folders of images, CIFAR's pickles. Oracles: numpy, Pillow, os.walk, Python's slow unpickler."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_inputs import ACCEPTED, Draw, Wrong, answered, damaged, outcome, target
from hypothesis import strategies as st
from PIL import Image

from ewavit.data.arrays import find_cifar, read_cifar
from ewavit.data.sources import FileImages, UnreadableImage, read_folder

_SIDE = st.integers(1, 9)
_LOSSLESS = (
    ("png", "L"),
    ("png", "RGB"),
    ("png", "P"),
    ("png", "1"),
    ("png", "LA"),
    ("png", "RGBA"),
    ("bmp", "RGB"),
    ("bmp", "L"),
    ("ppm", "RGB"),
    ("pgm", "L"),
    ("tif", "RGB"),
    ("tif", "L"),
    ("webp", "RGB"),
)


def _loaded(folder: Path, name: str, data: bytes, mode: str) -> tuple[Any, Exception | None]:
    file = folder / name
    file.write_bytes(data)
    source = FileImages([str(file)], [0], ("a", "b"))
    return answered(lambda: source.load(0, mode)[0], UnreadableImage)


def _drawn_image(draw: Draw, mode: str) -> Image.Image:
    height, width = draw(_SIDE), draw(_SIDE)
    values = np.random.default_rng(draw(st.integers(0, 999))).integers(0, 256, (height, width, 4), np.uint8)
    image = Image.fromarray(values[..., :3])
    return image if mode == "RGB" else Image.fromarray(values) if mode == "RGBA" else image.convert(mode)


@target("images: lossless formats", 0.7)
def lossless(draw: Draw, folder: Path) -> str:
    """The pixels that come back are those that were written, turned as EXIF says."""
    suffix, mode = draw(st.sampled_from(_LOSSLESS))
    wanted = draw(st.sampled_from(["L", "RGB"]))
    image, stored = _drawn_image(draw, mode), io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    turn = draw(st.integers(0, 9)) if suffix == "png" else 0
    if turn:
        exif = Image.Exif()
        exif[0x0112] = turn
        options["exif"] = exif
    formats = {"pgm": "ppm", "tif": "tiff"}
    image.save(stored, formats.get(suffix, suffix), **options)
    found, refusal = _loaded(folder, f"a.{suffix}", stored.getvalue(), wanted)
    if found is None:
        raise Wrong(f"a sound {mode} {suffix} was refused: {refusal}")
    pixels = np.asarray(image.convert(wanted))
    # The four flips and three turns of EXIF, in numpy's words.
    turned = {2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1)}
    turned |= {6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(pixels)}
    if found.mode != wanted or not np.array_equal(np.asarray(found), turned.get(turn, pixels)):
        raise Wrong(f"other pixels: {suffix} {mode} as {wanted}, orientation {turn}")
    return ACCEPTED


@target("images: 16 bits", 0.3)
def sixteen_bits(draw: Draw, folder: Path) -> str:
    values = np.array(draw(st.lists(st.integers(0, 65535), min_size=1, max_size=9)), np.uint16)[None]
    if draw(st.booleans()):
        stored = io.BytesIO()
        Image.fromarray(values).save(stored, "png")
        name, data = "a.png", stored.getvalue()
    else:
        name, data = "a.pgm", b"P5 %d 1 65535\n" % values.size + values.astype(">u2").tobytes()
    found, refusal = _loaded(folder, name, data, "L")
    if found is None:
        raise Wrong(f"sound 16 bits were refused: {refusal}")
    if np.abs(np.asarray(found, np.float64) - values / 257).max() > 0.51:
        raise Wrong(f"{values.tolist()} became {np.asarray(found).tolist()}")
    return ACCEPTED


def _pictures(folder: Path) -> tuple[Path, list[tuple[str, bytes]]]:
    rng, files = np.random.default_rng(0), []
    noise = rng.integers(0, 256, (24, 17, 3), np.uint8)
    for mode in ("L", "RGB", "P", "RGBA", "I;16", "1", "F"):
        image = Image.fromarray(noise[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(noise)
        image = image if mode == "I;16" else image.convert(mode)
        for suffix, kind in (
            ("png", "png"),
            ("jpg", "jpeg"),
            ("bmp", "bmp"),
            ("ppm", "ppm"),
            ("tif", "tiff"),
            ("webp", "webp"),
        ):
            stored = io.BytesIO()
            try:
                image.save(stored, kind)
            except (OSError, ValueError):
                continue
            files.append((f"a.{suffix}", stored.getvalue()))
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "png")  # 50 KB of file, 1.2 GB as RGB
    return folder, [
        *files,
        ("a.png", huge.getvalue()),
        ("a.ppm", b"P6 100000 100000 255\n"),
        ("a.pgm", b"P5 30000 30000 65535\n"),
    ]


@target("images: damaged files", 2.0, _pictures)
def damaged_images(draw: Draw, shared: tuple[Path, list[tuple[str, bytes]]]) -> str:
    folder, files = shared
    name, data = draw(st.sampled_from(files))
    data = data if draw(st.integers(0, 19)) == 0 else damaged(draw, data)
    wanted = draw(st.sampled_from(["L", "RGB"]))
    found, refusal = _loaded(folder, name, data, wanted)
    if found is not None:
        with Image.open(io.BytesIO(data)) as again:
            plain = again.mode[0] not in "IF" and not again.getexif().get(0x0112)
            if plain and not np.array_equal(np.asarray(found), np.asarray(again.convert(wanted))):
                raise Wrong("other pixels than Pillow's")
    return outcome(refusal)


# --- folders ---

_NAMES = st.one_of(
    st.sampled_from(
        [
            "a",
            "b",
            "c",
            ".hidden",
            "@eaDir",
            "lost+found",
            "A",
            "café",
            "cafe\u0301",
            "a b",
            "\udce9",
            "-x",
            "1",
            "01",
            "10",
            "2",
            "train",
            "x" * 200,
            "\n",
            "'",
        ]
    ),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=4),
)
_ENTRIES = st.lists(
    st.tuples(
        _NAMES,
        st.sampled_from(
            [
                "png",
                "png",
                "jpg",
                "PNG",
                "txt",
                "heic",
                "folder",
                "link to image",
                "link to folder",
                "link up",
                "broken link",
                "loop of links",
                "fifo",
                "socket",
                "null",
                "empty",
            ]
        ),
    ),
    max_size=4,
)
_TREES = st.lists(st.tuples(_NAMES, _ENTRIES), max_size=4)


def _outside(folder: Path) -> Path:
    (folder / "outside/deep").mkdir(parents=True)
    for name in ("outside/one.png", "outside/deep/two.png", "one.png"):
        Image.new("L", (2, 2)).save(folder / name)
    return folder


def _lay(place: Path, entries: list[tuple[str, str]], folder: Path) -> None:
    for name, kind in entries:
        path = place / (f"{name}.{kind}" if kind in ("png", "jpg", "PNG", "txt", "heic") else f"{name}.png")
        if len(os.fsencode(path.name)) > 250 or os.path.lexists(path):
            continue
        if kind == "folder":
            (place / name).mkdir(exist_ok=True)
            shutil.copy(folder / "one.png", place / name / "in.png")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            os.chdir(place)
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name[-90:] if len(os.fsencode(path.name)) > 90 else path.name)
            os.chdir(folder)
        elif kind.startswith("link") or kind in ("broken link", "loop of links", "null"):
            aims = {
                "link to image": folder / "one.png",
                "link to folder": folder / "outside",
                "link up": place,
                "broken link": "nowhere",
                "loop of links": path.name,
                "null": "/dev/null",
            }
            path.symlink_to(aims[kind])
        elif kind == "empty":
            path.touch()
        else:
            shutil.copy(folder / "one.png", path)


def _walked(folder: Path) -> dict[str, set[str]]:
    """The real paths of the images of each class, by `os.walk`."""
    odd = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "__pycache__", "lost+found")

    def seen(name: str) -> bool:
        return not name.startswith(".") and name not in odd

    above = {os.path.realpath(place) for place in (folder, *folder.parents)}
    found = {}
    for entry in os.scandir(folder):
        if entry.is_dir() and seen(entry.name) and os.path.realpath(entry) not in above:
            files, real = set(), set()
            for place, folders, names in os.walk(entry, followlinks=True):
                there = os.path.realpath(place)
                loop = there in real or (there in above) or there == os.path.realpath(folder)
                folders[:] = [] if loop else [name for name in folders if seen(name)]
                real.add(there)
                if not loop:
                    files |= {
                        os.path.realpath(f"{place}/{name}")
                        for name in names
                        if seen(name)
                        and name.lower().endswith((".png", ".jpg", ".heic")[:2])
                        and not os.path.isdir(f"{place}/{name}")
                    }
            found[entry.name] = files
    return found


@target("images: folders of odd entries", 0.4, _outside)
def folders(draw: Draw, folder: Path) -> str:
    place = folder / "set"
    train = draw(_TREES)
    trees = {"train": train, "val": train if draw(st.integers(0, 4)) else draw(_TREES)}
    sound = draw(st.booleans())
    try:
        for split, names in trees.items():
            (place / split).mkdir(parents=True)
            for name, entries in names:
                (place / split / name[:60]).mkdir(exist_ok=True)
                _lay(place / split / name[:60], [*entries, *([("sound", "png")] if sound else [])], folder)
        found, refusal = answered(lambda: read_folder(place, "train", "val"))
        if found is not None:
            for source, split in zip(found, ("train", "val"), strict=True):
                _check_images(source, place / split)
    finally:
        shutil.rmtree(place)
    return outcome(refusal)


def _check_images(source: Any, place: Path) -> None:
    expected = _walked(place)
    if set(source.classes) != set(expected):
        raise Wrong(f"classes {source.classes} instead of {sorted(expected)}")
    for label, name in enumerate(source.classes):
        mine = [source.where(int(number)) for number in np.flatnonzero(source.labels() == label)]
        if {os.path.realpath(file) for file in mine} != expected[name]:
            raise Wrong(f"class {name!r} has {mine} instead of {sorted(expected[name])}")
    for number in range(min(len(source), 3)):  # each is an image or refused, and none waits for ever
        found, _ = answered(lambda number=number: source.load(number, "L"), UnreadableImage)
        if found is not None and not os.path.isfile(source.where(number)):
            raise Wrong(f"{source.where(number)!r} is no file and was read")


def _tiny_imagenet(folder: Path) -> tuple[Path, bytes]:
    place = folder / "set"
    for name in ("n01", "n02"):
        (place / "train" / name / "images").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(place / "train" / name / "images/x.png")
    (place / "val/images").mkdir(parents=True)
    rows = []
    for number in range(4):
        Image.new("RGB", (4, 4)).save(place / f"val/images/val_{number}.png")
        rows.append(f"val_{number}.png\tn0{1 + number % 2}\t0\t0\t62\t62\n")
    return place, "".join(rows).encode()


@target("images: Tiny-ImageNet's annotations", 0.3, _tiny_imagenet)
def annotations(draw: Draw, shared: tuple[Path, bytes]) -> str:
    place, data = shared
    data = damaged(draw, data)
    (place / "val/val_annotations.txt").write_bytes(data)
    found, refusal = answered(lambda: read_folder(place, "train", "val"))
    if found is not None:
        names = [line.split("\t") for line in data.decode().splitlines() if line.strip()]
        expected = [("n01", "n02").index(row[1]) for row in names]
        if found[1].labels().tolist() != expected:
            raise Wrong(f"labels {found[1].labels().tolist()} instead of {expected}")
        if outside := [
            f
            for f in map(found[1].where, range(len(names)))
            if Path(f).resolve().parent != place / "val/images"
        ]:
            raise Wrong(f"an image outside the set: {outside[0]!r:.100}")
    return outcome(refusal)


# --- CIFAR ---


class _Plain(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's slow unpickler, which imports what arrays need and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "encode":
            return lambda text, _: text.encode("latin1")
        if name not in ("_reconstruct", "ndarray", "dtype") or not module.startswith("numpy"):
            raise pickle.UnpicklingError(name)
        return {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}[name]


def _cifar(folder: Path) -> tuple[Path, dict[str, list[bytes]]]:
    """CIFAR-10 with four images a file, in each protocol, with keys of bytes or text."""
    place = folder / "set"
    place.mkdir()
    rng = np.random.default_rng(0)
    files: dict[str, list[bytes]] = {}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        for protocol in (2, 4, 0):
            for kind in (bytes, str):
                content = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 1]}
                if name == "batches.meta":
                    content = {"label_names": ["a", "b", "c"], "num_vis": 3072}
                keyed = {key.encode() if kind is bytes else key: value for key, value in content.items()}
                files.setdefault(name, []).append(pickle.dumps(keyed, protocol))
        (place / name).write_bytes(files[name][0])
    return place, files


_CALLED: list[Any] = []  # what a pickle managed to call


class _Hostile:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def called(*arguments: Any) -> list[Any]:
    """What hostile pickles try to call."""
    _CALLED.append(arguments)
    return []


def hostile(draw: Draw, content: Any, key: Any) -> Any:
    """Content with a call in it: the witness, `eval`, `getattr` or `open`, plain or hidden in a list."""
    function, arguments = draw(
        st.sampled_from(
            [
                (called, (1,)),
                (builtins.eval, ("1+1",)),
                (builtins.getattr, ("a", "upper")),
                (os.system, ("true",)),
                (builtins.open, ("hostile", "w")),
                (os.mkdir, ("hostile",)),
            ]
        )
    )
    made: Any = _Hostile(function, *arguments)
    return content | {key: [made] if draw(st.booleans()) else made}


@target("images: CIFAR pickles", 1.5, _cifar)
def cifar(draw: Draw, shared: tuple[Path, dict[str, list[bytes]]]) -> str:
    place, files = shared
    name = draw(st.sampled_from(["data_batch_1", "test_batch", "batches.meta"]))
    data, sound = draw(st.sampled_from(files[name])), (place / name).read_bytes()
    how = draw(st.integers(0, 9))
    if how == 0:
        key = draw(st.sampled_from([b"data", b"labels", b"other", b"label_names"]))
        data = pickle.dumps(hostile(draw, pickle.loads(data, encoding="bytes"), key), draw(st.integers(0, 5)))
    elif how > 1:
        data = damaged(draw, data)
    _CALLED.clear()
    (place / name).write_bytes(data)
    try:
        found, refusal = answered(lambda: read_cifar(find_cifar(place) or place))
    finally:
        (place / name).write_bytes(sound)
    if _CALLED or Path("hostile").exists():
        raise Wrong("a pickle ran code")
    if how == 0 and refusal is None:
        raise Wrong("a hostile pickle was accepted")
    if found is not None and name != "batches.meta":
        _check_cifar(found, name, data)
    return outcome(refusal)


def _check_cifar(found: Any, name: str, data: bytes) -> None:
    try:
        content = _Plain(io.BytesIO(data), encoding="bytes").load()
    except Exception:  # it insists on some lengths that Python's fast unpickler passes over
        return
    content = {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}
    test = name == "test_batch"
    images = found.eval_images if test else found.train_images
    labels = found.eval_labels if test else found.train_labels
    count = len(content[b"labels"])
    same = np.array_equal(images[:count].reshape(count, -1), np.asarray(content[b"data"]).reshape(count, -1))
    if not same or labels[:count].tolist() != [int(label) for label in content[b"labels"]]:
        raise Wrong("other images or labels than the plain unpickler's")
    if not all(isinstance(label, int | np.integer) for label in content[b"labels"]):
        raise Wrong(f"labels {content[b'labels']!r} were rounded")
