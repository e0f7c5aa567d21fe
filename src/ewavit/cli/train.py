"""`ewavit train`: train a run, or resume it."""

from __future__ import annotations

import argparse
import json
import os
import sys

from ewavit.cli import output, settings
from ewavit.cli.parser import nonempty_path
from ewavit.errors import EwavitError
from ewavit.training.setting import flag

SUMMARY = "train a model"
DESCRIPTION = (
    "Train a model. The folder OUTPUT/NAME gets the plain model, checkpoints, settings, metrics of every "
    "epoch and pictures."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit train`."""
    settings.add_flags(parser)
    parser.add_argument(
        "--resume", metavar="RUN", type=nonempty_path, help="continue this run exactly, with its own settings"
    )
    output.add_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Train or resume a run, and return its exit status."""
    given = settings.given(options)
    if options.resume is None:
        recipe, _ = settings.recipe_of(options)
    else:
        harmless = {"data", "data_dir", "workers", "log"}
        if options.config or (fixed := sorted(set(given) - harmless)):
            what = "--config" if options.config else f"--{flag(fixed[0])}"
            raise EwavitError(f"--resume takes all settings from the run: leave out {what}")

    from ewavit.training.loop import resume, train
    from ewavit.training.processes import Interrupted, ProcessLost

    main = os.environ.get("RANK", "0") == "0"
    try:
        with output.reporting(options):
            done = train(recipe) if options.resume is None else resume(options.resume, **given)
    except (Interrupted, ProcessLost) as stopped:
        if main or isinstance(stopped, ProcessLost):  # a signal stops all processes alike
            print(f"ewavit: {stopped}", file=sys.stderr)
        return stopped.exit_status
    if options.json and main:
        print(json.dumps({"run": str(done.run), "model_file": str(done.model_file), **done.row}, indent=2))
    return 0
