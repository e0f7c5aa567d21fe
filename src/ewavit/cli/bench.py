"""`ewavit bench`: the time of a step, with and without experts."""

from __future__ import annotations

import argparse
import json

from ewavit.cli import settings
from ewavit.cli.parser import typed
from ewavit.errors import EwavitError

SUMMARY = "time training steps with and without experts on this machine"
DESCRIPTION = (
    "Time training steps of the recipe's model and of its dense model, in turn, on random images. Prints "
    "the time of each part of a step, the ratio of the two with an interval, and the memory of the "
    "activations."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit bench`."""
    settings.add_flags(parser)
    parser.add_argument("--rounds", default=20, **typed(int), help="timed steps of each model (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Time steps, and print their table."""
    if options.rounds < 1:
        raise EwavitError(f"--rounds {options.rounds} measures nothing: choose 1 or more")
    recipe, given = settings.recipe_of(options)
    if recipe.experts == 1:
        raise EwavitError("--experts 1 is the dense model itself: choose 2 or more")

    from ewavit.study.bench import bench

    made = bench(recipe, options.rounds, settings.data_of(recipe, given))
    print(json.dumps(made.as_dict(), indent=2) if options.json else made)
    return 0
