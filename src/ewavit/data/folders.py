"""Folders of class folders, of images or clouds: their splits, classes and files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from ewavit.errors import EwavitError

VALIDATION_FOLDERS = ("val", "validation", "valid", "test")  # the usual names, in the order they are tried
# Folders that file servers and archives leave behind, besides hidden ones.
_NO_CLASSES = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "__pycache__", "lost+found")
# Files that often lie beside images and clouds.
_COMPANIONS = (".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".ini", ".db", ".py")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


def _places_above(folder: Path) -> set[str]:
    """The real paths of a folder and of every folder above it, by links or without."""
    real = Path(os.path.realpath(folder))
    return {
        os.path.realpath(place)
        for place in (folder.absolute(), *folder.absolute().parents, real, *real.parents)
    }


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder; hidden ones, and links to a folder above, do not count."""
    above = _places_above(folder)
    return [
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not _is_hidden(entry.name) and os.path.realpath(entry) not in above
    ]


def files_below(folder: Path, suffixes: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Find the files of some formats in a folder and in the folders in it.

    Hidden files and folders do not count. Links are followed, but not to a folder above and not twice.

    Args:
        folder: where to look.
        suffixes: the formats, such as ".png".

    Returns:
        The paths in order, and the number of files in other formats by suffix. Text and tables, which often
        lie beside data, are not counted.
    """
    found: list[str] = []
    others: Counter[str] = Counter()
    endings = tuple(suffixes)

    def walk(place: str, real: str, above: set[str]) -> None:
        for entry in os.scandir(place):
            if _is_hidden(entry.name):
                continue
            if os.path.isdir(entry.path):  # False for a loop of links
                inner = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if inner not in above and inner not in seen:
                    seen.add(inner)
                    walk(entry.path, inner, above | {inner})
            elif entry.name.lower().endswith(endings):
                found.append(entry.path)
            elif (suffix := Path(entry.name).suffix.lower()) not in _COMPANIONS:
                others[suffix or "no suffix"] += 1

    seen: set[str] = set()
    walk(str(folder), os.path.realpath(folder), _places_above(folder))
    return sorted(found), others


def formats_text(others: Mapping[str, int]) -> str:
    """The number of files in other formats in words, "12 files of other formats (.heic 10, .gif 2)"."""
    total = sum(others.values())
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    more = ", ..." if len(most) > 5 else ""
    named = ", ".join(f"{suffix} {count:,}" for suffix, count in most[:5])
    return f"{total:,} file{'s' * (total > 1)} of other formats ({named}{more})"


def split_folders(
    path: Path, train_split: str, val_split: str | None, holdout: bool, kind: str
) -> tuple[Path, Path | None]:
    """Find the training and the evaluation folder of a set of class folders.

    Args:
        path: a folder with both; with `holdout` also one with a training folder alone, or one with the class
            folders themselves.
        train_split: name of the training folder.
        val_split: name of the evaluation folder, tried before the usual names; None for these alone.
        holdout: whether evaluation takes training samples; then an evaluation folder is ignored.
        kind: what the folders hold, for messages, such as "images".

    Returns:
        The training folder, and the evaluation folder, None with `holdout`.

    Raises:
        EwavitError: a folder is missing.
    """
    names = list(dict.fromkeys([*([val_split] if val_split else []), *VALIDATION_FOLDERS]))
    present = [path / name for name in names if (path / name).is_dir()]
    train = path / train_split
    each = f"with one folder of {kind} per class"
    if not train.is_dir():
        flat = not present and not (path / "train").is_dir() and bool(class_folders(path))
        if holdout and flat:
            return path, None
        remedy = (
            f", or, if it holds one folder of {kind} per class itself, give --holdout 0.2" if flat else ""
        )
        raise EwavitError(
            f"{path} has no {train_split}/: it must hold {train_split}/ and val/ (also named "
            f"{', '.join(VALIDATION_FOLDERS[1:])}), each {each}{remedy}"
        )
    if not present and not holdout:
        raise EwavitError(
            f"{path} has no val/ (also named {', '.join(VALIDATION_FOLDERS[1:])}): add it, {each}, or give "
            f"--holdout 0.2 to evaluate on training {kind}"
        )
    return train, None if holdout else present[0]
