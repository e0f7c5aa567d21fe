"""Optimizer steps: who makes them, where they are counted, and the new draws that follow them."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ewavit.core.devices import local
from ewavit.core.dispatch import Dispatcher
from ewavit.core.draws import STEP

STEPS_KEY = "ewavit_steps"  # of an optimizer's first group, so that its state dict has the count
# Where wrappers hold the optimizer: accelerate and Lightning, SAM, timm's Lookahead, LARC.
_INNER = ("optimizer", "base_optimizer", "_base_optimizer", "optim")


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """The innermost optimizer: the one that changes the weights, whatever wraps it."""
    while True:
        found = (getattr(optimizer, name, None) for name in _INNER)
        inner = next((each for each in found if isinstance(each, Optimizer)), None)
        if inner is None:
            return optimizer
        optimizer = inner


def held_by(optimizer: Optimizer) -> set[int]:
    """The identities of an optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def only_makes_state(optimizer: Optimizer) -> bool:
    """Whether this was a step of torch's state-dict helpers: learning rate 0 and zero gradients."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    if any(rate is None or float(rate) != 0 for rate in rates):
        return False
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return not any(p.grad is not None and bool(local(p.grad).any()) for p in parameters)


def set_step(model: nn.Module, step: int) -> None:
    """Set the number of optimizer steps done, from which an expanded model draws its partitions.

    torch's optimizers and `ExpertAveraging` do it by themselves. Call it in a loop without either, or to get
    other partitions at the same weights.

    Args:
        model: an expanded model.
        step: 0 or more.
    """
    for module in model.modules():
        if isinstance(module, Dispatcher):
            module.key[STEP] = step


_followers: WeakSet[Any] = WeakSet()  # the MoE layers, or a model that was one as a whole


def follow_optimizers(moe: nn.Module) -> None:
    """Let a `MoE` draw anew after each step of an optimizer that holds parameters of its experts.

    One hook of all optimizers does it, because a layer does not know its optimizer, and a model without
    averaging needs new draws, too.
    """
    _register()
    _followers.add(moe)


@cache
def _register() -> None:
    register_optimizer_step_post_hook(_draw_anew)


def _draw_anew(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _followers:  # optimizers of other models step, too
        return
    held = held_by(optimizer)
    counted = unwrapped_optimizer(optimizer).param_groups[0].get(STEPS_KEY)  # by an attached averaging
    drawn: set[Dispatcher[Any]] = set()  # the layers of a split FFN share one
    for moe in list(_followers):
        if "dispatcher" not in moe._modules or moe.dispatcher in drawn:
            continue
        if any(id(p) in held for p in moe.experts.parameters()):
            drawn.add(moe.dispatcher)
            key = moe.dispatcher.key
            key[STEP] = key[STEP] + 1 if counted is None else counted
