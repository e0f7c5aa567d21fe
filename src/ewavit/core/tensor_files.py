"""What safetensors files and indices of shards say, checked before anything is made of it.

A file has 8 bytes with the header's length, a JSON header, and the data without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ewavit.errors import EwavitError
from ewavit.files import regular

INDEX = ".safetensors.index.json"
LARGEST_HEADER = (
    25_000_000  # bytes, also of an index: some 200,000 tensors, and at most 0.6 GB of Python's objects
)
LONGEST_KEY = 1024  # characters
LARGEST_SIZE = 2**63  # bytes and elements that torch can count
ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_WRONG = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading foreign JSON raises


@dataclass(frozen=True)
class Stored:
    """The place of a tensor in a file, or of equal tensors one after another."""

    file: Path
    begin: int
    size: int  # bytes, of each
    dtype: str
    shape: tuple[int, ...]  # of each
    count: int = 1

    def unstacked(self) -> Stored:
        """The parts along dimension 0."""
        count, *shape = self.shape
        return replace(self, size=self.size // count, shape=tuple(shape), count=count)


def strict_json(text: bytes) -> Any:
    """Read JSON as strict readers do: UTF-8, no key twice, no lone surrogate, no NaN, not too deep.

    Raises:
        ValueError: it is not of this kind.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is there twice")
        for pair in pairs:
            for word in pair:
                if isinstance(word, str):
                    word.encode()
        return found

    def refused(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text.decode(), object_pairs_hook=checked, parse_constant=refused)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The place of each tensor in a file, and the file's metadata; checks the whole header.

    Raises:
        EwavitError: it is no file, or no whole safetensors file, or a type of tensors is unknown.
    """
    try:
        total = regular(file).stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(total - 8, LARGEST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {total:,}")
            header = strict_json(handle.read(length))
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that are not text")
        tensors = {key: _stored(file, 8 + length, key, entry) for key, entry in header.items()}
        expected = 8 + length
        for stored in sorted(tensors.values(), key=lambda each: (each.begin, each.size)):
            if stored.begin != expected:
                raise ValueError("tensors overlap or leave gaps")
            expected += stored.size
        if expected != total:
            raise ValueError(f"{total:,} of {expected:,} bytes")
    except _WRONG as problem:
        raise EwavitError(f"{file} cannot be read as safetensors ({said(problem)}): fetch it again") from None
    return tensors, metadata


def _stored(file: Path, start: int, key: str, entry: Mapping[str, Any]) -> Stored:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(key) > LONGEST_KEY:
        raise ValueError(f"a key of {len(key):,} characters")
    if dtype not in ITEM_BITS:
        raise ValueError(f"{printable(key)} has the unknown type {printable(dtype)}")
    bits = ITEM_BITS[dtype]
    for number in (begin, end, *shape):
        if type(number) is not int or not 0 <= number < LARGEST_SIZE:
            raise ValueError(f"{printable(key)} has the size {printable(str(number))}")
    for number in shape:
        bits *= number
        if bits >= 8 * LARGEST_SIZE:
            raise ValueError(f"{printable(key)} of shape {printable(str(shape))} is too large")
    if 8 * (end - begin) != bits:
        where = f"in bytes {begin} to {end}"
        raise ValueError(f"{printable(key)} of shape {printable(str(tuple(shape)))} and type {dtype} {where}")
    return Stored(file, start + begin, end - begin, dtype, tuple(shape))


def read_index(file: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """The shard of each key, and the metadata of the index.

    Raises:
        EwavitError: it is no index, it names a file outside its folder, or a shard is missing.
    """
    try:
        if (size := regular(file).stat().st_size) > LARGEST_HEADER:
            raise ValueError(f"it has {size:,} bytes")
        index = strict_json(file.read_bytes())
        of_key = {key: file.parent / _inside(name) for key, name in index["weight_map"].items()}
        metadata = index.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise ValueError("its metadata have no names")
    except _WRONG as problem:
        raise EwavitError(f"{file} cannot be read as an index of shards ({said(problem)})") from None
    shards = dict.fromkeys(of_key.values())
    if missing := [printable(shard.name) for shard in shards if not os.path.exists(shard)]:
        raise EwavitError(f"{file} names {missing[0]}, but it is missing: fetch all {len(shards)} shards")
    return of_key, metadata


def _inside(name: Any) -> Path:
    """The name of a shard, relative to the folder of the index."""
    path = Path(name)
    if path.is_absolute() or path.drive or ".." in path.parts or not path.name or not name.isprintable():
        raise ValueError(f"it names {printable(repr(name))}, which is not a file in its folder")
    return path


def said(problem: Exception) -> str:
    """What was wrong, in words."""
    if isinstance(problem, OSError):
        return problem.strerror or str(problem)
    if isinstance(problem, (TypeError, AttributeError)):
        return "its parts are of other types"
    return f"no {problem}" if isinstance(problem, KeyError) else str(problem)


def printable(text: Any) -> str:
    """A text of a foreign file for a message: short, and without control characters."""
    whole = text if isinstance(text, str) and text.isprintable() else repr(text)
    return whole if len(whole) <= 200 else f"{whole[:200]}..."
