"""Random uniform partition (RUP): which token goes to which expert, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ewavit.core.dispatch import Dispatcher
from ewavit.core.draws import permutation


class Partition(NamedTuple):
    """One random partition of T units over E experts with capacity C = ceil(T / E)."""

    slots: Tensor  # (E C,) int64: the unit in each slot of the block
    positions: Tensor  # (T,) int64: the slot of each unit
    padding: Tensor | None  # (E C,) bool: the slots without a unit, fewer than E; None when E divides T


def _move(x: Tensor, slots: Tensor, positions: Tensor, padding: Tensor | None, into_slots: bool) -> Tensor:
    if not into_slots:
        return x.index_select(0, positions)
    moved = x.index_select(0, slots)
    return moved if padding is None else moved.masked_fill(padding.view(-1, *(1,) * (x.ndim - 1)), 0)


class _Move(torch.autograd.Function):
    """Move units into slots or back. Each is the gradient of the other: a gather, not a scatter-add."""

    generate_vmap_rule = True

    forward = staticmethod(_move)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, slots, positions, padding, into_slots = inputs
        ctx.save_for_backward(slots, positions, padding)
        ctx.into_slots = into_slots

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        move = _Move.apply if torch.is_grad_enabled() else _move  # apply: only for a second derivative
        slots, positions, padding = ctx.saved_tensors
        return move(grad, slots, positions, padding, not ctx.into_slots), None, None, None, None


class RandomPartition(Dispatcher[Partition]):
    """Split the units of a batch at random into `num_experts` groups of equal size (arXiv 2308.06093).

    Every unit is in one group, group sizes differ by at most one, and each unit goes to each expert with
    probability 1/N. The draw is a function of (seed, layer, optimizer step), see `core/draws.py`.

    Args:
        num_experts: number of groups, N >= 1.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def draw(self, num_units: int, device: torch.device | str = "cpu") -> Partition:
        """Draw a partition of T = `num_units` units: the same until the next optimizer step."""
        experts = self.num_experts
        capacity = -(-num_units // experts)
        num_slots = experts * capacity
        device = torch.device(device)
        order = permutation(self.key, 0, num_units, device)
        index = torch.arange(num_slots, device=device)
        if num_slots == num_units:
            return Partition(order, torch.empty_like(order).scatter_(0, order, index), None)
        # Deal the shuffled units in turn, so short groups lack one unit each. Then shuffle the groups, so
        # that no expert is short more often than another.
        deal = index.view(capacity, experts)[:, permutation(self.key, 1, experts, device)].t().reshape(-1)
        padding = deal >= num_units
        slots = torch.cat([order, order.new_zeros(num_slots - num_units)])[deal]
        target = torch.where(padding, num_units, slots)
        positions = order.new_empty(num_units + 1).scatter_(0, target, index)[:num_units]
        return Partition(slots, positions, padding)

    def dispatch(self, x_TD: Tensor) -> tuple[Tensor, Partition]:
        state = self.draw(x_TD.shape[0], x_TD.device)
        block = _Move.apply(x_TD, *state, True)
        capacity = state.slots.shape[0] // self.num_experts
        return block.view(self.num_experts, capacity, *x_TD.shape[1:]), state

    def combine(self, block_ECD: Tensor, state: Partition) -> Tensor:
        moved: Tensor = _Move.apply(block_ECD.flatten(0, 1), *state, False)
        return moved

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


def dispatch_reference(x: Tensor, state: Partition, num_experts: int) -> Tensor:
    """`RandomPartition.dispatch` for a given partition, as loops; the tests compare the two."""
    capacity = len(state.slots) // num_experts
    block = x.new_zeros(num_experts, capacity, *x.shape[1:])
    for unit, slot in enumerate(state.positions.tolist()):
        block[slot // capacity, slot % capacity] = x[unit]
    return block
