"""Image sets that are read whole into memory: the bundled one, and CIFAR in its published python format."""

import importlib.resources
import io
import pickle
import pickletools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ewavit.errors import EwavitError, first_line
from ewavit.files import regular

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Arrays:
    """A whole set in memory: uint8 images (images, channels, height, width) and int64 labels (images,)."""

    name: str
    classes: tuple[str, ...]
    train_images: npt.NDArray[np.uint8]
    train_labels: Ints
    eval_images: npt.NDArray[np.uint8]
    eval_labels: Ints


def read_bundled() -> Arrays:
    """Read the bundled subset of Fashion-MNIST: 10,000 training and 2,000 evaluation images, 1x28x28."""
    file = importlib.resources.files("ewavit.data").joinpath("fashion_mnist_mini.npz")
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
        return Arrays(
            "fashion-mnist-mini",
            tuple(str(name) for name in stored["classes"]),
            stored["train_images"][:, None],
            stored["train_labels"].astype(np.int64),
            stored["test_images"][:, None],
            stored["test_labels"].astype(np.int64),
        )


_CIFAR = {  # folder: (training files, evaluation file, file of names, key of names, key of labels)
    "cifar-10-batches-py": (
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        "label_names",
        "labels",
    ),
    "cifar-100-python": (("train",), "test", "meta", "fine_label_names", "fine_labels"),
}


class _PickledType:
    """A numpy type in a pickle: its letters and, from its state, the order of its bytes."""

    def __init__(self, letters: str | bytes, *_: Any) -> None:
        self.letters, self.order = _text(letters), "|"

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = _text(state[1])


class _PickledArray:
    """A numpy array in a pickle; `numpy` sees the bytes only after their number is checked."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, kind, by_column, content = state
        if not re.fullmatch("[iub][1-8]", kind.letters):
            raise pickle.UnpicklingError(
                f"it holds an array of type {kind.letters}; image sets hold integers"
            )
        dtype = np.dtype(kind.letters).newbyteorder(kind.order)
        values = np.frombuffer(content, dtype).reshape(shape, order="F" if by_column else "C")
        self.values = values.copy()  # writable


def _text(value: str | bytes) -> str:
    """A text of a pickle; those of Python 2 are read as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays of integers, numbers, strings and containers; any other class or function is an error.

    numpy's own unpickling is not called.
    """

    _allowed = {  # noqa: RUF012 (constant)
        ("multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "ndarray"): object,  # an argument of _reconstruct
        ("numpy", "dtype"): _PickledType,
        # Python 3 writes bytes so in the old protocols; this replacement knows no other codec
        ("_codecs", "encode"): lambda text, _encoding: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        key = (module.removeprefix("numpy.core.").removeprefix("numpy._core."), name)
        if key not in self._allowed:
            raise pickle.UnpicklingError(
                f"it imports {module}.{name}; image sets hold only arrays and values"
            )
        return self._allowed[key]


def _check_memo(content: bytes) -> None:
    """Refuse a pickle that numbers its objects beyond its length: the unpickler allocates by that number.

    Raises:
        ValueError: it does, or it is damaged.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise ValueError(f"it numbers an object {argument} in {len(content):,} bytes")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        pickled = regular(path).read_bytes()
        _check_memo(pickled)
        content = _ArrayUnpickler(io.BytesIO(pickled), encoding="bytes").load()
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary")
        return {
            _text(key): value.values if isinstance(value, _PickledArray) else value
            for key, value in content.items()
        }
    except FileNotFoundError:
        raise EwavitError(f"{path} is missing: unpack the CIFAR archive again") from None
    except Exception as error:  # damaged pickles fail in many ways
        raise EwavitError(
            f"cannot read CIFAR file {path} ({first_line(error)}): download it again"
        ) from error


def _cifar_batch(path: Path, label_key: str, num_classes: int) -> tuple[npt.NDArray[np.uint8], Ints]:
    content = _unpickle(path)
    try:
        images = np.asarray(content["data"])
        if images.dtype != np.uint8:
            raise ValueError(f"its images are {images.dtype}, not uint8")
        images = images.reshape(-1, 3, 32, 32)
        labels = np.asarray(content[label_key], dtype=np.int64)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise EwavitError(f"CIFAR file {path} is damaged ({first_line(error)}): download it again") from error
    if labels.shape != (len(images),) or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise EwavitError(
            f"CIFAR file {path} is damaged ({len(images)} images, {labels.size} labels, {num_classes} "
            "classes): download it again"
        )
    return images, labels


def _is_cifar(folder: Path, kind: str) -> bool:
    return folder.is_dir() and (folder.name == kind or (folder / _CIFAR[kind][1]).is_file())


def find_cifar(path: Path) -> Path | None:
    """Find the CIFAR files in a folder or in its subfolder.

    Args:
        path: a folder; anything else has no CIFAR files.

    Returns:
        The folder with the files, or None.

    Raises:
        EwavitError: there are both CIFAR-10 and CIFAR-100.
    """
    found = [folder for kind in _CIFAR for folder in (path, path / kind) if _is_cifar(folder, kind)]
    if len(found) > 1:
        raise EwavitError(f"{path} holds {' and '.join(f.name for f in found)}: give one of them")
    return found[0] if found else None


def read_cifar(folder: Path) -> Arrays:
    """Read CIFAR-10 or CIFAR-100 (fine labels), 3x32x32, from a folder that `find_cifar` returned.

    Raises:
        EwavitError: a file is missing, damaged, or holds something other than arrays and plain values.
    """
    kind = next(kind for kind in _CIFAR if _is_cifar(folder, kind))
    train_files, eval_file, meta, names_key, label_key = _CIFAR[kind]
    names = _unpickle(folder / meta).get(names_key)
    named = isinstance(names, list) and all(isinstance(name, str | bytes) for name in names)
    classes = tuple(_text(name) for name in names or ()) if named else ()
    if len(classes) < 2:
        raise EwavitError(f"CIFAR file {folder / meta} names no classes: download it again")
    train = [_cifar_batch(folder / file, label_key, len(classes)) for file in train_files]
    eval_images, eval_labels = _cifar_batch(folder / eval_file, label_key, len(classes))
    return Arrays(
        kind,
        classes,
        np.concatenate([images for images, _ in train]),
        np.concatenate([labels for _, labels in train]),
        eval_images,
        eval_labels,
    )
