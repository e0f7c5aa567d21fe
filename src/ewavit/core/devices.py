"""Experts whose parameters are sharded (FSDP2, HSDP): where to cut them, the part that is here, the whole.

Nothing here talks to other processes but `whole` and `summed`. `torch.distributed.tensor` is imported when a
model is sharded, not with ewavit.
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
