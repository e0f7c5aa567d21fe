"""What the algebra of Experts Weights Averaging predicts, in closed form (derivations: docs/theory.md).

N experts, share rate beta, lerp weight D = beta N / (N - 1): averaging is `W_i <- W_i - D (W_i - mean)`, and
d_i = W_i - mean is a deviation. `SpreadPrediction` follows a training and says how far apart its experts are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from .averaging import ExpertAveraging, check_share_rate
from .errors import EwavitError
from .experts import Experts, SeparateExperts
from .moe import moe_layers


def lerp_weight(share_rate: float, num_experts: int) -> float:
    """D = beta N / (N - 1), the share of its deviation that an expert loses when averaged (Eq. 6 as a lerp).

    Raises:
        EwavitError: the share rate is outside 0 <= beta <= (N - 1) / N.
    """
    if num_experts == 1:
        return 0.0  # a single expert is its own mean
    return min(1.0, check_share_rate(share_rate, num_experts) * num_experts / (num_experts - 1))


def deviation_decay(share_rate: float, num_experts: int, steps: int, every: int = 1) -> float:
    """(1 - D)^(steps // every): what averaging alone leaves of a deviation after `steps` optimizer steps."""
    return (1 - lerp_weight(share_rate, num_experts)) ** (steps // every)


def interval_share_rate(share_rate: float, num_experts: int, every: int) -> float:
    """The share rate that, used every k-th step, decays deviations as fast as `share_rate` at every step.

    Its lerp weight is 1 - (1 - D)^k.
    """
    kept = deviation_decay(share_rate, num_experts, every)
    return (1 - kept) * (num_experts - 1) / num_experts


def matched_sgd(lr: float, weight_decay: float, num_experts: int) -> dict[str, float]:
    """Settings of the experts' parameter group under which full averaging is dense SGD, step for step.

    An expert sees 1/N of the tokens, so the experts' mean gradient is 1/N of the dense one: the learning
    rate is N-fold, and weight decay / N keeps their product. Momentum, Nesterov's too, stays as it is.

    Args:
        lr: of the dense SGD.
        weight_decay: of the dense SGD.
        num_experts: N.

    Returns:
        `lr` and `weight_decay` for the group of the experts; all other parameters keep the dense settings.
    """
    return {"lr": lr * num_experts, "weight_decay": weight_decay / num_experts}


def history_weights(share_rates: Sequence[float], num_experts: int) -> tuple[Tensor, Tensor]:
    """How much of each past update is in the weights of an expert at the end.

    For updates u_1, ..., u_T and M_r = (1 - D_r) I + D_r / N 11^T the weights at the end are
    W_T = M_T ... M_1 W_0 + sum_s M_T ... M_s u_s. All M share their eigenvectors, so
    M_T ... M_s = p_s I + (1 - p_s) / N 11^T with p_s = prod_{r >= s} (1 - D_r).

    Args:
        share_rates: beta of step 1, ..., T; 0 for steps without averaging.
        num_experts: N.

    Returns:
        Two float64 tensors (T,): the weight of an expert's own update of each step, and that of each other
        expert's. Their sum over experts is 1, so that in the mean of the experts every update has weight 1/N,
        whatever the schedule. The initial weights have the weights of the first update.

    Raises:
        EwavitError: a share rate is out of range.
    """
    kept = torch.tensor([1 - lerp_weight(rate, num_experts) for rate in share_rates], dtype=torch.float64)
    apart = kept.flip(0).cumprod(0).flip(0)
    other = (1 - apart) / num_experts
    return apart + other, other


class DeviationMoments(NamedTuple):
    """Second moments of deviations d and of their momentum m: mean over experts, sum over weights."""

    d_d: float = 0.0
    d_m: float = 0.0
    m_m: float = 0.0

    def advance(
        self,
        noise: float,
        lr: float,
        lerp: float,
        *,
        momentum: float = 0.0,
        gain: float = 1.0,
        from_momentum: float = 1.0,
        from_gradient: float = 0.0,
        pull: float = 0.0,
        decay: float = 1.0,
    ) -> DeviationMoments:
        """One optimizer step and averaging: exact for gradients x = g + pull d with white noise g.

            m <- momentum m + gain x
            d <- (1 - lerp) (decay d - lr (from_momentum m + from_gradient x))

        Args:
            noise: second moment of g, mean over experts, sum over weights.
            lr: learning rate.
            lerp: D of this step, 0 without averaging.
            momentum: of SGD, or Adam's beta1.
            gain: 1 - dampening of SGD, or 1 - beta1.
            from_momentum: Adam's bias correction 1 / (1 - beta1^t); the momentum with Nesterov.
            from_gradient: 1 with Nesterov.
            pull: slope of the gradient along the deviations: curvature and coupled weight decay.
            decay: 1 - lr times decoupled weight decay.
        """
        kept, total = 1 - lerp, from_momentum * gain + from_gradient
        a, b = kept * (decay - lr * total * pull), -kept * lr * from_momentum * momentum
        e = -kept * lr * total
        c, f = gain * pull, momentum
        return DeviationMoments(
            a * a * self.d_d + 2 * a * b * self.d_m + b * b * self.m_m + e * e * noise,
            a * c * self.d_d + (a * f + b * c) * self.d_m + b * f * self.m_m + e * gain * noise,
            c * c * self.d_d + 2 * c * f * self.d_m + f * f * self.m_m + gain * gain * noise,
        )


def stationary_variance(
    share_rate: float,
    num_experts: int,
    lr: float,
    noise_variance: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> float:
    """Variance of a deviation under white gradient noise, when averaging and noise balance.

    With r = 1 - D and the momentum filter m <- momentum m + (1 - dampening) g it is

        (N - 1) / N  lr^2 variance(m)  r^2 / (1 - r^2)  (1 + r momentum) / (1 - r momentum)

    and variance(m) = (1 - dampening)^2 / (1 - momentum^2) noise_variance. Plain SGD has r^2 / (1 - r^2) lr^2
    noise_variance times (N - 1) / N, for the mean of N experts takes part in the noise.

    Args:
        share_rate: beta, the same at every step.
        num_experts: N.
        lr: learning rate.
        noise_variance: of one expert's gradient, divided by Adam's squared denominator for Adam.
        momentum: of SGD; beta1 for Adam.
        dampening: of SGD; beta1 for Adam.

    Raises:
        EwavitError: the share rate is out of range, or 0: without averaging deviations grow without end.
    """
    r = 1 - lerp_weight(share_rate, num_experts)
    if r == 1:
        raise EwavitError(
            "without averaging (share rate 0) deviations have no stationary variance: choose share rate > 0"
        )
    of_momentum = (1 - dampening) ** 2 / (1 - momentum**2) * noise_variance
    memory = (1 + r * momentum) / (1 - r * momentum)
    return (num_experts - 1) / num_experts * lr**2 * of_momentum * r**2 / (1 - r**2) * memory


def hessian_trace(loss: Tensor, parameters: Iterable[Tensor], samples: int = 16) -> float:
    """Trace of a loss's Hessian, the mean of v^T H v over random signs v (Hutchinson 1989).

    Args:
        loss: a scalar with its graph. torch's fused attention has no second derivative: compute the loss
            within `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
        parameters: with respect to which the Hessian is taken; each requires a gradient.
        samples: random vectors, each about as dear as two backward passes.
    """
    held = list(parameters)
    gradients = torch.autograd.grad(loss, held, create_graph=True, materialize_grads=True)
    signs = (
        [torch.randint(2, p.shape, device=p.device).to(p.dtype) * 2 - 1 for p in held] for _ in range(samples)
    )
    return sum(_curvature(gradients, held, vector).item() for vector in signs) / samples


def flatness_penalty(model: nn.Module, loss: Tensor) -> float:
    """1/2 tr(H Cov d): what the experts' deviations add to the loss in training, to second order.

    Layers draw their partitions independently, so only the Hessian's blocks within one MoE layer count. It
    holds where the loss is a sum over the units that are dealt: by image, and for losses summed over tokens.
    Where tokens of different experts meet in one loss, as in attention, cross terms between tokens are in H
    but average out in training.

    Args:
        model: an expanded model.
        loss: of the model in `eval()` mode, where its FFNs are the mean experts, with its graph; about
            attention see `hessian_trace`.

    Returns:
        1/2 mean_i d_i^T H d_i, summed over MoE layers.

    Raises:
        EwavitError: the model has no MoE layer.
    """
    penalty = 0.0
    for moe in _layers(model).values():
        families = _families(moe.experts)
        held = [parameter for family in families for parameter in family]
        gradients = torch.autograd.grad(loss, held, create_graph=True, materialize_grads=True)
        deviations = [_deviations([parameter.detach() for parameter in family]) for family in families]
        for expert in range(moe.num_experts):
            # All experts move by this one's deviation, and so does their mean.
            vector = [
                d[expert].expand_as(p) for d, family in zip(deviations, families, strict=True) for p in family
            ]
            penalty += 0.5 * _curvature(gradients, held, vector).item() / moe.num_experts
    return penalty


def _curvature(gradients: Sequence[Tensor], parameters: list[Tensor], vector: list[Tensor]) -> Tensor:
    """v^T H v for the gradients of a loss, taken with their graph."""
    products = torch.autograd.grad(gradients, parameters, vector, retain_graph=True, materialize_grads=True)
    return torch.stack([(v * product).sum() for v, product in zip(vector, products, strict=True)]).sum()


def _layers(model: nn.Module) -> dict[str, Any]:
    layers = moe_layers(model)
    if not layers:
        raise EwavitError("the model has no MoE layer: call ewavit.expand(model) first")
    if any(moe.experts.peers is not None for moe in layers.values()):
        raise EwavitError(
            "the spread of replica experts is not predicted: each process knows one expert only"
        )
    return layers


def _families(experts: Experts) -> list[list[Tensor]]:
    """Per parameter of the FFN the tensors that an optimizer holds: one with N on dimension 0, or N."""
    if isinstance(experts, SeparateExperts):
        return [list(family) for family in zip(*(copy.parameters() for copy in experts.copies), strict=True)]
    return [[parameter] for parameter in experts.parameters()]


def _deviations(family: list[Tensor]) -> Tensor:
    """(experts, ...) minus its mean over experts, for one tensor that holds all experts or one for each."""
    stacked = family[0] if len(family) == 1 else torch.stack(family)
    return stacked - stacked.mean(0)


class _Part:
    """The expert parameters of one MoE layer in one optimizer group, and what is known of them."""

    def __init__(self, layer: str, group: int | None, num_experts: int) -> None:
        self.layer, self.group, self.num_experts = layer, group, num_experts
        self.families: list[list[Tensor]] = []
        self.noise = self.along = self.apart = 0.0  # smoothed |x|^2, d x and |d|^2 of the observations
        self.moments = DeviationMoments()

    @property
    def floats(self) -> list[float]:
        return [self.noise, self.along, self.apart, *self.moments]


class SpreadPrediction:
    """Predicts `ewavit.expert_spread` during a training from its gradients, learning rates and share rates.

    `observe` measures in the preconditioned gradients how much the experts differ (the noise) and how that
    depends on their deviations (the slope); `step` advances `DeviationMoments` with the settings of the step
    just done. The spread itself is measured once, at the start.

    Args:
        model: an expanded model, with the weights it starts from.
        optimizer: torch's SGD, Adam or AdamW with any of their settings but amsgrad; wrappers that hold it as
            `.optimizer` are looked through.
        averaging: of the model's experts; its latest share rate and its interval are read at each step.

    Raises:
        EwavitError: another optimizer (ask `supports` before), or a model without MoE.

    Example:
        >>> prediction = SpreadPrediction(model, optimizer, averaging)
        >>> loss.backward()
        >>> if step % 10 == 0:
        ...     prediction.observe()
        >>> optimizer.step()
        >>> prediction.step()  # before the learning rate changes
        >>> prediction.relative(), expert_spread(model)
    """

    # Weight of the latest observation: the noise drifts with the training, the slope scatters more.
    NOISE_WEIGHT = 0.5
    SLOPE_WEIGHT = 0.1

    def __init__(self, model: nn.Module, optimizer: Optimizer, averaging: ExpertAveraging) -> None:
        self.optimizer, self.averaging = _unwrapped(optimizer), averaging
        if not self.supports(optimizer):
            raise EwavitError(
                f"the spread under {type(self.optimizer).__name__} is not predicted: use torch's SGD, "
                "Adam or AdamW without amsgrad, or leave the prediction out"
            )
        self._steps = self._observations = 0
        self._averaging_steps = averaging.steps_done
        group_of = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        parts: dict[tuple[str, int | None], _Part] = {}
        for layer, moe in _layers(model).items():
            for family in _families(moe.experts):
                key = (layer, group_of.get(id(family[0])))  # None: frozen
                part = parts.setdefault(key, _Part(*key, moe.num_experts))
                part.families.append(family)
                start = _deviations([parameter.detach().float() for parameter in family])
                d_d = part.moments.d_d + float(start.square().sum()) / moe.num_experts
                part.moments = DeviationMoments(d_d)
        self._parts = list(parts.values())

    @staticmethod
    def supports(optimizer: Optimizer) -> bool:
        """Whether the spread under this optimizer can be predicted."""
        optimizer = _unwrapped(optimizer)
        amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
        return type(optimizer) in (SGD, Adam, AdamW) and not amsgrad

    @torch.no_grad()
    def observe(self, scale: float = 1.0) -> None:
        """Measure the gradient noise; call it with the gradients that the next `optimizer.step()` will see.

        Before the first step, then every tenth or so, or at least once per epoch: it takes two to three times
        as long as a fused optimizer step and waits for the device. Gradients that are not finite are ignored.

        Args:
            scale: by which the gradients are still multiplied, `scaler.get_scale()` if not unscaled.
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
        """|x|^2, d x and |d|^2 of a part, mean over experts, sum over weights."""
        total = torch.zeros(3, device=part.families[0][0].device)
        for family in part.families:
            if part.group is None or any(parameter.grad is None for parameter in family):
                continue
            x = _deviations([self._direction(parameter, part.group, scale) for parameter in family])
            d = _deviations([parameter.float() for parameter in family])
            total += torch.stack([(x * x).sum(), (d * x).sum(), (d * d).sum()]) / part.num_experts
        return total

    def _direction(self, parameter: Tensor, index: int, scale: float) -> Tensor:
        """What this gradient adds to the optimizer's momentum: preconditioned, with coupled weight decay."""
        group = self.optimizer.param_groups[index]
        gradient = cast(Tensor, parameter.grad).float() / scale
        if not group.get("decoupled_weight_decay", False):
            gradient = gradient + group["weight_decay"] * parameter
        if isinstance(self.optimizer, SGD):
            return gradient
        state = self.optimizer.state.get(parameter, {})
        beta2, done = float(group["betas"][1]), state.get("step", 0)
        second = (1 - beta2) * gradient.square()  # of the step to come, as the optimizer will have it
        if "exp_avg_sq" in state:
            second += beta2 * state["exp_avg_sq"]
        denominator: Tensor = (second / (1 - beta2 ** (done + 1))).sqrt() + group["eps"]
        return gradient / denominator

    def step(self) -> None:
        """Advance by one step; call it after `optimizer.step()`, before the learning rate changes.

        Does nothing if the averaging has not counted a step since: the GradScaler skipped it.
        """
        if self.averaging.steps_done == self._averaging_steps:
            return
        self._averaging_steps = self.averaging.steps_done
        self._steps += 1
        averaged = self._averaging_steps % self.averaging.every == 0
        for part in self._parts:
            lerp = lerp_weight(self.averaging.share_rate, part.num_experts) if averaged else 0.0
            # A negative slope is mostly scatter, and would let the prediction grow without end.
            slope = max(0.0, part.along / part.apart) if part.apart else 0.0
            noise = max(0.0, part.noise - slope * part.along)
            settings = {"lr": 0.0} if part.group is None else self._settings(part.group)
            part.moments = part.moments.advance(noise, lerp=lerp, pull=slope, **settings)

    def _settings(self, index: int) -> dict[str, float]:
        group = self.optimizer.param_groups[index]
        lr = float(group["lr"])
        if isinstance(self.optimizer, SGD):
            momentum = group["momentum"]
            gain = 1 - group["dampening"] if self._steps > 1 else 1.0  # torch's buffer starts as the gradient
            nesterov = {"from_momentum": momentum, "from_gradient": 1.0} if group["nesterov"] else {}
            return {"lr": lr, "momentum": momentum, "gain": gain, **nesterov}
        beta1 = float(group["betas"][0])
        correction = 1 / (1 - beta1**self._steps)
        decay = 1 - lr * group["weight_decay"] if group.get("decoupled_weight_decay", False) else 1.0
        return {"lr": lr, "momentum": beta1, "gain": 1 - beta1, "from_momentum": correction, "decay": decay}

    @torch.no_grad()
    def relative(self) -> dict[str, float]:
        """The predicted sqrt(mean_i |W_i - Wm|^2) / |Wm| by layer, to put beside `expert_spread(model)`."""
        squares: dict[str, list[float]] = {}
        for part in self._parts:
            apart_and_norm = squares.setdefault(part.layer, [0.0, 0.0])
            apart_and_norm[0] += part.moments.d_d
            for family in part.families:
                stacked = family[0] if len(family) == 1 else torch.stack(family)
                apart_and_norm[1] += float(stacked.float().mean(0).square().sum())
        return {layer: (d / w) ** 0.5 if w else 0.0 for layer, (d, w) in squares.items()}

    def state_dict(self) -> dict[str, Any]:
        """Numbers from which a resumed run predicts the same."""
        numbers = [part.floats for part in self._parts]
        return {"steps": self._steps, "observations": self._observations, "parts": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved numbers, of the same model and optimizer groups.

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


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
