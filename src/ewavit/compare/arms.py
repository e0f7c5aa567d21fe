"""The arms of a comparison, built in or of a user's own, and the recipe of each arm."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Literal

from ewavit.errors import EwavitError
from ewavit.training.recipe import Recipe, settings

Overrides = Mapping[str, Any]
LARGEST_SEEDS = 10_000  # of an arm
LR, TUNED = "-lr", "-tuned"  # ends of the names of arms that choose their learning rate, or several settings

# timm's default decay of 0.9998 is a window of 5,000 steps, more than a short run has. With the warm-up the
# window is step^(2/3), 5 to 10 % of a run of 1,000 to 10,000 steps, and 0.9998 is only its upper end.
_EMA = {"model_ema": True, "model_ema_warmup": True}

# A naive MoE with a learned router. The deployed model is the MoE itself; for moe-collapsed it is the mean of
# the experts.
_ROUTED = {"router": "topk", "unit": "token"}


def _halved(epochs: int) -> int:
    if epochs < 2:
        raise EwavitError(f"arm 'half' trains half of --epochs {epochs}: give 2 or more, or leave it out")
    return epochs // 2


BUILT_IN: dict[str, Callable[[Recipe], dict[str, Any]]] = {
    "dense": lambda recipe: {"experts": 1},
    "ema": lambda recipe: {"experts": 1, **_EMA},
    "swa": lambda recipe: {"experts": 1, "swa": 0.25},
    # 10 epochs after 200 in TWA's paper (arXiv 2205.13104)
    "twa": lambda recipe: {"experts": 1, "twa": max(1, round(recipe.epochs / 20))},
    "switch-ema": lambda recipe: {"experts": 1, **_EMA, "model_ema_switch": True},
    # a longer or shorter schedule, and ordinary regularisers: stronger ones where the recipe has them already
    "half": lambda recipe: {"experts": 1, "epochs": _halved(recipe.epochs)},
    "double": lambda recipe: {"experts": 1, "epochs": 2 * recipe.epochs},
    "drop-path": lambda recipe: {"experts": 1, "drop_path": round((recipe.drop_path or 0.1) + 0.1, 9)},
    "mixup": lambda recipe: {"experts": 1, "mixup": 2 * recipe.mixup or 0.2},
    "wise-ft": lambda recipe: {"experts": 1, "toward_start": 0.5},
    # SCHEME (arXiv 2312.00412): its branch beside plain FFNs, and with block-diagonal FFNs of equal FLOPs
    "cca": lambda recipe: {"experts": 1, "branch": "cca"},
    "scheme": lambda recipe: {"experts": 1, "branch": "cca", "ffn_groups": 2},
    "ewa+cca": lambda recipe: {"branch": "cca"},
    "rup": lambda recipe: {"share_rate": 0.0},
    "full": lambda recipe: {"share_rate": (recipe.experts - 1) / recipe.experts, "ramp": 0.0},
    # lo-fi (arXiv 2210.11948): copies of the whole model, each for its own images, merged at the end
    "lofi": lambda recipe: {"select": "model", "unit": "image", "share_rate": 0.0},
    "ewa": lambda recipe: {},
    "ewa+ema": lambda recipe: dict(_EMA),
    # after ExFusion (arXiv 2603.27965) and the hybrid experts of Emotion-Qwen (arXiv 2505.06685)
    "fused": lambda recipe: {**_ROUTED, "router": "fused", "share_rate": 0.0},
    "hybrid": lambda recipe: {**_ROUTED, "router": "hybrid", "share_rate": 0.0, "experts": 2},
    "moe": lambda recipe: {**_ROUTED, "share_rate": 0.0},
    "moe+ewa": lambda recipe: dict(_ROUTED),
    "moe+early-ewa": lambda recipe: {**_ROUTED, "early": recipe.early or 0.3},
    "moe-collapsed": lambda recipe: {**_ROUTED, "share_rate": 0.0, "collapse": True},
}
# No difference between two arms may come from other data, other seeds or other folders.
_SHARED = {
    "task", "data", "data_dir", "train_split", "val_split", "img_size", "limit", "shots", "resample",
    "test_on_rest", "holdout", "fold", "skip_bad_images", "num_points", "point_features", "votes", "retain",
    "seed", "output", "name",
}  # fmt: skip
_AVERAGES = ("model_ema", "swa", "twa", "toward_start")


@dataclass(frozen=True)
class Arm:
    """One way to train: a named set of overrides of the recipe.

    `tuned`: settings are chosen from the comparison's grid on held-out training data.
    `role`: "control" for training a dense model without experts, "method" for what is being judged.
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
        names: of built-in and own arms, ending in "-lr" or "-tuned" for settings chosen from a grid.
        recipe: the settings that the arms share.
        own: the overrides of own arms, by name; None or empty for a built-in arm.

    Raises:
        EwavitError: an unknown arm or override, an override that would undo the pairing, or a value that the
            recipe refuses. The message names the arm.
    """
    mine = {name: overrides for name, overrides in (own or {}).items() if overrides}
    for name, overrides in mine.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+_.-]*", name):
            raise EwavitError(f"arm {name!r} is no name for a folder: use letters, digits and + - _ .")
        if plain_name(name) in BUILT_IN:
            raise EwavitError(f"arm {name!r} is built in: give your own arm another name")
        check_overrides(name, overrides)
    if averages := [name for name in _AVERAGES if getattr(recipe, name)]:
        raise EwavitError(
            f"{averages[0]} would average the weights of every arm: leave it out of the recipe and add arms "
            "that average, e.g. ema, swa, twa, ewa+ema"
        )
    if recipe.router != "random":
        raise EwavitError(
            f"router {recipe.router} would route every arm: leave it out of the recipe and add arms with a "
            "router, e.g. moe, moe+ewa, moe+early-ewa, moe-collapsed"
        )
    arms = tuple(_arm(name, recipe, mine) for name in dict.fromkeys(names))
    if len(arms) < 2:
        names = ",".join(arm.name for arm in arms) or "''"
        raise EwavitError(f"--arms {names} has nothing to compare: add a second arm, e.g. dense,ewa")
    for arm in arms:
        arm_recipe(recipe, arm)
    return arms


def check_overrides(arm: str, overrides: Overrides) -> None:
    """Check the names of an arm's overrides.

    Raises:
        EwavitError: a setting is unknown, or all arms share it.
    """
    check_names(f"arm {arm!r}", overrides)
    if "lr" in overrides and arm.endswith(LR):
        raise EwavitError(
            f"arm {arm!r} overrides lr, but {LR} at the end of a name means a tuned lr: rename the arm or "
            "leave out lr"
        )


def check_names(who: str, names: Iterable[str]) -> None:
    """Check that arms may differ in these settings.

    Raises:
        EwavitError: a setting is unknown, or all arms share it; the message begins with `who`.
    """
    known = [setting.name for setting in settings()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise EwavitError(f"{who} overrides the unknown setting {name!r}: did you mean {near[0]}?")
        if name in _SHARED:
            raise EwavitError(f"{who} overrides {name}, which all arms share: set it in the recipe")


def arm_recipe(recipe: Recipe, arm: Arm, **more: Any) -> Recipe:
    """The recipe of an arm: the shared one with the arm's overrides, and `more` settings such as the seed.

    Raises:
        EwavitError: the recipe refuses a value. The message names the arm.
    """
    try:
        return replace(recipe, **{**arm.overrides, **more})
    except EwavitError as problem:
        raise EwavitError(f"arm {arm.name!r}: {problem}") from None


def _arm(name: str, recipe: Recipe, own: Mapping[str, Overrides]) -> Arm:
    base = name if name in own else plain_name(name)
    if base in own:
        overrides = dict(own[base])
        if name == base + LR:
            overrides.pop("lr", None)
    elif base in BUILT_IN:
        overrides = BUILT_IN[base](recipe)
    else:
        near = difflib.get_close_matches(base, [*BUILT_IN, *own], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise EwavitError(
            f"unknown arm {name!r}: {hint}choose from {', '.join([*own, *BUILT_IN])}, each also with {LR} or "
            f"{TUNED}"
        )
    experts = overrides.get("experts", recipe.experts)
    if experts < 2 and base in BUILT_IN and "experts" not in overrides:
        raise EwavitError(f"arm {name!r} trains experts: set --experts {experts} to 2 or more")
    return Arm(name, overrides, "control" if experts == 1 else "method", name.endswith((LR, TUNED)))


def plain_name(name: str) -> str:
    """The name of an arm without the ending that says it is tuned."""
    return name.removesuffix(LR).removesuffix(TUNED)


def check_packages() -> None:
    """Check that the packages for the statistics are here.

    Raises:
        EwavitError: one is missing.
    """
    for module in ("scipy", "statsmodels"):
        if find_spec(module) is None:
            raise EwavitError(f"ewavit compare needs {module}: pip install 'ewavit[compare]'")


def check_start(recipe: Recipe, arms: Sequence[Arm], seeds: int, jobs: int | None) -> None:
    """Check what a comparison can be refused for before torch is imported.

    Raises:
        EwavitError: a package is missing, a number is out of range, or an arm needs first weights.
    """
    check_packages()
    if seeds < 2:
        raise EwavitError(f"--seeds {seeds} gives no interval: choose 2 or more")
    if seeds > LARGEST_SEEDS:
        raise EwavitError(f"--seeds {seeds} is out of range: choose at most {LARGEST_SEEDS}")
    if jobs is not None and jobs < 1:
        raise EwavitError(f"--jobs {jobs} is too small: choose 1 or more")
    back = next((arm.name for arm in arms if arm.overrides.get("toward_start")), None)
    if back and not (recipe.pretrained or recipe.initial_checkpoint):
        raise EwavitError(
            f"arm {back!r} goes back to the first weights: give --initial-checkpoint or --pretrained"
        )
