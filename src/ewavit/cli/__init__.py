"""The `ewavit` command: parses, calls one function, prints. Wrong input: one line and exit status 2.

Each command is a file here, with its flags and the function that runs it. torch is imported when a command
starts its work, not before, so help and wrong flags answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from ewavit import __version__
from ewavit.cli.parser import Help, Parser, shortened
from ewavit.errors import EwavitError, first_line

try:
    from ewavit.cli import (
        bench,
        compare,
        completion,
        data,
        doctor,
        evaluate,
        export,
        plan,
        predict,
        reproduce,
        train,
    )
except ModuleNotFoundError as missing:
    sys.exit(f"ewavit: the command line needs {missing.name}: pip install 'ewavit[train]'")

# OpenMP threads wait for each other in a loop of so many rounds, then they sleep. libgomp's 300,000 take
# milliseconds, and on busy cores a step has hundreds of waits; 5,000 cost nothing on free cores
# (benchmarks/busy_cores.py).
SPIN_COUNT = "5000"
COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        train,
        plan,
        bench,
        compare,
        evaluate,
        predict,
        export,
        reproduce,
        data,
        doctor,
        completion,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `ewavit`; None takes those of this process.

    Returns:
        The exit status: 0, or 2 for wrong input; each command's help names others.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read once, when torch is imported
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if wrong := [word for word in arguments if "\0" in word]:
            raise EwavitError(f"{shortened(wrong[0])!r} holds a NUL character: remove it")
        options = build_parser().parse_args(arguments)
        options.words = arguments
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except SystemExit as stop:
        return int(stop.code or 0)
    except EwavitError as problem:
        if os.environ.get("RANK", "0") == "0":
            print(f"ewavit: {shortened(first_line(problem))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except RecursionError:
        if _interrupts:
            return 130
        raise
    except BrokenPipeError:
        return 141
    except OSError as problem:  # a full disk, a folder that may not be written, a name that is too long
        print(f"ewavit: {shortened(first_line(EwavitError(problem)))}", file=sys.stderr)
        return 2


_interrupts: list[int] = []


def _interrupted(number: int, frame: object) -> None:
    """Remember SIGINT: an import that it stops may raise something else (numpy: RecursionError)."""
    _interrupts.append(number)
    raise KeyboardInterrupt


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; a parsed command line has its function in `command`."""
    parser = Parser(
        "ewavit",
        description="Train a Vision Transformer as a mixture of averaged experts and deploy the plain model.",
        epilog="ewavit COMMAND --help explains a command and all of its flags.",
    )
    parser.add_argument("--version", action="version", version=f"ewavit {__version__}")
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND", parser_class=Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            allow_abbrev=False,
            formatter_class=Help,
        )
        command.set_defaults(command=module.run, build=build_parser)
        module.add_flags(command)
    return parser
