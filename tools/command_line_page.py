"""Print the documentation page of the command line, in Markdown, from its own parser.

    python tools/command_line_page.py > docs/command-line.md

Two runs give the same text, and torch is not needed.
"""

import argparse

from ewavit.cli import build_parser
from ewavit.training.recipe import GROUPS

INTRODUCTION = """\
# Command line

This page is generated from the parser of `ewavit`; `ewavit COMMAND --help` prints the same texts.
Wrong input ends a command with exit status 2 and one line that says what to do."""
SETTINGS = """\
## Settings

{commands} take all of these flags. A YAML file given with `--config` takes the same names, as `epochs: 20`;
the command line overrides the file. From Python they are the arguments of `ewavit.training.recipe.Recipe`."""


def page() -> str:
    """The whole page."""
    (subparsers,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    commands: dict[str, argparse.ArgumentParser] = subparsers.choices
    parts = [INTRODUCTION]
    shared: dict[str, str] = {}
    with_settings = []
    for name, parser in commands.items():
        parts += [f"## ewavit {name}", parser.description or "", f"```text\n{usage(parser)}\n```"]
        groups = {str(group.title): group._group_actions for group in parser._action_groups}
        shared |= {title: table(groups.pop(title)) for title in GROUPS if title in groups}
        parts.append(table([action for actions in groups.values() for action in actions]))
        if parser.usage:
            with_settings.append(f"`{name}`")
            parts.append("All [settings](#settings) are flags as well.")
    parts.append(SETTINGS.format(commands=" and ".join([", ".join(with_settings[:-1]), with_settings[-1]])))
    for title in GROUPS:
        parts += [f"### {title.capitalize()}", shared[title]]
    return "\n\n".join(parts) + "\n"


def usage(parser: argparse.ArgumentParser) -> str:
    """The command with what it must be given."""
    required = [
        spelled(action) if action.option_strings else str(action.metavar)
        for action in parser._actions
        if action.required
    ]
    return " ".join([parser.prog, *required, "[options]"])


def table(actions: list[argparse.Action]) -> str:
    """Arguments with their defaults and meanings."""
    rows = [("flag", "default", "meaning"), ("---", "---", "---")]
    for action in actions:
        if not isinstance(action, argparse._HelpAction):
            text = (action.help or "").replace("%%", "%")
            meaning, _, default = text.removesuffix(")").partition(" (default: ")
            rows.append((f"`{spelled(action)}`", default, meaning if default else text))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def spelled(action: argparse.Action) -> str:
    """An argument as it is written: `--limit N`, `--[no-]amp`, `RUN_OR_FILE`."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return action.option_strings[0].replace("--", "--[no-]", 1)
    value = str(action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else ""))
    return " ".join(filter(None, [*action.option_strings, f"[{value}]" if action.nargs == "?" else value]))


if __name__ == "__main__":
    print(page(), end="")
