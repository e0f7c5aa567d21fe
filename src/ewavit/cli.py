"""The `ewavit` command: parses, calls one function, prints. Wrong input: one line and exit status 2."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

from ewavit import __version__
from ewavit.errors import EwavitError

try:
    import yaml

    from ewavit.training.recipe import Recipe, flag, settings
except ModuleNotFoundError as missing:
    sys.exit(f"ewavit: the command line needs {missing.name}: pip install 'ewavit[train]'")

if TYPE_CHECKING:
    from ewavit.training.opening import Data

_OF_COMPARISON = {"arms", "seeds", "lrs", "jobs"}  # what the YAML of a comparison holds beside a recipe


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser().parse_args(arguments)
        options.words = arguments
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except SystemExit as stop:
        return int(stop.code or 0)
    except EwavitError as problem:
        if os.environ.get("RANK", "0") == "0":
            print(f"ewavit: {str(problem).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as problem:  # a full disk, a folder that may not be written
        print(f"ewavit: {problem}", file=sys.stderr)
        return 2


def _parser(name: str = "ewavit") -> argparse.ArgumentParser:
    parser = _Parser(
        name, description="Train a Vision Transformer as averaged experts, deploy the plain model."
    )
    parser.add_argument("--version", action="version", version=f"ewavit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="train a model and leave a run's folder", allow_abbrev=False)
    _add_recipe(train)
    train.add_argument("--resume", metavar="RUN", help="go on with this run exactly, with its own settings")
    train.set_defaults(command=_train)

    plan = commands.add_parser("plan", help="show what train would do, and its cost", allow_abbrev=False)
    _add_recipe(plan)
    plan.add_argument(
        "--devices", type=int, metavar="D", help="also what each of D devices needs, dense and with experts"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(command=_plan)

    bench = commands.add_parser(
        "bench",
        help="measure training steps with experts against dense ones, here",
        description="Take training steps of a recipe's mixture and of its dense model in turn, on random "
        "images, and print the time of each part, its ratio with an interval, and the activations' memory.",
        allow_abbrev=False,
    )
    _add_recipe(bench)
    bench.add_argument("--rounds", type=int, default=20, help="steps of each that count (default: 20)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(command=_bench)

    compare = commands.add_parser(
        "compare",
        help="train arms that differ in the method, paired by seed, and say what helps",
        description="Train a recipe in several arms at the same seeds, into OUTPUT/NAME/: report.html, "
        "results.csv, results.json and the runs. Start the same command again to go on; more seeds or other "
        "arms may be asked for then, nothing is trained twice and nothing is deleted. Exit status 1: some "
        "runs failed, the results say which, and the next start repeats them.",
        allow_abbrev=False,
    )
    _add_recipe(compare)
    _add_comparison(compare)
    compare.set_defaults(command=_compare)

    evaluate = commands.add_parser("evaluate", help="accuracy of a run or file", allow_abbrev=False)
    evaluate.add_argument(
        "source", metavar="RUN_OR_FILE", type=Path, help="run, checkpoint, .safetensors or .onnx"
    )
    evaluate.add_argument("--data", help="data spec; the one it was trained on unless given")
    evaluate.add_argument(
        "--batch-size",
        type=int,
        default=128,
        help="images per batch, which compete for the room of routed experts (default: 128)",
    )
    evaluate.add_argument("--workers", type=int, default=4, help="processes that read images (default: 4)")
    evaluate.add_argument("--data-dir", help="root folder for timm's data specs")
    evaluate.add_argument("--val-split", default="validation", help="name of the split (default: validation)")
    evaluate.add_argument("--votes", type=int, default=1, help="passes over each cloud (default: 1)")
    evaluate.add_argument("--skip-bad-images", action="store_true", help="go on without unreadable images")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser(
        "export",
        help="write the plain model as one checked file",
        description="Write the plain model. That of a run is built and the file checked against it, logits "
        "and accuracy; safetensors of any expanded model are collapsed tensor by tensor, in little memory.",
        allow_abbrev=False,
    )
    export.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        type=Path,
        help="a run's folder, its checkpoint, or .safetensors (the index or folder of shards) of any "
        "expanded model",
    )
    export.add_argument(
        "--to",
        required=True,
        type=Path,
        metavar="FILE",
        help="ends in .safetensors or .onnx; for shards also a new folder",
    )
    export.add_argument("--data", help="check the accuracy on this data instead of the run's")
    export.add_argument(
        "--collapse", action="store_true", help="of a routed run the plain model with the mean expert"
    )
    export.set_defaults(command=_export)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """One flag per setting of `Recipe`; absent flags stay absent, so that YAML and defaults can fill them."""
    types = get_type_hints(Recipe)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="settings from YAML; the command line overrides them"
    )
    for setting in settings():
        choices = setting.metadata["choices"]
        accepted = (str,) if choices else (*get_args(types[setting.name]), types[setting.name])
        kind = next(t for t in accepted if t is not type(None))
        default = "" if setting.default in (None, "") else f" (default: {setting.default})"
        options: dict[str, Any] = {"help": setting.metadata["help"].replace("%", "%%") + default}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {
                "type": kind,
                "choices": choices,
                "metavar": None if choices else kind.__name__.upper(),
            }
        parser.add_argument(
            f"--{flag(setting.name)}", dest=setting.name, default=argparse.SUPPRESS, **options
        )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    """What a comparison has beside its recipe; absent flags stay absent."""
    from ewavit.compare.arms import BUILT_IN

    def names(text: str) -> list[str]:
        return [word.strip() for word in text.split(",") if word.strip()]

    def numbers(text: str) -> list[float]:
        return [float(word) for word in names(text)]

    for name, kind, metavar, help_text in (
        (
            "arms",
            names,
            "A,B,...",
            f"of {', '.join(BUILT_IN)} and the YAML's own arms; each with -lr for a tuned lr "
            "(default: dense,ewa)",
        ),
        ("seeds", int, "K", "seeds of each arm: --seed, --seed + 1, ... (default: 5)"),
        ("lrs", numbers, "LR,LR,...", "learning rates that the arms NAME-lr choose from, on held-out images"),
        ("jobs", int, "J", "runs at a time (default: one for each GPU, else each CPU core)"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, metavar=metavar, help=help_text, default=argparse.SUPPRESS
        )
    parser.add_argument(
        "--preset", metavar="NAME", help=f"a comparison that comes with ewavit: {', '.join(_presets())}"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", nargs="?", const="", help="run on this Ray cluster, or on one made here"
    )


def _presets() -> dict[str, Path]:
    return {
        file.stem: file for file in sorted((Path(__file__).parent / "compare" / "presets").glob("*.yaml"))
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
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        reason = str(problem).replace("\n", " ")
        raise EwavitError(f"--config {path} cannot be read as YAML ({reason})") from None
    if not isinstance(content, dict):
        raise EwavitError(f"--config {path} holds no settings: write lines like `epochs: 20`")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _parsed(content: Mapping[str, Any], source: str, command: str) -> dict[str, Any]:
    """Settings from YAML, which become command-line words, so that one parser checks both."""
    known = {setting.name for setting in settings()} | (_OF_COMPARISON if command == "compare" else set())
    words = []
    for name, value in content.items():
        if name not in known:
            raise EwavitError(f"{source} has the unknown setting {name!r}: see ewavit {command} --help")
        if isinstance(value, bool):
            words.append(f"--{flag(name)}" if value else f"--no-{flag(name)}")
        elif name == "model_kwargs" and isinstance(value, dict):
            words.append("--model-kwargs=" + ",".join(f"{k}={v}" for k, v in value.items()))
        elif name in _OF_COMPARISON and isinstance(value, list):
            words.append(f"--{name}=" + ",".join(map(str, value)))
        elif value is not None:
            words.append(f"--{flag(name)}={value}")
    return _given(_parser(f"ewavit: {source}:").parse_args([command, *words]))


def _train(options: argparse.Namespace) -> int:
    from ewavit.training.loop import resume, train
    from ewavit.training.processes import Interrupted, ProcessLost

    try:
        if options.resume is None:
            train(_recipe(options)[0])
            return 0
        given = _given(options)
        harmless = {"data", "data_dir", "workers", "tensorboard"}
        if options.config or (fixed := sorted(set(given) - harmless)):
            what = "--config" if options.config else f"--{flag(fixed[0])}"
            raise EwavitError(f"--resume takes all settings from the run: leave out {what}")
        resume(Path(options.resume), **given)
        return 0
    except (Interrupted, ProcessLost) as stopped:
        print(f"ewavit: {stopped}", file=sys.stderr)
        return stopped.exit_status


def _plan(options: argparse.Namespace) -> int:
    from ewavit.study.plan import plan

    try:
        made = plan(*_recipe_and_data(options), options.devices)
    except EwavitError as problem:
        table = str(problem).partition("\n")[2]  # the candidates and why each is refused
        if table and not options.json:
            print(table, flush=True)
        raise
    print(json.dumps(made.as_dict(), indent=2) if options.json else made)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from ewavit.study.bench import bench

    if options.rounds < 1:
        raise EwavitError(f"--rounds {options.rounds} measures nothing: choose 1 or more")
    recipe, data = _recipe_and_data(options)
    if recipe.experts == 1:
        raise EwavitError("--experts 1 is the dense model itself: choose 2 or more")
    made = bench(recipe, options.rounds, data)
    print(json.dumps(made.as_dict(), indent=2) if options.json else made)
    return 0


def _recipe_and_data(options: argparse.Namespace) -> tuple[Recipe, Data | None]:
    """The recipe, and its data unless a model is named alone: then it is for the images of timm's weights."""
    from ewavit.training.opening import open_recipe_data

    recipe, given = _recipe(options)
    return recipe, open_recipe_data(recipe) if recipe.model is None or "data" in given else None


def _compare(options: argparse.Namespace) -> int:
    from ewavit.compare.arms import make_arms
    from ewavit.compare.compare import Stopped, compare
    from ewavit.compare.terminal import as_text

    given: dict[str, Any] = {"arms": ["dense", "ewa"], "seeds": 5, "lrs": [], "jobs": None}
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
    try:
        comparison = compare(
            recipe,
            make_arms(special["arms"], recipe, own),
            special["seeds"],
            lrs=special["lrs"],
            jobs=special["jobs"],
            ray=options.ray,
            limited="limit" in typed,
            command=f"ewavit {shlex.join(options.words)}",
        )
    except Stopped as stopped:
        print(f"ewavit: {stopped}", file=sys.stderr)
        return stopped.exit_status
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

    names = ("data", "batch_size", "workers", "data_dir", "val_split", "votes", "skip_bad_images")
    metrics = evaluate(options.source, **{name: getattr(options, name) for name in names})
    print(json.dumps(metrics.as_dict()) if options.json else metrics.sentence)
    return 0


def _export(options: argparse.Namespace) -> int:
    from ewavit.training.export import export

    print(export(options.source, options.to, options.data, mean_expert=options.collapse))
    return 0


if __name__ == "__main__":
    sys.exit(main())
