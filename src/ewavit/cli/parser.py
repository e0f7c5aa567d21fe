"""The parser of `ewavit`: one line for wrong words, with the closest right one, and the types of values."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from ewavit.errors import EwavitError

MOST_CHARACTERS = 2000  # of a message


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises wrong input as one line, with the closest right word."""

    def error(self, message: str) -> NoReturn:
        raise EwavitError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but raise for unknown words: each command knows its own flags."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            is_flag = word.startswith("-") and word != "-"
            hint = did_you_mean(word, self._option_string_actions) if is_flag else ""
            self.error(f"{'unknown flag' if is_flag else 'unexpected word'} {word}{hint}")
        return options, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = ", ".join(map(str, action.choices))
            hint = did_you_mean(str(value), map(str, action.choices)) or f": choose one of {names}"
            raise argparse.ArgumentError(action, f"{value!r} is unknown{hint}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word; empty if no known word is close."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f": did you mean {close[0]}?" if close else ""


class Help(argparse.HelpFormatter):
    """Help texts that do not break flags and names at a hyphen."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def shortened(text: str) -> str:
    """A message with its longest words and its middle cut: a user's text may have any length."""
    text = re.sub(r"\S{500,}", lambda word: f"{word[0][:100]}...", text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:1000]} ... {text[-500:]}"


def nonempty(text: str) -> str:
    """A text of one character or more; argparse quotes the error."""
    if not text:
        raise argparse.ArgumentTypeError("the text is empty: give a value, or leave the flag out")
    return text


def nonempty_path(text: str) -> Path:
    """A path; argparse quotes the error."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: give a file or folder")
    return Path(text)


def whole_number(text: str) -> int:
    """An integer of at most 64 bits; argparse quotes the error."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if abs(value) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too large")
    return value


def number(text: str) -> float:
    """A float; argparse quotes the error."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def typed(kind: type) -> dict[str, Any]:
    """What `add_argument` needs for a value of this type: the function that reads it, and the metavar."""
    parse = {int: whole_number, float: number, str: str}[kind]
    return {"type": parse, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
