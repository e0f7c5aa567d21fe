"""Experts whose parameters are sharded (FSDP2, HSDP): where to cut them, the part that is here, the whole.

Nothing here talks to other processes but `whole` and `summed`. `torch.distributed.tensor` is imported when a
model is sharded, not with ewavit.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .errors import EwavitError
from .experts import StackedExperts
from .moe import moe_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard


def expert_placement(
    model: nn.Module, mesh: DeviceMesh | None = None
) -> Callable[[nn.Parameter], Shard | None]:
    """A `shard_placement_fn` for `fully_shard` that cuts stacked experts off their expert dimension.

    Each process then holds its part of every expert, and the averaging needs no communication. Ask for it
    once, before the first `fully_shard`, and hand it to every one.

    Args:
        model: an expanded model, not sharded yet.
        mesh: the mesh that `fully_shard` gets, 1-D or (replicate, shard); all processes unless given.

    Raises:
        EwavitError: no MoE layer, replica experts (docs/distributed.md shards them), or a parameter has no
            such dimension that the processes divide evenly.

    Example:
        >>> placement = ewa.expert_placement(model, mesh)
        >>> for block in model.blocks:
        ...     fully_shard(block, mesh=mesh, shard_placement_fn=placement)
        >>> fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    """
    from torch.distributed.tensor import Shard

    layers = moe_layers(model)
    if not layers:
        raise EwavitError("the model has no MoE layer: call ewavit.expand(model) first")
    if any(moe.experts.peers is not None for moe in layers.values()):
        raise EwavitError(
            "replica experts are not stacked: leave out expert_placement, and shard each MoE over the "
            "processes of its replica, fully_shard(moe, mesh=mesh['shard'])"
        )
    processes = mesh.size(mesh.ndim - 1) if mesh is not None else dist.get_world_size()
    # By weak reference: the parameters themselves are replaced, and must be freed.
    placements: MutableMapping[nn.Parameter, Shard] = WeakIdKeyDictionary()
    for layer, moe in layers.items():
        stacked = isinstance(moe.experts, StackedExperts)
        for name, parameter in moe.experts.named_parameters() if stacked else ():
            sizes = tuple(parameter.shape)
            cut = next((d for d in range(1, len(sizes)) if sizes[d] % processes == 0), None)
            if cut is None:
                raise EwavitError(
                    f"{layer}.experts.{name} {sizes} cannot be cut evenly over {processes} processes off its "
                    'expert dimension: shard over fewer, or expand with experts="separate"'
                )
            placements[parameter] = Shard(cut)
    return placements.get


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: a view of a `DTensor`'s, else the tensor itself."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; for a `DTensor` every process of its mesh must call."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`."""
    return hasattr(tensor, "device_mesh")


def sharded_like(tensor: Tensor, part: Tensor) -> Tensor:
    """A `DTensor` that is sharded as another, of which this process holds the given part."""
    from torch.distributed.tensor import DTensor

    like = cast(DTensor, tensor)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def cut_like(tensor: Tensor, full: Tensor) -> Tensor:
    """A tensor that every process has in full, sharded as another one."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = cast(DTensor, tensor)
    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def summed(value: Tensor, like: Tensor) -> Tensor:
    """The sum of a value over the processes among which a tensor is sharded; each must call."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    like = cast(DTensor, like)
    placements = [Partial() if place.is_shard() else Replicate() for place in like.placements]
    return DTensor.from_local(value, like.device_mesh, placements, run_check=False).full_tensor()
