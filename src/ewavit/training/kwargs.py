"""Arguments of others' constructors, kept as text: `--model-kwargs`, `--opt-kwargs`, `--sched-kwargs`."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ewavit.errors import EwavitError
from ewavit.training.setting import flag

_NOT_MODEL_KWARGS = {
    "num_classes": "the data has a number of classes, leave it out",
    "in_chans": "the data has a number of channels, leave it out",
    "features": "give --point-features",
    "img_size": "give --img-size",
    "pretrained": "give --pretrained",
    "checkpoint_path": "give --initial-checkpoint",
    "features_only": "features have no classes, leave it out",
}
# The settings that hold such text, and the arguments that have a flag of their own.
KWARGS: dict[str, Mapping[str, str]] = {
    "model_kwargs": _NOT_MODEL_KWARGS,
    "opt_kwargs": {
        name: f"give --{name.replace('_', '-')}"
        for name in ("opt", "lr", "weight_decay", "momentum", "layer_decay")
    },
    "sched_kwargs": {
        **{
            name: f"give --{name.replace('_', '-')}"
            for name in ("sched", "warmup_epochs", "warmup_lr", "min_lr", "decay_epochs", "decay_rate")
        },
        "num_epochs": "give --epochs",
        **dict.fromkeys(("cycle_mul", "cycle_decay", "cycle_limit"), "a run is one cycle, leave it out"),
        "cooldown_epochs": "a run ends after --epochs, leave it out",
        **dict.fromkeys(("patience_epochs", "plateau_mode"), "no schedule waits for a plateau, leave it out"),
        "step_on_epochs": "the schedule goes by steps, leave it out",
        "updates_per_epoch": "the data has a number of steps, leave it out",
    },
}
EXAMPLES = {
    "model_kwargs": "patch_size=4,depth=6",
    "opt_kwargs": "eps=1e-6,amsgrad=True",
    "sched_kwargs": "k_decay=1.5,warmup_prefix=True",
}


def parsed_kwargs(name: str, text: str) -> dict[str, Any]:
    """The arguments in the text of a setting; values are Python literals or else strings.

    Raises:
        EwavitError: a part is not of the form key=value, or has a flag of its own.
    """
    result = _split(text, name)
    for key, remedy in KWARGS[name].items():
        if key in result:
            raise EwavitError(f"--{flag(name)} {key}={result[key]} does not work: {remedy}")
    return result


def kwargs_text(name: str, kwargs: Mapping[str, Any]) -> str:
    """Arguments as the text that the setting of this name takes, e.g. `--model-kwargs`.

    Raises:
        EwavitError: a value is no Python literal, so that text cannot hold it.
    """
    plain = ",".join(f"{key}={value}" for key, value in kwargs.items())
    for text in (plain, ",".join(f"{key}={value!r}" for key, value in kwargs.items())):
        with suppress(EwavitError):
            if _split(text, name) == dict(kwargs):
                return text
    raise EwavitError(
        f"--{flag(name)} {dict(kwargs)!r} cannot be written as text: use numbers, strings without commas, "
        "tuples, lists, True, False and None"
    )


def _split(text: str, name: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    part = ""
    for piece in text.split(",") if text else ():
        part = f"{part},{piece}" if part else piece
        if sum(map(part.count, "([{")) > sum(map(part.count, ")]}")):
            continue  # a comma inside a tuple, list or dict
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not key.isidentifier():
            raise EwavitError(f"--{flag(name)} {part!r} is not key=value: write {EXAMPLES[name]}")
        try:
            result[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            result[key] = value
        part = ""
    if part:
        raise EwavitError(f"--{flag(name)} {part!r} has an open bracket: close it")
    return result
