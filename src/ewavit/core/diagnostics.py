"""How far the experts are apart, what collapsing them now would change, and what the routers do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewavit.core.devices import local, summed
from ewavit.core.moe import dispatching, moe_layers, require_moe_layers
from ewavit.core.routing import TopKRouter
from ewavit.core.surgery import collapsed


@torch.no_grad()
def expert_spread(model: nn.Module) -> dict[str, float]:
    """Relative distance of the experts to their mean, per MoE layer.

    Returns:
        By layer name sqrt(mean_i |W_i - Wm|^2) / |Wm|, over all parameters of an FFN; 0 when all are equal.
        Of sharded and of replica experts every process must ask.
    """
    spread = {}
    for layer, moe in moe_layers(model).items():
        peers, apart, norm = moe.experts.peers, [], []
        for _, values in moe.experts.values_by_parameter(local):
            stacked = torch.stack([value.float() for value in values])
            total = stacked.sum(0) if peers is None else peers.sum([stacked.sum(0)])[0]
            mean = total / moe.num_experts
            apart.append((stacked - mean).square().sum())
            norm.append(mean.square().sum())
        deviations = torch.stack(apart).sum() / moe.num_experts
        if peers is not None:
            (deviations,) = peers.sum([deviations])
        both = torch.stack([deviations, torch.stack(norm).sum()])
        variance, square = summed(both, like=next(moe.experts.parameters())).tolist()
        spread[layer] = (variance / square) ** 0.5 if square else 0.0
    return spread


@dataclass(frozen=True)
class CollapseGap:
    """What collapse changes on one batch; `output` is |mixture - collapsed| / |collapsed| of the outputs."""

    output: float
    loss_mixture: float | None
    loss_collapsed: float | None

    @property
    def loss(self) -> float | None:
        """Loss of the collapsed model minus loss of the mixture; negative when collapsing helps."""
        if self.loss_mixture is None or self.loss_collapsed is None:
            return None
        return self.loss_collapsed - self.loss_mixture


@torch.no_grad()
def collapse_gap(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> CollapseGap:
    """Compare the mixture, dealt at random or routed, with its collapse on one batch; no dropout, no noise.

    Args:
        model: an expanded model; its mode is restored.
        inputs: what the model takes, (batch, channels, height, width) for images.
        targets: (batch,) classes or whatever `criterion` takes; without them only outputs are compared.
        criterion: loss of (outputs, targets).

    Raises:
        EwavitError: the model has no MoE layer.
    """
    layers = require_moe_layers(model).values()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with collapsed(model) if any(moe.routed for moe in layers) else nullcontext():
            dense = _logits(model(inputs))
        with dispatching(model):
            mixture = _logits(model(inputs))
    finally:
        for module, mode in modes:
            module.training = mode
    return CollapseGap(
        output=float((mixture - dense).norm() / dense.norm()),
        loss_mixture=None if targets is None else float(criterion(mixture, targets)),
        loss_collapsed=None if targets is None else float(criterion(dense, targets)),
    )


@dataclass(frozen=True)
class RoutingStatistics:
    """What the router of one layer did with the latest batch in training.

    `load`: of each expert, the share of the tokens' choices, before room runs out; 1 / N where balanced.
    `dropped`: share of the choices whose expert was full. `entropy`: mean of the softmax's, in nats; log N is
    undecided, 0 is certain.
    """

    load: tuple[float, ...]
    dropped: float
    entropy: float


def routing_statistics(model: nn.Module) -> dict[str, RoutingStatistics]:
    """Load, dropped share and entropy of each router, by layer name; empty for a model without routers."""
    statistics = {}
    for layer, moe in moe_layers(model).items():
        if isinstance(moe.dispatcher, TopKRouter):
            *load, dropped, entropy, _ = moe.dispatcher.statistics.tolist()
            statistics[layer] = RoutingStatistics(tuple(load), dropped, entropy)
    return statistics


def _logits(output: Any) -> Tensor:
    """The tensor in a model's output: itself, `.logits`, or the first entry (transformers)."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output[0]
