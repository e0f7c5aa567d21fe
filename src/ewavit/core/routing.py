"""Naive MoE: a learned top-k router in the place of the random partition, as in V-MoE (arXiv 2106.05974).

`TopKRouter` is a dispatcher like `RandomPartition`: its block is a static `(experts, capacity, dim)` tensor,
computed by the same experts. Its balancing losses reach the gradients by themselves.
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

from ewavit.errors import EwavitError


@dataclass(frozen=True)
class TopK:
    """What a top-k router does; the defaults are V-MoE's but for k, which is 2 there.

    Args:
        k: experts that each token goes to, weighted by their softmax.
        capacity_ratio: room of each expert, in units of an equal share of the tokens (k x tokens / experts).
            Tokens beyond it get zero from the FFN, so its residual connection passes them on unchanged.
        noise: standard deviation of the Gaussian noise on the logits in training, in units of 1 / experts.
        batch_priority: when room is short, serve the tokens with the largest softmax first (batch prioritised
            routing), not those that come first in the batch.
        importance_loss, load_loss: weights of V-MoE's balancing losses (appendix A.2); the paper's 0.01 times
            the mean of the two. The load loss needs noise and is left out without.
        balance_loss: weight of the Switch Transformer's loss (arXiv 2101.03961, Eq. 4), 0.01 there.
        z_loss: weight of ST-MoE's loss on large logits (arXiv 2202.08906, Eq. 5), 0.001 there.

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
    """Where the choices of one batch went, -1 for nowhere. Choice j of token t has the number t k + j."""

    taken: Tensor  # (experts * capacity, 1) int64: the choice in each slot
    slots: Tensor  # (tokens, k) int64: the slot of each choice
    gates: Tensor  # (tokens, k): the weight of each choice in the token's sum


class _Gather(torch.autograd.Function):
    """Sum up rows: out[i] = sum_j x[index[i, j]], where -1 adds nothing.

    `inverse` says in the same way which rows of the output each row of x is in, so the gradient is a gather
    too, not a scatter-add.
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
    """Hands on x; in the backward pass `loss` gets the gradient 1, as if the training loss contained it."""

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


class TopKRouter(nn.Module):
    """Send each token to the k experts that a learned linear layer prefers for it (arXiv 2106.05974).

    The softmax and all losses are float32. All tokens of a batch compete for the experts' room, in eval mode
    too, where there is no noise. Shapes depend on the number of tokens alone; the noise comes from the global
    generator of the tokens' device, so activation checkpointing recomputes the same routing.

    Args:
        config: k, capacity, noise and losses.
        num_experts: N >= 2.
        dim: of a token.

    Raises:
        EwavitError: N is 1 or less than k.
    """

    statistics: Tensor

    def __init__(self, config: TopK, num_experts: int, dim: int) -> None:
        super().__init__()
        if num_experts < max(2, config.k):
            raise EwavitError(
                f"a top-{config.k} router cannot choose among {num_experts} experts: "
                f"choose num_experts={max(2, config.k)} or more"
            )
        self.config, self.num_experts = config, num_experts
        # A fraction of integers: torch.compile would make a float a variable, which no shape can follow.
        ratio = Fraction(config.capacity_ratio).limit_denominator(1000)
        self.room = (ratio * config.k / num_experts).as_integer_ratio()
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)
        # Of the latest pass in training: the experts' loads, dropped share, entropy, weighted auxiliary loss.
        self.register_buffer("statistics", torch.zeros(num_experts + 3))
        self.scale_loss: Callable[[Tensor], Tensor] | None = None

    def capacity(self, num_tokens: int) -> int:
        """Slots of each expert: ceil(k x tokens x capacity_ratio / experts), at most one for each token."""
        numerator, denominator = self.room
        return min(num_tokens, -(-num_tokens * numerator // denominator))

    def dispatch(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Send tokens to experts.

        Args:
            x: (tokens, dim).

        Returns:
            The block (experts, capacity, dim), zeros in slots without a token, and the state for `combine`.
        """
        k, capacity = self.config.k, self.capacity(x.shape[0])
        self._warn_of_unscaled_loss(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            clean = F.linear(_at_least_float32(x), _at_least_float32(self.weight))
            noise = self.config.noise / self.num_experts if self.training else 0.0
            logits = clean + noise * torch.randn_like(clean) if noise else clean
            probabilities = logits.softmax(-1)
            gates, choices = probabilities.topk(k, dim=-1)
            slots, counts = self._assign(gates, choices, capacity)
            if self.training and x.shape[0]:
                loss = self._loss(clean, logits, probabilities, choices, counts, noise)
                self._note(probabilities, slots, counts, loss)
                gates = _WithLoss.apply(gates, loss if self.scale_loss is None else self.scale_loss(loss))
        num_slots = self.num_experts * capacity
        number = torch.arange(slots.numel(), device=x.device)
        target = torch.where(slots < 0, num_slots, slots).flatten()  # dropped choices share one slot more
        taken = number.new_full((num_slots + 1,), -1).scatter_(0, target, number)[:-1].unsqueeze(1)
        block = _Gather.apply(x, taken // k, slots)
        return block.view(self.num_experts, capacity, *x.shape[1:]), Routing(taken, slots, gates)

    def combine(self, block: Tensor, state: Routing) -> Tensor:
        """Bring (experts, capacity, dim) back to (tokens, dim): each token's choices, weighted and summed."""
        rows = _Gather.apply(block.flatten(0, 1), state.slots.view(-1, 1), state.taken)
        combined: Tensor = (rows.unflatten(0, state.slots.shape) * state.gates.unsqueeze(-1)).sum(1)
        return combined.to(block.dtype)

    def _assign(self, gates: Tensor, choices: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """The slot of each choice (tokens, k), -1 where its expert is full, and how often each was chosen.

        All first choices are served before the second ones.
        """
        tokens, k = choices.shape
        first = gates[:, 0].argsort(descending=True, stable=True) if self.config.batch_priority else None
        queue = (choices if first is None else choices[first]).t().reshape(-1, 1)
        chosen = queue == torch.arange(self.num_experts, device=queue.device)
        place = chosen.cumsum(0).gather(1, queue) - 1
        slots = torch.where(place < capacity, queue * capacity + place, -1).view(k, tokens).t()
        slots = slots if first is None else slots[first.argsort()]
        return slots.contiguous(), chosen.sum(0)

    def _loss(
        self,
        clean: Tensor,
        logits: Tensor,
        probabilities: Tensor,
        choices: Tensor,
        counts: Tensor,
        noise: float,
    ) -> Tensor:
        """The weighted sum of the auxiliary losses of one batch; terms without weight are not computed."""
        config, loss = self.config, clean.new_zeros(())
        if config.importance_loss:
            loss = loss + config.importance_loss * _squared_variation(clean.softmax(-1).sum(0))
        if config.load_loss and noise:
            # With new noise, how likely is each logit above the one that was just enough to be chosen?
            threshold = logits.gather(1, choices[:, -1:])
            likely = torch.special.ndtr((clean - threshold) / noise)
            loss = loss + config.load_loss * _squared_variation(likely.mean(0))
        if config.balance_loss:
            share = counts / choices.numel()
            loss = loss + config.balance_loss * self.num_experts * (share * probabilities.mean(0)).sum()
        if config.z_loss:
            loss = loss + config.z_loss * clean.logsumexp(-1).square().mean()
        return loss

    def _warn_of_unscaled_loss(self, device: str) -> None:
        if torch.compiler.is_compiling() or not self.training or self.scale_loss is not None:
            return
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            warnings.warn(
                "float16 needs a GradScaler, whose factor the auxiliary losses of a router do not see: call "
                "ewavit.scale_auxiliary_loss(model, scaler.scale)",
                stacklevel=2,
            )

    @torch.no_grad()
    def _note(self, probabilities: Tensor, slots: Tensor, counts: Tensor, loss: Tensor) -> None:
        dropped = (slots < 0).to(loss.dtype).mean()
        entropy = torch.special.entr(probabilities).sum(-1).mean()
        self.statistics.copy_(torch.cat([counts / slots.numel(), torch.stack([dropped, entropy, loss])]))

    def extra_repr(self) -> str:
        return f"{self.config}, num_experts={self.num_experts}"


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _squared_variation(x: Tensor) -> Tensor:
    """The squared coefficient of variation: 0 when all are equal."""
    return x.var(correction=0) / x.mean().square()


def _routers(model: nn.Module) -> list[TopKRouter]:
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    if not routers:
        raise EwavitError("the model has no router: call ewavit.expand(model, router=ewavit.TopK()) first")
    return routers


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The weighted auxiliary losses of the latest pass in training, summed over the layers, without gradient.

    They are part of the gradients already: do not add them to the training loss.

    Raises:
        EwavitError: the model has no router.
    """
    return torch.stack([router.statistics[-1] for router in _routers(model)]).sum()


def scale_auxiliary_loss(model: nn.Module, scale: Callable[[Tensor], Tensor] | None) -> None:
    """Do to the auxiliary losses what the training loop does to its loss before `backward()`.

    A layer does not see that the loss is multiplied later. Where it is, by a GradScaler or by 1 / k for k
    accumulated batches, give that function once, before the training.

    Args:
        model: a model with routers.
        scale: of a loss; None: the loop calls `loss.backward()` as it is. For a compiled model it has to be
            tensor operations, which `GradScaler.scale` is not: multiply by a tensor that you set before each
            pass.

    Raises:
        EwavitError: the model has no router.

    Example:
        >>> ewavit.scale_auxiliary_loss(model, lambda loss: scaler.scale(loss / accumulation_steps))
    """
    for router in _routers(model):
        router.scale_loss = scale


def routed_reference(router: TopKRouter, x: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """What a MoE computes from (tokens, dim) without noise, as loops; the tests hold the two equal."""
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
