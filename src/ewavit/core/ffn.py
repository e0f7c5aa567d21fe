"""Which modules of a model are FFNs: found by name and class, checked by running them, and selected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ewavit.core import split
from ewavit.core.copying import attachments
from ewavit.core.experts import SeparateExperts
from ewavit.core.moe import MoE, Unit
from ewavit.core.trial import (
    channels,
    deploys,
    different,
    first_layer,
    moved_tokens,
    probe_inputs,
    same_in_training,
    stacks,
    width,
    with_random_weights,
)
from ewavit.errors import EwavitError, first_line

Select = str | Iterable[str] | Callable[[str, nn.Module], bool]

_NAMES = re.compile(r"(mlp|ffn)\d*|mlp_(layer|channels|tokens|in)|channel_mixer|feed_?forward|ff")
_CLASSES = re.compile(r"mlp|ffn|feed_?forward|swiglu|geglu|dense(gated)?actdense", re.IGNORECASE)
_NOT_FFNS = (  # a part of the module's name, and what such a module is
    (re.compile(r"(self_|cross_)?attn\d*|(self_|cross_)?attention"), "part of attention, not an FFN"),
    (re.compile(r"(shared_)?rel_pos\w*"), "computes a position bias, not an FFN"),
    (re.compile(r"se|mlp_(scale|add)"), "part of channel attention, not an FFN"),
    (re.compile(r"mlp_tokens|mlp_inter|token_mixer"), "mixes tokens by design, not an FFN"),
    (
        re.compile(
            r"(\w+_)?(heads?|pool(er)?|projector|predictors?|classifier|(class|bbox|mask)_embed(der)?)"
        ),
        "part of the head, not an FFN",
    ),
    (re.compile(r"pre_logits"), "part of the head, not an FFN"),
)
_HEAD_CLASSES = re.compile(r"(?<!Multi)Heads?$|(Predictor|Classifier|Projector)$")
_DROPS = {  # layers that draw once for an image, and what they drop
    **dict.fromkeys(("DropPath", "StochasticDepth"), "images"),
    **dict.fromkeys(("Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"), "channels of an image"),
}


@dataclass(frozen=True)
class FFN:
    """One candidate: its place, the unit it can be dealt by, or why it cannot become a mixture of experts.

    Of a split FFN, `module` is the block and `pair` has the paths of the two layers in it.
    """

    name: str
    module: nn.Module
    unit: Unit | None  # "token": tokens are independent; "image": tokens are mixed; None: refused
    reason: str = ""  # why it is refused or needs unit="image"
    channels_first: bool = False
    stackable: bool = False
    pair: tuple[str, str] | None = None

    @property
    def class_name(self) -> str:
        """The class of the module, and the layers of a split FFN."""
        kind = type(self.module).__name__
        return f"{kind} ({' and '.join(self.pair)})" if self.pair else kind

    @property
    def layers(self) -> list[FFN]:
        """What becomes mixtures of experts: the FFN itself, or the two layers of a split one."""
        if self.pair is None:
            return [self]
        parts = [(f"{self.name}.{path}", self.module.get_submodule(path)) for path in self.pair]
        return [replace(self, name=name, module=layer, pair=None) for name, layer in parts]

    @property
    def block(self) -> str:
        """The name of the block that it is in."""
        return self.name if self.pair else self.name.rpartition(".")[0]

    @property
    def dim(self) -> int:
        """Channels of its input tokens; 0 if there is no Linear or Conv2d inside."""
        first = first_layer(self.layers[0].module)
        return 0 if first is None else channels(first)

    @property
    def num_parameters(self) -> int:
        """Parameters of the FFN."""
        return sum(p.numel() for layer in self.layers for p in layer.module.parameters())


def find_ffns(model: nn.Module, names: list[str] | None = None) -> list[FFN]:
    """The FFNs of a model and other candidates with a reason, in module order; a shared FFN appears once.

    Candidates are found by attribute and class name. Then a copy with random weights runs on random tokens:
    the FFN is token-wise if replacing one token and reordering all changes no other token's output. The model
    and the random generators stay as they are.

    Args:
        model: any module.
        names: examine these modules instead of searching for candidates.

    Raises:
        KeyError: the model has no module of this name.
    """
    modules = dict(model.named_modules())
    known: dict[str, FFN] = {}  # the blocks of a ViT are alike: examine each kind of FFN once
    result = []
    for name in _candidates(modules) if names is None else names:
        module = modules[name]
        friend = _false_friend(name, modules) if names is None else ""
        if isinstance(module, MoE):
            result.append(FFN(name, module, None, "is already expanded"))
        elif friend:
            result.append(FFN(name, module, None, friend))
        elif any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
            result.append(FFN(name, module, None, "its layers are lazy and empty: run the model once first"))
        else:
            signature = _signature(module)
            if signature not in known:
                known[signature] = _examine(name, module)
            result.append(replace(known[signature], name=name, module=module))
    return result if names is not None else _without_leftovers(result, modules)


def _without_leftovers(found: list[FFN], modules: dict[str, nn.Module]) -> list[FFN]:
    """Refuse what lies outside the blocks where the blocks themselves are refused: it is a head or a stem."""
    refused = [ffn for ffn in found if ffn.unit is None and split.split_ffn(ffn.module)]
    blocks = {ffn.name.rpartition(".")[0] for ffn in refused}
    inside = any(ffn.unit and ffn.name.startswith(tuple(f"{name}." for name in blocks)) for ffn in found)
    if not blocks or inside:
        return found

    def leftover(ffn: FFN) -> bool:
        return bool(ffn.unit) and not split.attends(modules[ffn.block])

    reason = "outside the blocks, which cannot be expanded: a head or a stem"
    return [replace(ffn, unit=None, reason=reason) if leftover(ffn) else ffn for ffn in found]


def _candidates(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the innermost modules that look like FFNs, and of blocks that compute their FFN themselves."""
    mixtures = tuple(f"{name}." if name else "" for name, part in modules.items() if isinstance(part, MoE))
    likely = [
        name
        for name, module in modules.items()
        if name
        and not name.startswith(mixtures)
        and (_looks_like_ffn(name, modules) or split.split_ffn(module))
    ]
    for name in list(likely):  # GEGLU of diffusers is the first layer of an FFN and its activation
        layers = [part for part in modules[name].modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        if len(layers) == 1 and any(name.startswith(f"{other}.") for other in likely):
            likely.remove(name)
    return [
        name
        for name in likely
        if split.split_ffn(modules[name]) or not any(other.startswith(f"{name}.") for other in likely)
    ]


def _looks_like_ffn(name: str, modules: dict[str, nn.Module]) -> bool:
    module, (place, _, last) = modules[name], name.rpartition(".")
    named = bool(_NAMES.fullmatch(last) or _CLASSES.search(type(module).__name__))
    holder = modules.get(place)
    if not named and isinstance(module, nn.Sequential) and isinstance(holder, nn.ModuleList):
        # vit-pytorch has lists of an attention and an FFN without a name or class.
        beside = any("attention" in type(other).__name__.lower() for other in holder)
        named = beside and sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in module) == 2
    return bool(named and module._modules and next(module.parameters(), None) is not None)


def _signature(module: nn.Module) -> str:
    """Everything `_examine` depends on: structure, plain attributes, shapes, dtypes and devices."""
    plain = (bool, int, float, str, tuple)
    considered = split.beside_attention(module) if split.split_ffn(module) else list(module.modules())
    parts = [
        (type(part), [(key, value) for key, value in vars(part).items() if isinstance(value, plain)])
        for part in considered
    ]
    tensors = [(name, value.shape, value.dtype, value.device) for name, value in module.named_parameters()]
    return f"{module!r} {parts} {tensors} {[attachments(part) for part in considered]}"


def _false_friend(name: str, modules: dict[str, nn.Module]) -> str:
    for holder in (name, name.rpartition(".")[0]):
        if _HEAD_CLASSES.search(kind := type(modules[holder]).__name__):
            return f"part of the head ({kind}), not an FFN"
    for component in name.split("."):
        for pattern, reason in _NOT_FFNS:
            if pattern.fullmatch(component):
                return f"{reason} (`{component}`)"
    return ""


def _examine(name: str, module: nn.Module) -> FFN:
    """Decide by looking inside, then by running it, which unit a module can be dealt by."""

    def refused(reason: str) -> FFN:
        return FFN(name, module, None, reason)

    if pair := split.split_ffn(module):
        found = split.examine(module, pair)
        return FFN(name, module, found.unit, found.reason, stackable=found.stackable, pair=found.pair)
    for inner, part in module.named_modules():
        kind = type(part).__name__
        if "forward" in vars(part):
            where = f"{inner}.forward" if inner else "its forward"
            return refused(f"{where} was replaced and belongs to this one module: replace it after expand")
        if "batchnorm" in kind.lower():
            return refused(f"{kind} inside: its statistics would differ from expert to expert")
        if what := _DROPS.get(kind):
            return FFN(name, module, "image", f'drops whole {what} ({kind} inside): needs unit="image"')
    for parameter in module.parameters():
        if parameter.is_meta:
            return refused("its parameters are on the meta device: give them memory first")
        if not parameter.is_floating_point():
            return refused(f"its weights are {parameter.dtype}: averaging needs floating point")
    if (first := first_layer(module)) is None:
        return refused("no Linear or Conv2d inside")
    spatial = next((m for m in module.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1), None)
    if spatial is not None:
        mixes = f"mixes tokens ({'x'.join(map(str, spatial.kernel_size))} convolution inside)"
        return FFN(name, module, "image", f'{mixes}: needs unit="image"')
    try:
        trial = with_random_weights(module)
    except Exception as problem:
        return refused(f"cannot be copied: {_short(problem)}")
    errors = []
    for x, channel_dim in probe_inputs(first):
        try:
            with torch.no_grad():
                moved = moved_tokens(trial, x, channel_dim)
        except Exception as problem:
            # Any error in someone else's forward means the same here: it cannot be called like this.
            errors.append(f"cannot be run on {tuple(x.shape)}: {_short(problem)}")
            continue
        if moved is None:
            errors.append("does not return one output per token")
        elif moved[1:].any():
            return refused("mixes the images of a batch")
        elif moved.sum() > 1:
            return FFN(name, module, "image", 'mixes tokens or depends on their position: needs unit="image"')
        elif not moved[0, 0]:
            errors.append("its output does not depend on its input")
        elif (channels := width(trial, x, channel_dim)) != x.shape[channel_dim]:
            return refused(f"{x.shape[channel_dim]} channels in, {channels} out: a head or a projection")
        else:
            hooked = any(attachments(part) for part in module.modules() if part is not module)
            separate = different(SeparateExperts(trial, 2))
            if not deploys(separate, x):
                return refused("does not compute with its mean weights: merge adapters first (peft: LoRA)")
            plain = not hooked and same_in_training(trial, x)
            return FFN(name, module, "token", "", channel_dim == 1, plain and stacks(trial, separate, x))
    return refused(errors[0])


def _short(problem: Exception) -> str:
    return f"{type(problem).__name__}: {first_line(problem)}"


def select_ffns(model: nn.Module, select: Select = "alternate", unit: Unit = "token") -> list[FFN]:
    """The FFNs that `expand` would choose with these arguments; it raises the same errors."""
    if is_whole(model, select):
        return [_whole(model)]
    if isinstance(select, str):
        if dict(model.named_modules()).get(select) is not None:
            select = [select]
    elif not callable(select):
        select = list(select)
    if isinstance(select, list):
        if not select:
            raise _nothing("select=[] names no module", find_ffns(model))
        modules = dict(model.named_modules())
        if unknown := [name for name in select if not name or name not in modules]:
            raise _nothing(f"the model has no module {', '.join(map(repr, unknown))}", find_ffns(model))
        if inner := [(a, b) for a in select for b in select if a.startswith(f"{b}.")]:
            raise EwavitError(f"{inner[0][0]} is a part of {inner[0][1]}: leave one of them out of select")
        found = find_ffns(model, names=select)
        if bad := [ffn for ffn in found if not _usable(ffn, unit)]:
            raise _nothing(f"{bad[0].name} cannot become a mixture of experts", found, bad[0])
        return found
    found = find_ffns(model)
    usable = [ffn for ffn in found if _usable(ffn, unit)]
    if not usable:
        problem = f'no FFN works with unit="{unit}"'
        if not found and any("batchnorm" in type(module).__name__.lower() for module in model.modules()):
            raise EwavitError(
                f"{problem}: no module looks like an FFN, and convolutions with BatchNorm are none "
                "(statistics would differ from expert to expert); name yours in select=[...]"
            )
        by_image = [ffn for ffn in found if ffn.unit]
        raise _nothing(problem, found, (by_image + found)[0] if found else None)
    if callable(select):
        chosen = [ffn for ffn in usable if select(ffn.name, ffn.module)]
    elif select == "all":
        chosen = usable
    elif select == "alternate":
        chosen = usable[::-1][::2][::-1]
    elif select == "last_half":
        chosen = usable[len(usable) // 2 :]
    else:
        try:
            chosen = [ffn for ffn in usable if re.search(select, ffn.name)]
        except re.error as problem:
            raise EwavitError(
                f"select={select!r} is neither alternate, all, last_half, a module's name nor a regular "
                f"expression ({problem})"
            ) from None
    if not chosen:
        raise _nothing(f"select={select!r} matches none of the FFNs", found)
    return chosen


BRANCHES = "ewavit_branches"  # the child of a model that holds the gates of its branches


def is_whole(model: nn.Module, select: Select) -> bool:
    """Whether the whole model is selected; a module of the name "model" has priority."""
    return isinstance(select, str) and select == "model" and "model" not in dict(model.named_modules())


def _whole(model: nn.Module) -> FFN:
    """The whole model as one candidate."""
    reason = ""
    if hasattr(type(model), "save_pretrained"):
        reason = "a transformers model returns no tensor"
    for name, part in model.named_modules():
        if "forward" in vars(part):
            reason = f"the forward of {name or 'the model'} was replaced and belongs to this one module"
        elif name == BRANCHES:
            reason = "it has branches, and each of its copies would need its own"
        elif "batchnorm" in (kind := type(part).__name__).lower():
            reason = f"{name} ({kind}) would have other statistics in every copy"
    if reason:
        raise EwavitError(f'select="model" does not work: {reason}; select blocks or FFNs without it')
    return FFN("", model, "image")


def _usable(ffn: FFN, unit: Unit) -> bool:
    return ffn.unit == "token" or (ffn.unit == "image" and unit == "image")


def _nothing(problem: str, found: list[FFN], refused: FFN | None = None) -> EwavitError:
    """The error with the table of candidates; its first line gives one reason, or names to choose from."""
    if not found:
        return EwavitError(f"{problem}: no module looks like an FFN; name yours in select=[...]")
    names = [ffn.name for ffn in found if ffn.unit]
    hint = f"{refused.name}: {refused.reason}" if refused else f"choose from {', '.join(names[:3])}"
    if refused and refused.unit == "image":
        hint += ', as in ewavit.expand(model, unit="image") or ewavit train --unit image'
    more = f", {len(found)} candidates in all" if len(found) > 1 else ""
    return EwavitError(f"{problem}; {hint}{more}\n{candidate_table(found)}")


def candidate_table(found: list[FFN]) -> str:
    """The candidates as text, one per line: name, class, unit or the reason for refusing it."""
    rows = [(f.name, f.class_name, f.unit or "refused", f.reason) for f in found]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    )
