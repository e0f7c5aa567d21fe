"""One setting: how it is declared, and how a value of it is converted and checked."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import Field, field
from types import UnionType
from typing import Any, Union, get_args, get_origin

from ewavit.errors import EwavitError

LARGEST_COUNT, LARGEST = 10**9, 1e30  # without a closer limit: larger ones overflow a count or a float32
_LIMITS = (
    ("least", operator.ge, "{} or more"),
    ("above", operator.gt, "more than {}"),
    ("most", operator.le, "at most {}"),
    ("below", operator.lt, "less than {}"),
)


def flag(name: str) -> str:
    """A setting's name as it is written on the command line."""
    return name.replace("_", "-")


def option(
    default: Any,
    help_text: str,
    *,
    group: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a dataclass of settings, with its help text, its group and the range of its value."""
    limits = {"least": least, "above": above, "most": most, "below": below}
    return field(default=default, metadata={"help": help_text, "group": group, **limits})


def converted(setting: Field[Any], kind: type, value: Any) -> Any:
    """A value in the type of its setting: paths as text, numpy's numbers as Python's.

    Raises:
        EwavitError: a value of another type.
    """
    name = f"--{flag(setting.name)}"
    if value is None and setting.default is None:
        return None
    if kind is tuple and isinstance(value, list | tuple):  # a list from YAML or JSON
        if all(isinstance(each, numbers.Real) for each in value):
            return tuple(float(each) for each in value)
    elif kind is str:
        if isinstance(value, str | os.PathLike):
            return os.fspath(value)
    elif isinstance(value, numbers.Real) and (kind is not bool or value in (0, 1)):
        with suppress(ValueError, OverflowError):  # not a number, infinity, or too large
            if kind is not tuple and ((converted := kind(value)) == value or kind is float):
                return converted
        if kind is float or not math.isfinite(value):
            raise EwavitError(f"{name} {value} does not work: choose a finite number")
    wanted = {
        str: "text", bool: "True or False", int: "a whole number", float: "a number", tuple: "numbers",
    }[kind]  # fmt: skip
    raise EwavitError(f"{name} {value!r} does not work: give {wanted}")


def check_value(setting: Field[Any], kind: type, choices: Sequence[str], value: Any) -> None:
    """Refuse a value that its setting does not allow.

    Raises:
        EwavitError: the value is not among the choices, out of range, empty or not finite.
    """
    name = f"--{flag(setting.name)}"
    if choices and value not in (*choices, setting.default):
        raise EwavitError(f"{name} {value!r} is unknown: choose one of {', '.join(choices)}")
    if isinstance(value, str) and not value and setting.default != "":
        raise EwavitError(f"{name} is empty: give a value, or leave out {name}")
    if isinstance(value, str) and "\0" in value:
        raise EwavitError(f"{name} {value!r} holds a NUL character: remove it")
    values = value if isinstance(value, tuple) else (value,)
    if any(isinstance(each, float) and not math.isfinite(each) for each in values):
        raise EwavitError(f"{name} {value} does not work: choose a finite number")
    if not all(isinstance(each, int | float) for each in values):
        return
    limits = [(setting.metadata[limit], holds, words) for limit, holds, words in _LIMITS]
    if setting.metadata["most"] is None and setting.metadata["below"] is None:
        largest = LARGEST_COUNT if kind is int else LARGEST
        limits.append((largest, operator.le, "at most {}"))
    limits = [(limit, holds, words) for limit, holds, words in limits if limit is not None]
    if not all(holds(each, limit) for limit, holds, _ in limits for each in values):
        allowed = " and ".join(words.format(limit) for limit, _, words in limits)
        raise EwavitError(f"{name} {value} is out of range: choose {allowed}")


def without_none(hint: Any) -> Any:
    """`X` of `X | None`; the first of several types."""
    return get_args(hint)[0] if get_origin(hint) in (Union, UnionType) else hint
