"""How far the experts are apart, what collapse would change now, and what the routers do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewavit.core.branches import branches
from ewavit.core.devices import local, summed
from ewavit.core.moe import dispatching, moe_layers, require_moe_layers
from ewavit.core.routing import routers
from ewavit.core.surgery import collapsed


@torch.no_grad()
def expert_spread(model: nn.Module) -> dict[str, float]:
    """Relative distance of the experts to their mean, per MoE layer.

    With sharded or replica experts this is a collective: every process must call it.

    Returns:
        sqrt(mean_i |W_i - Wm|^2) / |Wm| by layer name, over all parameters of an FFN; 0 if all are equal. The
        name of a whole model is "model".
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
        spread["model" if moe.whole else layer] = (variance / square) ** 0.5 if square else 0.0
    return spread


@dataclass(frozen=True)
class CollapseGap:
    """What collapse changes on one batch; `output` is |mixture - collapsed| / |collapsed| of the outputs."""

    output: float
    loss_mixture: float | None
    loss_collapsed: float | None

    @property
    def loss(self) -> float | None:
        """Loss of the collapsed model minus loss of the mixture; negative if collapsing helps."""
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
    """Compare a model with mixtures or branches with its collapse on one batch, without dropout and noise.

    Args:
        model: an expanded model; its mode is restored.
        inputs: the model's input, (batch, channels, height, width) for images.
        targets: (batch,) classes, or whatever `criterion` takes; without them only outputs are compared.
        criterion: maps (outputs, targets) to a loss.

    Raises:
        EwavitError: the model has no MoE layer and no branch.
    """
    layers = (moe_layers(model) if branches(model) else require_moe_layers(model)).values()
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

    `load`: each expert's share of the tokens' choices, dropped ones included; 1 / N if balanced.
    `dropped`: share of the choices that found their expert full. `entropy`: mean entropy of the softmax in
    nats; log N if undecided, 0 if certain.
    """

    load: tuple[float, ...]
    dropped: float
    entropy: float


def routing_statistics(model: nn.Module) -> dict[str, RoutingStatistics]:
    """Load, dropped share and entropy of each router by layer name; empty without routers."""
    statistics = {}
    for layer, router in routers(model).items():
        *load, dropped, entropy, _ = router.statistics.tolist()
        statistics[layer] = RoutingStatistics(tuple(load), dropped, entropy)
    return statistics


def _logits(output: Any) -> Tensor:
    """The tensor in a model's output: itself, `.logits`, or the first entry (transformers)."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output[0]
