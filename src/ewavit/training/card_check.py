"""Checks of what a file says about its model, before anything is built from it: files come from strangers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ewavit.core.checkpoint_files import is_expert_key
from ewavit.errors import EwavitError, first_line
from ewavit.training.recipe import choices

LONGEST_TEXT = 20_000_000  # characters; the names of a million classes fit
MOST_CLASSES, MOST_CHANNELS, MOST_PIXELS, MOST_POINTS, MOST_EXPERTS = 10**6, 1024, 4096, 100_000, 2**16
CROP_MODES = ("center", "squash", "border")
SPARE_TENSORS, SPARE_NUMBERS = 1000, 2**24  # that a constructor may make and drop again


def parse_card(text: str, source: str) -> dict[str, Any]:
    """The fields of a card from its JSON text, not checked yet.

    Raises:
        EwavitError: it is no JSON object, or far too long.
    """
    try:
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"{len(text):,} characters")
        card = json.loads(text)
        if not isinstance(card, dict):
            raise ValueError(f"a {type(card).__name__}, not an object")
    except (ValueError, RecursionError) as problem:
        raise EwavitError(
            f"{source} says in unreadable words which model it holds ({first_line(problem)}): export it again"
        ) from None
    return card


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be printed and written: JSON may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _is_number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _whole(least: int, most: int) -> tuple[Callable[[Any], bool], str]:
    words = f"a whole number from {least} to {most:,}"
    return lambda value: isinstance(value, int) and _is_number(value, least, most), words


def _optional(check: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value is None or check[0](value), f"{check[1]}, or null"


def _numbers(least: float, most: float) -> tuple[Callable[[Any], bool], str]:
    def holds(values: Any) -> bool:
        is_list = isinstance(values, list | tuple) and len(values) <= MOST_CHANNELS
        return is_list and all(_is_number(value, least, most) for value in values)

    return holds, f"a list of numbers from {least:g} to {most:g}"


def _texts(most: int) -> tuple[Callable[[Any], bool], str]:
    def holds(values: Any) -> bool:
        return isinstance(values, list | tuple) and 0 < len(values) <= most and all(map(_is_text, values))

    return holds, f"a list of 1 to {most:,} names"


def _one_of(names: Collection[str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


_TEXT = (_is_text, "text")
_OBJECT = (lambda value: isinstance(value, dict), "names with values")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": _TEXT,
    "model_kwargs": _OBJECT,
    "classes": _texts(MOST_CLASSES),
    "in_chans": _whole(1, MOST_CHANNELS),
    "img_size": _whole(0, MOST_PIXELS),
    "mean": _numbers(-1e6, 1e6),
    "std": _numbers(1e-9, 1e6),
    "data": _TEXT,
    "metric": _optional((lambda value: _is_number(value, -1e30, 1e30), "a number")),
    "mixture": _optional(_OBJECT),
    "num_points": _optional(_whole(1, MOST_POINTS)),
    "absolute_data": _optional(_TEXT),
    "data_dir": _optional(_TEXT),
    "interpolation": _optional(_one_of(choices("interpolation"))),
    "crop_pct": _optional((lambda value: _is_number(value, 1e-3, 1), "a number from 0.001 to 1")),
    "crop_mode": _optional(_one_of(CROP_MODES)),
    "task_name": _optional(_one_of(choices("task"))),
    "ffn_groups": _whole(1, 2**16),
    "point_features": _optional(_one_of(choices("point_features"))),
}
_MIXTURE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_experts": _whole(2, MOST_EXPERTS),
    "layers": _texts(MOST_CLASSES),
    "router": _OBJECT,
}
_NEEDED = ("model", "model_kwargs", "classes", "in_chans", "img_size", "mean", "std", "data")


def check_fields(card: Mapping[str, Any], source: str) -> None:
    """Check the fields of a card: all that are needed, none that is unknown, each of its type and range.

    Args:
        card: as JSON gives it.
        source: the file, for messages.

    Raises:
        EwavitError: a field is missing, unknown or wrong, or two contradict each other.
    """
    _check(card, _FIELDS, _NEEDED, source, "")
    if card.get("mixture") is not None:
        _check(card["mixture"], _MIXTURE, tuple(_MIXTURE), source, "mixture.")
    clouds = card["img_size"] == 0
    if clouds != (card.get("num_points") is not None):
        raise _wrong(source, "num_points", card.get("num_points"), "for clouds only, which have img_size 0")
    for name in ("mean", "std"):
        if len(card[name]) not in ((0,) if clouds else (1, card["in_chans"])):
            raise _wrong(source, name, card[name], f"one number for each of the {card['in_chans']} channels")
    said = {"num_classes": len(card["classes"]), "in_chans": card["in_chans"], "img_size": card["img_size"]}
    for name, value in said.items():
        if (given := card["model_kwargs"].get(name, value)) != value:
            raise _wrong(source, f"model_kwargs.{name}", given, f"{value} as beside it")


def _check(
    values: Mapping[str, Any],
    known: Mapping[str, tuple[Callable[[Any], bool], str]],
    needed: Collection[str],
    source: str,
    prefix: str,
) -> None:
    if missing := [name for name in needed if name not in values]:
        raise EwavitError(f"{source} does not say {prefix}{missing[0]} of its model: export it again")
    for name, value in values.items():
        if name not in known:
            raise EwavitError(
                f"{source} says {f'{prefix}{name}'[:100]!r} of its model, which is unknown: update "
                "ewavit, or export it again"
            )
        holds, words = known[name]
        if not holds(value):
            raise _wrong(source, f"{prefix}{name}", value, words)


def _wrong(source: str, name: str, value: Any, words: str) -> EwavitError:
    try:
        said = json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        said = type(value).__name__
    said = said if len(said) <= 60 else f"{said[:57]}..."
    return EwavitError(f"{source} says {name} {said} of its model, not {words}: export it again")


@contextmanager
def no_larger_than(weights: Mapping[str, Tensor], source: str) -> Iterator[None]:
    """A context manager in which models much larger than a file cannot be built."""
    tensors, numbers = len(weights), sum(weight.numel() for weight in weights.values())
    left = [2 * tensors + SPARE_TENSORS, 2 * numbers + SPARE_NUMBERS]

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            left[0], left[1] = left[0] - 1, left[1] - parameter.numel()
        if min(left) < 0:
            raise _TooLarge

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    except (_TooLarge, EwavitError):
        if min(left) >= 0:  # another error
            raise
        raise EwavitError(
            f"{source} describes a far larger model than its {tensors:,} tensors with {numbers:,} numbers: "
            "export it again"
        ) from None
    finally:
        handle.remove()


class _TooLarge(Exception):
    """A model grows beyond its file."""


def build_for(
    weights: Mapping[str, Tensor], create: Callable[[], nn.Module], source: str, num_experts: int = 1
) -> nn.Module:
    """Build the dense model that a file describes, once its shapes are seen to be those of the file.

    Shapes are found on torch's meta device, so a model of any size takes no memory.

    Args:
        weights: what the file holds; of an expanded model with the experts.
        create: builds the dense model.
        source: the file, for messages.
        num_experts: experts in each mixture of the file.

    Raises:
        EwavitError: the file holds tensors of other shapes, or the model cannot be built.
    """
    with no_larger_than(weights, source):
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                shapes = {key: tuple(value.shape) for key, value in create().state_dict().items()}
        except EwavitError:
            shapes = {}  # some constructors compute with values: see what the real one says
    mixtures = {f".{key}".partition(".experts.")[0] + "." for key in weights if is_expert_key(key)}
    for key, shape in shapes.items():
        allowed = {key: [shape]}
        if layer := next((name for name in mixtures if f".{key}".startswith(name)), None):
            rest, layer = f".{key}".removeprefix(layer), layer[1:]
            stacked = f"{layer}experts.ffn.{rest}", [(num_experts, *shape), shape]  # buffers are not stacked
            allowed = dict([stacked, (f"{layer}experts.copies.{num_experts - 1}.{rest}", [shape])])
        found = {name: tuple(weights[name].shape) for name in allowed if name in weights}
        if not any(of_file in allowed[name] for name, of_file in found.items()):
            has = f"it is {next(iter(found.values()))}" if found else "it is missing"
            raise EwavitError(
                f"{source} holds another model than it says: {key} should be {shape}, {has}: export it again"
            )
    with no_larger_than(weights, source):
        return create()
