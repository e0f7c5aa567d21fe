"""One FFN made N: `StackedExperts` (batched matmul, fast) or `SeparateExperts` (N copies, always works).

`StackedExperts` copies the FFN's own module and gives its layers a leading expert dimension, so the FFN's own
`forward` runs unchanged on (E, ..., C, D).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ewavit.core.copying import (
    attachments,
    computed_weights,
    computes_weight,
    copied_with,
    duplicate,
    keep_attributes,
    unknown_mean,
    without_call_hooks,
    without_weights,
)
from ewavit.core.devices import Peers, at_least_float32, is_sharded, local
from ewavit.errors import EwavitError

Read = Callable[[nn.Parameter], Tensor | None]


def refuse_tracing() -> None:
    """Raise where TorchScript traces what it would record wrongly: a partition, or copies with their mean."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise EwavitError(
            "TorchScript cannot trace an expanded model: pass a collapsed copy, "
            "ewavit.collapse(copy.deepcopy(model))"
        )


class ExpertLeaf(nn.Module):
    """A layer with E sets of parameters, stacked on dimension 0 under the original names.

    In training mode, and in eval mode with a router, input and output have a leading expert dimension.
    Otherwise, or with one expert, this is the original layer with the mean parameters.
    """

    weight: Tensor
    bias: Tensor | None
    routed = False  # a MoE with a router sets it

    def __init__(self, leaf: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.training = leaf.training
        for name, parameter in leaf._parameters.items():
            if parameter is None:
                self.register_parameter(name, None)
                continue
            stacked = parameter.detach().unsqueeze(0).repeat(num_experts, *[1] * parameter.ndim)
            self.register_parameter(name, nn.Parameter(stacked, parameter.requires_grad))
            keep_attributes(parameter, cast(nn.Parameter, self._parameters[name]))
        self.names = tuple(self._parameters)
        # The original layer without its weights, in a tuple so that torch does not register it as a child.
        self._original = (without_weights(leaf),)

    @property
    def merged(self) -> bool:
        return self.num_experts == 1 or not (self.training or self.routed)

    def mean(self, name: str) -> Tensor | None:
        """The mean over experts of one parameter (None for an absent bias).

        Of a weight that is computed (a parametrization, pruning) the mean of what is computed.
        """
        value: Tensor | None = getattr(self, name)
        return None if value is None else value.mean(0)

    def collapse(self) -> nn.Module:
        """The original layer, of its original class, with the mean parameters."""
        for hook in list(self._forward_pre_hooks.values()):
            if computes_weight(hook):
                hook(self, ())
        held = dict(self.named_parameters(recurse=False))
        means = {
            name: nn.Parameter(mean.detach(), held[name].requires_grad if name in held else True)
            for name in self.names
            if (mean := self.mean(name)) is not None
        }
        return copied_with(self._original[0], means).train(self.training)

    def extra_repr(self) -> str:
        shapes = {name: tuple(p.shape) for name, p in self._parameters.items() if p is not None}
        return ", ".join(f"{name}={shape}" for name, shape in shapes.items())


class ExpertLinear(ExpertLeaf):
    """E linear layers: weight (E, out, in), bias (E, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """(E, ..., in) -> (E, ..., out) in training, (..., in) -> (..., out) in eval."""
        if self.merged:
            return F.linear(x, cast(Tensor, self.mean("weight")), self.mean("bias"))
        return _batched_linear(x, self.weight, self.bias)


class ExpertConv1x1(ExpertLeaf):
    """E pointwise convolutions: weight (E, out, in, 1, 1), bias (E, out); channels at dim -3."""

    def forward(self, x: Tensor) -> Tensor:
        """(E, ..., in, h, w) -> (E, ..., out, h, w) in training, (b, in, h, w) -> (b, out, h, w) in eval."""
        if self.merged:
            return F.conv2d(x, cast(Tensor, self.mean("weight")), self.mean("bias"))
        y = _batched_linear(x.movedim(-3, -1), self.weight.flatten(2), self.bias)
        return y.movedim(-1, -3)


class ExpertNorm(ExpertLeaf):
    """E layer norms, RMS norms or layer scales over the last dimension: weight (E, D)."""

    def __init__(self, leaf: nn.Module, num_experts: int) -> None:
        super().__init__(leaf, num_experts)
        self.scale_name = next(iter(leaf._parameters))  # `weight`, or `gamma` of a layer scale
        self.eps = getattr(leaf, "eps", None)
        self.kind = _norm_kind(leaf)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x: (E, ..., D) in training, (..., D) in eval."""
        weight, bias = getattr(self, self.scale_name), getattr(self, "bias", None)
        if self.merged:  # in one call, so that one expert computes bit for bit what the original layer does
            scale, shift = (p if p is None else p.mean(0) for p in (weight, bias))
            return self._normalised(x, scale, shift) if self.kind != "scale" else x * cast(Tensor, scale)
        x = self._normalised(x)
        for parameter, operation in ((weight, torch.mul), (bias, torch.add)):
            if parameter is not None:
                x = operation(x, parameter.view(self.num_experts, *(1,) * (x.ndim - 2), -1))
        return x

    def _normalised(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], scale, shift, cast(float, self.eps))
        return F.rms_norm(x, x.shape[-1:], scale, self.eps) if self.kind == "rms" else x


class _BatchedLinear(torch.autograd.Function):
    """`baddbmm(bias, rows, weight.mT)`; the gradient of the weight has the memory layout of the weight.

    The derivative of `bmm` is transposed, and autograd would copy it for the optimizer.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return torch.bmm(rows, weight.mT)
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if for_rows else None,
            torch.bmm(grad.mT, rows) if for_weight else None,
            grad.sum(1) if for_bias else None,
        )


def _batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(E, ..., in) times (E, out, in) -> (E, ..., out), as one batched matmul."""
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)  # cast here, so that the backward pass has it too
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    y: Tensor = _BatchedLinear.apply(x.flatten(1, -2), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[1])


def _norm_kind(leaf: nn.Module) -> str | None:
    name = type(leaf).__name__.lower()
    if isinstance(leaf, nn.LayerNorm):
        return "layer"
    if (isinstance(leaf, nn.RMSNorm) or "rmsnorm" in name) and hasattr(leaf, "eps"):  # named otherwise: lost
        return "rms"
    return "scale" if "layerscale" in name and len(leaf._parameters) == 1 else None


def _stack_leaf(leaf: nn.Module, num_experts: int) -> ExpertLeaf | None:
    """The stacked version of a layer, or None if there is none or the layer does more than its class."""
    forward, pointwise = type(leaf).forward, (1, 1)
    if attachments(leaf):
        return None
    if isinstance(leaf, nn.Linear):
        return ExpertLinear(leaf, num_experts) if forward is nn.Linear.forward else None
    if isinstance(leaf, nn.Conv2d) and leaf.kernel_size == leaf.stride == pointwise and leaf.groups == 1:
        plain = forward is nn.Conv2d.forward and not any(leaf.padding)
        return ExpertConv1x1(leaf, num_experts) if plain else None
    if _norm_kind(leaf) and all(p is None or p.ndim == 1 for p in leaf._parameters.values()):
        has_scale = leaf._parameters.get("weight", 0) is not None
        return ExpertNorm(leaf, num_experts) if has_scale and _same_in_training(leaf) else None
    return None


@torch.no_grad()
def _same_in_training(norm: nn.Module) -> bool:
    """Whether a norm computes the same in training and eval mode: libraries have norms of their own class."""
    scale = next(parameter for parameter in norm.parameters())
    x = torch.linspace(-1, 1, 2 * len(scale), device=scale.device, dtype=scale.dtype).view(2, -1)
    mode = norm.training
    outputs = [norm.train(training)(x) for training in (True, False)]
    norm.train(mode)
    return torch.equal(*outputs)


class Experts(nn.Module):
    """What every kind of experts offers to `MoE` and to the averaging.

    `forward(x)` takes one FFN input per expert, (E, *input), and returns (E, *output).
    """

    num_experts: int
    peers: Peers | None = None  # the processes, if each holds only one expert
    _before: tuple[nn.Module]  # the FFN without its weights; in a tuple, so that torch does not register it

    @property
    def changed(self) -> bool:
        """Whether parameters were renamed, added or removed since `expand`: parametrized, pruned, LoRA."""
        now, then = (dict(each.named_parameters()).keys() for each in (self.ffns()[0], *self._before))
        return now != then

    @property
    def original(self) -> nn.Module:
        """The FFN as it was, without its weights."""
        return self._before[0]

    def merged(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The FFN with the mean parameters, applied to a dense input: what is deployed."""
        raise NotImplementedError

    def mean_of(self, name: str) -> Tensor | None:
        """The mean over experts of a parameter that the FFN itself holds; None for an absent bias."""
        raise NotImplementedError

    def values_by_parameter(self, read: Read | None = None) -> Iterator[tuple[str, list[Tensor]]]:
        """For each parameter of the FFN its name and its values, one per local expert, as writable views.

        Args:
            read: maps a parameter to the tensor to take instead, of the same shape (its gradient, its local
                shard), or to None, which leaves the parameter out.
        """
        raise NotImplementedError

    def pull_towards_mean_(self, weight: float, read: Read = local) -> Callable[[], None] | None:
        """Move every expert towards their mean, in place: `W_i <- W_i + weight (mean - W_i)`.

        Half-precision values are averaged in float32.

        Args:
            weight: D of Eq. 6. 0 leaves the experts where they are, 1 makes them equal.
            read: what is moved for each parameter, as in `values_by_parameter`; this process's part of it.

        Returns:
            None when the experts have moved. Replica experts return a function that waits for the all-reduce
            and then moves them: call it after the all-reduce of every layer has started.
        """
        raise NotImplementedError

    def ffns(self) -> list[nn.Module]:
        """The local modules of the FFN's class: one, or one per expert. They hold the FFN's buffers."""
        raise NotImplementedError

    def collapse(self) -> nn.Module:
        """A new FFN of the original class with the mean parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def fill_(self, ffn: nn.Module, keep: Container[str] = ()) -> None:
        """Set every expert to the parameters and buffers of a dense FFN, except those named in `keep`."""
        dense = dict(ffn.named_parameters())
        if self.changed:
            raise EwavitError(
                "experts were parametrized, pruned or wrapped since ewavit.expand: load weights before that"
            )
        for name, values in self.values_by_parameter():
            for value in values if name not in keep else ():
                value.copy_(dense[name])
        for name, buffer in ffn.named_buffers():
            for mine in self.ffns() if name not in keep else ():
                mine.get_buffer(name).copy_(buffer)


class StackedExperts(Experts):
    """N experts as one copy of the FFN; each of its layers has N sets of parameters.

    Args:
        ffn: the FFN, left untouched.
        num_experts: N.

    Raises:
        TypeError: a layer with parameters has no stacked version.
    """

    def __init__(self, ffn: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        memo: dict[int, Any] = {}
        for name, module in ffn.named_modules():
            if all(parameter is None for parameter in module._parameters.values()):
                continue
            leaf = _stack_leaf(module, num_experts)
            if leaf is None:
                raise TypeError(
                    f"{name or 'the FFN itself'} ({type(module).__name__}) has no stacked version"
                )
            memo[id(module)] = leaf
        self.ffn: nn.Module = duplicate(ffn, memo | without_call_hooks(ffn))
        self._before = (without_weights(ffn),)
        self.training = ffn.training

    def ffns(self) -> list[nn.Module]:
        return [self.ffn]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self.ffn(x, *args, **kwargs))

    merged = forward  # in eval mode the layers themselves use the mean

    def mean_of(self, name: str) -> Tensor | None:
        return cast(ExpertLeaf, self.ffn).mean(name)

    def values_by_parameter(self, read: Read | None = None) -> Iterator[tuple[str, list[Tensor]]]:
        for name, stack in self._stacks(read):
            yield name, list(stack.unbind(0))

    def _stacks(self, read: Read | None) -> Iterator[tuple[str, Tensor]]:
        """As `values_by_parameter`, each parameter as one tensor (E, ...)."""
        for name, parameter in self.ffn.named_parameters():
            value = parameter if read is None else read(parameter)
            if value is None:
                continue
            if value.shape[:1] != (self.num_experts,):
                raise EwavitError(
                    f"{name} is sharded over its experts: pass shard_placement_fn="
                    "ewavit.distributed.expert_placement(model, mesh) to every fully_shard"
                    if is_sharded(parameter)
                    else f"{name} {tuple(value.shape)} has no value for each of {self.num_experts} stacked "
                    'experts: use ewavit.expand(model, experts="separate"), or add it before expand'
                )
            yield name, value

    @torch.no_grad()
    def pull_towards_mean_(self, weight: float, read: Read = local) -> None:
        for _, stack in self._stacks(read):
            work = at_least_float32(stack)
            work.lerp_(work.mean(0), weight)
            if work is not stack:
                stack.copy_(work)

    def collapse(self) -> nn.Module:
        leaves = [module for module in self.ffn.modules() if isinstance(module, ExpertLeaf)]
        stacked = {parameter for leaf in leaves for parameter in leaf.parameters()}
        if added := [name for name, parameter in self.ffn.named_parameters() if parameter not in stacked]:
            raise unknown_mean(added[0], "was added")
        return duplicate(self.ffn, {id(leaf): leaf.collapse() for leaf in leaves})


class SeparateExperts(Experts):
    """N experts as N deep copies of the FFN.

    Args:
        ffn: the FFN, left untouched.
        num_experts: N.
    """

    def __init__(self, ffn: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.copies = nn.ModuleList(duplicate(ffn, without_call_hooks(ffn)) for _ in range(num_experts))
        self._before = (without_weights(ffn),)
        self.training = self.copies.training = ffn.training

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([ffn(part, *args, **kwargs) for ffn, part in zip(self.copies, x, strict=True)])

    def merged(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.num_experts == 1:
            return cast(Tensor, self.copies[0](x, *args, **kwargs))
        refuse_tracing()
        return cast(Tensor, functional_call(*self.mean(), (x, *args), kwargs))

    def mean_of(self, name: str) -> Tensor | None:
        return self.mean()[1].get(name)

    def mean(self, weights: Tensor | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
        """The module that computes what is deployed, and its parameters: the experts' means.

        Args:
            weights: (E,), of the experts; their sum is 1. None is the plain mean.
        """
        ffn, by_parameter = self.copies[0], dict(self.values_by_parameter())
        if self.changed:
            (ffn,) = self._before
            each = [computed_weights(expert, ffn) for expert in self.copies]
            by_parameter = {name: [weights[name] for weights in each] for name in each[0]}
        elif not self._same_masks():
            raise EwavitError(
                "the experts were pruned before ewavit.expand and again since, each by itself, so no pruned "
                "FFN is their mean: prune only before or only after expand"
            )
        return ffn, {name: weighted(torch.stack(values), weights) for name, values in by_parameter.items()}

    def _same_masks(self) -> bool:
        """Whether the masks of torch's pruning are those of the first expert."""
        masks = [[m for name, m in ffn.named_buffers() if name.endswith("_mask")] for ffn in self.copies]
        return all(all(map(torch.equal, masks[0], each)) for each in masks[1:])

    @torch.no_grad()
    def pull_towards_mean_(self, weight: float, read: Read = local) -> None:
        for _, values in self.values_by_parameter(read):
            work = [at_least_float32(value) for value in values]
            mean = torch.stack(work).mean(0)
            for value, moved in zip(values, work, strict=True):
                value.copy_(moved.lerp_(mean, weight))

    def ffns(self) -> list[nn.Module]:
        return list(self.copies)

    def values_by_parameter(self, read: Read | None = None) -> Iterator[tuple[str, list[Tensor]]]:
        parameters = [dict(ffn.named_parameters()) for ffn in self.copies]
        if odd := {name for each in parameters for name in parameters[0].keys() ^ each.keys()}:
            raise EwavitError(
                f"the experts have no parameters of the same names ({min(odd)}): prune or parametrize every "
                "copy in `experts.copies` alike, or the model before ewavit.expand"
            )
        for name in parameters[0]:
            found = [p if read is None else read(p) for p in (of_expert[name] for of_expert in parameters)]
            values = [value for value in found if value is not None]
            if len(values) == self.num_experts:
                yield name, values

    def collapse(self, weights: Tensor | None = None) -> nn.Module:
        return with_means(*self.mean(weights))


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of (E, ...) over E; with weights (E,) their weighted sum."""
    return values.mean(0) if weights is None else torch.tensordot(weights.to(values), values, 1)


def with_means(ffn: nn.Module, means: dict[str, Tensor]) -> nn.Module:
    """A copy of an FFN with other parameters, given by name."""
    parameters = dict(ffn.named_parameters())
    made = {n: nn.Parameter(mean.detach(), parameters[n].requires_grad) for n, mean in means.items()}
    return copied_with(ffn, made)
