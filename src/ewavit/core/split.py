"""Split FFNs: two linear layers of a block, and not one module.

`intermediate` and `output` of transformers, `linear1` and `linear2` of torch.nn, `fc1` and `fc2` of Whisper.
Each layer becomes a `MoE`. Both share one dispatcher, and its draw is a function of (seed, layer, step), so
both deal the same units to the same experts. What lies between the layers (activation, dropout) and around
them (norm, residual connection) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ewavit.core.copying import attachments
from ewavit.core.experts import Experts, SeparateExperts
from ewavit.core.moe import MoE, Unit, dispatching
from ewavit.core.partition import RandomPartition
from ewavit.core.trial import probe_inputs, rows_close, stacked_like, with_random_weights
from ewavit.errors import first_line

_PAIRS = (  # children of a block: the two layers of its FFN, and what is beside them if it is not attention
    ("intermediate", "output"),  # transformers: modules with one linear layer each
    ("linear1", "linear2"),  # torch.nn.TransformerEncoderLayer
    ("fc1", "fc2"),  # Whisper, BART, Mask2Former
    ("ffn", "ffn_output"),  # ALBERT
    ("pwconv1", "pwconv2", "dwconv"),  # ConvNeXt of its authors and of transformers
    ("pointwise_conv1", "pointwise_conv2", "depthwise_conv"),  # ConvNeXt of DINOv3
    ("block.3", "block.5", "block.0"),  # ConvNeXt of torchvision
    ("in_proj", "mlp_drop"),  # timm's ParallelScalingBlock
)
_FUSED = "in_proj"  # it computes queries, keys, values and the hidden layer of the FFN
_MIXERS = ("attn", "attention", "fourier")  # in the names of what mixes tokens
Run = Callable[[nn.Module, Tensor], Any]


class Found(NamedTuple):
    """What a trial found: the paths of the two layers within the block, and how they can be dealt."""

    pair: tuple[str, str] | None = None  # None: refused
    unit: Unit | None = None
    stackable: bool = False
    reason: str = ""  # why it is refused or needs unit="image"


def split_ffn(block: nn.Module) -> tuple[str, str] | None:
    """The names of the two parts of an FFN that a block computes itself, beside what mixes tokens."""
    for first, second, *beside in _PAIRS:
        parts = [_part(block, path) for path in (first, second, *beside)]
        linear = all(isinstance(part, nn.Linear) for part in parts[:2])
        if None not in parts and (linear if beside else attends(block)):
            return first, second
    return None


def _part(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def attends(block: nn.Module) -> bool:
    """Whether a module holds attention or a substitute: it is a block, and an FFN in it is no head."""
    held = [name for name, child in block._modules.items() if child is not None]
    return any(mixer in name for name in held for mixer in _MIXERS)


def beside_attention(block: nn.Module) -> list[nn.Module]:
    """The modules of a block without those of its attention, which a trial run replaces."""
    replaced = {part for child in _attention(block) for part in child.modules()}
    return [part for part in block.modules() if part not in replaced]


def _attention(block: nn.Module) -> list[nn.Module]:
    named = [child for name, child in block.named_children() if any(mixer in name for mixer in _MIXERS)]
    return [child for child in named if child._modules]  # norms and dropout of attention have no parts


def examine(block: nn.Module, pair: tuple[str, str]) -> Found:
    """Find the two linear layers and run the block, its attention replaced, with experts that differ.

    Each token (or image) must come out as it does from the block with the weights of one expert in both
    layers: then the two mixtures compute what one mixture of the whole FFN does.
    """
    if pair[0] == _FUSED:
        return Found(reason=f"{_FUSED} computes attention and FFN in one layer: no expert can have its own")
    paths = []
    for name in pair:
        part = block.get_submodule(name)
        linear = [path for path, layer in part.named_modules() if isinstance(layer, nn.Linear)]
        if len(linear) != 1:
            return Found(reason=f"{name} ({type(part).__name__}) holds {len(linear)} linear layers, not one")
        paths.append(f"{name}.{linear[0]}".rstrip("."))
    first, second = paths
    layers = [block.get_submodule(path) for path in paths]
    if any("forward" in vars(part) for part in (block, *layers)):
        return Found(
            reason="its forward was replaced and belongs to this one module: replace it after expand"
        )
    for parameter in (p for layer in layers for p in layer.parameters()):
        if parameter.is_meta:
            return Found(reason="its parameters are on the meta device: give them memory first")
        if not parameter.is_floating_point():
            return Found(reason=f"its weights are {parameter.dtype}: averaging needs floating point")
    try:
        trial = _Trial(block, (first, second))
    except Exception as problem:
        # Any error in someone else's code means the same here: the block cannot be tried.
        return Found(reason=f"cannot be copied: {type(problem).__name__}: {first_line(problem)}")
    found = trial.verdict()
    if found is None:
        why = (
            "do not compute one FFN in a trial run"
            if trial.ran
            else "are in a block that needs more than tokens"
        )
        return Found(reason=f"{first} and {second} {why}: give them a module of their own")
    hooked = any(attachments(layer) for layer in layers)
    reason = "" if found[0] == "token" else f'mixes tokens between {first} and {second}: needs unit="image"'
    return Found((first, second), found[0], found[1] and not hooked, reason)


class _Trial:
    """A copy of a block with random weights, its attention replaced, and two experts for each layer."""

    def __init__(self, block: nn.Module, pair: tuple[str, str]) -> None:
        self.block, self.pair = with_random_weights(block), pair
        self.layers = [self.block.get_submodule(path) for path in pair]
        self.experts = [SeparateExperts(layer, 2) for layer in self.layers]
        with torch.no_grad():
            for parameter in (p for each in self.experts for p in each.copies[1].parameters()):
                parameter.copy_(parameter.flip(0) if parameter.ndim else 0.5 * parameter)
        self.ran = False

    def verdict(self) -> tuple[Unit, bool] | None:
        """The unit that can be dealt, and whether stacked experts do it; None if no run gives one FFN."""
        inputs = list(probe_inputs(self.layers[0]))  # type: ignore[arg-type]
        inputs = inputs[::-1] if any(isinstance(m, nn.Conv2d) for m in self.block.modules()) else inputs
        units: tuple[Unit, ...] = ("token", "image")
        for run in self._runs():
            for x, channel_dim in inputs:
                try:
                    with torch.no_grad(), _without_fast_path():
                        copies = [each.copies for each in self.experts]
                        plain = [self._with(run, x, *(c[i] for c in copies)) for i in (0, 1)]
                        self.ran = True
                        mixed = self._with(run, x, copies[0][0], copies[1][1])
                        if any(rows_close(mixed, each).any() for each in plain):
                            continue  # the output does not depend on one of the layers
                        for unit in units:
                            if self._is_one_ffn(run, x, channel_dim, unit, self.experts, plain):
                                return unit, self._stacks(run, x, channel_dim, unit, plain)
                except Exception:
                    continue  # any error in someone else's forward: it cannot be called like this
        return None

    def _runs(self) -> Iterator[Run]:
        """Ways to call the FFN or the block."""
        if not isinstance(_part(self.block, self.pair[0].split(".")[0]), nn.Linear | nn.Sequential):
            one, two = (path.split(".")[0] for path in self.pair)
            yield lambda block, x: getattr(block, two)(getattr(block, one)(x), x)
            yield lambda block, x: getattr(block, two)(getattr(block, one)(x))
        for give_back in (lambda x: (x, None), lambda x: x, lambda x: (x, None, None)):
            for child in _attention(self.block):
                child.forward = _handing_on(give_back)
            yield _call_with_none

    def _with(self, run: Run, x: Tensor, *parts: nn.Module) -> Tensor:
        """The output of the block with other modules in the places of its two layers."""
        for path, part in zip(self.pair, parts, strict=True):
            holder, _, name = path.rpartition(".")
            self.block.get_submodule(holder)._modules[name] = part
        output = run(self.block, x)
        output = output if isinstance(output, Tensor) else output[0]
        if output.shape != x.shape:
            raise ValueError(f"gives {tuple(output.shape)} for {tuple(x.shape)}")
        return output

    def _is_one_ffn(
        self,
        run: Run,
        x: Tensor,
        channel_dim: int,
        unit: Unit,
        experts: Sequence[Experts],
        plain: list[Tensor],
    ) -> bool:
        """Whether every unit comes out as from one expert, half of them from each, and eval as collapsed."""
        dispatcher = RandomPartition(2)
        moes = [MoE(each, unit, dispatcher=dispatcher) for each in experts]
        evaluated = self._with(run, x, *(moe.eval() for moe in moes))
        if not rows_close(evaluated, self._with(run, x, *(moe.collapse() for moe in moes))).all():
            return False
        for step in range(3):
            dispatcher.key[:] = torch.tensor([0, 0, step])
            with dispatching(moes[0]), dispatching(moes[1]):
                output = self._with(run, x, *moes)
            rows = [each.movedim(channel_dim, -1) for each in (output, *plain)]
            rows = [each.flatten(0, -2) if unit == "token" else each.flatten(1) for each in rows]
            near = torch.stack([rows_close(rows[0], each) for each in rows[1:]])
            if not ((near.sum(0) == 1).all() and (near.sum(1) == len(rows[0]) // 2).all()):
                return False
        return True

    def _stacks(self, run: Run, x: Tensor, channel_dim: int, unit: Unit, plain: list[Tensor]) -> bool:
        try:
            stacked = [stacked_like(*each) for each in zip(self.layers, self.experts, strict=True)]
            return self._is_one_ffn(run, x, channel_dim, unit, stacked, plain)
        except Exception:
            return False  # separate copies accept what stacked layers do not


def _handing_on(give_back: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A forward in the place of attention: it gives its first tensor back."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return give_back(next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)))

    return forward


def _call_with_none(block: nn.Module, x: Tensor) -> Any:
    """Call a block with None for each argument that it requires besides its input."""
    named = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in signature(block.forward).parameters.values() if p.kind in named]
    return block(x, *[None for p in required[1:] if p.default is Parameter.empty])


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Context manager: torch's TransformerEncoderLayer calls its parts, and no fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
