"""Averaging the experts after every optimizer step: Eq. 6 of arXiv 2308.06093 as a lerp towards the mean.

`W_i <- (1 - beta) W_i + sum_{j != i} beta / (N - 1) W_j` equals `W_i <- W_i - D (W_i - mean)` with
`D = beta N / (N - 1)`. beta is the share rate, 0 <= beta <= (N - 1) / N; the upper end is full averaging.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ewavit.core.moe import moe_layers, require_moe_layers
from ewavit.core.replicas import check_peers
from ewavit.errors import EwavitError

CHECK_EVERY = 100  # optimizer steps between two checks that processes with replica experts agree
Schedule = Callable[[int], float]  # number of optimizer steps done (1, 2, ...) -> share rate


@dataclass(frozen=True)
class Constant:
    """The same share rate at every step."""

    rate: float

    def __call__(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True)
class LinearRamp:
    """From 0 up to `rate` in `steps` steps along a straight line, then constant."""

    rate: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.rate * min(1.0, step / self.steps) if self.steps > 0 else self.rate


@dataclass(frozen=True)
class CosineRamp:
    """From 0 up to `rate` in `steps` steps along half a cosine, flat at both ends, then constant."""

    rate: float
    steps: int

    def __call__(self, step: int) -> float:
        done = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        return self.rate * (0.5 - 0.5 * math.cos(math.pi * done))


@dataclass(frozen=True)
class Early:
    """Another schedule up to and including step `until`, then no averaging: the experts specialise."""

    schedule: Schedule
    until: int

    def __call__(self, step: int) -> float:
        return self.schedule(step) if step <= self.until else 0.0


def full_share_rate(num_experts: int) -> float:
    """The share rate (N - 1) / N at which averaging makes all experts equal."""
    return (num_experts - 1) / num_experts


def check_share_rate(share_rate: float, num_experts: int) -> float:
    """Return the share rate if it is in range.

    Raises:
        EwavitError: it is outside 0 <= share_rate <= (N - 1) / N, so experts would overshoot their mean.
    """
    highest = full_share_rate(num_experts)
    if not 0.0 <= share_rate <= highest * (1 + 1e-12):
        raise EwavitError(
            f"share rate {share_rate} is out of range for {num_experts} experts: "
            f"choose 0 <= share rate <= {highest:.4g} (full averaging)"
        )
    return share_rate


def lerp_weight(share_rate: float, num_experts: int) -> float:
    """D = beta N / (N - 1): the fraction of its deviation from the mean that averaging removes (Eq. 6).

    Raises:
        EwavitError: the share rate is outside 0 <= beta <= (N - 1) / N.
    """
    if num_experts == 1:
        return 0.0  # a single expert is its own mean, whatever the share rate
    return min(1.0, check_share_rate(share_rate, num_experts) * num_experts / (num_experts - 1))


@torch.no_grad()
def average_experts_(model: nn.Module, share_rate: float) -> None:
    """Pull the experts of every MoE of a model towards their mean, in place (Eq. 6).

    Half-precision parameters are averaged in float32. The parameter objects and the experts' mean stay the
    same.

    Args:
        model: an expanded model.
        share_rate: beta, 0 <= beta <= (N - 1) / N.

    Raises:
        EwavitError: the model has no MoE, or the share rate is out of range.
    """
    layers = require_moe_layers(model).values()
    weights = [lerp_weight(share_rate, moe.num_experts) for moe in layers]  # all are checked before any moves
    begun = [
        moe.experts.pull_towards_mean_(weight) for moe, weight in zip(layers, weights, strict=True) if weight
    ]
    for finish in begun:  # by now the weights of replica experts in all layers are on their way
        if finish is not None:
            finish()


@torch.no_grad()
def average_experts_reference_(model: nn.Module, share_rate: float) -> None:
    """`average_experts_` as the explicit sum of Eq. 6; the tests compare the two."""
    for moe in moe_layers(model).values():
        n = moe.num_experts
        for _, values in moe.experts.values_by_parameter() if n > 1 else ():
            old = [value.clone() for value in values]
            for i in range(n):
                others = sum(share_rate / (n - 1) * old[j] for j in range(n) if j != i)
                values[i].copy_((1 - share_rate) * old[i] + others)


class ExpertAveraging:
    """Averages the experts of a model after every optimizer step.

    Args:
        model: an expanded model.
        share_rate: beta at the end of the ramp, or a schedule `step -> beta`.
        ramp_steps: optimizer steps of a linear rise from 0 to a share rate given as a number.
        every: average only after every k-th step.

    Raises:
        EwavitError: the model has no MoE, the share rate is out of range, or `every` is below 1.

    Examples:
        >>> ExpertAveraging(model, share_rate=0.3, ramp_steps=10_000).attach(optimizer)
    """

    def __init__(
        self, model: nn.Module, share_rate: float | Schedule = 0.3, ramp_steps: int = 0, every: int = 1
    ) -> None:
        layers = require_moe_layers(model)
        if every < 1:
            raise EwavitError(f"every={every} is not a number of steps: choose 1 or more")
        if callable(share_rate):
            if ramp_steps:
                raise EwavitError("ramp_steps needs a share rate given as a number: leave one of them out")
            self.schedule: Schedule = share_rate
        else:
            for moe in layers.values():
                lerp_weight(share_rate, moe.num_experts)
            self.schedule = LinearRamp(share_rate, ramp_steps) if ramp_steps else Constant(share_rate)
        self.model = model
        self.every = every
        self.steps_done = 0
        self._hook: Any = None

    def __repr__(self) -> str:
        attached = "not attached" if self._hook is None else "attached"
        return (
            f"ExpertAveraging({self.schedule}, every={self.every}, steps_done={self.steps_done}, {attached})"
        )

    @property
    def share_rate(self) -> float:
        """The share rate of the latest step."""
        return float(self.schedule(self.steps_done))

    def attach(self, optimizer: torch.optim.Optimizer) -> ExpertAveraging:
        """Average after every `optimizer.step()` that a GradScaler did not skip; returns self.

        The optimizer may be inside wrappers that hold it as `.optimizer` (accelerate, Lightning).

        Raises:
            EwavitError: already attached, or the optimizer lacks expert parameters (built before `expand`).
        """
        if self._hook is not None:
            raise EwavitError("this ExpertAveraging is already attached: call detach() first")
        optimizer = unwrapped_optimizer(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        half: dict[str, torch.dtype] = {}
        for layer, moe in moe_layers(self.model).items():
            for name, parameter in moe.experts.named_parameters():
                if parameter.requires_grad and id(parameter) not in held:
                    raise EwavitError(
                        f"the optimizer does not hold {layer}.experts.{name}: "
                        "build the optimizer after ewavit.expand(model)"
                    )
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    half[layer] = parameter.dtype
        for layer, dtype in half.items():
            warnings.warn(
                f"{layer} has {dtype} weights, so averaging may round to no change: "
                "keep float32 weights and use autocast",
                stacklevel=2,
            )
        self._hook = optimizer.register_step_post_hook(self._after_step)
        return self

    def detach(self) -> None:
        """Stop averaging after the optimizer's steps."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A GradScaler steps a fused optimizer even if the gradients overflowed.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not float(found_inf):
            self.step()

    def step(self) -> None:
        """Count one optimizer step and average; call it yourself only in loops without `attach`."""
        self.steps_done += 1
        if self.steps_done <= 2 or self.steps_done % CHECK_EVERY == 0:
            check_peers(self.model)
        if self.steps_done % self.every == 0:
            average_experts_(self.model, self.share_rate)

    def state_dict(self) -> dict[str, int]:
        """The number of steps done; the schedule is not part of it."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved number of steps."""
        self.steps_done = int(state["steps_done"])


def unwrapped_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside wrappers that hold it as `.optimizer` (accelerate, Lightning)."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
