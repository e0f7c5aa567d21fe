"""Averaging the experts after every optimizer step: Eq. 6 of arXiv 2308.06093 as a lerp towards the mean.

`W_i <- (1 - beta) W_i + sum_{j != i} beta / (N - 1) W_j` equals `W_i <- W_i - D (W_i - mean)` with
`D = beta N / (N - 1)`. beta is the share rate, 0 <= beta <= (N - 1) / N; the upper end is full averaging.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ewavit.core.devices import local
from ewavit.core.experts import Read, StackedExperts
from ewavit.core.mixing import refuse_moving_frozen
from ewavit.core.moe import moe_layers, require_moe_layers
from ewavit.core.replicas import check_peers
from ewavit.core.steps import STEPS_KEY, held_by, only_makes_state, set_step, unwrapped_optimizer
from ewavit.errors import EwavitError

# Optimizers that use the norm or the shape of a whole tensor, which stacked experts share.
_WHOLE_TENSORS = (
    "muon", "lamb", "lars", "larc", "adafactor", "novograd", "adamp", "sgdp", "soap", "shampoo", "kron",
    "mars",
)  # fmt: skip
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
    _average(model, partial(lerp_weight, share_rate), [local])


def _average(model: nn.Module, weight_of: Callable[[int], float], reads: Sequence[Read]) -> None:
    """Average what each of `reads` gives for the parameters of N experts, with the lerp weight for N."""
    layers = require_moe_layers(model).values()
    weights = [weight_of(moe.num_experts) for moe in layers]  # all are checked before any moves
    for moe, weight in zip(layers, weights, strict=True):
        if weight:
            refuse_moving_frozen(moe.dispatcher)
    reads = [_once(read) for read in reads]
    begun = [
        moe.experts.pull_towards_mean_(weight, read)
        for moe, weight in zip(layers, weights, strict=True)
        for read in reads
        if weight
    ]
    for finish in begun:  # by now the weights of replica experts in all layers are on their way
        if finish is not None:
            finish()


def _once(read: Read) -> Read:
    """Leave out parameters that were read before: mixtures may share them (tied weights)."""
    seen: set[nn.Parameter] = set()

    def first(parameter: nn.Parameter) -> Tensor | None:
        known = parameter in seen
        seen.add(parameter)
        return None if known else read(parameter)

    return first


@torch.no_grad()
def average_experts_reference_(model: nn.Module, share_rate: float) -> None:
    """`average_experts_` as the explicit sum of Eq. 6; the tests compare the two."""
    once = _once(local)
    for moe in moe_layers(model).values():
        n = moe.num_experts
        for _, values in moe.experts.values_by_parameter(once) if n > 1 else ():
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
        every: average only after every k-th step, as strongly as k averagings together, so that deviations
            from the mean decay as fast: the lerp weight is 1 - (1 - D_1) ... (1 - D_k).

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
        self._steps_done = 0
        self._optimizers: list[Optimizer] = []
        self._stepped: set[int] = set()  # those of the optimizers that were stepped since the last averaging
        self._hooks: list[Any] = []

    @property
    def steps_done(self) -> int:
        """Optimizer steps done. Attached, the count is in the optimizer's state and travels with it."""
        if not self._optimizers:
            return self._steps_done
        return int(self._optimizers[0].param_groups[0].get(STEPS_KEY, self._steps_done))

    @steps_done.setter
    def steps_done(self, steps: int) -> None:
        self._steps_done = steps
        for optimizer in self._optimizers:
            optimizer.param_groups[0][STEPS_KEY] = steps

    def __repr__(self) -> str:
        attached = "attached" if self._hooks else "not attached"
        return (
            f"ExpertAveraging({self.schedule}, every={self.every}, steps_done={self.steps_done}, {attached})"
        )

    @property
    def share_rate(self) -> float:
        """The share rate of the latest step."""
        return float(self.schedule(self.steps_done))

    def lerp_weight(self, num_experts: int) -> float:
        """The lerp weight of the averaging after the latest step; 0 between two averagings.

        Args:
            num_experts: N of the layer.
        """
        done, weight = self.steps_done, 0.0
        if done % self.every == 0:
            for step in range(max(1, done - self.every + 1), done + 1):
                weight += (1 - weight) * lerp_weight(float(self.schedule(step)), num_experts)
        return weight

    def attach(self, *optimizers: Optimizer) -> ExpertAveraging:
        """Average after every `optimizer.step()` that a GradScaler did not skip; returns self.

        The count of steps is kept in the optimizer's first parameter group, so it is saved and loaded with
        the optimizer's state dict.

        Args:
            optimizers: one, or several that hold parts of the model: the averaging then follows when each of
                them has stepped. Wrappers are looked through: accelerate, Lightning, two-step SAM, Lookahead.

        Raises:
            EwavitError: already attached, an optimizer that was built before `expand`, or one that uses whole
                tensors while the experts are stacked in one.
        """
        if self._hooks:
            raise EwavitError("this ExpertAveraging is already attached: call detach() first")
        inner = [unwrapped_optimizer(optimizer) for optimizer in optimizers]
        experts = self._check_held(inner)
        self._optimizers = [optimizer for optimizer in inner if experts & held_by(optimizer)] or inner[:1]
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in self._optimizers]
        for optimizer in self._optimizers:
            optimizer.param_groups[0].setdefault(STEPS_KEY, self._steps_done)
            self._hooks.append(optimizer.register_load_state_dict_post_hook(self._after_load))
        self._after_load()
        return self

    def _after_load(self, optimizer: Optimizer | None = None) -> None:
        """Draw the partitions of the step that the optimizer's state counts."""
        set_step(self.model, self.steps_done)

    def _check_held(self, optimizers: list[Optimizer]) -> set[int]:
        """The identities of all expert parameters, if the optimizers can train them."""
        kinds = {identity: each for each in optimizers for identity in held_by(each)}
        experts: set[int] = set()
        half: dict[str, torch.dtype] = {}
        for layer, moe in moe_layers(self.model).items():
            stacked = isinstance(moe.experts, StackedExperts) and moe.num_experts > 1
            for name, parameter in moe.experts.named_parameters():
                experts.add(id(parameter))
                if parameter.requires_grad and id(parameter) not in kinds:
                    raise EwavitError(self._why_not_held(f"{layer}.experts.{name}", set(kinds)))
                own = kinds.get(id(parameter))
                if stacked and own and looks_at_whole_tensors(type(own).__name__, own.defaults):
                    kind = type(own).__name__ + (" with caution" if own.defaults.get("caution") else "")
                    raise EwavitError(
                        f"{kind} uses the shape, norm or mean of a whole tensor, and {layer} stacks its "
                        'experts in one: use ewavit.expand(model, experts="separate")'
                    )
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    half[layer] = parameter.dtype
        for layer, dtype in half.items():
            warnings.warn(
                f"{layer} has {dtype} weights, so averaging may round to no change: "
                "keep float32 weights and use autocast",
                stacklevel=3,
            )
        return experts

    def _why_not_held(self, name: str, held: set[int]) -> str:
        here = {id(parameter) for parameter in self.model.parameters()}
        if held - here:
            why = "build the optimizer after ewavit.expand(model), from the model that is trained"
        else:
            why = "its parameter groups leave the experts out: add them, or pass all optimizers to attach"
        return f"the optimizer does not hold {name}: {why}"

    def detach(self) -> None:
        """Stop averaging after the optimizer's steps."""
        self._steps_done = self.steps_done
        for hook in self._hooks:
            hook.remove()
        for optimizer in self._optimizers:  # another averaging of this optimizer starts its own count
            optimizer.param_groups[0].pop(STEPS_KEY, None)
        self._hooks, self._optimizers = [], []
        self._stepped.clear()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A GradScaler steps a fused optimizer even if the gradients overflowed.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf):
            return
        if only_makes_state(optimizer):
            return
        if id(optimizer) in self._stepped:  # the others do not step every time
            self._stepped.clear()
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._optimizers):
            self._stepped.clear()
            if self.steps_done == 0 and len(self._optimizers) == 1:
                self._check_gradients()
            self.step()

    def _check_gradients(self) -> None:
        """After the first step: experts that no gradient reached are never called, or not through the MoE."""
        if all(parameter.grad is None for parameter in self.model.parameters()):
            return  # a step without a backward pass
        for layer, moe in moe_layers(self.model).items():
            learning = [p for p in moe.experts.parameters() if p.requires_grad]
            if learning and all(p.grad is None for p in learning):
                raise EwavitError(
                    f"no expert of {layer} got a gradient in the first step: the model does not call "
                    "this MoE (a replaced forward?), or its gradients were cleared too early"
                )

    def step(self) -> None:
        """Count one optimizer step and average; call it yourself only in loops without `attach`."""
        self.steps_done += 1
        if not self._optimizers:  # else the hook of all optimizers follows
            set_step(self.model, self.steps_done)
        if self.steps_done <= 2 or self.steps_done % CHECK_EVERY == 0:
            check_peers(self.model)
        if self.steps_done % self.every == 0:
            with torch.no_grad():
                _average(self.model, self.lerp_weight, [local, *self._weights_in_states()])

    def _weights_in_states(self) -> Iterator[Read]:
        """Weights in an optimizer's state: schedule-free's z."""
        for optimizer in self._optimizers:
            if "schedulefree" in type(optimizer).__name__.lower():
                yield partial(_weights_in_state, optimizer)

    def state_dict(self) -> dict[str, int]:
        """The number of steps done; the schedule is not part of it."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved number of steps; a different count in the optimizer's state is warned of."""
        saved, here = int(state["steps_done"]), self.steps_done
        if self._optimizers and here not in (0, saved):
            warnings.warn(
                f"the averaging was saved after {saved} steps, the optimizer's state counts {here}: "
                f"continuing at {saved}",
                stacklevel=2,
            )
        self.steps_done = saved
        set_step(self.model, saved)


def looks_at_whole_tensors(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether an optimizer of this name uses the shape or norm of a whole tensor: not for stacked experts.

    With `caution` among its settings it scales an update by a mean over the tensor.
    """
    plain = re.sub(r"[^a-z]", "", name.lower())
    return bool(settings.get("caution")) or any(kind in plain for kind in _WHOLE_TENSORS)


def _weights_in_state(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor | None:
    z = optimizer.state.get(parameter, {}).get("z")
    return None if z is None else local(z)
