"""Training in several processes: sharding of experts, gradient clipping, one state for all replicas."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.weak import WeakIdKeyDictionary

from ewavit.core.devices import Peers, cut_like, whole
from ewavit.core.experts import StackedExperts
from ewavit.core.moe import require_moe_layers
from ewavit.core.replicas import own_parameters
from ewavit.errors import EwavitError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard


def expert_placement(
    model: nn.Module, mesh: DeviceMesh | None = None
) -> Callable[[nn.Parameter], Shard | None]:
    """A `shard_placement_fn` for `fully_shard` that never shards the expert dimension of stacked experts.

    So each process has a part of every expert, and averaging needs no communication. Call this once, before
    the first `fully_shard`, and pass the result to every `fully_shard`.

    Args:
        model: an expanded model, not sharded yet.
        mesh: the mesh for `fully_shard`, 1-D or (replicate, shard); all processes by default.

    Raises:
        EwavitError: no MoE layer, replica experts (docs/distributed.md shows how to shard them), or a
            parameter without another dimension that divides evenly over the processes.

    Examples:
        >>> placement = ewa.distributed.expert_placement(model, mesh)
        >>> for block in model.blocks:
        ...     fully_shard(block, mesh=mesh, shard_placement_fn=placement)
        >>> fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    """
    from torch.distributed.tensor import Shard

    layers = require_moe_layers(model)
    if any(moe.experts.peers is not None for moe in layers.values()):
        raise EwavitError(
            "replica experts are not stacked: leave out expert_placement, and shard each MoE over the "
            "processes of its replica, fully_shard(moe, mesh=mesh['shard'])"
        )
    processes = mesh.size(mesh.ndim - 1) if mesh is not None else dist.get_world_size()
    # Weak references: `fully_shard` replaces the parameters, and the old ones must be freed.
    placements: MutableMapping[nn.Parameter, Shard] = WeakIdKeyDictionary()
    for layer, moe in layers.items():
        stacked = isinstance(moe.experts, StackedExperts)
        for name, parameter in moe.experts.named_parameters() if stacked else ():
            sizes = tuple(parameter.shape)
            cut = next((d for d in range(1, len(sizes)) if sizes[d] % processes == 0), None)
            if cut is None:
                raise EwavitError(
                    f"{layer}.experts.{name} {sizes} cannot be divided evenly over {processes} processes "
                    'along its other dimensions: use fewer processes, or expand with experts="separate"'
                )
            placements[parameter] = Shard(cut)
    return placements.get


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` with the same factor in every process, for replica experts.

    The squared norm is that of the shared gradients plus the mean over processes of that of the experts'
    gradients. Without replica experts this is torch's function.

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
    """The state of a model with replica experts, in the form of stacked experts; a collective.

    Tensors that differ between processes are stacked on dimension 0 in the order of the processes.

    Args:
        model: an expanded model; wrappers keep their prefix in the keys.
        optimizer: the model's optimizer.

    Returns:
        {"model": ..., "optimizer": ...} on the CPU of process 0 and an empty dict elsewhere. Without replica
        experts the plain state dicts in every process.
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
    """Load the result of `stacked_state_dict`; each process takes its expert.

    The number of processes may differ from that of the saved experts; their mean stays the same. More
    processes start from the mean. Fewer take the first experts, moved so that their mean is the mean of all.

    Args:
        model: an expanded model.
        state: the whole state, in every process.
        optimizer: the model's optimizer, if its state was saved.
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
    """The parameters in the order of the optimizer's state dict."""
    groups = [] if optimizer is None else optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]]


def _stacked(value: Tensor, peers: Peers | None) -> Tensor:
    """A tensor on the CPU, or on the first process those of all processes stacked."""
    gathered = [] if peers is None else peers.gather(whole(value))
    return torch.stack([each.cpu() for each in gathered]) if gathered else whole(value).cpu()


def _share(stacked: Tensor, peers: Peers, keep_mean: bool = False) -> Tensor:
    """This process's expert among the saved ones."""
    if peers.rank >= len(stacked):
        return stacked.mean(0)
    mine = stacked[peers.rank]
    if keep_mean and peers.size < len(stacked):
        mine = mine + stacked.mean(0) - stacked[: peers.size].mean(0)
    return mine
