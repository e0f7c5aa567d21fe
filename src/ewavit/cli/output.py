"""Where the words of a command go: `--quiet` and `--json`."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet` and `--json` to a command that reports while it works."""
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, and all other words on standard error"
    )


@contextmanager
def reporting(options: argparse.Namespace) -> Iterator[None]:
    """A context manager for the work of a command with these flags; print its result after it."""
    if options.quiet:
        with redirect_stdout(_Warnings()):
            yield
    elif options.json:
        with redirect_stdout(sys.stderr):
            yield
    else:
        yield


class _Warnings(io.TextIOBase):
    """Passes lines that begin with "warning:" on to standard error."""

    def __init__(self) -> None:
        self._passes = False

    def write(self, text: str) -> int:
        if text != "\n":  # `print` writes it by itself
            self._passes = text.startswith("warning:")
        return sys.stderr.write(text) if self._passes else len(text)
