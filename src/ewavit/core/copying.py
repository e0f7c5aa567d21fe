"""What hangs on a module besides its parameters (hooks, attributes), and deep copies that keep it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Hooks of calls. A MoE takes those of its FFN, so that they fire once for each call of the FFN's place.
CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def duplicate(module: nn.Module, memo: dict[int, Any] | None = None, hooks: bool = True) -> nn.Module:
    """A deep copy that shares all hooks, and keeps the attributes and gradient hooks of parameters.

    A hook that is a bound method keeps its owner, and the handle of a hook removes it from the copy too.

    Args:
        module: what is copied.
        memo: objects that stand in for parts of the module, by the part's `id`.
        hooks: False leaves out all hooks but those of torch that compute a weight.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        for name, value in vars(part).items():
            if "_hooks" in name and value:
                kept = value if hooks else {k: hook for k, hook in value.items() if computes_weight(hook)}
                memo.setdefault(id(value), value if hooks else type(value)(kept))
            elif isinstance(value, Tensor) and not value.is_leaf:  # a hook computes it: pruning, weight norm
                memo.setdefault(id(value), value.detach().clone())
    made = copy.deepcopy(module, memo)
    for parameter in module.parameters() if hooks else ():
        if isinstance(other := memo.get(id(parameter)), nn.Parameter) and other is not parameter:
            keep_attributes(parameter, other)
            for hook in (getattr(parameter, "_backward_hooks", None) or {}).values():
                other.register_hook(hook)  # type: ignore[no-untyped-call]
            for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                other.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return made


def computes_weight(hook: Any) -> bool:
    """Whether a forward pre-hook is one of torch's that compute a weight: pruning, the older weight norms."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def copied_with(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A deep copy of a module with other parameters, given by name."""
    return duplicate(module, {id(module.get_parameter(name)): new for name, new in parameters.items()})


def keep_attributes(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Give a parameter the attributes of another one, such as `_no_weight_decay`."""
    for name, value in vars(parameter).items():
        other.__dict__.setdefault(name, value)


def share_call_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let a module have the hooks of another one; adding or removing a hook then changes both."""
    for name in CALL_HOOKS:
        target.__dict__[name] = source.__dict__[name]


def without_call_hooks(module: nn.Module) -> dict[int, Any]:
    """A memo for `duplicate` that leaves the module's own hooks out; those of its parts stay."""
    return {id(vars(module)[name]): type(vars(module)[name])() for name in CALL_HOOKS if vars(module)[name]}


def attachments(module: nn.Module) -> list[str]:
    """What hangs on one module, its parts left out: hooks, its own `forward`, parametrizations."""
    found = [name for name, value in vars(module).items() if "_hooks" in name and value]
    if "forward" in vars(module):
        found.append("forward")
    if "parametrizations" in module._modules:
        found.append("parametrizations")
    for name, parameter in module.named_parameters(recurse=False):
        found += [f"{name}.{kind}" for kind in _PARAMETER_HOOKS if getattr(parameter, kind, None)]
    return found
