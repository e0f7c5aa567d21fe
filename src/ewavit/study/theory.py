"""Closed forms of Experts Weights Averaging (derivations: docs/theory.md).

N experts, share rate beta, lerp weight D = beta N / (N - 1): averaging is `W_i <- W_i - D (W_i - mean)`, and
d_i = W_i - mean is a deviation. `training.prediction.SpreadPrediction` applies them during training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ewavit.core.averaging import lerp_weight
from ewavit.errors import EwavitError
from ewavit.training.prediction import deviations_from_mean, layers_with_all_experts, tensors_by_parameter


def deviation_decay(share_rate: float, num_experts: int, steps: int, every: int = 1) -> float:
    """(1 - D)^(steps averaged): the rest of a deviation after `steps` optimizer steps of averaging alone."""
    return (1 - lerp_weight(share_rate, num_experts)) ** (steps - steps % every)


def matched_sgd(lr: float, weight_decay: float, num_experts: int) -> dict[str, float]:
    """Settings of the experts' parameter group that make full averaging equal dense SGD, step by step.

    An expert sees 1/N of the tokens, so the experts' mean gradient is 1/N of the dense one. The learning rate
    is N times as large, and weight decay / N keeps their product. Momentum stays the same, also Nesterov's.

    Args:
        lr: learning rate of dense SGD.
        weight_decay: weight decay of dense SGD.
        num_experts: N.

    Returns:
        `lr` and `weight_decay` for the experts; all other parameters keep the dense settings.
    """
    return {"lr": lr * num_experts, "weight_decay": weight_decay / num_experts}


def history_weights(share_rates: Sequence[float], num_experts: int) -> tuple[Tensor, Tensor]:
    """The weight of each past update in an expert at the end of training.

    For updates u_1, ..., u_T and M_r = (1 - D_r) I + D_r / N 11^T the weights at the end are
    W_T = M_T ... M_1 W_0 + sum_s M_T ... M_s u_s. All M share their eigenvectors, so
    M_T ... M_s = p_s I + (1 - p_s) / N 11^T with p_s = prod_{r >= s} (1 - D_r).

    Args:
        share_rates: beta of step 1, ..., T; 0 for steps without averaging.
        num_experts: N.

    Returns:
        Two float64 tensors (T,): the weight of the expert's own update of each step, and the weight of each
        other expert's update. Their sum over experts is 1, so in the mean of the experts every update has
        weight 1/N for any schedule. The initial weights count like the first update.

    Raises:
        EwavitError: a share rate is out of range.
    """
    kept = torch.tensor([1 - lerp_weight(rate, num_experts) for rate in share_rates], dtype=torch.float64)
    apart = kept.flip(0).cumprod(0).flip(0)
    other = (1 - apart) / num_experts
    return apart + other, other


def stationary_variance(
    share_rate: float,
    num_experts: int,
    lr: float,
    noise_variance: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> float:
    """Variance of a deviation under white gradient noise when averaging and noise are in balance.

    With r = 1 - D and the momentum filter m <- momentum m + (1 - dampening) g it is

        (N - 1) / N  lr^2 variance(m)  r^2 / (1 - r^2)  (1 + r momentum) / (1 - r momentum)

    and variance(m) = (1 - dampening)^2 / (1 - momentum^2) noise_variance. Plain SGD has r^2 / (1 - r^2) lr^2
    noise_variance times (N - 1) / N, because the mean of N experts is noisy too.

    Args:
        share_rate: beta, the same at every step.
        num_experts: N.
        lr: learning rate.
        noise_variance: of one expert's gradient, divided by Adam's squared denominator for Adam.
        momentum: of SGD; beta1 for Adam.
        dampening: of SGD; beta1 for Adam.

    Raises:
        EwavitError: the share rate is out of range, or 0: without averaging deviations grow without bound.
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
    """Trace of the Hessian of a loss: the mean of v^T H v over random signs v (Hutchinson 1989).

    Args:
        loss: a scalar with its graph. torch's fused attention has no second derivative: compute the loss
            within `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
        parameters: the variables of the Hessian; each requires a gradient.
        samples: number of random vectors; each costs about two backward passes.
    """
    held = list(parameters)
    gradients = torch.autograd.grad(loss, held, create_graph=True, materialize_grads=True)
    signs = (
        [torch.randint(2, p.shape, device=p.device).to(p.dtype) * 2 - 1 for p in held] for _ in range(samples)
    )
    return sum(_curvature(gradients, held, vector).item() for vector in signs) / samples


def flatness_penalty(model: nn.Module, loss: Tensor) -> float:
    """1/2 tr(H Cov d): the contribution of the experts' deviations to the training loss, to second order.

    FFNs draw their partitions independently, so only the blocks of the Hessian within one of them count.
    This holds if the loss is a sum over units: with unit="image", and for losses summed over tokens. If the
    loss mixes tokens of different experts, as with attention, H has cross terms between tokens; they average
    out in training.

    Args:
        model: an expanded model.
        loss: the loss of the model in `eval()` mode, with its graph; for attention see `hessian_trace`.

    Returns:
        1/2 mean_i d_i^T H d_i, summed over FFNs.

    Raises:
        EwavitError: the model has no MoE layer, or it has replica experts.
    """
    penalty = 0.0
    layers = list(layers_with_all_experts(model).values())
    for dispatcher in dict.fromkeys(moe.dispatcher for moe in layers):  # split FFNs: two layers with one draw
        drawn = [moe for moe in layers if moe.dispatcher is dispatcher]
        families = [family for moe in drawn for family in tensors_by_parameter(moe.experts)]
        held = [parameter for family in families for parameter in family]
        gradients = torch.autograd.grad(loss, held, create_graph=True, materialize_grads=True)
        deviations = [
            deviations_from_mean([parameter.detach() for parameter in family]) for family in families
        ]
        for expert in range(drawn[0].num_experts):
            # All experts move by this one's deviation, and so does their mean.
            vector = [
                d[expert].expand_as(p) for d, family in zip(deviations, families, strict=True) for p in family
            ]
            penalty += 0.5 * _curvature(gradients, held, vector).item() / drawn[0].num_experts
    return penalty


def _curvature(gradients: Sequence[Tensor], parameters: list[Tensor], vector: list[Tensor]) -> Tensor:
    """v^T H v, from the gradients of a loss with their graph."""
    products = torch.autograd.grad(gradients, parameters, vector, retain_graph=True, materialize_grads=True)
    return torch.stack([(v * product).sum() for v, product in zip(vector, products, strict=True)]).sum()
