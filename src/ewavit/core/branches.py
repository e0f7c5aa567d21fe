"""A training-only branch beside FFNs: channel-covariance attention, as in SCHEME (arXiv 2312.00412).

A branch is a forward hook of its FFN or mixture, and its gate is a parameter of the model. So classes and
keys of the FFNs stay, and `expand` may come before or after.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ewavit.core.devices import at_least_float32
from ewavit.core.ffn import BRANCHES, find_ffns
from ewavit.core.moe import MoE
from ewavit.errors import EwavitError

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ChannelCovariance:
    """Settings of channel-covariance attention: `softmax(covariance / temperature)` applied to the features.

    Args:
        temperature: divides the covariance of the channels over an image's tokens.
        share: weight 1 - alpha of the branch at the start, 0 to 1; alpha is that of the FFN.

    Raises:
        EwavitError: a value is out of range.
    """

    temperature: float = 1.0
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf or not 0 <= self.share <= 1:
            raise EwavitError(f"{self} is out of range: temperature is above 0, share from 0 to 1")

    def __call__(self, x: Tensor, channels_first: bool = False) -> Tensor:
        """Attention over the channels of each image, without parameters.

        Args:
            x: (tokens, dim), (batch, ..., dim) or, channels first, (batch, dim, ...).
            channels_first: where the channels are.

        Returns:
            The shape of x. Output channel i is the sum of all channels j, weighted by the softmax over j of
            their covariance with i.
        """
        last = x.movedim(1, -1) if channels_first else x
        rows = last.flatten(1, -2) if last.ndim > 2 else last.unsqueeze(0)
        centred = at_least_float32(rows - rows.mean(1, keepdim=True))
        covariance = centred.mT @ centred / rows.shape[1]
        weights = (covariance / self.temperature).softmax(-1).to(rows.dtype)
        y = (rows @ weights.mT).view(last.shape)
        return y.movedim(-1, 1) if channels_first else y


class Branch(nn.Module):
    """The branch of one FFN. Training computes `alpha FFN(x) + (1 - alpha) branch(x)`, eval mode FFN(x)."""

    training_only = True

    def __init__(self, layer: str, config: ChannelCovariance, channels_first: bool, like: Tensor) -> None:
        super().__init__()
        self.layer, self.config, self.channels_first = layer, config, channels_first
        self.share = nn.Parameter(like.new_full((1,), config.share))  # 1 - alpha

    def forward(self, ffn: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The forward hook of the FFN."""
        if not self.training:
            return None
        branch = self.config(inputs[0], self.channels_first).to(output.dtype)
        return output + self.share.clamp(0, 1).to(output.dtype) * (branch - output)


def add_branch(model: Model, config: ChannelCovariance, names: Iterable[str] | None = None) -> Model:
    """Put a branch beside FFNs and mixtures of a model, in place, and return the model; `collapse` drops it.

    Call it before you build the optimizer. The weight 1 - alpha of each branch is learned. Lower it to 0 by
    the end with `ewavit.core.limit_branches_`.

    Args:
        model: any model with FFNs that `find_ffns` finds, expanded or not.
        config: the branch.
        names: of FFNs; all by default.

    Raises:
        EwavitError: the model has branches, no FFN, or is a mixture as a whole, or a name is wrong.
    """
    if branches(model) or isinstance(model, MoE):
        why = "has branches already" if branches(model) else "is a mixture as a whole"
        raise EwavitError(f"the model {why}: call ewavit.collapse(model) first")
    mixed = {name: part for name, part in model.named_modules() if isinstance(part, MoE)}
    chosen = {ffn.name: ffn.module for ffn in find_ffns(model) if ffn.unit} | mixed
    first = {ffn.name: ffn.channels_first for ffn in find_ffns(model)}
    wanted = list(chosen) if names is None else list(names)
    if not wanted or (wrong := [name for name in wanted if name not in chosen]):
        what = f"{wrong[0]} is none of the FFNs" if wanted else "no FFN found"
        raise EwavitError(
            f"no branch can be added: {what}; choose from {', '.join(chosen) or 'another model'}"
        )
    made = nn.ModuleDict()
    for number, name in enumerate(name for name in dict(model.named_modules()) if name in wanted):
        ffn = chosen[name]
        axis = ffn.channels_first if isinstance(ffn, MoE) else first[name]
        branch = Branch(name, config, axis, next(ffn.parameters())).train(ffn.training)
        ffn.register_forward_hook(branch)
        made[str(number)] = branch
    model.add_module(BRANCHES, made)
    return model


def branches(model: nn.Module) -> list[Branch]:
    """The branches of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, Branch)]


def branch_shares(model: nn.Module) -> dict[str, float]:
    """The weight 1 - alpha of each branch by the name of its FFN, 0 to 1."""
    return {each.layer: float(each.share.detach().clamp(0, 1)) for each in branches(model)}


@torch.no_grad()
def limit_branches_(model: nn.Module, most: float) -> None:
    """Keep the weight of every branch between 0 and `most`; lower `most` to 0 over the training."""
    for each in branches(model):
        each.share.clamp_(0, most)


def remove_branches(model: nn.Module) -> None:
    """Drop all branches; say which still had weight."""
    if still := {name: share for name, share in branch_shares(model).items() if share > 0}:
        name, share = max(still.items(), key=lambda item: item[1])
        warnings.warn(
            f"{len(still)} of {len(branches(model))} branches still had weight, {name} {share:.3g}: "
            "ewavit.collapse_gap says how much of the output that was",
            stacklevel=3,
        )
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Branch)]:
            del module._forward_hooks[key]
    for holder in [module for module in model.modules() if BRANCHES in module._modules]:
        del holder._modules[BRANCHES]
