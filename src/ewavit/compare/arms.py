"""The arms of a comparison: the built-in ones, a user's own, and the recipe that each of them trains."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ewavit.errors import EwavitError
from ewavit.training.recipe import Recipe, settings

Overrides = Mapping[str, Any]
TUNED = "-lr"  # an arm's name that ends so: its learning rate is chosen from the grid

# timm's default decay of 0.9998 is a window of 5,000 steps, more than a short run has. With the warm-up the
# window is step^(2/3), 5 to 10 % of a run of 1,000 to 10,000 steps, and the decay set is only its upper end.
_EMA = {"model_ema": True, "model_ema_warmup": True}

# A naive MoE, with a learned router; it is what is deployed, but for moe-collapsed: the mean of its experts.
_ROUTED = {"router": "topk", "unit": "token"}

BUILT_IN: dict[str, Callable[[Recipe], dict[str, Any]]] = {
    "dense": lambda recipe: {"experts": 1},
    "ema": lambda recipe: {"experts": 1, **_EMA},
    "swa": lambda recipe: {"experts": 1, "swa": 0.25},
    # 10 epochs after 200 in TWA's paper (arXiv 2205.13104)
    "twa": lambda recipe: {"experts": 1, "twa": max(1, round(recipe.epochs / 20))},
    "switch-ema": lambda recipe: {"experts": 1, **_EMA, "model_ema_switch": True},
    "rup": lambda recipe: {"share_rate": 0.0},
    "full": lambda recipe: {"share_rate": (recipe.experts - 1) / recipe.experts, "ramp": 0.0},
    "ewa": lambda recipe: {},
    "ewa+ema": lambda recipe: dict(_EMA),
    "moe": lambda recipe: {**_ROUTED, "share_rate": 0.0},
    "moe+ewa": lambda recipe: dict(_ROUTED),
    "moe+early-ewa": lambda recipe: {**_ROUTED, "early": recipe.early or 0.3},
    "moe-collapsed": lambda recipe: {**_ROUTED, "share_rate": 0.0, "collapse": True},
}
# What a difference between two arms must not come from: other images, other seeds, other folders.
_SHARED = {
    "data", "data_dir", "train_split", "val_split", "img_size", "limit", "holdout", "skip_bad_images",
    "num_points", "votes",
    "seed", "output", "name",
}  # fmt: skip
_AVERAGES = ("model_ema", "swa", "twa")


@dataclass(frozen=True)
class Arm:
    """One way to train: a named set of overrides of the recipe.

    `tuned`: the learning rate is chosen from the comparison's grid on held-out training images.
    `role`: "control" for what a dense model gets without experts, "method" for what is being judged.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    role: Literal["control", "method"] = "method"
    tuned: bool = False


def make_arms(
    names: Iterable[str], recipe: Recipe, own: Mapping[str, Overrides | None] | None = None
) -> tuple[Arm, ...]:
    """The arms of the given names, each checked against the recipe.

    Args:
        names: built-in arms, own arms, or either with "-lr" for a tuned learning rate; "dense" among them.
        recipe: the settings that the arms share.
        own: overrides of the recipe by the name of an own arm; None or nothing for a built-in arm.

    Raises:
        EwavitError: an unknown arm or override, an override that would undo the pairing, or a value that the
            recipe refuses; the arm is named.
    """
    mine = {name: overrides for name, overrides in (own or {}).items() if overrides}
    for name, overrides in mine.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+_.-]*", name):
            raise EwavitError(f"arm {name!r} cannot name a folder: use letters, digits and + - _ .")
        if name.removesuffix(TUNED) in BUILT_IN:
            raise EwavitError(f"arm {name!r} is built in: give your own arm another name")
        check_overrides(name, overrides)
    if averages := [name for name in _AVERAGES if getattr(recipe, name)]:
        raise EwavitError(
            f"{averages[0]} would average the weights of every arm: leave it out of the recipe and compare "
            "arms that do, e.g. ema, swa, twa, ewa+ema"
        )
    if recipe.router != "random":
        raise EwavitError(
            f"router {recipe.router} would route every arm: leave it out of the recipe and compare arms that "
            "have one, e.g. moe, moe+ewa, moe+early-ewa, moe-collapsed"
        )
    arms = tuple(_arm(name, recipe, mine) for name in dict.fromkeys(names))
    if "dense" not in {arm.name for arm in arms}:
        raise EwavitError(
            f"dense is missing in --arms {','.join(arm.name for arm in arms)}: all are compared with it"
        )
    if len(arms) < 2:
        raise EwavitError("arms dense: there is nothing to compare it with, name a second one, e.g. ewa")
    for arm in arms:
        arm_recipe(recipe, arm)
    return arms


def check_overrides(arm: str, overrides: Overrides) -> None:
    """Check the names of an arm's overrides.

    Raises:
        EwavitError: a setting is unknown, or shared by all arms.
    """
    known = [setting.name for setting in settings()]
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise EwavitError(f"arm {arm!r} overrides the unknown setting {name!r}: did you mean {near[0]}?")
        if name in _SHARED:
            raise EwavitError(f"arm {arm!r} overrides {name}, which all arms share: set it in the recipe")
    if "lr" in overrides and arm.endswith(TUNED):
        raise EwavitError(
            f"arm {arm!r} overrides lr, which its name says is tuned: rename it or leave out lr"
        )


def arm_recipe(recipe: Recipe, arm: Arm, **more: Any) -> Recipe:
    """The recipe of an arm: the shared one under its overrides, and more settings such as the seed.

    Raises:
        EwavitError: the recipe refuses a value; the arm is named.
    """
    try:
        return replace(recipe, **{**arm.overrides, **more})
    except EwavitError as problem:
        raise EwavitError(f"arm {arm.name!r}: {problem}") from None


def _arm(name: str, recipe: Recipe, own: Mapping[str, Overrides]) -> Arm:
    base = name if name in own else name.removesuffix(TUNED)
    if base in own:
        overrides = dict(own[base])
        if name != base:
            overrides.pop("lr", None)
    elif base in BUILT_IN:
        overrides = BUILT_IN[base](recipe)
    else:
        near = difflib.get_close_matches(base, [*BUILT_IN, *own], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise EwavitError(
            f"unknown arm {name!r}: {hint}choose from {', '.join([*own, *BUILT_IN])}, each also with {TUNED}"
        )
    experts = overrides.get("experts", recipe.experts)
    if experts < 2 and base in BUILT_IN and "experts" not in overrides:
        raise EwavitError(f"arm {name!r} needs mixtures: set --experts {experts} to 2 or more")
    return Arm(name, overrides, "control" if experts == 1 else "method", name.endswith(TUNED))
