"""`ewavit compare`: several arms at the same seeds, and their differences."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ewavit.cli import output, settings
from ewavit.cli.parser import number, whole_number
from ewavit.errors import EwavitError
from ewavit.training.recipe import Recipe
from ewavit.training.setting import flag

if TYPE_CHECKING:
    from ewavit.compare.results import Comparison

SUMMARY = "train several arms at the same seeds and test their differences"
DESCRIPTION = (
    "Train the recipe in several arms, each at the same seeds, and test their differences. The folder "
    "OUTPUT/NAME gets report.html, results.csv, results.json and the runs. Start the same command again "
    "to continue; it may then name more seeds or other arms. No run is trained twice or deleted. Exit "
    "status 1: some runs failed. The results name them, and the next start repeats them."
)
# What the YAML of a comparison holds beside a recipe.
OWN = {"arms", "seeds", "lrs", "grid", "jobs", "against", "contrasts", "primary"}
# What a preset takes of the bundled images; of a user's own it takes all.
_OF_BUNDLED = {"shots", "resample", "test_on_rest"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit compare`."""
    group = parser.add_argument_group("comparison")
    _add_design(group)
    _add_work(group)
    settings.add_flags(parser)
    output.add_flags(parser)


def _add_design(group: argparse._ArgumentGroup) -> None:
    """What is compared; absent flags stay absent."""
    from ewavit.compare.arms import BUILT_IN

    def names(text: str) -> list[str]:
        return [word.strip() for word in text.split(",") if word.strip()]

    def numbers(text: str) -> list[float]:
        return [number(word) for word in names(text)]

    for name, kind, metavar, help_text in (
        (
            "arms",
            names,
            "A,B,...",
            f"arms to train: {', '.join(BUILT_IN)} or arms of the YAML file; NAME-lr also tunes the learning "
            "rate of NAME, NAME-tuned several settings (default: dense,ewa)",
        ),
        ("seeds", whole_number, "N", "seeds of each arm: --seed, --seed + 1, ... (default: 5)"),
        ("lrs", numbers, "X,X,...", "learning rates that NAME-lr arms choose from, on held-out data"),
        ("jobs", whole_number, "N", "runs at the same time (default: one per GPU, or one per CPU core)"),
        ("against", str, "ARM", "judge all arms against this one (default: dense and the best control)"),
        ("contrasts", names, "A:B,...", "judge arm A against arm B, and no others; Holm corrects over these"),
        (
            "primary",
            str,
            "A:B",
            "the contrast that decides, named before the first run: judged alone, without a correction",
        ),
    ):
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=help_text, default=argparse.SUPPRESS)
    group.add_argument(
        "--grid",
        nargs="+",
        metavar="NAME=X,X",
        help="values that NAME-tuned arms choose from, in all combinations, on held-out data, e.g. "
        "lr=5e-4,1e-3 drop_path=0,0.2",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--preset", metavar="NAME", help=f"a comparison that comes with ewavit: {', '.join(presets())}"
    )


def _add_work(group: argparse._ArgumentGroup) -> None:
    """How it is done."""
    group.add_argument(
        "--pilot",
        metavar="X",
        nargs="?",
        const=0.5,
        type=number,
        help="train two arms at three seeds only, and say what the comparison will cost and how many seeds "
        "would tell a difference of X (default: 0.5); in the folder NAME-pilot",
    )
    group.add_argument(
        "--from",
        dest="source",
        metavar="PATH:COLUMN",
        help="train nothing, and judge runs that any program trained: PATH is a table with the columns arm "
        "and seed, or has {arm} and {seed} in it and fits each run's log (summary.csv of timm, "
        "trainer_state.json, metrics.csv of Lightning, events of TensorBoard); COLUMN is the metric",
    )
    group.add_argument(
        "--lower-is-better",
        action=argparse.BooleanOptionalAction,
        help="say it of the metric of --from",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help="run on the Ray cluster at this address; without an address, on a new local one",
    )


def presets() -> dict[str, Path]:
    """The comparisons that come with ewavit, by name."""
    return {
        file.stem: file
        for file in sorted((Path(__file__).parent.parent / "compare" / "presets").glob("*.yaml"))
    }


def _asked(
    options: argparse.Namespace,
) -> tuple[Recipe, dict[str, Any], dict[str, dict[str, Any] | None]]:
    """The recipe, what a comparison has beside it, and the overrides of a user's own arms."""
    given: dict[str, Any] = {"arms": ["dense", "ewa"], "seeds": 5, "lrs": [], "grid": [], "jobs": None}
    given |= {"against": None, "contrasts": [], "primary": None}
    own: dict[str, dict[str, Any] | None] = {}
    if options.preset is not None:
        if (file := presets().get(options.preset)) is None:
            raise EwavitError(f"unknown --preset {options.preset}: choose from {', '.join(presets())}")
        given |= {"name": options.preset} | comparison_yaml(file, "--preset", own)
    chosen = {} if options.config is None else comparison_yaml(options.config, "--config", own)
    chosen |= settings.given(options, OWN)
    if "data" in chosen:
        given = {name: value for name, value in given.items() if name not in _OF_BUNDLED}
    given |= chosen
    special = {name: given.pop(name) for name in OWN}
    return Recipe(**given), special, own


def run(options: argparse.Namespace) -> int:
    """Compare arms; 1 if a run failed."""
    if options.source is not None:
        return _judge(options)
    if options.lower_is_better is not None:
        raise EwavitError("--lower-is-better goes with --from: leave it out")
    recipe, special, own = _asked(options)

    from ewavit.compare.arms import check_start, make_arms
    from ewavit.compare.contrasts import Contrasts
    from ewavit.compare.tuning import Grids

    arms = make_arms(special["arms"], recipe, own)
    contrasts = Contrasts.parse(special["against"], special["contrasts"], special["primary"])
    contrasts.check(arm.name for arm in arms)
    grids = Grids.parse(special["lrs"], special["grid"])
    if options.pilot is None:  # a pilot trains other arms and seeds
        check_start(recipe, arms, special["seeds"], special["jobs"])
        grids.check(recipe, arms)

    from ewavit.compare.compare import Stopped, compare, usual_jobs
    from ewavit.compare.pilot import Plan, forecast

    plan = None
    if options.pilot is not None:
        jobs = special["jobs"] or usual_jobs()
        plan = Plan(recipe, arms, grids, contrasts, special["seeds"], jobs, options.pilot)
        recipe, arms, contrasts, special["seeds"] = plan.pilot()
    try:
        with output.reporting(options):
            comparison = compare(
                recipe,
                arms,
                special["seeds"],
                grids=grids,
                jobs=special["jobs"],
                ray=options.ray,
                contrasts=contrasts,
                command=f"ewavit {shlex.join(options.words)}",
            )
    except Stopped as stopped:
        print(f"ewavit: {stopped}", file=sys.stderr)
        return stopped.exit_status
    if plan is not None:
        found = forecast(plan, comparison)
        print(json.dumps(found.as_dict(), indent=2) if options.json else found)
        return int(any(run.error for arm in comparison.arms for run in arm.runs))
    return _shown(comparison, Path(recipe.output) / comparison.name, options)


def _judge(options: argparse.Namespace) -> int:
    """Judge runs that other programs trained; 1 if a run has no result."""
    from ewavit.compare.arms import check_packages
    from ewavit.compare.contrasts import Contrasts
    from ewavit.compare.outside import Source, read_comparison

    given = settings.given(options, OWN)
    others = {"config": options.config, "preset": options.preset, "ray": options.ray, "pilot": options.pilot}
    given |= {name: value for name, value in others.items() if value is not None}
    if unfit := sorted(set(given) - {"name", "output", "against", "contrasts"}):
        why = "the runs exist already: name it before them" if unfit[0] == "primary" else "nothing is trained"
        raise EwavitError(f"--{flag(unfit[0])} does not go with --from, as {why}: leave it out")
    check_packages()
    folder = Recipe(name=given.get("name", "judged"), output=given.get("output", Recipe.output))
    comparison = read_comparison(
        Source.parse(options.source),
        name=str(folder.name),
        command=f"ewavit {shlex.join(options.words)}",
        contrasts=Contrasts.parse(given.get("against"), given.get("contrasts", []), None),
        lower_is_better=options.lower_is_better,
    )

    from ewavit.compare.report import write_results

    place = Path(folder.output) / comparison.name
    if (place / "compare.yaml").exists() or (place / "runs").exists():
        raise EwavitError(f"{place} holds a comparison that was trained: give another --name")
    write_results(comparison, place)
    return _shown(comparison, place, options)


def _shown(comparison: Comparison, folder: Path, options: argparse.Namespace) -> int:
    """Print the results as the flags ask; 1 if a run failed."""
    from ewavit.compare.statistics import summarise
    from ewavit.compare.text import as_text

    if options.json:
        print(json.dumps(summarise(comparison).as_dict(), indent=2))
    elif not options.quiet:
        print(as_text(comparison, folder))
    return int(any(run.error for arm in comparison.arms for run in arm.runs))


def comparison_yaml(path: str | Path, what: str, own: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """The settings of a comparison's YAML; the overrides of its own arms go into `own`.

    `base: NAME` takes what the file does not set from NAME.yaml beside it.
    """
    from ewavit.compare.arms import check_overrides

    content, source = settings.read_yaml(path), f"{what} {path}"
    if base := content.pop("base", None):
        content = settings.read_yaml(Path(path).with_name(f"{base}.yaml")) | content
    if isinstance(arms := content.get("arms"), dict):
        content["arms"] = list(arms)
        for name, overrides in arms.items():
            if overrides and not isinstance(overrides, dict):
                raise EwavitError(
                    f"{source}: arm {name!r} is {overrides!r}: write {{share_rate: 0.1}} or nothing"
                )
            overrides = {str(key).replace("-", "_"): value for key, value in (overrides or {}).items()}
            check_overrides(str(name), overrides)
            own[str(name)] = settings.from_yaml(
                overrides, f"{source}: arm {name}", "train", settings.add_flags
            )
    return settings.from_yaml(content, source, "compare", add_flags, OWN)
