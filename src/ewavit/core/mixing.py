"""Experts that all see every token: fused in weight space, or mixed per token by a gate beside a frozen FFN.

`Fusion` follows what is known of ExFusion (arXiv 2603.27965), `Hybrid` the hybrid experts of Emotion-Qwen
(arXiv 2505.06685); docs/relatives.md says what is our reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ewavit.core.dispatch import Dispatcher
from ewavit.core.experts import SeparateExperts
from ewavit.errors import EwavitError

MOMENTUM = 0.01  # of the running mean of a gate, per training pass


class Mixer(Dispatcher[None]):
    """A dispatcher that deals nothing: `mix` computes with all experts at once."""

    def mix(self, experts: SeparateExperts, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the FFN's output, in the FFN's shape; further arguments are the FFN's."""
        raise NotImplementedError

    @property
    def weights(self) -> Tensor:
        """(E,), the weight of each expert in the collapsed FFN; their sum is 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class Fusion:
    """Settings of fusion: before every pass the experts become one FFN, `W = sum_i a_i W_i` with learned a.

    Args:
        spread: how far the experts start apart, relative to each weight's root mean square; equal experts
            would have equal gradients for ever. Their mean is the FFN.

    Raises:
        EwavitError: the spread is negative or not finite.
    """

    spread: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.spread < math.inf:
            raise EwavitError(f"spread={self.spread} is out of range: choose 0 or more")

    @torch.no_grad()
    def mixer(self, experts: SeparateExperts, dim: int, channels_first: bool) -> Mixer:
        """Move fresh experts apart, and return what fuses them."""
        for _, values in experts.values_by_parameter():
            noise = torch.randn(len(values), *values[0].shape).to(values[0])
            noise -= noise.mean(0)
            for value, move in zip(values, noise, strict=True):
                value += self.spread * value.square().mean().sqrt() * move
        return Fused(experts.num_experts)


class Fused(Mixer):
    """One FFN with the weights `sum_i a_i W_i`; a is the softmax of E learned numbers, equal at the start."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.fusion = nn.Parameter(torch.zeros(num_experts))

    @property
    def weights(self) -> Tensor:
        return self.fusion.softmax(0)

    def mix(self, experts: SeparateExperts, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = functional_call(*experts.mean(self.weights), (x, *args), kwargs)
        return y

    def describe(self, unit: str) -> str:
        return "fused in weight space"


@dataclass(frozen=True)
class Hybrid:
    """Settings of hybrid experts: the FFN, frozen, beside trained copies, mixed per token by a learned gate.

    Expert 0 is the general expert. Collapse weights the experts by the running mean of their gates.

    Args:
        specialists: number of trained copies.

    Raises:
        EwavitError: it is below 1.
    """

    specialists: int = 1

    def __post_init__(self) -> None:
        if self.specialists < 1 or self.specialists != int(self.specialists):
            raise EwavitError(f"specialists={self.specialists} trains no expert: choose 1 or more")

    def mixer(self, experts: SeparateExperts, dim: int, channels_first: bool) -> Mixer:
        """Freeze the general expert, and return the gate."""
        experts.copies[0].requires_grad_(False)
        return Gate(experts.num_experts, dim, channels_first)


class Gate(Mixer):
    """A softmax over all experts for each token, linear in the token; all experts equal at the start."""

    routed = True
    mean: Tensor

    def __init__(self, num_experts: int, dim: int, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.weight = nn.Parameter(torch.zeros(num_experts, dim))
        self.register_buffer("mean", torch.full((num_experts,), 1 / num_experts))

    @property
    def weights(self) -> Tensor:
        return self.mean / self.mean.sum()

    def mix(self, experts: SeparateExperts, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        last = x.movedim(1, -1) if self.channels_first else x
        gates = F.linear(last, self.weight).softmax(-1)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(gates.flatten(0, -2).mean(0).to(self.mean.dtype), MOMENTUM)
        axis = 1 if self.channels_first else -1
        parts = [gate.unsqueeze(axis) for gate in gates.unbind(-1)]
        each = [gate * ffn(x, *args, **kwargs) for gate, ffn in zip(parts, experts.copies, strict=True)]
        return torch.stack(each).sum(0)

    def describe(self, unit: str) -> str:
        return "mixed by a gate"


def refuse_moving_frozen(dispatcher: Dispatcher[Any]) -> None:
    """Raise where averaging would move the frozen general expert."""
    if isinstance(dispatcher, Gate):
        raise EwavitError("averaging would move the frozen expert of a hybrid: use share_rate=0")
