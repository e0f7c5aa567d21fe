"""Replica experts: each data-parallel process holds one expert, and averaging is an all-reduce of the FFNs.

The data loader deals samples to processes, so nothing is dispatched. DDP does not send the FFNs' gradients;
instead their weights are sent after the optimizer step. N is the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from ewavit.core.copying import computed_weights, duplicate, without_call_hooks, without_weights
from ewavit.core.devices import Peers, is_sharded, local, sharded_like, whole
from ewavit.core.dispatch import Dispatcher
from ewavit.core.experts import Experts, Read, with_means
from ewavit.core.moe import moe_layers
from ewavit.errors import EwavitError


class ReplicaExperts(Experts):
    """One of N experts: this process's FFN. It starts as a copy of the first process's FFN.

    In eval mode it uses the mean over all processes. `eval()` is a collective: every process must call it.

    Args:
        ffn: the FFN, left untouched.
        peers: the processes, one expert each.
    """

    def __init__(self, ffn: nn.Module, peers: Peers) -> None:
        super().__init__()
        self.peers: Peers = peers
        self.num_experts = peers.size
        self.ffn = duplicate(ffn, without_call_hooks(ffn))
        self._before = (without_weights(ffn),)
        self.training = ffn.training
        for tensor in (*self.ffn.parameters(), *self.ffn.buffers()):
            peers.broadcast_(tensor.detach())
        self._mean: dict[str, Tensor] | None = None
        self._versions: list[int] = []
        self._sharded = False
        if not self.training:
            self.eval()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self.ffn(x, *args, **kwargs))

    def merged(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.num_experts == 1:
            return self.forward(x, *args, **kwargs)
        mean = {name: whole(value) for name, value in self._known_mean().items()}
        return cast(Tensor, functional_call(self._deployed, mean, (x, *args), kwargs))

    def mean_of(self, name: str) -> Tensor | None:
        mean = self._known_mean().get(name)
        return None if mean is None else whole(mean)

    def _known_mean(self) -> dict[str, Tensor]:
        if self._mean is None or self._stale():
            raise EwavitError(
                "the mean of the replica experts is missing or out of date: call model.eval() in every "
                "process before evaluating, and again after the weights have changed"
            )
        return self._mean

    @property
    def _deployed(self) -> nn.Module:
        return self._before[0] if self.changed else self.ffn

    def train(self, mode: bool = True) -> ReplicaExperts:
        """Switch the mode. Entering eval mode computes the experts' mean: every process must call it."""
        super().train(mode)
        self._mean = None if mode else self.mean()
        self._versions = [parameter._version for parameter in self.ffn.parameters()]
        self._sharded = any(is_sharded(parameter) for parameter in self.ffn.parameters())
        return self

    def _stale(self) -> bool:
        """Whether the weights changed since `eval()`; sharded or compiled ones cannot be checked."""
        if self._sharded or torch.compiler.is_compiling():
            return False
        return self._versions != [parameter._version for parameter in self.ffn.parameters()]

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """The mean over all processes of each parameter, by name; every process must call it."""
        parameters: dict[str, Tensor] = dict(self.ffn.named_parameters())
        if self.changed:
            parameters = computed_weights(self.ffn, self._deployed)
        total = self.peers.sum([local(parameter) for parameter in parameters.values()])
        means = [
            _like(p, part.div_(self.num_experts)) for p, part in zip(parameters.values(), total, strict=True)
        ]
        return dict(zip(parameters, means, strict=True))

    def values_by_parameter(self, read: Read | None = None) -> Iterator[tuple[str, list[Tensor]]]:
        for name, parameter in self.ffn.named_parameters():
            value = parameter if read is None else read(parameter)
            if value is not None:
                yield name, [value]

    @torch.no_grad()
    def pull_towards_mean_(self, weight: float, read: Read = local) -> Callable[[], None] | None:
        values = [value for _, (value,) in self.values_by_parameter(read)]
        if not values:
            return None
        sums = self.peers.begin_sum(values)

        def finish() -> None:
            for value, total in zip(values, sums(), strict=True):
                work = value.to(total.dtype)  # a copy only in half precision
                work.lerp_(total.div_(self.num_experts), weight)
                if work is not value:
                    value.copy_(work)

        return finish

    def ffns(self) -> list[nn.Module]:
        return [self.ffn]

    def collapse(self) -> nn.Module:
        # The means are views of one tensor.
        return with_means(self._deployed, {name: mean.clone() for name, mean in self.mean().items()})


def _like(parameter: Tensor, part: Tensor) -> Tensor:
    """This process's `part` with a parameter's dtype and sharding."""
    part = part.to(parameter.dtype)
    return sharded_like(parameter, part) if is_sharded(parameter) else part


class DealtByProcess(Dispatcher[None]):
    """The dispatcher of replica experts. It does nothing: the data loader deals samples to processes."""

    def dispatch(self, x_TD: Tensor) -> tuple[Tensor, None]:
        return x_TD, None

    def combine(self, block_ECD: Tensor, state: None) -> Tensor:
        return block_ECD


def own_parameters(model: nn.Module) -> dict[nn.Parameter, Peers]:
    """The parameters that differ between processes (replica experts), each with its processes."""
    experts = [moe.experts for moe in moe_layers(model).values()]
    return {p: each.peers for each in experts if each.peers is not None for p in each.parameters()}


def keep_from_ddp(model: nn.Module) -> None:
    """Make DDP ignore the replica experts' weights and gradients; it must wrap this very module later."""
    own = own_parameters(model)
    named = model.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in named if parameter in own}
    names |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    mark = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    mark(model, names)  # type: ignore[no-untyped-call]


@torch.no_grad()
def check_peers(model: nn.Module) -> None:
    """Check that only the experts differ between processes, and that each learns from its own samples.

    Raises:
        EwavitError: other weights differ, or all experts have the same gradient.
    """
    own = own_parameters(model)
    if not own:
        return
    parameter, peers = next(iter(own.items()))
    sums = [local(p).float().abs().sum() for p in model.parameters() if p not in own]
    gradient = torch.zeros_like(sums[0]) if parameter.grad is None else local(parameter.grad).float().norm()
    values = torch.stack([gradient, *sums])
    apart = peers.range(values)
    if bool((apart[1:] > 1e-6 * values[1:]).any()):
        raise EwavitError(
            "shared weights differ between processes: wrap the model in DistributedDataParallel, and clip "
            "gradients with ewavit.distributed.clip_grad_norm_"
        )
    if peers.size > 1 and float(apart[0]) == 0 and float(gradient) > 0:
        raise EwavitError(
            "the replica experts have the same gradient in every process: expand the same module that "
            "DistributedDataParallel wraps, and give each process its own samples"
        )
