"""Sharded tensors (FSDP2, HSDP): the local part and the whole; `Peers`, the processes of replica experts.

Only `whole`, `summed` and `Peers` communicate. `torch.distributed.tensor` is imported only if a model is
sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ewavit.errors import EwavitError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """A half-precision tensor as float32; others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: a view of a `DTensor`'s local tensor, or the tensor itself."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; a collective over the mesh of a `DTensor`."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`."""
    return hasattr(tensor, "device_mesh")


def sharded_like(tensor: Tensor, part: Tensor) -> Tensor:
    """A `DTensor` with the sharding of another and `part` as its local tensor."""
    from torch.distributed.tensor import DTensor

    like = cast(DTensor, tensor)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def cut_like(tensor: Tensor, full: Tensor) -> Tensor:
    """A tensor that every process has in full, sharded like another tensor."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = cast(DTensor, tensor)
    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def summed(value: Tensor, like: Tensor) -> Tensor:
    """The sum of a value over the processes that share a tensor; a collective if the tensor is sharded."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    like = cast(DTensor, like)
    placements = [Partial() if place.is_shard() else Replicate() for place in like.placements]
    return DTensor.from_local(value, like.device_mesh, placements, run_check=False).full_tensor()


class Peers:
    """The data-parallel processes of replica experts, one expert each; all processes by default.

    Every method is a collective.

    Raises:
        EwavitError: torch.distributed is not running.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise EwavitError(
                'placement="replicas" needs one process per expert: start with torchrun and call '
                "torch.distributed.init_process_group() before ewavit.expand"
            )
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self  # an averaged copy of a model lives in the same processes

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums over the processes, at least in float32, by one all-reduce for all tensors."""
        return self.begin_sum(tensors)()

    def begin_sum(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Start the all-reduce; the returned function waits for it and returns the sums."""
        flat = torch.cat([at_least_float32(tensor.reshape(-1)) for tensor in tensors])
        sent = dist.all_reduce(flat, group=self.group, async_op=True)

        def sums() -> list[Tensor]:
            sent.wait()
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

        return sums

    def range(self, values: Tensor) -> Tensor:
        """The largest minus the smallest of each value over the processes."""
        ends = torch.stack([values, -values])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        return ends.sum(0)

    def broadcast_(self, tensor: Tensor) -> None:
        """Overwrite a tensor with the first process's."""
        dist.broadcast(tensor, group=self.group, group_src=0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes by rank, on the first process; an empty list on the others."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor.contiguous(), gathered, group=self.group, group_dst=0)
        return gathered or []
