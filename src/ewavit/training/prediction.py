"""`SpreadPrediction` predicts during training how far apart the experts are (docs/theory.md)."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ewavit.core.averaging import ExpertAveraging
from ewavit.core.experts import Experts, SeparateExperts
from ewavit.core.moe import MoE, require_moe_layers
from ewavit.core.steps import unwrapped_optimizer
from ewavit.errors import EwavitError


class StepSettings(NamedTuple):
    """One optimizer step on deviations d with momentum m and gradients x, and the averaging after it.

    m <- momentum m + gain x
    d <- (1 - lerp) (decay d - lr (from_momentum m + from_gradient x))
    """

    lr: float
    momentum: float = 0.0  # of SGD; beta1 of Adam
    gain: float = 1.0  # 1 - dampening of SGD; 1 - beta1 of Adam
    from_momentum: float = 1.0  # Adam's bias correction 1 / (1 - beta1^t); the momentum with Nesterov
    from_gradient: float = 0.0  # 1 with Nesterov
    decay: float = 1.0  # 1 - lr times decoupled weight decay


class DeviationMoments(NamedTuple):
    """Second moments of deviations d and of their momentum m: mean over experts, sum over weights."""

    d_d: float = 0.0
    d_m: float = 0.0
    m_m: float = 0.0

    def advance(self, noise: float, step: StepSettings, lerp: float, slope: float = 0.0) -> DeviationMoments:
        """One optimizer step and averaging; exact for gradients x = g + slope d with white noise g.

        Args:
            noise: second moment of g, mean over experts, sum over weights.
            step: settings of the optimizer.
            lerp: D of this step, 0 without averaging.
            slope: of the gradient along the deviations, from curvature and coupled weight decay.
        """
        lr, momentum, gain, from_momentum, from_gradient, decay = step
        kept, total = 1 - lerp, from_momentum * gain + from_gradient
        a, b = kept * (decay - lr * total * slope), -kept * lr * from_momentum * momentum
        e = -kept * lr * total
        c, f = gain * slope, momentum
        return DeviationMoments(
            a * a * self.d_d + 2 * a * b * self.d_m + b * b * self.m_m + e * e * noise,
            a * c * self.d_d + (a * f + b * c) * self.d_m + b * f * self.m_m + e * gain * noise,
            c * c * self.d_d + 2 * c * f * self.d_m + f * f * self.m_m + gain * gain * noise,
        )


class _Part:
    """The expert parameters of one MoE layer in one optimizer group, with their statistics."""

    def __init__(self, layer: str, group: int | None, num_experts: int) -> None:
        self.layer, self.group, self.num_experts = layer, group, num_experts
        self.families: list[list[Tensor]] = []
        self.noise = self.along = self.apart = 0.0  # smoothed |x|^2, d x and |d|^2 of the observations
        self.moments = DeviationMoments()

    @property
    def floats(self) -> list[float]:
        return [self.noise, self.along, self.apart, *self.moments]


class SpreadPrediction:
    """Predicts `ewavit.expert_spread` during training from gradients, learning rates and share rates.

    `observe` measures how much the experts' preconditioned gradients differ (the noise) and how that depends
    on the deviations (the slope). `step` advances `DeviationMoments` with the settings of the latest step.
    The spread itself is measured only at the start.

    Args:
        model: an expanded model with its starting weights.
        optimizer: torch's SGD, Adam or AdamW without amsgrad, also inside wrappers that hold it as
            `.optimizer`.
        averaging: averages the model's experts.

    Raises:
        EwavitError: another optimizer (see `supports`), or a model without MoE.

    Examples:
        >>> prediction = SpreadPrediction(model, optimizer, averaging)
        >>> loss.backward()
        >>> if step % 10 == 0:
        ...     prediction.observe()
        >>> optimizer.step()
        >>> prediction.step()  # before the learning rate changes
        >>> prediction.relative(), expert_spread(model)
    """

    # Weight of the latest observation: the noise drifts during training, the slope scatters more.
    NOISE_WEIGHT = 0.5
    SLOPE_WEIGHT = 0.1

    def __init__(self, model: nn.Module, optimizer: Optimizer, averaging: ExpertAveraging) -> None:
        self.optimizer, self.averaging = unwrapped_optimizer(optimizer), averaging
        if not self.supports(optimizer):
            raise EwavitError(
                f"the spread under {type(self.optimizer).__name__} cannot be predicted: use torch's SGD, "
                "Adam or AdamW without amsgrad, or leave the prediction out"
            )
        self._steps = self._observations = 0
        self._averaging_steps = averaging.steps_done
        group_of = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        parts: dict[tuple[str, int | None], _Part] = {}
        for layer, moe in layers_with_all_experts(model).items():
            for family in tensors_by_parameter(moe.experts):
                key = (layer, group_of.get(id(family[0])))  # None: frozen
                part = parts.setdefault(key, _Part(*key, moe.num_experts))
                part.families.append(family)
                start = deviations_from_mean([parameter.detach().float() for parameter in family])
                d_d = part.moments.d_d + float(start.square().sum()) / moe.num_experts
                part.moments = DeviationMoments(d_d)
        self._parts = list(parts.values())

    @staticmethod
    def supports(optimizer: Optimizer) -> bool:
        """Whether the spread under this optimizer can be predicted."""
        optimizer = unwrapped_optimizer(optimizer)
        amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
        return type(optimizer) in (SGD, Adam, AdamW) and not amsgrad

    @torch.no_grad()
    def observe(self, scale: float = 1.0) -> None:
        """Measure the gradient noise, from the gradients of the next `optimizer.step()`.

        Call it before the first step and then about every tenth, at least once per epoch. It takes two to
        three times as long as a fused optimizer step and waits for the device. Infinite or nan gradients are
        ignored.

        Args:
            scale: factor that the gradients still contain: `scaler.get_scale()` before `unscale_`, else 1.
        """
        rows = torch.stack([self._measure(part, scale) for part in self._parts]).tolist()
        if not torch.tensor(rows).isfinite().all():
            return
        self._observations += 1
        of_noise, of_slope = (max(w, 1 / self._observations) for w in (self.NOISE_WEIGHT, self.SLOPE_WEIGHT))
        for part, (noise, along, apart) in zip(self._parts, rows, strict=True):
            part.noise += of_noise * (noise - part.noise)
            part.along += of_slope * (along - part.along)
            part.apart += of_slope * (apart - part.apart)

    def _measure(self, part: _Part, scale: float) -> Tensor:
        """|x|^2, d x and |d|^2 of a part: mean over experts, sum over weights."""
        total = torch.zeros(3, device=part.families[0][0].device)
        for family in part.families:
            if part.group is None or any(parameter.grad is None for parameter in family):
                continue
            x = deviations_from_mean([self._direction(parameter, part.group, scale) for parameter in family])
            d = deviations_from_mean([parameter.float() for parameter in family])
            total += torch.stack([(x * x).sum(), (d * x).sum(), (d * d).sum()]) / part.num_experts
        return total

    def _direction(self, parameter: Tensor, index: int, scale: float) -> Tensor:
        """The gradient as the optimizer's momentum sees it: preconditioned, with coupled weight decay."""
        group = self.optimizer.param_groups[index]
        gradient = cast(Tensor, parameter.grad).float() / scale
        if not group.get("decoupled_weight_decay", False):
            gradient = gradient + group["weight_decay"] * parameter
        if isinstance(self.optimizer, SGD):
            return gradient
        state = self.optimizer.state.get(parameter, {})
        beta2, done = float(group["betas"][1]), state.get("step", 0)
        second = (1 - beta2) * gradient.square()  # Adam's second moment at the coming step
        if "exp_avg_sq" in state:
            second += beta2 * state["exp_avg_sq"]
        denominator: Tensor = (second / (1 - beta2 ** (done + 1))).sqrt() + group["eps"]
        return gradient / denominator

    def step(self) -> None:
        """Advance by one step; call it after `optimizer.step()` and before the learning rate changes.

        It does nothing after a step that a GradScaler skipped, since the averaging did not count it.
        """
        if self.averaging.steps_done == self._averaging_steps:
            return
        self._averaging_steps = self.averaging.steps_done
        self._steps += 1
        for part in self._parts:
            lerp = self.averaging.lerp_weight(part.num_experts)
            # A negative slope is mostly scatter, and would let the prediction grow without bound.
            slope = max(0.0, part.along / part.apart) if part.apart else 0.0
            noise = max(0.0, part.noise - slope * part.along)
            settings = StepSettings(0.0) if part.group is None else self._settings(part.group)
            part.moments = part.moments.advance(noise, settings, lerp, slope)

    def _settings(self, index: int) -> StepSettings:
        group = self.optimizer.param_groups[index]
        lr = float(group["lr"])
        if isinstance(self.optimizer, SGD):
            momentum = group["momentum"]
            gain = 1 - group["dampening"] if self._steps > 1 else 1.0  # torch's buffer starts as the gradient
            return StepSettings(lr, momentum, gain, *((momentum, 1.0) if group["nesterov"] else ()))
        beta1 = float(group["betas"][0])
        correction = 1 / (1 - beta1**self._steps)
        decay = 1 - lr * group["weight_decay"] if group.get("decoupled_weight_decay", False) else 1.0
        return StepSettings(lr, beta1, 1 - beta1, correction, decay=decay)

    @torch.no_grad()
    def relative(self) -> dict[str, float]:
        """The predicted sqrt(mean_i |W_i - Wm|^2) / |Wm| by layer, to compare with `expert_spread(model)`."""
        squares: dict[str, list[float]] = {}
        for part in self._parts:
            apart_and_norm = squares.setdefault(part.layer, [0.0, 0.0])
            apart_and_norm[0] += part.moments.d_d
            for family in part.families:
                stacked = family[0] if len(family) == 1 else torch.stack(family)
                apart_and_norm[1] += float(stacked.float().mean(0).square().sum())
        return {layer: (d / w) ** 0.5 if w else 0.0 for layer, (d, w) in squares.items()}

    def state_dict(self) -> dict[str, Any]:
        """The numbers that a resumed run needs to predict the same."""
        numbers = [part.floats for part in self._parts]
        return {"steps": self._steps, "observations": self._observations, "parts": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved numbers of the same model and optimizer groups.

        Raises:
            EwavitError: the numbers belong to another model.
        """
        if len(state["parts"]) != len(self._parts):
            raise EwavitError(
                f"the saved prediction has {len(state['parts'])} parts, this model {len(self._parts)}: "
                "load the state of the same model and optimizer groups"
            )
        self._steps, self._observations = int(state["steps"]), int(state["observations"])
        for part, (noise, along, apart, *moments) in zip(self._parts, state["parts"], strict=True):
            part.noise, part.along, part.apart = noise, along, apart
            part.moments = DeviationMoments(*moments)


def layers_with_all_experts(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers of a model by name; replica experts are refused."""
    layers = require_moe_layers(model)
    if any(moe.experts.peers is not None for moe in layers.values()):
        raise EwavitError(
            "the spread of replica experts cannot be predicted, because each process has only one expert: "
            "leave the prediction out"
        )
    return layers


def tensors_by_parameter(experts: Experts) -> list[list[Tensor]]:
    """For each parameter of the FFN the tensors in the optimizer: one (E, ...), or one per expert."""
    if isinstance(experts, SeparateExperts):
        return [list(family) for family in zip(*(copy.parameters() for copy in experts.copies), strict=True)]
    return [[parameter] for parameter in experts.parameters()]


def deviations_from_mean(family: list[Tensor]) -> Tensor:
    """(E, ...) minus its mean over experts, from one tensor (E, ...) or one tensor per expert."""
    stacked = family[0] if len(family) == 1 else torch.stack(family)
    return stacked - stacked.mean(0)
