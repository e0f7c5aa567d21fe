"""One FFN made N: `StackedExperts` (batched matmul, fast) or `SeparateExperts` (N copies, always works).

`StackedExperts` keeps the FFN's own module: a copy whose parameter-holding leaves carry a leading expert
dimension, so the FFN's own `forward` runs unchanged on (experts, ..., tokens, dim).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ewavit.core.devices import Peers, local
from ewavit.errors import EwavitError

Read = Callable[[nn.Parameter], Tensor | None]
_HALF = (torch.bfloat16, torch.float16)


class ExpertLeaf(nn.Module):
    """A layer with N sets of parameters, stacked on dimension 0 under the original names.

    In training mode, and with a router in eval mode too, input and output carry a leading expert dimension.
    Else, or with one expert, the layer is the original one with the mean parameters and there is no expert
    dimension.
    """

    weight: Tensor
    bias: Tensor | None
    routed = False  # set by a MoE that has a router

    def __init__(self, leaf: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.training = leaf.training
        memo: dict[int, Any] = {}
        for name, parameter in leaf._parameters.items():
            if parameter is None:
                self.register_parameter(name, None)
                continue
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            stacked = parameter.detach().unsqueeze(0).repeat(num_experts, *[1] * parameter.ndim)
            self.register_parameter(name, nn.Parameter(stacked, parameter.requires_grad))
        # The original layer without its weights, in a tuple so that it is not registered as a child.
        self._original = (copy.deepcopy(leaf, memo),)

    @property
    def merged(self) -> bool:
        return self.num_experts == 1 or not (self.training or self.routed)

    def mean(self, name: str) -> Tensor | None:
        """The mean over experts of one parameter (None for an absent bias)."""
        parameter = self._parameters[name]
        return None if parameter is None else parameter.mean(0)

    def collapse(self) -> nn.Module:
        """The original layer, of its original class, with the mean parameters."""
        original = self._original[0]
        memo: dict[int, Any] = {}
        for name, stacked in self._parameters.items():
            if stacked is not None:
                mean = stacked.detach().mean(0)
                memo[id(original._parameters[name])] = nn.Parameter(mean, stacked.requires_grad)
        return copy.deepcopy(original, memo).train(self.training)

    def extra_repr(self) -> str:
        shapes = {name: tuple(p.shape) for name, p in self._parameters.items() if p is not None}
        return ", ".join(f"{name}={shape}" for name, shape in shapes.items())


class ExpertLinear(ExpertLeaf):
    """N linear layers: weight (experts, out, in), bias (experts, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """(experts, ..., in) -> (experts, ..., out) in training, (..., in) -> (..., out) in eval."""
        if self.merged:
            return F.linear(x, cast(Tensor, self.mean("weight")), self.mean("bias"))
        return _batched_linear(x, self.weight, self.bias)


class ExpertConv1x1(ExpertLeaf):
    """N pointwise convolutions: weight (experts, out, in, 1, 1), bias (experts, out); channels at dim -3."""

    def forward(self, x: Tensor) -> Tensor:
        """(experts, ..., in, h, w) -> (experts, ..., out, h, w) in training, (b, in, h, w) in eval."""
        if self.merged:
            return F.conv2d(x, cast(Tensor, self.mean("weight")), self.mean("bias"))
        y = _batched_linear(x.movedim(-3, -1), self.weight.flatten(2), self.bias)
        return y.movedim(-1, -3)


class ExpertNorm(ExpertLeaf):
    """N layer norms, RMS norms or layer scales over the last dimension: weight (experts, dim)."""

    def __init__(self, leaf: nn.Module, num_experts: int) -> None:
        super().__init__(leaf, num_experts)
        self.scale_name = next(iter(leaf._parameters))  # `weight`, or `gamma` of a layer scale
        self.eps = getattr(leaf, "eps", None)
        self.kind = _norm_kind(leaf)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out as in; (experts, ..., dim) in training, (..., dim) in eval."""
        weight, bias = self._parameters[self.scale_name], self._parameters.get("bias")
        if self.merged:  # in one call, so that one expert computes bit for bit what the original layer does
            scale, shift = (p if p is None else p.mean(0) for p in (weight, bias))
            if self.kind == "layer":
                return F.layer_norm(x, x.shape[-1:], scale, shift, cast(float, self.eps))
            if self.kind == "rms":
                return F.rms_norm(x, x.shape[-1:], scale, self.eps)
            return x * cast(Tensor, scale)
        if self.kind == "layer":
            x = F.layer_norm(x, x.shape[-1:], eps=cast(float, self.eps))
        elif self.kind == "rms":
            x = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        for parameter, operation in ((weight, torch.mul), (bias, torch.add)):
            if parameter is not None:
                x = operation(x, parameter.view(self.num_experts, *(1,) * (x.ndim - 2), -1))
        return x


class _BatchedLinear(torch.autograd.Function):
    """`baddbmm(bias, rows, weight.mT)` whose gradient of the weight is laid out as the weight is.

    The derivative of `bmm` itself comes out transposed, and autograd would copy it for the optimizer.
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
    """(experts, ..., in) times (experts, out, in) -> (experts, ..., out), as one batched matmul."""
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
    """The N-expert version of a layer, or None if there is none."""
    if isinstance(leaf, nn.Linear):
        return ExpertLinear(leaf, num_experts)
    if isinstance(leaf, nn.Conv2d) and leaf.kernel_size == leaf.stride == (1, 1) and leaf.groups == 1:
        return ExpertConv1x1(leaf, num_experts) if not any(leaf.padding) else None
    if _norm_kind(leaf) and all(p is None or p.ndim == 1 for p in leaf._parameters.values()):
        return ExpertNorm(leaf, num_experts) if leaf._parameters.get("weight", 0) is not None else None
    return None


class Experts(nn.Module):
    """What both kinds of experts offer to `MoE` and to the averaging.

    `forward(x)` takes one FFN input per expert, (experts, *input), and returns (experts, *output).
    """

    num_experts: int
    peers: Peers | None = None  # the processes, where each holds one expert only

    def merged(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The FFN with the mean parameters on a dense input: what will be deployed."""
        raise NotImplementedError

    def values_by_parameter(self, read: Read | None = None) -> Iterator[tuple[str, list[Tensor]]]:
        """For each parameter of the FFN its name and its values, one per local expert, as writable views.

        Args:
            read: maps a parameter to the tensor to take instead, of the same shape (its gradient, its local
                shard), or to None, which leaves the parameter out.
        """
        raise NotImplementedError

    def pull_towards_mean_(self, weight: float) -> Callable[[], None] | None:
        """Move every expert towards their mean, in place: `W_i <- W_i + weight (mean - W_i)`.

        Half-precision values are averaged in float32.

        Args:
            weight: D of Eq. 6. 0 leaves the experts where they are, 1 makes them equal.

        Returns:
            None when the experts have moved. Replica experts return a function that waits for the all-reduce
            and then moves them: call it after the all-reduce of every layer has started.
        """
        raise NotImplementedError

    def ffns(self) -> list[nn.Module]:
        """The modules that hold the FFN's buffers."""
        raise NotImplementedError

    def collapse(self) -> nn.Module:
        """A new FFN of the original class with the mean parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def fill_(self, ffn: nn.Module, keep: Container[str] = ()) -> None:
        """Set every expert to the parameters and buffers of a dense FFN, except for those named in `keep`."""
        dense = dict(ffn.named_parameters())
        for name, values in self.values_by_parameter():
            for value in values if name not in keep else ():
                value.copy_(dense[name])
        for name, buffer in ffn.named_buffers():
            for replica in self.ffns() if name not in keep else ():
                replica.get_buffer(name).copy_(buffer)


class StackedExperts(Experts):
    """N experts as one copy of the FFN whose layers hold N sets of parameters.

    Args:
        ffn: the FFN, left untouched.
        num_experts: N.

    Raises:
        TypeError: a parameter sits in a layer that has no stacked version.
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
        self.ffn: nn.Module = copy.deepcopy(ffn, memo)
        self.training = ffn.training

    def ffns(self) -> list[nn.Module]:
        return [self.ffn]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self.ffn(x, *args, **kwargs))

    merged = forward  # the layers themselves compute with the mean when they are not dispatched to

    def values_by_parameter(self, read: Read | None = None) -> Iterator[tuple[str, list[Tensor]]]:
        for name, stack in self._stacks(read):
            yield name, list(stack.unbind(0))

    def _stacks(self, read: Read | None) -> Iterator[tuple[str, Tensor]]:
        """As `values_by_parameter`, each parameter as one tensor (E, ...)."""
        for name, parameter in self.ffn.named_parameters():
            value = parameter if read is None else read(parameter)
            if value is None:
                continue
            if value.shape[0] != self.num_experts:
                raise EwavitError(
                    f"{name} is sharded over its experts: give every fully_shard "
                    "shard_placement_fn=ewavit.distributed.expert_placement(model, mesh)"
                )
            yield name, value

    @torch.no_grad()
    def pull_towards_mean_(self, weight: float) -> None:
        for _, stack in self._stacks(local):
            work = stack.float() if stack.dtype in _HALF else stack
            work.lerp_(work.mean(0), weight)
            if work is not stack:
                stack.copy_(work)

    def collapse(self) -> nn.Module:
        leaves = [module for module in self.ffn.modules() if isinstance(module, ExpertLeaf)]
        return copy.deepcopy(self.ffn, {id(leaf): leaf.collapse() for leaf in leaves})


class SeparateExperts(Experts):
    """N experts as N deep copies of the FFN.

    Args:
        ffn: the FFN, left untouched.
        num_experts: N.
    """

    def __init__(self, ffn: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.copies = nn.ModuleList(copy.deepcopy(ffn) for _ in range(num_experts))
        self.training = self.copies.training = ffn.training

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([ffn(part, *args, **kwargs) for ffn, part in zip(self.copies, x, strict=True)])

    def merged(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.num_experts == 1:
            return cast(Tensor, self.copies[0](x, *args, **kwargs))
        mean = {name: torch.stack(values).mean(0) for name, values in self.values_by_parameter()}
        return cast(Tensor, functional_call(self.copies[0], mean, (x, *args), kwargs))

    @torch.no_grad()
    def pull_towards_mean_(self, weight: float) -> None:
        for _, values in self.values_by_parameter(local):
            work = [value.float() if value.dtype in _HALF else value for value in values]
            mean = torch.stack(work).mean(0)
            for value, moved in zip(values, work, strict=True):
                value.copy_(moved.lerp_(mean, weight))

    def ffns(self) -> list[nn.Module]:
        return list(self.copies)

    def values_by_parameter(self, read: Read | None = None) -> Iterator[tuple[str, list[Tensor]]]:
        parameters = [dict(ffn.named_parameters()) for ffn in self.copies]
        for name in parameters[0]:
            found = [p if read is None else read(p) for p in (of_expert[name] for of_expert in parameters)]
            values = [value for value in found if value is not None]
            if len(values) == self.num_experts:
                yield name, values

    def collapse(self) -> nn.Module:
        first = dict(self.copies[0].named_parameters())
        memo: dict[int, Any] = {}
        for name, values in self.values_by_parameter():
            mean = torch.stack([value.detach() for value in values]).mean(0)
            memo[id(first[name])] = nn.Parameter(mean, first[name].requires_grad)
        return copy.deepcopy(self.copies[0], memo)
