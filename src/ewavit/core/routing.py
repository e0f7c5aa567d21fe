"""Naive MoE: a learned top-k router instead of the random partition, as in V-MoE (arXiv 2106.05974).

The same experts compute the block. The router adds its balancing losses to the gradients by itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewavit.core.devices import at_least_float32
from ewavit.core.dispatch import Dispatcher
from ewavit.core.draws import normal
from ewavit.errors import EwavitError


@dataclass(frozen=True)
class TopK:
    """Settings of a top-k router. The defaults are V-MoE's, except that V-MoE uses k = 2.

    Args:
        k: experts per token, weighted by their softmax.
        capacity_ratio: capacity of each expert, relative to an equal share of the tokens (k T / E). The FFN
            returns zero for tokens beyond it, so its residual connection passes them on unchanged.
        noise: standard deviation of the Gaussian noise on the logits in training, in units of 1 / E.
        batch_priority: when experts are full, serve the tokens with the largest softmax first (batch
            prioritised routing), not the first ones in the batch.
        importance_loss: weight of V-MoE's importance loss (appendix A.2). The paper adds 0.01 times the mean
            of this loss and the load loss.
        load_loss: weight of V-MoE's load loss; left out without noise.
        balance_loss: weight of the Switch Transformer's loss (arXiv 2101.03961, Eq. 4); 0.01 there.
        z_loss: weight of ST-MoE's loss on large logits (arXiv 2202.08906, Eq. 5); 0.001 there.

    Raises:
        EwavitError: a value is out of range.
    """

    k: int = 1
    capacity_ratio: float = 1.25
    noise: float = 1.0
    batch_priority: bool = False
    importance_loss: float = 0.005
    load_loss: float = 0.005
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.k < 1 or self.k != int(self.k):
            raise EwavitError(f"k={self.k} is not a number of experts per token: choose 1 or more")
        if not 0.001 <= self.capacity_ratio < math.inf:
            raise EwavitError(f"capacity_ratio={self.capacity_ratio} is out of range: choose 0.001 or more")
        for name, value in asdict(self).items():
            if not 0 <= value < math.inf:
                raise EwavitError(f"{name}={value} is out of range: choose 0 or more")


class Routing(NamedTuple):
    """Where the choices of one batch went, -1 for nowhere. Choice j of token t has the number t K + j."""

    taken: Tensor  # (E C, 1) int64: the choice in each slot
    slots: Tensor  # (T, K) int64: the slot of each choice
    gates: Tensor  # (T, K): the weight of each choice in the token's sum


class _Gather(torch.autograd.Function):
    """Sum up rows: out[i] = sum_j x[index[i, j]], where -1 adds nothing.

    `inverse` lists in the same way the rows of the output that contain each row of x. So the gradient is a
    gather too, not a scatter-add.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        flat = index.flatten()
        rows = x.index_select(0, flat.clamp(min=0))
        rows = rows.masked_fill((flat < 0).view(-1, *(1,) * (x.ndim - 1)), 0)
        return rows if index.shape[1] == 1 else rows.view(*index.shape, *rows.shape[1:]).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Gather.apply(grad, inverse, index), None, None


class _WithLoss(torch.autograd.Function):
    """Returns x; the backward pass gives `loss` the gradient 1, as if it were part of the training loss."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])


class TopKRouter(Dispatcher[Routing]):
    """Sends each token to the k experts with the largest logits of a linear layer (arXiv 2106.05974).

    The softmax and all losses are float32. All tokens of a batch compete for the experts' capacity, in eval
    mode too. The noise is a function of (seed, layer, optimizer step), see `core/draws.py`; eval mode adds
    none.

    Args:
        config: k, capacity, noise and losses.
        num_experts: N >= 2.
        dim: channels of a token.

    Raises:
        EwavitError: N is 1 or less than k.
    """

    routed = True
    statistics: Tensor

    def __init__(self, config: TopK, num_experts: int, dim: int) -> None:
        super().__init__()
        if num_experts < max(2, config.k):
            raise EwavitError(
                f"a top-{config.k} router cannot choose among {num_experts} experts: "
                f"choose num_experts={max(2, config.k)} or more"
            )
        self.config, self.num_experts = config, num_experts
        # A fraction of integers: torch.compile would make a float a variable, and no shape can depend on one.
        ratio = Fraction(config.capacity_ratio).limit_denominator(1000)
        self.room = (ratio * config.k / num_experts).as_integer_ratio()
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)
        # From the latest pass in training: the experts' loads, dropped share, entropy, weighted loss.
        self.register_buffer("statistics", torch.zeros(num_experts + 3))
        self.scale_loss: Callable[[Tensor], Tensor] | None = None

    def capacity(self, num_tokens: int) -> int:
        """Slots of each expert: ceil(k T capacity_ratio / E), at most T."""
        numerator, denominator = self.room
        return min(num_tokens, -(-num_tokens * numerator // denominator))

    def dispatch(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        k, capacity = self.config.k, self.capacity(x_TD.shape[0])
        self._warn_of_unscaled_loss(x_TD.device.type)
        with torch.autocast(x_TD.device.type, enabled=False):
            clean_TE = F.linear(at_least_float32(x_TD), at_least_float32(self.weight))
            noise = self.config.noise / self.num_experts if self.training else 0.0
            logits_TE = clean_TE + noise * normal(self.key, clean_TE.detach()) if noise else clean_TE
            softmax_TE = logits_TE.softmax(-1)
            gates_TK, choices_TK = softmax_TE.topk(k, dim=-1)
            slots_TK, counts_E = self._assign(gates_TK, choices_TK, capacity)
            if self.training and x_TD.shape[0]:
                load = counts_E / slots_TK.numel()
                threshold = logits_TE.gather(1, choices_TK[:, -1:])
                loss = self._loss(clean_TE, softmax_TE, load, threshold, noise)
                self._note(softmax_TE, slots_TK, load, loss)
                scaled = loss if self.scale_loss is None else self.scale_loss(loss)
                gates_TK = _WithLoss.apply(gates_TK, scaled)
        num_slots = self.num_experts * capacity
        number = torch.arange(slots_TK.numel(), device=x_TD.device)
        target = torch.where(slots_TK < 0, num_slots, slots_TK).flatten()  # dropped: one slot more, for all
        taken = number.new_full((num_slots + 1,), -1).scatter_(0, target, number)[:-1].unsqueeze(1)
        block = _Gather.apply(x_TD, taken // k, slots_TK)
        return block.view(self.num_experts, capacity, *x_TD.shape[1:]), Routing(taken, slots_TK, gates_TK)

    def combine(self, block_ECD: Tensor, state: Routing) -> Tensor:
        """The sum of each token's choices, weighted by its gates: (E, C, D) -> (T, D)."""
        rows = _Gather.apply(block_ECD.flatten(0, 1), state.slots.view(-1, 1), state.taken)
        combined: Tensor = (rows.unflatten(0, state.slots.shape) * state.gates.unsqueeze(-1)).sum(1)
        return combined.to(block_ECD.dtype)

    def describe(self, unit: str) -> str:
        return f"by top-{self.config.k} router"

    def _assign(self, gates_TK: Tensor, choices_TK: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """The slot of each choice (T, K), -1 if its expert is full, and how often each was chosen (E,).

        All first choices are served before the second ones.
        """
        first = gates_TK[:, 0].argsort(descending=True, stable=True) if self.config.batch_priority else None
        queue = (choices_TK if first is None else choices_TK[first]).t().reshape(-1, 1)
        chosen = queue == torch.arange(self.num_experts, device=queue.device)
        place = chosen.cumsum(0).gather(1, queue) - 1
        slots = torch.where(place < capacity, queue * capacity + place, -1)
        slots_TK = slots.view(choices_TK.shape[::-1]).t()
        slots_TK = slots_TK if first is None else slots_TK[first.argsort()]
        return slots_TK.contiguous(), chosen.sum(0)

    def _loss(
        self, clean_TE: Tensor, softmax_TE: Tensor, load_E: Tensor, threshold: Tensor, noise: float
    ) -> Tensor:
        """The weighted sum of the auxiliary losses of one batch; terms without weight are not computed.

        `threshold` (T, 1) is the smallest logit that was chosen.
        """
        config, loss = self.config, clean_TE.new_zeros(())
        if config.importance_loss:
            loss = loss + config.importance_loss * _squared_variation(clean_TE.softmax(-1).sum(0))
        if config.load_loss and noise:
            # The probability that a logit exceeds the threshold when the noise is drawn again.
            likely = torch.special.ndtr((clean_TE - threshold) / noise)
            loss = loss + config.load_loss * _squared_variation(likely.mean(0))
        if config.balance_loss:
            loss = loss + config.balance_loss * self.num_experts * (load_E * softmax_TE.mean(0)).sum()
        if config.z_loss:
            loss = loss + config.z_loss * clean_TE.logsumexp(-1).square().mean()
        return loss

    def _warn_of_unscaled_loss(self, device: str) -> None:
        if torch.compiler.is_compiling() or not self.training or self.scale_loss is not None:
            return
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            warnings.warn(
                "float16 needs a GradScaler, and the auxiliary losses of a router miss its factor: call "
                "ewavit.scale_auxiliary_loss(model, scaler.scale)",
                stacklevel=2,
            )

    @torch.no_grad()
    def _note(self, softmax_TE: Tensor, slots_TK: Tensor, load_E: Tensor, loss: Tensor) -> None:
        dropped = (slots_TK < 0).to(loss.dtype).mean()
        entropy = torch.special.entr(softmax_TE).sum(-1).mean()
        self.statistics.copy_(torch.cat([load_E, torch.stack([dropped, entropy, loss])]))

    def extra_repr(self) -> str:
        return f"{self.config}, num_experts={self.num_experts}"


def _squared_variation(x: Tensor) -> Tensor:
    """The squared coefficient of variation; 0 if all are equal."""
    return x.var(correction=0) / x.mean().square()


def routers(model: nn.Module) -> dict[str, TopKRouter]:
    """The routers of a model by the name of their MoE layer."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, TopKRouter)}
    return {name.removesuffix("dispatcher").removesuffix("."): router for name, router in found.items()}


def _require_routers(model: nn.Module) -> list[TopKRouter]:
    found = list(routers(model).values())
    if not found:
        raise EwavitError("the model has no router: call ewavit.expand(model, router=ewavit.TopK()) first")
    return found


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The weighted router losses of the latest pass in training, summed over layers, without gradient.

    Do not add them to the training loss: the gradients contain them already.

    Raises:
        EwavitError: the model has no router.
    """
    return torch.stack([router.statistics[-1] for router in _require_routers(model)]).sum()


def scale_auxiliary_loss(model: nn.Module, scale: Callable[[Tensor], Tensor] | None) -> None:
    """Scale the router losses as your training loop scales its loss before `backward()`.

    Router losses bypass your loss, so they miss any later scaling. If you scale the loss (by a GradScaler, or
    by 1 / k for k accumulated batches), register that scaling here once before training.

    Args:
        model: a model with routers.
        scale: maps a loss to the scaled loss; None if the loop does not scale. A compiled model needs tensor
            operations here, and `GradScaler.scale` is none: multiply by a tensor that you set before each
            pass.

    Raises:
        EwavitError: the model has no router.

    Examples:
        >>> ewavit.scale_auxiliary_loss(model, lambda loss: scaler.scale(loss / accumulation_steps))
    """
    for router in _require_routers(model):
        router.scale_loss = scale


def routed_reference(router: TopKRouter, x: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """What a routed MoE computes from (T, D) without noise, as loops; the tests compare the two."""
    config, num_tokens = router.config, x.shape[0]
    probabilities = (x @ router.weight.T).softmax(-1)
    values = probabilities.tolist()
    ranking = [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in values]
    queue = list(range(num_tokens))
    if config.batch_priority:
        queue.sort(key=lambda token: -max(values[token]))
    free = [math.ceil(config.k * num_tokens * config.capacity_ratio / len(experts))] * len(experts)
    sums: list[Any] = [0] * num_tokens
    for choice in range(config.k):
        for token in queue:
            expert = ranking[token][choice]
            if free[expert]:
                free[expert] -= 1
                sums[token] = sums[token] + probabilities[token, expert] * experts[expert](x[token])
    width = next(row.shape[-1] for row in sums if isinstance(row, Tensor))
    return torch.stack([row if isinstance(row, Tensor) else x.new_zeros(width) for row in sums])
