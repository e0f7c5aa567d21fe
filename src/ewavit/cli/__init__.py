"""The `ewavit` command: parses, calls one function, prints. Wrong input: one line and exit status 2.

torch is imported when a command starts its work, not before, so help and wrong flags answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ewavit import __version__
from ewavit.cli import completion, doctor, output, predict
from ewavit.cli.parser import (
    Help,
    Parser,
    did_you_mean,
    nonempty,
    nonempty_path,
    number,
    shortened,
    typed,
    whole_number,
)
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular

try:
    import yaml

    from ewavit.training.recipe import GROUPS, Recipe, choices, flag, kinds, kwargs_text, renamed, settings
except ModuleNotFoundError as missing:
    sys.exit(f"ewavit: the command line needs {missing.name}: pip install 'ewavit[train]'")

if TYPE_CHECKING:
    from ewavit.data.batches import Data

    _Commands = argparse._SubParsersAction[Parser]

# OpenMP threads wait for each other in a loop of so many rounds, then they sleep. libgomp's 300,000 take
# milliseconds, and on busy cores a step has hundreds of waits; 5,000 cost nothing on free cores
# (benchmarks/busy_cores.py).
SPIN_COUNT = "5000"
COMMANDS = (
    "train", "plan", "bench", "compare", "evaluate", "predict", "export", "doctor", "completion",
)  # fmt: skip
# What the YAML of a comparison holds beside a recipe.
_OF_COMPARISON = {"arms", "seeds", "lrs", "jobs", "against", "contrasts", "primary"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `ewavit`; None takes those of this process.

    Returns:
        The exit status: 0, or 2 for wrong input; each command's help names others.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read once, when torch is imported
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
    except BrokenPipeError:
        return 141
    except OSError as problem:  # a full disk, a folder that may not be written, a name that is too long
        print(f"ewavit: {shortened(first_line(EwavitError(problem)))}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; a parsed command line has its function in `command`."""
    parser = Parser(
        "ewavit",
        description="Train a Vision Transformer as a mixture of averaged experts and deploy the plain model.",
        epilog="ewavit COMMAND --help explains a command and all of its flags.",
    )
    parser.add_argument("--version", action="version", version=f"ewavit {__version__}")
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND", parser_class=Parser)
    _add_train(commands)
    _add_plan(commands)
    _add_bench(commands)
    _add_compare(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_help(commands)
    return parser


def _command(
    commands: _Commands, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=description, allow_abbrev=False, formatter_class=Help
    )
    parser.set_defaults(command=run)
    return parser


def _add_train(commands: _Commands) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "train a model",
        "Train a model. The folder OUTPUT/NAME gets the plain model, checkpoints, settings, metrics of every "
        "epoch and pictures.",
    )
    _add_recipe(parser)
    parser.add_argument(
        "--resume", metavar="RUN", type=nonempty_path, help="continue this run exactly, with its own settings"
    )
    output.add_flags(parser)


def _add_plan(commands: _Commands) -> None:
    parser = _command(
        commands,
        "plan",
        _plan,
        "show what train would do and what it costs (a dry run)",
        "The dry run of train: show which FFNs become mixtures, and the parameters, memory and time this "
        "costs. It trains nothing and writes nothing.",
    )
    _add_recipe(parser)
    parser.add_argument(
        "--devices",
        **typed(int),
        help="also show the memory of each of N devices, for the dense model and for the mixture",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_bench(commands: _Commands) -> None:
    parser = _command(
        commands,
        "bench",
        _bench,
        "time training steps with and without experts on this machine",
        "Time training steps of the recipe's model and of its dense model, in turn, on random images. Prints "
        "the time of each part of a step, the ratio of the two with an interval, and the memory of the "
        "activations.",
    )
    _add_recipe(parser)
    parser.add_argument("--rounds", default=20, **typed(int), help="timed steps of each model (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_compare(commands: _Commands) -> None:
    parser = _command(
        commands,
        "compare",
        _compare,
        "train several arms at the same seeds and test their differences",
        "Train the recipe in several arms, each at the same seeds, and test their differences. The folder "
        "OUTPUT/NAME gets report.html, results.csv, results.json and the runs. Start the same command again "
        "to continue; it may then name more seeds or other arms. No run is trained twice or deleted. Exit "
        "status 1: some runs failed. The results name them, and the next start repeats them.",
    )
    _add_comparison(parser)
    _add_recipe(parser)
    output.add_flags(parser)


def _add_evaluate(commands: _Commands) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "evaluate a run or a file",
        "Evaluate the model of a run, a checkpoint or an exported file.",
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        type=nonempty_path,
        help="folder of a run, checkpoint, .safetensors or .onnx",
    )
    for name, default, help_text in (
        ("data", None, "data set (default: that of the training)"),
        ("batch-size", 128, "images per batch; routed tokens of one batch compete for the experts' capacity"),
        ("workers", 4, "processes that read images"),
        ("data-dir", None, "root folder of timm data sets"),
        ("train-split", "train", "training split"),
        ("val-split", "validation", "evaluation split"),
        ("holdout", 0.0, "evaluate on the share of the training images that --holdout held out"),
        ("votes", 1, "passes over each cloud, averaged"),
    ):
        kind = str if default is None else type(default)
        options = typed(kind) | ({"type": nonempty} if kind is str else {})
        parser.add_argument(f"--{name}", default=default, **options, help=help_text + _said(default))
    parser.add_argument("--skip-bad-images", action="store_true", help="skip images that cannot be read")
    parser.add_argument(
        "--per-class",
        action="store_true",
        help="also print recall, precision and the usual mistake of each class",
    )
    parser.add_argument(
        "--confusion",
        type=Path,
        metavar="FILE.csv",
        help="write the confusion matrix (row: true class, column: predicted class) and a picture, FILE.png",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_predict(commands: _Commands) -> None:
    parser = _command(
        commands,
        "predict",
        predict.run,
        "predict for files without labels",
        "Predict with the model of a run, a checkpoint or an exported file. Files are prepared as in the "
        "run's evaluation. Predictions are printed in the order of the inputs, or written with --csv and "
        "--sheet.",
    )
    predict.add_flags(parser)


def _add_help(commands: _Commands) -> None:
    """The commands about the command itself."""
    summary = "say whether this machine can train"
    description = (
        "Check packages, devices, threads and folders. Exit status 1: something is wrong; its line says what "
        "to do."
    )
    doctor.add_flags(_command(commands, "doctor", doctor.run, summary, description))
    summary = "print a script that completes commands and flags in a shell"
    description = (
        "Print a script that completes commands and flags. For bash, write this into ~/.bashrc: "
        'eval "$(ewavit completion bash)". It needs shtab: pip install shtab.'
    )
    parser = _command(commands, "completion", completion.run, summary, description)
    completion.add_flags(parser, build_parser)


def _add_export(commands: _Commands) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "write the plain model as one checked file",
        "Write the plain model. The model of a run is built, and the logits and the accuracy of the written "
        "file are checked against it. The safetensors of any expanded model are collapsed tensor by tensor, "
        "in little memory.",
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        nargs="+",
        type=nonempty_path,
        help="folder of a run, its checkpoint, or .safetensors of any expanded model (shards: their index or "
        "folder); with --toward also several runs to merge",
    )
    parser.add_argument(
        "--to",
        type=nonempty_path,
        metavar="FILE",
        help="file to write, .safetensors, .onnx or .pt2 (torch.export); or a new folder, for shards, or for "
        "the model with the config.json that timm loads it by (local-dir:FOLDER)",
    )
    parser.add_argument(
        "--hub",
        metavar="ORG/NAME",
        type=nonempty,
        help="push the model with a model card to the Hugging Face hub (public, unless the repository exists "
        "and is private); with --to FOLDER or HF_HUB_OFFLINE=1 only write that folder. RUN may also be a "
        "folder of transformers' Trainer",
    )
    parser.add_argument(
        "--license", metavar="ID", type=nonempty, help="licence in the model card, e.g. apache-2.0"
    )
    parser.add_argument(
        "--data",
        metavar="TEXT",
        type=nonempty,
        help="data set that checks the accuracy (default: that of the run)",
    )
    parser.add_argument(
        "--collapse",
        action="store_true",
        help="export the plain model with the mean expert of a routed run (a different model)",
    )
    parser.add_argument(
        "--toward",
        metavar="FILE",
        type=nonempty_path,
        help="move the weights towards those of this file, which the training started from",
    )
    parser.add_argument(
        "--by",
        metavar="SHARE",
        type=nonempty,
        help="share of that way, 0 to 1 (WiSE-FT), or stock: for each tensor from the angle between the "
        "experts or runs (Model Stock)",
    )


def _said(default: object) -> str:
    if isinstance(default, tuple):
        default = " ".join(f"{value:.4g}" for value in default)
    return "" if default in (None, "") else f" (default: {default})"


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """One flag per setting of `Recipe`; absent flags stay absent, so that YAML and defaults can fill them."""
    parser.usage = "%(prog)s [options]"
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        type=nonempty_path,
        help="read settings from YAML; the command line overrides them",
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for setting in settings():
        kind = kinds()[setting.name]
        options: dict[str, Any] = {"help": setting.metadata["help"].replace("%", "%%")}
        options["help"] += "" if kind is bool else _said(setting.default)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif named := choices(setting.name):
            options["choices"] = named
        elif kind is tuple:
            options |= {"type": float, "nargs": "+", "metavar": "X"}
        else:
            options |= typed(kind)
        groups[setting.metadata["group"]].add_argument(
            f"--{flag(setting.name)}", dest=setting.name, default=argparse.SUPPRESS, **options
        )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    """What a comparison has beside its recipe; absent flags stay absent."""
    from ewavit.compare.arms import BUILT_IN

    def names(text: str) -> list[str]:
        return [word.strip() for word in text.split(",") if word.strip()]

    def numbers(text: str) -> list[float]:
        return [number(word) for word in names(text)]

    group = parser.add_argument_group("comparison")
    for name, kind, metavar, help_text in (
        (
            "arms",
            names,
            "A,B,...",
            f"arms to train: {', '.join(BUILT_IN)} or arms of the YAML file; NAME-lr also tunes the learning "
            "rate of NAME (default: dense,ewa)",
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
        "--preset", metavar="NAME", help=f"a comparison that comes with ewavit: {', '.join(_presets())}"
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help="run on the Ray cluster at this address; without an address, on a new local one",
    )


def _presets() -> dict[str, Path]:
    return {
        file.stem: file
        for file in sorted((Path(__file__).parent.parent / "compare" / "presets").glob("*.yaml"))
    }


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = {setting.name for setting in settings()} | _OF_COMPARISON
    return {name: value for name, value in vars(options).items() if name in names}


def _recipe(options: argparse.Namespace) -> tuple[Recipe, set[str]]:
    """Defaults, under the YAML file, under the command line; and which settings were given at all."""
    from_file = {}
    if options.config:
        from_file = _parsed(_read_yaml(options.config), f"--config {options.config}", "train")
    given = from_file | _given(options)
    return Recipe(**given), set(given)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(regular(Path(path)).read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as problem:
        reason = str(problem).replace("\n", " ")
        raise EwavitError(
            f"--config {path} cannot be read as YAML ({reason}): write lines like `epochs: 20`"
        ) from None
    if not isinstance(content, dict):
        raise EwavitError(f"--config {path} holds no settings: write lines like `epochs: 20`")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _parsed(content: Mapping[str, Any], source: str, command: str) -> dict[str, Any]:
    """Settings from YAML. They become command-line words, so that one parser checks both."""
    known = {setting.name for setting in settings()} | (_OF_COMPARISON if command == "compare" else set())
    words = []
    for name, value in renamed(content).items():
        if name not in known:
            hint = did_you_mean(name, known) or f": see ewavit {command} --help"
            raise EwavitError(f"{source} has the unknown setting {name!r}{hint}")
        if isinstance(value, bool):
            words.append(f"--{flag(name)}" if value else f"--no-{flag(name)}")
        elif name.endswith("_kwargs") and isinstance(value, dict):
            words.append(f"--{flag(name)}={kwargs_text(name, value)}")
        elif name in ("contrasts", "primary") and isinstance(value, dict):
            words.append(f"--{name}=" + ",".join(f"{arm}:{reference}" for arm, reference in value.items()))
        elif name in _OF_COMPARISON and isinstance(value, list):
            words.append(f"--{name}=" + ",".join(map(str, value)))
        elif isinstance(value, list) and kinds()[name] is tuple:
            words += [f"--{flag(name)}", *map(str, value)]
        elif value is not None:
            words.append(f"--{flag(name)}={value}")
    try:
        return _given(build_parser().parse_args([command, *words]))
    except EwavitError as problem:
        raise EwavitError(f"{source}: {problem}") from None


def _train(options: argparse.Namespace) -> int:
    given = _given(options)
    if options.resume is None:
        recipe, _ = _recipe(options)
    else:
        harmless = {"data", "data_dir", "workers", "log"}
        if options.config or (fixed := sorted(set(given) - harmless)):
            what = "--config" if options.config else f"--{flag(fixed[0])}"
            raise EwavitError(f"--resume takes all settings from the run: leave out {what}")

    from ewavit.training.loop import resume, train
    from ewavit.training.processes import Interrupted, ProcessLost

    try:
        with output.reporting(options):
            done = train(recipe) if options.resume is None else resume(options.resume, **given)
    except (Interrupted, ProcessLost) as stopped:
        print(f"ewavit: {stopped}", file=sys.stderr)
        return stopped.exit_status
    if options.json and os.environ.get("RANK", "0") == "0":
        print(json.dumps({"run": str(done.run), "model_file": str(done.model_file), **done.row}, indent=2))
    return 0


def _plan(options: argparse.Namespace) -> int:
    recipe, given = _recipe(options)

    from ewavit.study.plan import plan

    try:
        made = plan(recipe, _data(recipe, given), options.devices)
    except EwavitError as problem:
        table = str(problem).partition("\n")[2]  # the candidates and why each is refused
        if table and not options.json:
            print(table, flush=True)
        raise
    print(json.dumps(made.as_dict(), indent=2) if options.json else made)
    return 0


def _bench(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise EwavitError(f"--rounds {options.rounds} measures nothing: choose 1 or more")
    recipe, given = _recipe(options)
    if recipe.experts == 1:
        raise EwavitError("--experts 1 is the dense model itself: choose 2 or more")

    from ewavit.study.bench import bench

    made = bench(recipe, options.rounds, _data(recipe, given))
    print(json.dumps(made.as_dict(), indent=2) if options.json else made)
    return 0


def _data(recipe: Recipe, given: set[str]) -> Data | None:
    """The recipe's data; None where only a model is named, for the images of timm's weights."""
    from ewavit.training.opening import open_recipe_data

    return open_recipe_data(recipe) if recipe.model is None or {"data", "task"} & given else None


def _compare(options: argparse.Namespace) -> int:
    from ewavit.compare.arms import make_arms

    given: dict[str, Any] = {"arms": ["dense", "ewa"], "seeds": 5, "lrs": [], "jobs": None}
    given |= {"against": None, "contrasts": [], "primary": None}
    own: dict[str, dict[str, Any] | None] = {}
    if options.preset is not None:
        if options.preset not in _presets():
            raise EwavitError(f"unknown --preset {options.preset}: choose from {', '.join(_presets())}")
        given |= {"name": options.preset} | _comparison_yaml(_presets()[options.preset], "--preset", own)
    if options.config is not None:
        given |= _comparison_yaml(options.config, "--config", own)
    typed = _given(options)
    given |= typed
    special = {name: given.pop(name) for name in _OF_COMPARISON}
    recipe = Recipe(**given)
    arms = make_arms(special["arms"], recipe, own)

    from ewavit.compare.contrasts import Contrasts

    contrasts = Contrasts.parse(special["against"], special["contrasts"], special["primary"])
    contrasts.check(arm.name for arm in arms)

    from ewavit.compare.compare import Stopped, compare
    from ewavit.compare.statistics import summarise
    from ewavit.compare.terminal import as_text

    try:
        with output.reporting(options):
            comparison = compare(
                recipe,
                arms,
                special["seeds"],
                lrs=special["lrs"],
                jobs=special["jobs"],
                ray=options.ray,
                contrasts=contrasts,
                command=f"ewavit {shlex.join(options.words)}",
            )
    except Stopped as stopped:
        print(f"ewavit: {stopped}", file=sys.stderr)
        return stopped.exit_status
    if options.json:
        print(json.dumps(summarise(comparison).as_dict(), indent=2))
    elif not options.quiet:
        print(as_text(comparison, Path(recipe.output) / comparison.name))
    return int(any(run.error for arm in comparison.arms for run in arm.runs))


def _comparison_yaml(path: str | Path, what: str, own: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """The settings of a comparison's YAML; the overrides of its own arms go into `own`."""
    from ewavit.compare.arms import check_overrides

    content, source = _read_yaml(path), f"{what} {path}"
    if isinstance(arms := content.get("arms"), dict):
        content["arms"] = list(arms)
        for name, overrides in arms.items():
            if overrides and not isinstance(overrides, dict):
                raise EwavitError(
                    f"{source}: arm {name!r} is {overrides!r}: write {{share_rate: 0.1}} or nothing"
                )
            overrides = {str(key).replace("-", "_"): value for key, value in (overrides or {}).items()}
            check_overrides(str(name), overrides)
            own[str(name)] = _parsed(overrides, f"{source}: arm {name}", "train")
    return _parsed(content, source, "compare")


def _evaluate(options: argparse.Namespace) -> int:
    from ewavit.training.export import evaluate

    names = (
        "data", "batch_size", "workers", "data_dir", "train_split", "val_split", "holdout", "votes",
        "skip_bad_images",
    )  # fmt: skip
    given = {name: getattr(options, name) for name in names}
    to: Path | None = options.confusion
    if to is not None and (to.suffix != ".csv" or not to.parent.is_dir()):
        raise EwavitError(
            f"--confusion {to} does not work: give a path that ends in .csv, in an existing folder"
        )
    metrics = evaluate(options.source, confusion=options.per_class or to is not None, **given)
    found = metrics.confusion
    if to is not None and found is not None:
        found.write(to)
        found.draw(to.with_suffix(".png"), f"{options.source}: {metrics.count:,} {metrics.kind}")
    if options.json:
        classes = {"classes": found.per_class()} if options.per_class and found is not None else {}
        print(json.dumps({**metrics.as_dict(), **classes}))
    else:
        print(metrics.sentence)
        if options.per_class and found is not None:
            print(found.table())
    return 0


def _export(options: argparse.Namespace) -> int:
    if options.hub is not None:
        return _publish(options)
    if options.to is None or options.license is not None:
        raise EwavitError(
            "--license needs --hub ORG/NAME" if options.to else "give --to FILE or --hub ORG/NAME"
        )

    from ewavit.training.export import export

    source, *more = options.source
    print(export(source, options.to, options.data, options.collapse, options.toward, options.by, more))
    return 0


def _publish(options: argparse.Namespace) -> int:
    for name in ("data", "toward", "by"):
        if getattr(options, name) is not None:
            raise EwavitError(f"--{name} does not go with --hub: leave it out")
    source, *more = options.source
    if more:
        raise EwavitError(f"--hub takes one run, not {len(options.source)}: leave out {more[0]}")

    from ewavit.compare.results import verdict_of
    from ewavit.training.hub import publish

    words = {"mean_expert": options.collapse, "licence": options.license}
    print(publish(source, options.hub, options.to, verdict=verdict_of(source), **words))
    return 0
