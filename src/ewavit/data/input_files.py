"""`InputFiles`: inputs without labels, as batches for a model; `find_inputs` finds the files a user names."""

from __future__ import annotations

import glob
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ewavit.data.folders import files_below, formats_text
from ewavit.errors import EwavitError


class InputFiles(ABC):
    """Inputs without labels, each from a file, prepared for a model as in its evaluation.

    Attributes:
        kind: kind of the inputs in messages, "images" or "clouds".
        names: the files, in the order in which they were given.
        skipped: why a file could not be read, by its number in `names`; complete after `batches`.
    """

    kind: str
    names: tuple[str, ...]
    skipped: dict[int, str]

    @abstractmethod
    def batches(self) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the numbers of files in `names`, in order, and the model's inputs, on the device.

        Raises:
            EwavitError: a file cannot be read and bad files are not skipped, or no file can be read.
        """

    @abstractmethod
    def show(self, number: int) -> Any:
        """What a picture shows of a file: a PIL image in mode RGB, or the points of a cloud (points, 3).

        Raises:
            EwavitError: the file cannot be read.
        """


def find_inputs(places: Sequence[str], suffixes: Collection[str], kind: str) -> list[str]:
    """Find the files that a user names, in the order of the names.

    Args:
        places: files of any suffix; folders, for the files with one of the suffixes in them and below them,
            sorted; patterns such as `*.png`, for what fits, sorted. A file may occur several times.
        suffixes: the formats, such as ".png".
        kind: what the files hold, for messages.

    Raises:
        EwavitError: nothing is there, or a folder has no such file.
    """
    found: list[str] = []
    for place in places:
        if place == "-":
            raise EwavitError(f"- is the standard input, which is not read: give files or folders of {kind}")
        path = Path(place).expanduser()
        matches = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        if not matches:
            what = "no file fits" if glob.has_magic(place) else "no file or folder"
            raise EwavitError(f"{what} {place}: give files, folders or patterns of {kind}")
        for match in matches:
            found += _of_folder(match, suffixes, kind) if Path(match).is_dir() else [match]
    return found


def _of_folder(folder: str, suffixes: Collection[str], kind: str) -> list[str]:
    files, others = files_below(Path(folder), suffixes)
    if not files:
        but = f", but {formats_text(others)}" if others else ""
        raise EwavitError(f"{folder} has no {kind}{but}: give files with one of {', '.join(suffixes)}")
    return files
