"""Replica experts: each data-parallel process holds one expert, and averaging is an all-reduce of the FFNs.

The samples of a batch are dealt to the processes already, so nothing is dispatched. What DDP would send of an
FFN's gradients is not sent; its weights are, after the optimizer step. N is the number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .errors import EwavitError
from .experts import Experts, Of
from .moe import moe_layers
from .partition import RandomPartition
from .sharding import cut_like, is_sharded, local, sharded_like, whole


class Peers:
    """The data-parallel processes that hold one expert each; all of them unless a group is given.

    Raises:
        EwavitError: torch.distributed is not running.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise EwavitError(
                'placement="replicas" takes one process for each expert: start with torchrun and call '
                "torch.distributed.init_process_group() before ewavit.expand"
            )
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self  # an averaged copy of a model meets in the same processes

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums over the processes, in float32 or better, by one all-reduce for all tensors."""
        return self.begin_sum(tensors)()

    def begin_sum(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Send the tensors; what is returned waits for the sums and gives them."""
        flat = torch.cat([tensor.reshape(-1).to(_at_least_float32(tensor)) for tensor in tensors])
        sent = dist.all_reduce(flat, group=self.group, async_op=True)

        def sums() -> list[Tensor]:
            sent.wait()
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

        return sums

    def range(self, values: Tensor) -> Tensor:
        """How far apart the largest and the smallest of each value are over the processes."""
        ends = torch.stack([values, -values])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        return ends.sum(0)

    def broadcast_(self, tensor: Tensor) -> None:
        """Make a tensor the first process's."""
        dist.broadcast(tensor, group=self.group, group_src=0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes in their order, in the first process; none in the others."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor.contiguous(), gathered, group=self.group, group_dst=0)
        return gathered or []


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class ReplicaExperts(Experts):
    """One of N experts: this process's FFN, which starts as a copy of the first process's.

    In eval mode it computes with the mean, for which the processes meet in `eval()`: each must call it.

    Args:
        ffn: the FFN, left untouched.
        peers: the processes that hold one expert each.
    """

    def __init__(self, ffn: nn.Module, peers: Peers) -> None:
        super().__init__()
        self.peers: Peers = peers
        self.num_experts = peers.size
        self.ffn = copy.deepcopy(ffn)
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
        if self._mean is None or self._stale():
            raise EwavitError(
                "replica experts meet in eval(): call model.eval() in every process before evaluating, "
                "and again when the weights have changed"
            )
        mean = {name: whole(value) for name, value in self._mean.items()}
        return cast(Tensor, functional_call(self.ffn, mean, (x, *args), kwargs))

    def train(self, mode: bool = True) -> ReplicaExperts:
        """Switch the mode; into eval mode every process must go, for the experts' mean."""
        super().train(mode)
        self._mean = None if mode else self.mean()
        self._versions = [parameter._version for parameter in self.ffn.parameters()]
        self._sharded = any(is_sharded(parameter) for parameter in self.ffn.parameters())
        return self

    def _stale(self) -> bool:
        """Whether the weights were written to since `eval()`, as far as that can be seen."""
        if self._sharded or torch.compiler.is_compiling():
            return False
        return self._versions != [parameter._version for parameter in self.ffn.parameters()]

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """The mean over all processes of each parameter, by name; every process must ask."""
        parameters = dict(self.ffn.named_parameters())
        total = self.peers.sum([local(parameter) for parameter in parameters.values()])
        means = [
            _like(p, part.div_(self.num_experts)) for p, part in zip(parameters.values(), total, strict=True)
        ]
        return dict(zip(parameters, means, strict=True))

    def families(self, of: Of | None = None) -> Iterator[tuple[str, list[Tensor]]]:
        for name, parameter in self.ffn.named_parameters():
            value = parameter if of is None else of(parameter)
            if value is not None:
                yield name, [value]

    @torch.no_grad()
    def pull_(self, weight: float, of: Of | None = None) -> Callable[[], None] | None:
        values = [value for _, (value,) in self.families(of)]
        if not values:
            return None
        sums = self.peers.begin_sum(values)

        def finish() -> None:
            for value, total in zip(values, sums(), strict=True):
                work = value.to(total.dtype)  # itself, but for half precision
                work.lerp_(total.div_(self.num_experts), weight)
                if work is not value:
                    value.copy_(work)

        return finish

    def replicas(self) -> list[nn.Module]:
        return [self.ffn]

    def collapse(self) -> nn.Module:
        parameters = dict(self.ffn.named_parameters())
        memo: dict[int, Any] = {
            id(parameters[name]): nn.Parameter(
                mean.clone(), parameters[name].requires_grad
            )  # they share memory
            for name, mean in self.mean().items()
        }
        return copy.deepcopy(self.ffn, memo)


def _like(parameter: Tensor, part: Tensor) -> Tensor:
    """Of a parameter's dtype, and as it is sharded: `part` is this process's."""
    part = part.to(parameter.dtype)
    return sharded_like(parameter, part) if is_sharded(parameter) else part


class DealtByProcess(RandomPartition):
    """The dispatcher of replica experts: the data loader has dealt the samples to the processes already."""

    def dispatch(self, x: Tensor) -> tuple[Tensor, Any]:
        return x, None

    def combine(self, block: Tensor, state: Any) -> Tensor:
        return block


def own_parameters(model: nn.Module) -> dict[nn.Parameter, Peers]:
    """The parameters that every process has of its own, with the processes."""
    experts = [moe.experts for moe in moe_layers(model).values()]
    return {p: each.peers for each in experts if each.peers is not None for p in each.parameters()}


def keep_from_ddp(model: nn.Module) -> None:
    """Let DDP, which will wrap this very module, leave the replica experts' weights and gradients alone."""
    own = own_parameters(model)
    names = {name for name, parameter in model.named_parameters() if parameter in own}
    names |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    mark = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    mark(model, names)  # type: ignore[no-untyped-call]


@torch.no_grad()
def check_peers(model: nn.Module) -> None:
    """See that only the experts of the processes differ, and that they learn from samples of their own.

    Raises:
        EwavitError: the other weights have come apart, or the experts' gradients are all the same.
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
            "weights that all processes share differ between them: wrap the model in "
            "DistributedDataParallel, and clip gradients with ewavit.clip_grad_norm_"
        )
    if peers.size > 1 and float(apart[0]) == 0 and float(gradient) > 0:
        raise EwavitError(
            "the replica experts get the same gradient in every process: expand the very module that "
            "DistributedDataParallel wraps, and give each process samples of its own"
        )


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for models with replica experts, by the same factor in every process.

    The squared norm is that of the shared gradients plus the mean over the processes of the experts'. Without
    replica experts it is torch's.

    Args:
        model: wrapped or not.
        max_norm: largest norm of the whole gradient.

    Returns:
        The norm before clipping.
    """
    own = own_parameters(model)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm, norm_of_own = (
        whole(get_total_norm([cast(Tensor, p.grad) for p in parameters if (p in own) is mine]))
        for mine in (False, True)
    )
    if own:
        peers = next(iter(own.values()))
        norm = (norm**2 + peers.sum([norm_of_own**2])[0] / peers.size).sqrt()
    for mine in (False, True):  # they may be sharded over different meshes
        clip_grads_with_norm_([p for p in parameters if (p in own) is mine], max_norm, norm)
    return norm


def stacked_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """The state of a model with replica experts as one with stacked experts would have it.

    What each process has of its own is stacked on dimension 0, every process's expert in its place. Every
    process must call it.

    Args:
        model: an expanded model; wrappers keep their prefix in the keys.
        optimizer: of the model.

    Returns:
        {"model": ..., "optimizer": ...}, on process 0 and on the CPU; elsewhere an empty dict. Of a model
        without replica experts the state dicts as they are, in every process.
    """
    own = own_parameters(model)
    states: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        states["optimizer"] = optimizer.state_dict()
    if not own:
        return states
    for key, parameter in model.state_dict(keep_vars=True).items():
        states["model"][key] = _stacked(states["model"][key], own.get(parameter))
    for index, parameter in enumerate(_parameters_of(optimizer)):
        values = states["optimizer"]["state"].get(index, {})
        states["optimizer"]["state"][index] = {
            name: _stacked(value, own.get(parameter) if value.shape == parameter.shape else None)
            for name, value in values.items()
        }
    return states if dist.get_rank() == 0 else {}


def load_stacked_state_dict(
    model: nn.Module, state: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Load what `stacked_state_dict` gave; each process takes its expert.

    With another number of processes than experts were saved the experts' mean stays what it was: processes
    beyond them start from it, and fewer take the first experts, moved so that theirs is the mean of all.

    Args:
        model: an expanded model.
        state: the whole of it, in every process.
        optimizer: of the model, if its state was saved.
    """
    own = own_parameters(model)
    weights = dict(state["model"])
    for key, parameter in model.state_dict(keep_vars=True).items():
        if parameter in own:
            weights[key] = _share(weights[key], own[parameter], keep_mean=True)
        weights[key] = cut_like(parameter, weights[key])
    model.load_state_dict(weights)
    if optimizer is None:
        return
    moments = dict(state["optimizer"]["state"])
    for index, parameter in enumerate(_parameters_of(optimizer)):
        moments[index] = values = dict(moments.get(index, {}))
        for name, value in values.items():
            if parameter in own and value.shape[1:] == parameter.shape:
                value = _share(value, own[parameter])
            values[name] = cut_like(parameter, value) if value.shape == parameter.shape else value
    optimizer.load_state_dict({**state["optimizer"], "state": moments})


def _parameters_of(optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    """In the order in which an optimizer's state dict counts them."""
    groups = [] if optimizer is None else optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]]


def _stacked(value: Tensor, peers: Peers | None) -> Tensor:
    """On the CPU: a tensor, or those of all processes in the first of them."""
    gathered = [] if peers is None else peers.gather(whole(value))
    return torch.stack([each.cpu() for each in gathered]) if gathered else whole(value).cpu()


def _share(stacked: Tensor, peers: Peers, keep_mean: bool = False) -> Tensor:
    """This process's expert of those that were saved."""
    if peers.rank >= len(stacked):
        return stacked.mean(0)
    mine = stacked[peers.rank]
    if keep_mean and peers.size < len(stacked):
        mine = mine + stacked.mean(0) - stacked[: peers.size].mean(0)
    return mine
