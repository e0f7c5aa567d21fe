"""`replacing`: write a file whole or not at all. `is_torch_file`: recognise a pickle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context manager for writing a file or folder under another name, which then replaces `path`.

    Args:
        path: what to write. If the block raises, it stays as it was and nothing else is left behind.

    Yields:
        Where to write.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def is_torch_file(file: Path) -> bool:
    """Whether a file was written by `torch.save`: a zip archive, or in old versions a pickle."""
    if not file.is_file():
        return False
    with file.open("rb") as handle:
        start = handle.read(4)
    return start == b"PK\x03\x04" or (
        start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    )
