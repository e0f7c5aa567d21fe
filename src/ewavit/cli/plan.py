"""`ewavit plan`: what a run would do and cost."""

from __future__ import annotations

import argparse
import json

from ewavit.cli import settings
from ewavit.cli.parser import typed
from ewavit.errors import EwavitError
from ewavit.study.scaling import check_devices

SUMMARY = "show what train would do and what it costs (a dry run)"
DESCRIPTION = (
    "The dry run of train: show which FFNs become mixtures, and the parameters, memory and time this "
    "costs. It trains nothing and writes nothing."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit plan`."""
    settings.add_flags(parser)
    parser.add_argument(
        "--devices",
        **typed(int),
        help="also show the memory of each of N devices, for the dense model and for the mixture",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    recipe, given = settings.recipe_of(options)
    if options.devices is not None:
        check_devices(options.devices, recipe.router)

    from ewavit.study.plan import plan

    try:
        made = plan(recipe, settings.data_of(recipe, given), options.devices)
    except EwavitError as problem:
        table = str(problem).partition("\n")[2]  # the candidates and why each is refused
        if table and not options.json:
            print(table, flush=True)
        raise
    print(json.dumps(made.as_dict(), indent=2) if options.json else made)
    return 0
