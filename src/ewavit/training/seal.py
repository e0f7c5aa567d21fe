"""Digests of files, and JSON with a digest of itself: damage and mixed sets are seen when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ewavit.errors import first_line
from ewavit.files import regular

BLOCK = 2**20  # bytes


def digest(file: Path) -> str:
    """The BLAKE2b digest of a file, 32 bytes in hexadecimal: what `b2sum -l 256` prints.

    Raises:
        OSError: it is no file, or it cannot be read.
    """
    found = blake2b(digest_size=32)
    with regular(file).open("rb", buffering=0) as handle:
        while block := handle.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests of files of a folder by name."""
    return {name: digest(folder / name) for name in sorted(names)}


def check(folder: Path, expected: dict[str, str], source: str) -> None:
    """Compare files with their digests.

    Args:
        folder: of the files.
        expected: the digests by file name.
        source: name of the file with the digests.

    Raises:
        ValueError: a file differs or cannot be read; it is named.
    """
    for name, value in expected.items():
        try:
            found = digest(folder / name)
        except OSError as problem:
            raise ValueError(f"{name}: {said(problem)}") from None
        if found != value:
            raise ValueError(f"{name} differs from its digest in {source}")


def sealed(content: dict[str, Any]) -> str:
    """JSON of a dict with a digest of itself as its last entry."""
    return json.dumps({**content, "digest": _of_json(content)})


def unsealed(text: str) -> dict[str, Any]:
    """The inverse of `sealed`.

    Raises:
        ValueError: no JSON, or it differs from its digest.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if content.pop("digest", None) != _of_json(content):
        raise ValueError("it differs from its digest")
    return content


def _of_json(content: dict[str, Any]) -> str:
    return blake2b(json.dumps(content).encode(), digest_size=32).hexdigest()


def said(problem: Exception) -> str:
    """What is wrong with a damaged file, in one line."""
    if isinstance(problem, KeyError):
        return f"no {first_line(problem)}"
    strerror = problem.strerror if isinstance(problem, OSError) else None
    return strerror or first_line(problem)
