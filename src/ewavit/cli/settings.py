"""The settings of a run: one flag each, and the same names in YAML. The command line overrides the file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ewavit.cli.parser import Parser, did_you_mean, nonempty_path, typed
from ewavit.errors import EwavitError
from ewavit.files import regular
from ewavit.training.kwargs import kwargs_text
from ewavit.training.recipe import GROUPS, Recipe, choices, kinds, renamed, settings
from ewavit.training.setting import flag

if TYPE_CHECKING:
    from ewavit.data.batches import Data


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting of `Recipe`; absent flags stay absent, so that YAML and defaults fill them."""
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
        options["help"] += "" if kind is bool else in_words(setting.default)
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


def in_words(default: object) -> str:
    """The end of a help text."""
    if isinstance(default, tuple):
        default = " ".join(f"{value:.4g}" for value in default)
    return "" if default in (None, "") else f" (default: {default})"


def given(options: argparse.Namespace, more: Collection[str] = ()) -> dict[str, Any]:
    """What the command line gave: the settings, and what else is named in `more`."""
    names = {setting.name for setting in settings()} | set(more)
    return {name: value for name, value in vars(options).items() if name in names}


def recipe_of(options: argparse.Namespace) -> tuple[Recipe, set[str]]:
    """Defaults, under the YAML file, under the command line; and which settings were given at all."""
    from_file = {}
    if options.config:
        from_file = from_yaml(read_yaml(options.config), f"--config {options.config}", "train", add_flags)
    found = from_file | given(options)
    return Recipe(**found), set(found)


def data_of(recipe: Recipe, given: set[str]) -> Data | None:
    """The recipe's data; None where only a model is named, for the images of timm's weights."""
    from ewavit.training.opening import open_recipe_data

    return open_recipe_data(recipe) if recipe.model is None or {"data", "task"} & given else None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file, with underscores in their names.

    Raises:
        EwavitError: no such file, no YAML, or no settings in it.
    """
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


def from_yaml(
    content: Mapping[str, Any],
    source: str,
    command: str,
    add_flags: Callable[[argparse.ArgumentParser], None],
    more: Collection[str] = (),
) -> dict[str, Any]:
    """Settings from YAML. They become words for the flags of a command, so that one parser checks both.

    Args:
        content: the settings by name.
        source: begins a message, e.g. "--config recipe.yaml".
        command: its help is named in messages.
        add_flags: adds the flags that read the words.
        more: names beside the settings of a recipe.

    Raises:
        EwavitError: an unknown name or a wrong value.
    """
    known = {setting.name for setting in settings()} | set(more)
    words = []
    for name, value in renamed(content).items():
        if name not in known:
            hint = did_you_mean(name, known) or f": see ewavit {command} --help"
            raise EwavitError(f"{source} has the unknown setting {name!r}{hint}")
        words += _words(name, value)
    parser = Parser(f"ewavit {command}", allow_abbrev=False)
    add_flags(parser)
    try:
        return given(parser.parse_args(words), more)
    except EwavitError as problem:
        raise EwavitError(f"{source}: {problem}") from None


def _words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag(name)}" if value else f"--no-{flag(name)}"]
    if isinstance(value, dict) and name.endswith("_kwargs"):
        value = kwargs_text(name, value)
    elif isinstance(value, dict) and name in ("contrasts", "primary"):
        value = ",".join(f"{arm}:{reference}" for arm, reference in value.items())
    elif isinstance(value, dict) and name == "grid":
        return ["--grid", *(f"{key}={_joined(values)}" for key, values in value.items())]
    elif isinstance(value, list) and kinds().get(name) is tuple:
        return [f"--{flag(name)}", *map(str, value)]
    elif isinstance(value, list) and name not in kinds():
        value = _joined(value)
    return [f"--{flag(name)}={value}"]


def _joined(values: Any) -> str:
    return ",".join(map(str, values)) if isinstance(values, list) else str(values)
