"""`ewavit reproduce`: a cell of the paper's breadth, through `ewavit compare`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ewavit.cli import compare, output, settings
from ewavit.cli.parser import Parser, did_you_mean, typed
from ewavit.errors import EwavitError
from ewavit.files import replacing
from ewavit.training.recipe import Recipe
from ewavit.training.setting import flag

SUMMARY = "run a cell of the paper's breadth: its arms at its seeds"
DESCRIPTION = (
    "Compare the arms of a recipe that comes with ewavit, and write OUTPUT/NAME/record.json. Without a name, "
    "list the recipes. Start the same command again to continue."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit reproduce`."""
    parser.usage = "%(prog)s [RECIPE] --data PATH [options]"
    parser.add_argument("cell", metavar="RECIPE", nargs="?", help="name of the recipe; without it, a list")
    parser.add_argument("--data", **typed(str), help="the data set, as the recipe's header names it")
    parser.add_argument("--output", default="runs", **typed(str), help="folder of all runs (default: runs)")
    parser.add_argument(
        "--scale",
        default=1.0,
        **typed(float),
        help="multiply epochs, warm-up, training samples and seeds by this factor, up to 1 (default: 1); no "
        "model is made smaller, and all evaluation samples stay",
    )
    output.add_flags(parser)
    parser.add_argument(
        "--with",
        dest="more",
        metavar="FLAGS",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: flags of ewavit compare, which override the recipe, e.g. --with --jobs 8 --no-amp",
    )


def run(options: argparse.Namespace) -> int:
    """Compare the arms of a recipe; 1 if a run failed."""
    from ewavit.compare.cells import cells, title

    known = cells()
    if options.cell is None:
        titles, width = {name: title(file) for name, file in known.items()}, max(map(len, known))
        table = "\n".join(f"{name:{width}}  {text}" for name, text in titles.items())
        print(json.dumps(titles, indent=2) if options.json else table)
        return 0
    if (file := known.get(options.cell)) is None:
        hint = did_you_mean(options.cell, known) or ": `ewavit reproduce` lists the recipes"
        raise EwavitError(f"unknown recipe {options.cell!r}{hint}")
    if not options.data:
        raise EwavitError(f"ewavit reproduce {options.cell} needs the data: give --data PATH")
    words = ["--config", str(file), "--data", options.data, "--output", options.output]
    with output.reporting(options):
        facts = _facts(options, _compare_options([*words, *options.more]))
    for name, value in facts["shrunk"].items():
        words += [f"--{flag(name)}", str(value)]
    words += ["--name", options.cell + (f"-x{options.scale:g}" if facts["shrunk"] else "")]
    comparison = _compare_options([*words, *options.more])
    comparison.words = options.words
    comparison.json, comparison.quiet = comparison.json or options.json, comparison.quiet or options.quiet
    status = compare.run(comparison)
    folder = Path(comparison.output) / comparison.name
    if (folder / "results.json").exists():
        _write_record(folder, facts)
    return status


def _compare_options(words: list[str]) -> argparse.Namespace:
    parser = Parser("ewavit compare", allow_abbrev=False)
    compare.add_flags(parser)
    return parser.parse_args(words)


def _facts(options: argparse.Namespace, comparison: argparse.Namespace) -> dict[str, Any]:
    """What is shrunk, and whether the data have the published counts; both are said, too."""
    from ewavit.compare.cells import shrunk

    chosen = compare.comparison_yaml(comparison.config, "recipe", {})
    chosen |= settings.given(comparison, compare.OWN)
    recipe = Recipe(**{name: value for name, value in chosen.items() if name not in compare.OWN})
    own = {name: getattr(recipe, name) for name in ("epochs", "warmup_epochs", "val_interval")}
    own["seeds"] = chosen["seeds"]
    shrunk(own, options.scale, samples=1)  # a wrong factor is refused before the data are read

    from ewavit.study.published import identify
    from ewavit.training.opening import open_recipe_data
    from ewavit.training.report import say

    data = open_recipe_data(recipe)
    smaller = shrunk(own, options.scale, data.num_train)
    row = identify(recipe.data, data, recipe.task)
    held = (data.num_train, data.num_eval)
    published = row is not None and held == (row.train, row.evaluation)
    if not published:
        say("these data do not have the counts of a published set: see `ewavit data check`")
    if smaller:
        say(f"scale {options.scale:g}: " + ", ".join(f"{name} {value}" for name, value in smaller.items()))
    return {
        "recipe": options.cell,
        "scale": options.scale,
        "shrunk": smaller,
        "training_samples": held[0],
        "evaluation_samples": held[1],
        "published": published,
    }


def _write_record(folder: Path, facts: dict[str, Any]) -> None:
    from ewavit.compare.record import RECORD, comparison_record

    with replacing(folder / RECORD) as partial:
        partial.write_text(json.dumps({**comparison_record(folder), "reproduce": facts}, indent=1) + "\n")
