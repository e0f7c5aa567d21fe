"""`expand` replaces FFNs by mixtures of experts, `collapse` restores the original model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn

from ewavit.core.branches import branches, remove_branches
from ewavit.core.copying import all_parameters, called_within, hook_on_itself, share_call_hooks, tie
from ewavit.core.devices import Peers, cut_like, is_sharded, whole
from ewavit.core.dispatch import Dispatcher
from ewavit.core.draws import LAYER
from ewavit.core.experts import ExpertLeaf, Experts, SeparateExperts, StackedExperts
from ewavit.core.ffn import BRANCHES, FFN, Select, is_whole, select_ffns
from ewavit.core.mixing import Fusion, Hybrid
from ewavit.core.moe import MoE, Unit, moe_layers, require_moe_layers
from ewavit.core.partition import RandomPartition
from ewavit.core.pretrained import guard_save_pretrained, unguard_save_pretrained
from ewavit.core.replicas import DealtByProcess, ReplicaExperts, keep_from_ddp
from ewavit.core.routing import TopK, TopKRouter
from ewavit.core.steps import follow_optimizers
from ewavit.errors import EwavitError

Router = TopK | Fusion | Hybrid
Placement = Literal["local", "replicas"]
Model = TypeVar("Model", bound=nn.Module)

_WRAPPERS = {
    "DistributedDataParallel": "wrap the model after ewavit.expand(model)",
    "DataParallel": "wrap the model after ewavit.expand(model)",
    "FullyShardedDataParallel": "wrap the model after ewavit.expand(model)",
    "FSDPModule": "call fully_shard after ewavit.expand(model)",
    "OptimizedModule": "call torch.compile after ewavit.expand(model)",
}


def expand(
    model: Model,
    num_experts: int | None = None,
    *,
    select: Select = "alternate",
    unit: Unit = "token",
    router: Router | None = None,
    experts: Literal["auto", "stacked", "separate"] = "auto",
    placement: Placement = "local",
    process_group: dist.ProcessGroup | None = None,
) -> Model:
    """Turn FFNs of a model into mixtures of experts, in place, and return the model.

    Every expert starts as a copy of the FFN. Call it before you build the optimizer and before DDP, FSDP or
    `torch.compile`.

    Args:
        model: a timm, torchvision, transformers or own model.
        num_experts: N, 4 by default. With N = 1 the model computes exactly what it did.
        select: "alternate" (every second FFN, the last one in), "all", "last_half", the name of one module, a
            list of names, a regular expression searched in the names, or a callable `(name, module) -> bool`.
            Whole blocks by name need unit="image". "model" makes N copies of the whole model and deals whole
            images to them (lo-fi, arXiv 2210.11948): the model becomes a `MoE` until `collapse`.
        unit: deal single tokens ("token"), or whole images ("image") for FFNs that mix tokens.
        router: let a learned router choose the experts of each token instead of chance (a naive MoE). Eval
            mode routes too: deploy the MoE itself, or after `collapse` the mean expert. `ewavit.core.Hybrid`:
            the FFN stays as a frozen expert beside trained ones, and a gate mixes all of them for each token.
            `ewavit.core.Fusion`: learned weights fuse the experts into one FFN before every pass.
        experts: "stacked" (one batched matmul), "separate" (N copies), or "auto": stacked if a trial computes
            the same.
        placement: "local": every process has all experts. "replicas": each data-parallel process has one, for
            its own samples; N is the number of processes. `expand` is then a collective, and DDP must wrap
            this same model.
        process_group: the processes of the replicas, all by default.

    Raises:
        EwavitError: an argument is wrong, no FFN can be expanded this way (with the table of candidates and
            reasons), or the model is already expanded, wrapped or compiled.
    """
    whole = is_whole(model, select)
    _check_choices(unit, experts, placement, whole)
    unit = "image" if whole else unit
    peers = Peers(process_group) if placement == "replicas" else None
    num_experts = _checked_number(num_experts, unit, experts, router, peers)
    _refuse_wrapped(model)
    if moe_layers(model):
        raise EwavitError("the model is expanded already: call ewavit.collapse(model) first")
    chosen = select_ffns(model, select, unit if peers is None else "image")
    _check_split(chosen, unit, router)
    parts = [part for ffn in chosen for part in ffn.layers]
    _check_chosen(model, parts, experts if peers is None else placement)
    layers = _mixtures(chosen, num_experts, unit, router, experts, peers)
    layers[0].whole = whole  # then there is one
    listed = _listed_without_decay(model)
    _insert(model, parts, layers)
    _exempt_from_decay(model, listed)
    guard_save_pretrained(model)
    if peers is not None:
        keep_from_ddp(model)
    return model


def _mixtures(
    chosen: list[FFN],
    num_experts: int,
    unit: Unit,
    router: Router | None,
    experts: str,
    peers: Peers | None,
) -> list[MoE]:
    """A mixture for each layer of the chosen FFNs, numbered for their draws."""
    layers: list[MoE] = []
    for number, ffn in enumerate(chosen):
        dispatcher: Dispatcher[Any] = RandomPartition(num_experts)  # one draw for both layers of a split FFN
        if peers is not None:
            dispatcher, unit = DealtByProcess(), "image"
        separate = experts == "separate" or isinstance(router, Fusion | Hybrid) or not ffn.stackable
        for layer in ffn.layers:
            if peers is not None:
                made: Experts = ReplicaExperts(layer.module, peers)
            else:
                made = (SeparateExperts if separate else StackedExperts)(layer.module, num_experts)
            if router is not None:  # of one module: _check_split refuses the others
                dispatcher = _router(router, made, ffn)
            dispatcher.key[LAYER] = number
            layers.append(MoE(made, unit, ffn.channels_first, dispatcher))
    return layers


def _check_split(chosen: list[FFN], unit: Unit, router: Router | None) -> None:
    """Refuse what the two layers of a split FFN cannot do alike."""
    for ffn in chosen:
        if ffn.pair is None:
            continue
        if router is not None:
            raise EwavitError(
                f"{ffn.name} computes its FFN in two layers ({' and '.join(ffn.pair)}), but a router needs "
                "one module: leave out router"
            )
        if unit == "image" and any(vars(part).get("batch_first") is False for part in ffn.module.modules()):
            raise EwavitError(
                f'{ffn.name} takes (tokens, batch, channels), and unit="image" needs the batch first: '
                "build it with batch_first=True, or leave out unit"
            )


def _check_chosen(model: nn.Module, chosen: list[FFN], experts: str) -> None:
    """Refuse what experts cannot keep, and warn of experts that will not learn."""
    _refuse_tied(model, chosen, experts)
    for ffn in chosen:
        if place := hook_on_itself(ffn.module):
            raise EwavitError(
                f"{ffn.name} has a hook ({place}) that refers to this one module: register it after expand"
            )
        if experts == "stacked" and not ffn.stackable:
            raise EwavitError(
                f"{ffn.name or 'the model'} ({ffn.class_name}) cannot be stacked: "
                'use experts="separate" or "auto"'
            )
        if part := called_within(ffn.module):
            warnings.warn(f"the hooks of {ffn.name}.{part} fire once for each expert", stacklevel=3)
    if frozen := [ffn.name for ffn in chosen if not any(p.requires_grad for p in ffn.module.parameters())]:
        warnings.warn(
            f"{frozen[0]} is frozen ({len(frozen)} of {len(chosen)} FFNs are): its experts will never differ",
            stacklevel=3,
        )


def _refuse_tied(model: nn.Module, chosen: list[FFN], experts: str) -> None:
    """Raise for a parameter that an expanded FFN shares with a module outside, or with another layout."""
    holders = {p: (ffn, name) for ffn in chosen for name, p in all_parameters(ffn.module)}
    for ffn in chosen:
        for name, parameter in all_parameters(ffn.module):
            other, its_name = holders[parameter]
            if other.stackable != ffn.stackable and experts == "auto":
                raise EwavitError(
                    f"{ffn.name}.{name} and {other.name}.{its_name} are one tied parameter, and only one of "
                    'the FFNs can be stacked: use experts="separate"'
                )
    seen = {ffn.module for ffn in chosen}
    waiting = [("", model)] if model not in seen else []
    while waiting:
        path, module = waiting.pop()
        seen.add(module)
        for key, held in module._parameters.items():
            if held is not None and held in holders:
                ffn, name = holders[held]
                raise EwavitError(
                    f"{ffn.name}.{name} and {path}{key} are one tied parameter, and experts would untie it: "
                    "choose both in select, or copy the parameter"
                )
        children = ((f"{path}{key}.", part) for key, part in module._modules.items() if part is not None)
        waiting += [child for child in children if child[1] not in seen]


def _check_choices(unit: str, experts: str, placement: str, whole: bool) -> None:
    for option, value, choices in (
        ("unit", unit, ("token", "image")),
        ("experts", experts, ("auto", "stacked", "separate")),
        ("placement", placement, ("local", "replicas")),
    ):
        if value not in choices:
            raise EwavitError(f"{option}={value!r} is unknown: choose one of {', '.join(choices)}")
    if whole and placement == "replicas":
        raise EwavitError('select="model" makes copies in one process: leave out placement="replicas"')


def _checked_number(
    num_experts: int | None, unit: Unit, experts: str, router: Router | None, peers: Peers | None
) -> int:
    """N or its default; an error if the arguments contradict each other."""
    if num_experts is None:
        num_experts = 4 if peers is None else peers.size
        if isinstance(router, Hybrid):
            num_experts = 1 + router.specialists
    if isinstance(router, Hybrid) and num_experts != 1 + router.specialists:
        raise EwavitError(
            f"num_experts={num_experts}, but a hybrid has one general expert and {router.specialists} "
            "specialists: leave it out"
        )
    if isinstance(router, Fusion | Hybrid) and experts == "stacked":
        raise EwavitError('fused and hybrid experts are copies of the FFN: leave out experts="stacked"')
    if num_experts < 1 or num_experts != int(num_experts):
        raise EwavitError(f"num_experts={num_experts} is not a number of experts: choose 1 or more")
    if router is not None and unit != "token":
        raise EwavitError(f'a router sends single tokens: leave out unit="{unit}"')
    if peers is None:
        return num_experts
    if num_experts != peers.size:
        raise EwavitError(
            f"num_experts={num_experts}, but {peers.size} processes hold one replica each: leave it out"
        )
    if experts != "auto":
        raise EwavitError(f'replicas are copies of the FFN: leave out experts="{experts}"')
    if router is not None:
        raise EwavitError("a router does not work with replicas (one expert per process): leave out router")
    return num_experts


def _router(config: Router, experts: Experts, ffn: FFN) -> Dispatcher[Any]:
    """A router for an FFN's tokens; drawn on the CPU, so that it is the same on every device."""
    weight = next(ffn.module.parameters())
    if isinstance(config, TopK):
        return TopKRouter(config, experts.num_experts, ffn.dim).to(weight.device, weight.dtype)
    mixer = config.mixer(cast(SeparateExperts, experts), ffn.dim, ffn.channels_first)
    return mixer.to(weight.device, weight.dtype)


def _refuse_wrapped(model: nn.Module) -> None:
    for module in model.modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS:
                raise EwavitError(f"the model is wrapped in {base.__name__}: {_WRAPPERS[base.__name__]}")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise EwavitError("the model is compiled: call model.compile() after ewavit.expand(model)")


def _insert(model: nn.Module, chosen: list[FFN], layers: list[MoE]) -> None:
    """Put mixtures in the places of their FFNs; they share parameters where the FFNs do."""
    made = [(ffn.module, moe.experts.ffns()) for ffn, moe in zip(chosen, layers, strict=True)]
    for number in range(layers[0].num_experts):  # stacked experts are one module, separate ones N
        tie([(ffn, copies[number]) for ffn, copies in made if number < len(copies)])
    for ffn, moe in zip(chosen, layers, strict=True):
        share_call_hooks(ffn.module, moe)
        _, placed = _replace(model, ffn.module, moe)
        follow_optimizers(placed)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Put `new` wherever `old` is registered in the model (CoaT registers one FFN three times).

    The model itself stays the same object, so it exchanges class and content with `new`.

    Returns:
        The objects that are now outside and inside.
    """
    if old is model:
        for name in ("__class__", "__dict__"):
            mine, theirs = getattr(old, name), getattr(new, name)
            object.__setattr__(old, name, theirs)
            object.__setattr__(new, name, mine)
        return new, old
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return old, new


def _exempt_from_decay(model: nn.Module, listed: set[str]) -> None:
    """Let `model.no_weight_decay()` also list what experts have of `listed`, and their stacked vectors.

    timm would take stacked vectors for matrices.
    """
    vectors = _stacked_vectors(model)
    names = {name for name, parameter in model.named_parameters() if id(parameter) in vectors}
    for name, _ in model.named_parameters():
        plain = re.sub(r"(^|\.)experts\.(ffn|copies\.\d+)\.", r"\1", name)
        if plain != name and any(fnmatchcase(plain, pattern) for pattern in listed):
            names.add(name)
    model.no_weight_decay = _Names(names | listed)  # type: ignore[assignment]


def _listed_without_decay(model: nn.Module) -> set[str]:
    listed = getattr(model, "no_weight_decay", None)
    return set(listed()) if callable(listed) else set()


class _Names(set[str]):
    """A callable set of names, to replace the model's method; unlike a closure it can be copied."""

    def __call__(self) -> set[str]:
        return set(self)


def _stacked_vectors(model: nn.Module) -> set[int]:
    """Ids of the parameters with one vector per expert: norm weights and biases."""
    leaves = [module for module in model.modules() if isinstance(module, ExpertLeaf)]
    return {id(parameter) for leaf in leaves for parameter in leaf.parameters() if parameter.ndim == 2}


def collapse(model: Model) -> Model:
    """Replace each mixture by one FFN with the experts' mean, in place, and return the model; drop branches.

    Classes and state-dict keys are the original ones. The output is that of the expanded model in eval mode;
    only a routed model changes, because it loses its router. With replica experts this is a collective.

    Raises:
        EwavitError: the model is not expanded, or it is sharded (FSDP2).
    """
    if not branches(model):
        require_moe_layers(model)
    if isinstance(model, MoE) and not model.whole:
        raise EwavitError("a single MoE cannot replace itself: use its collapse() method")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise EwavitError(
            "the model is sharded: call ewavit.dense_state_dict(model) in every process, and load the result "
            "of process 0 into the plain model"
        )
    for moe, ffn in _plain(model):
        _replace(model, moe, ffn)
    remove_branches(model)
    if isinstance(vars(model).get("no_weight_decay"), _Names):
        del model.no_weight_decay
    unguard_save_pretrained(model)
    return model


def _plain(model: nn.Module) -> list[tuple[MoE, nn.Module]]:
    """Each mixture and the FFN with its mean expert; parameters that mixtures share stay shared."""
    made = [(moe, moe.collapse()) for moe in moe_layers(model).values()]
    tie([(moe.experts.ffns()[0], ffn) for moe, ffn in made])
    return made


@contextmanager
def collapsed(model: nn.Module) -> Iterator[list[tuple[nn.Module, nn.Module]]]:
    """Context manager: the model is dense inside, and its mixtures come back at the end.

    Yields:
        Pairs of a mixture and the FFN that replaces it.
    """
    swapped = [_replace(model, moe, ffn) for moe, ffn in _plain(model)]
    gates = [(each, each._modules.pop(BRANCHES)) for each in model.modules() if BRANCHES in each._modules]
    try:
        yield swapped
    finally:
        for each, held in gates:
            each._modules[BRANCHES] = held
        for moe, ffn in swapped:
            _replace(model, ffn, moe)


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of the collapsed model, under the original keys; the model stays expanded.

    Prefixes of wrappers and EMA models (`module.`, `_orig_mod.`) are removed. With replica experts or a
    sharded model (FSDP2) this is a collective. A sharded model averages its shards and gathers each mean
    once: process 0 gets the whole state on the CPU, the others get an empty dict.
    """
    with collapsed(model):
        state = model.state_dict()
    if any(is_sharded(value) for value in state.values() if isinstance(value, Tensor)):
        _gather_on_process_0(state)
    for key in list(state) if _wrapped(model) else ():
        plain = re.sub(r"(^|\.)(module\.|_orig_mod\.)+", r"\1", key)
        value = state.pop(key)
        if plain != "n_averaged":  # torch's AveragedModel counts in a buffer of its own
            state[plain] = value
    return state


def _gather_on_process_0(state: dict[str, Any]) -> None:
    """Gather whole tensors in the state of process 0, on the CPU; only one at a time is on the device."""
    for key in list(state):
        value = state.pop(key)
        if isinstance(value, Tensor):
            value = whole(value)
        if dist.get_rank() == 0:
            state[key] = value.cpu() if isinstance(value, Tensor) else value


def _wrapped(model: nn.Module) -> bool:
    names = {*_WRAPPERS, "AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3"}
    return any(base.__name__ in names for module in model.modules() for base in type(module).__mro__)


def load_dense_state_dict(model: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> Any:
    """Load the original model's state dict into an expanded model: every expert gets the FFN's parameters.

    Args:
        model: an expanded model, sharded or not.
        state_dict: the dense model's, whole in every process. With `strict=False` experts without a key stay
            as they are.
        strict: as in `torch.nn.Module.load_state_dict`.

    Returns:
        The result of `torch.nn.Module.load_state_dict`.
    """
    prefixes = [f"{name}." if name else "" for name in moe_layers(model)]
    with collapsed(model) as swapped:
        here = model.state_dict()
        if any(is_sharded(value) for value in here.values() if isinstance(value, Tensor)):
            state_dict = {k: cut_like(here[k], v) if k in here else v for k, v in state_dict.items()}
        result = model.load_state_dict(state_dict, strict=strict)
        for prefix, (moe, ffn) in zip(prefixes, swapped, strict=True):
            absent = {key.removeprefix(prefix) for key in result.missing_keys if key.startswith(prefix)}
            cast(MoE, moe).experts.fill_(ffn, keep=absent)
    return result


@dataclass(frozen=True)
class LayerSummary:
    """One mixture of an expanded model."""

    name: str
    ffn: str
    experts: str
    num_experts: int
    unit: str
    dealt: str  # "by token", "by image" or "by top-1 router"
    dense_parameters: int


@dataclass(frozen=True)
class Summary:
    """What `expand` did to a model; `print` shows a table."""

    layers: tuple[LayerSummary, ...]
    parameters: int
    dense_parameters: int

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} mixture{'' if len(self.layers) == 1 else 's'} of experts"]
        lines += [
            f"  {layer.name}: {layer.num_experts} x {layer.ffn} ({layer.experts}, {layer.dealt}), "
            f"{layer.dense_parameters:,} parameters each"
            for layer in self.layers
        ]
        lines.append(f"{self.parameters:,} parameters in training, {self.dense_parameters:,} after collapse")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """The mixtures of experts in a model, and its number of parameters."""
    layers, extra = [], 0
    seen: set[nn.Parameter] = set()  # mixtures may share parameters
    for name, moe in moe_layers(model).items():
        kind = type(moe.experts).__name__.removesuffix("Experts").lower()
        here = moe.num_experts if moe.experts.peers is None else 1
        each = sum(parameter.numel() for parameter in moe.experts.parameters()) // here
        ffn = type(moe.experts.original).__name__
        dealt = moe.dispatcher.describe(moe.unit)
        layers.append(LayerSummary(name or "model", ffn, kind, moe.num_experts, moe.unit, dealt, each))
        own = sum(parameter.numel() for parameter in set(moe.experts.parameters()) - seen)
        seen |= set(moe.experts.parameters())
        extra += own - own // here + sum(parameter.numel() for parameter in moe.dispatcher.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return Summary(tuple(layers), total, total - extra)


def param_groups(
    model: nn.Module, weight_decay: float = 0.05, no_weight_decay: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Optimizer groups by timm's rule: no weight decay for vectors, biases and names that the model lists.

    A stacked norm weight or bias of the experts counts as a vector.

    Args:
        model: a model, expanded or not.
        weight_decay: of all other parameters.
        no_weight_decay: more names without decay, besides `model.no_weight_decay()`; wildcards work as in
            timm (`pos_embed.*`).

    Returns:
        Two groups for any torch optimizer, the one without decay first.
    """
    while type(model).__name__ in _WRAPPERS:  # the model's list has names without the wrappers' prefixes
        model = getattr(model, "module", None) or model._orig_mod  # type: ignore[assignment]
    listed = set(no_weight_decay) | _listed_without_decay(model)
    vectors = _stacked_vectors(model)
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim <= 1 or name.endswith(".bias") or id(parameter) in vectors
            is_listed = any(fnmatchcase(name, pattern) for pattern in listed)
            (no_decay if is_vector or is_listed else decay).append(parameter)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]
