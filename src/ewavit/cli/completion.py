"""`ewavit completion`: a script for the shell that completes commands and flags."""

from __future__ import annotations

import argparse

from ewavit.errors import EwavitError

SUMMARY = "print a script that completes commands and flags in a shell"
DESCRIPTION = (
    "Print a script that completes commands and flags. For bash, write this into ~/.bashrc: "
    'eval "$(ewavit completion bash)". It needs shtab: pip install shtab.'
)
SHELLS = ("bash", "zsh", "fish")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the argument of `ewavit completion`."""
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def run(options: argparse.Namespace) -> int:
    """Print the script for the parser that `options.build` makes."""
    try:
        import shtab
    except ImportError:
        raise EwavitError("ewavit completion needs shtab: pip install shtab") from None
    parser = options.build()
    parser.prog = "ewavit"
    print(shtab.complete(parser, options.shell))
    return 0
