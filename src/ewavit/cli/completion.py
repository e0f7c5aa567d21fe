"""`ewavit completion`: a script for the shell that completes commands and flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ewavit.errors import EwavitError

SHELLS = ("bash", "zsh", "fish")


def add_flags(parser: argparse.ArgumentParser, build: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the argument of `ewavit completion`; `build` makes the parser that is completed."""
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(build=build)


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError:
        raise EwavitError("ewavit completion needs shtab: pip install shtab") from None
    parser = options.build()
    parser.prog = "ewavit"
    print(shtab.complete(parser, options.shell))
    return 0
