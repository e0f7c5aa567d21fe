"""The `ewavit` command: parses, calls one function, prints. Wrong input: one line and exit status 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from ewavit import __version__
from ewavit.errors import EwavitError

try:
    import yaml

    from ewavit.training.recipe import Recipe, flag, settings
except ModuleNotFoundError as missing:
    sys.exit(f"ewavit: the command line needs {missing.name}: pip install 'ewavit[train]'")


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser().parse_args(arguments)
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
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(command=_plan)

    evaluate = commands.add_parser("evaluate", help="accuracy of a run or file", allow_abbrev=False)
    evaluate.add_argument(
        "source", metavar="RUN_OR_FILE", type=Path, help="run, checkpoint, .safetensors or .onnx"
    )
    evaluate.add_argument("--data", help="data spec; the one it was trained on unless given")
    evaluate.add_argument("--batch-size", type=int, default=128, help="images per batch (default: 128)")
    evaluate.add_argument("--workers", type=int, default=4, help="processes that read images (default: 4)")
    evaluate.add_argument("--data-dir", help="root folder for timm's data specs")
    evaluate.add_argument("--val-split", default="validation", help="name of the split (default: validation)")
    evaluate.add_argument("--skip-bad-images", action="store_true", help="go on without unreadable images")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser(
        "export", help="write the plain model as one checked file", allow_abbrev=False
    )
    export.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's folder or its checkpoint"
    )
    export.add_argument(
        "--to", required=True, type=Path, metavar="FILE", help="ends in .safetensors or .onnx"
    )
    export.add_argument("--data", help="check the accuracy on this data instead of the run's")
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


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = {setting.name for setting in settings()}
    return {name: value for name, value in vars(options).items() if name in names}


def _recipe(options: argparse.Namespace) -> tuple[Recipe, set[str]]:
    """Defaults, under the YAML file, under the command line; and which settings were given at all."""
    from_file = {}
    if options.config:
        parser = _parser(f"ewavit: --config {options.config}:")
        from_file = _given(parser.parse_args(["train", *_yaml_arguments(options.config)]))
    given = from_file | _given(options)
    return Recipe(**given), set(given)


def _yaml_arguments(path: str) -> list[str]:
    """A YAML file's settings as command-line words, so that one parser checks both."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        reason = str(problem).replace("\n", " ")
        raise EwavitError(f"--config {path} cannot be read as YAML ({reason})") from None
    if not isinstance(content, dict):
        raise EwavitError(f"--config {path} holds no settings: write lines like `epochs: 20`")
    known = {setting.name for setting in settings()}
    words = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise EwavitError(f"--config {path} has the unknown setting {key!r}: see ewavit train --help")
        if isinstance(value, bool):
            words.append(f"--{flag(name)}" if value else f"--no-{flag(name)}")
        elif name == "model_kwargs" and isinstance(value, dict):
            words.append("--model-kwargs=" + ",".join(f"{k}={v}" for k, v in value.items()))
        elif value is not None:
            words.append(f"--{flag(name)}={value}")
    return words


def _train(options: argparse.Namespace) -> int:
    from ewavit.training.loop import Interrupted, resume, train

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
    except Interrupted as stopped:
        print(f"ewavit: {stopped}", file=sys.stderr)
        return stopped.exit_status


def _plan(options: argparse.Namespace) -> int:
    from ewavit.training.loop import open_recipe_data
    from ewavit.training.plan import plan

    recipe, given = _recipe(options)
    has_data = recipe.model is None or "data" in given  # else the images that timm's weights are for
    try:
        made = plan(recipe, open_recipe_data(recipe) if has_data else None)
    except EwavitError as problem:
        table = str(problem).partition("\n")[2]  # the candidates and why each is refused
        if table and not options.json:
            print(table, flush=True)
        raise
    print(json.dumps(made.as_dict(), indent=2) if options.json else made)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from ewavit.training.export import evaluate

    names = ("data", "batch_size", "workers", "data_dir", "val_split", "skip_bad_images")
    metrics = evaluate(options.source, **{name: getattr(options, name) for name in names})
    if options.json:
        print(json.dumps(asdict(metrics)))
    else:
        print(
            f"top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, "
            f"loss {metrics.loss:.4f} on {metrics.images:,} images"
        )
    return 0


def _export(options: argparse.Namespace) -> int:
    from ewavit.training.export import export

    print(export(options.source, options.to, options.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
