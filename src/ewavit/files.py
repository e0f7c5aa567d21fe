"""`replacing` writes whole files, `locked` locks, `regular` refuses special files, `csv_text` is for CSV."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ewavit.errors import EwavitError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context manager for writing a file or folder under another name, which then replaces `path`.

    The content is on the disk before it replaces `path`, and the new name is on the disk at the end.

    Args:
        path: what to write. If the block raises, it stays as it was and nothing else is left behind.

    Yields:
        Where to write.

    Raises:
        OSError: the file cannot be written.
    """
    partial = partial_of(path)
    remove(partial)  # what a killed process left
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync_names(path.parent)
    finally:
        remove(partial)


def partial_of(path: Path) -> Path:
    """Where `replacing` writes; no name of a user's own."""
    return path.with_name(f".{path.name}.ewavit-partial")


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name; a copy where the file system has no links. For `shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk.

    Raises:
        OSError: the disk failed.
    """
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
        sync_names(path)
        return
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def sync_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; nothing where the file system cannot."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """A context manager that holds a lock for this process. The lock ends with the process, however it ends.

    It is a record lock of POSIX: forked children do not hold it, and NFS knows it. On a file system without
    locks nothing is locked.

    Args:
        file: the file of the lock; it stays, and names the process.
        what: what is locked, in words, for the message.

    Raises:
        EwavitError: another process holds the lock.
        OSError: the file cannot be written.
    """
    with file.open("a+") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in (errno.EACCES, errno.EAGAIN):
                handle.seek(0)
                who = handle.read(200).strip()
                raise EwavitError(
                    f"{what} is in use by {who or 'another process'}: wait until it ends, or stop it"
                ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def regular(path: Path) -> Path:
    """Check that a path is a file or a link to one. Opening a named pipe could wait for ever.

    Returns:
        The path.

    Raises:
        OSError: nothing is there, or a loop of links, a folder, a named pipe, a socket or a device.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _SPECIAL if is_kind(mode)), "something else")
        raise OSError(f"it is {kind}, not a file")
    return path


_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)


def csv_text(text: str) -> str:
    """A text as a cell of a CSV file that no spreadsheet takes for a formula.

    One ' goes before a text that begins with = + - @, a tab or a line break, with or without ' before it.
    Removing one ' from such a cell gives the text again. Numbers stay as they are.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def is_torch_file(file: Path) -> bool:
    """Whether a file was written by `torch.save`: a zip archive, or in old versions a pickle."""
    if not file.is_file():
        return False
    with file.open("rb") as handle:
        start = handle.read(9)
    if start[2:] == b"\0\0\0\0\0\0{":  # the length of a safetensors header may begin like a pickle
        return False
    return start[:4] == b"PK\x03\x04" or (
        start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    )
