"""Which modules of a model are FFNs, found by name and class and then checked by running them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .experts import ExpertLeaf, SeparateExperts, StackedExperts
from .moe import MoE, Unit

_NAMES = re.compile(r"(mlp|ffn)\d*|mlp_(channels|tokens|in|out)|channel_mixer|feed_?forward|ff")
_CLASSES = re.compile(r"mlp|ffn|feed_?forward|swiglu|geglu", re.IGNORECASE)
_NOT_FFNS = (  # a component of the module's name, and what such a module is
    (re.compile(r"(\w*_)?attn(_\w+)?|(self_)?attention|rel_pos\w*|cpb_mlp"), "part of attention, not an FFN"),
    (
        re.compile(r"(attn_|map_)?pool\w*|\w*head\w*|pre_logits|projector|visual_projection"),
        "part of the head",
    ),
    (
        re.compile(r"mlp_tokens|token_mixer|mlp_scale|mlp_add|se|conv"),
        "mixes positions by design, not an FFN",
    ),
)
_SPLIT = "its FFN is split over `{}` and `{}`, which no single module computes; not supported"


@dataclass(frozen=True)
class FFN:
    """One candidate: where it is, how it can be dealt, or why it cannot become a mixture of experts."""

    name: str
    module: nn.Module
    unit: Unit | None  # "token": tokens are independent; "image": tokens are mixed; None: refused
    reason: str = ""  # why it is refused, or needs partition="image"
    channels_first: bool = False
    stackable: bool = False

    @property
    def class_name(self) -> str:
        return type(self.module).__name__

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


def find_ffns(model: nn.Module, names: list[str] | None = None) -> list[FFN]:
    """The FFNs of a model and what was mistaken for one, in module order; a shared FFN is listed once.

    Candidates are recognised by attribute and class name, then run on random inputs with random weights: one
    token is changed, and the FFN is token-wise when no other token moves. The model is not changed.

    Args:
        model: any module.
        names: examine these modules instead of the recognised candidates.

    Raises:
        KeyError: a name that the model does not have.
    """
    modules = dict(model.named_modules())
    found = [(name, modules[name]) for name in names] if names is not None else list(_candidates(model))
    known: dict[str, FFN] = {}  # by everything that the result depends on: blocks of a ViT are alike
    result = []
    for name, module in found:
        reason = "" if names is not None else _false_friend(name)
        if isinstance(module, MoE):
            result.append(FFN(name, module, None, "is expanded already"))
        elif reason:
            result.append(FFN(name, module, None, reason))
        else:
            signature = f"{type(module)} {module!r} {next(module.parameters(), torch.empty(0)).dtype}"
            if signature not in known:
                known[signature] = _examine(name, module)
            like = known[signature]
            result.append(FFN(name, module, like.unit, like.reason, like.channels_first, like.stackable))
    return result


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    looks_right = {
        name: module
        for name, module in model.named_modules()
        if name
        and not isinstance(module, nn.Identity)
        and any(True for _ in module.parameters())
        and (_NAMES.fullmatch(name.rpartition(".")[2]) or (_CLASSES.search(type(module).__name__)))
        and (any(True for _ in module.children()))
    }
    split = dict(_split_ffns(model))
    for name, module in model.named_modules():
        if name in split:
            yield name, module
        elif name in looks_right:
            inside = any(other.startswith(f"{name}.") for other in looks_right)
            if not inside and not isinstance(module, ExpertLeaf) and not _within_moe(name, model):
                yield name, module


def _within_moe(name: str, model: nn.Module) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), MoE) for i in range(1, len(parts)))


def _split_ffns(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Blocks that compute their FFN in several modules, with the reason to refuse them."""
    for name, module in model.named_modules():
        for first, second in (("intermediate", "output"), ("linear1", "linear2")):
            if all(isinstance(getattr(module, child, None), nn.Module) for child in (first, second)):
                yield name, _SPLIT.format(first, second)


def _false_friend(name: str) -> str:
    for component in name.split("."):
        for pattern, reason in _NOT_FFNS:
            if pattern.fullmatch(component):
                return f"{reason} (`{component}`)"
    return ""


def _examine(name: str, module: nn.Module) -> FFN:
    """Decide by looking inside, then by running, how a module can be dealt to experts."""

    def refused(reason: str) -> FFN:
        return FFN(name, module, None, reason)

    for _, reason in _split_ffns(module):
        return refused(reason)
    for part in module.modules():
        if "batchnorm" in type(part).__name__.lower():
            return refused(f"{type(part).__name__} inside: its statistics would differ from expert to expert")
    if any(parameter.is_meta for parameter in module.parameters()):
        return refused("its parameters are on the meta device: give them memory first")
    inputs = list(_probe_inputs(module))
    if not inputs:
        return refused("no linear layer or convolution inside")
    spatial = next((m for m in module.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1), None)
    if spatial is not None:
        mixes = f"mixes tokens ({'x'.join(map(str, spatial.kernel_size))} convolution inside)"
        return FFN(name, module, "image", f'{mixes}: needs partition="image"')
    trial = _with_random_weights(module)
    error = "it does not keep the number of tokens"
    for x, channel_dim in inputs:
        try:
            with torch.no_grad():
                moved = _moved_tokens(trial, x, channel_dim)
        except Exception as problem:
            # Any failure of a stranger's forward means the same here: not callable in this way.
            error = f"could not be run on {tuple(x.shape)}: {repr(problem)[:160]}"
            continue
        if moved is None:
            continue
        if moved[1:].any():
            return refused("mixes the images of a batch")
        if moved.sum() > 1:
            return FFN(name, module, "image", 'mixes tokens: needs partition="image"')
        return FFN(name, module, "token", "", channel_dim == 1, _stacks(trial, x))
    return refused(error)


def _probe_inputs(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Random inputs that the module may take, two images of four tokens, with their channel dimension."""
    generator = torch.Generator().manual_seed(0)
    first = next((m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)), None)
    if first is None:
        return
    dim = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    shapes = [((2, 4, dim), -1), ((2, 2, 2, dim), -1), ((2, dim, 2, 2), 1)]
    if isinstance(first, nn.Conv2d):
        shapes.reverse()
    for shape, channel_dim in shapes:
        x = torch.randn(shape, generator=generator)
        yield x.to(first.weight.device, first.weight.dtype), channel_dim


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A copy in eval mode with random weights: layers that start at zero would hide what they mix."""
    generator = torch.Generator().manual_seed(1)
    trial = copy.deepcopy(module).eval()
    with torch.no_grad():
        for parameter in trial.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return trial


def _moved_tokens(trial: nn.Module, x: Tensor, channel_dim: int) -> Tensor | None:
    """(images, tokens) of the output that move when the first token is changed; None if tokens are lost."""
    changed = x.movedim(channel_dim, -1).clone()
    changed[(0,) * (changed.ndim - 1)] += 1.0
    before, after = (trial(v).movedim(channel_dim, -1) for v in (x, changed.movedim(-1, channel_dim)))
    if before.shape[:-1] != changed.shape[:-1]:
        return None
    moved: Tensor = (after - before).abs().amax(-1) > 1e-3 * before.abs().amax()
    return moved.flatten(1)


def _stacks(trial: nn.Module, x: Tensor) -> bool:
    """Whether stacked experts compute what two separate, different copies do on (experts, ...) inputs."""
    separate = SeparateExperts(trial, 2)
    with torch.no_grad():
        for parameter in separate.copies[1].parameters():
            parameter.mul_(0.5)
        try:
            stacked = StackedExperts(trial, 2)
            for (_, into), (_, values) in zip(stacked.families(), separate.families(), strict=True):
                for target, value in zip(into, values, strict=True):
                    target.copy_(value)
            for part in stacked.modules():
                part.training = isinstance(part, ExpertLeaf)
            inputs = torch.stack([x, -x])
            expected = separate(inputs)
            tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
            return bool((stacked(inputs) - expected).norm() <= tolerance * expected.norm())
        except Exception:
            # Whatever the layer or the FFN's forward does not accept, separate copies do.
            return False
