"""`Dispatcher`: the contract between a `MoE` and whatever sends its units to experts.

Axes, in docstrings and at the end of names (`block_ECD`):

    T  units that are dealt to experts: tokens, or whole images
    E  experts
    C  capacity: the slots of one expert
    D  channels of a token; for images all dimensions of one image
    K  experts that a router sends each token to
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn

from ewavit.core.draws import new_key

State = TypeVar("State")


class Dispatcher(nn.Module, Generic[State]):
    """Sends units to experts and puts the results back; `State` is what `combine` needs from `dispatch`.

    The shape (E, C, D) depends on T alone, never on values, so one batched matmul serves every dispatcher,
    `torch.compile` sees static shapes and nothing waits for the device.
    """

    routed: ClassVar[bool] = False  # whether eval mode dispatches too, instead of using the mean expert

    def __init__(self) -> None:
        super().__init__()
        self.key = new_key()  # of its draws; not a buffer: neither the state dict nor `.to()` contains it

    def dispatch(self, x_TD: Tensor) -> tuple[Tensor, State]:
        """Send units to experts.

        Returns:
            The block (E, C, D), zeros in slots without a unit, and the state for `combine`.
        """
        raise NotImplementedError

    def combine(self, block_ECD: Tensor, state: State) -> Tensor:
        """Put the experts' outputs back: (E, C, D) -> (T, D), each unit in its place."""
        raise NotImplementedError

    def compute(self, x_TD: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
        """Dispatch, apply the experts to the block, combine."""
        block, state = self.dispatch(x_TD)
        return self.combine(experts(block), state)

    def describe(self, unit: str) -> str:
        """How units are dealt, for `summary`."""
        return f"by {unit}"
