"""What hangs on a module besides its parameters (hooks, attributes), and deep copies that keep it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import reduce
from types import CellType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ewavit.errors import EwavitError

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
_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def duplicate(module: nn.Module, memo: dict[int, Any] | None = None, hooks: bool = True) -> nn.Module:
    """A deep copy that shares all hooks, and keeps the attributes and gradient hooks of parameters.

    A hook that is a bound method keeps its owner, and the handle of a hook removes it from the copy too. Only
    where a hook of torch computes a weight has each copy its own hooks: pruning adds and removes them.

    Args:
        module: what is copied.
        memo: objects that stand in for parts of the module, by the part's `id`.
        hooks: False leaves out all hooks but those of torch that compute a weight.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        for name, value in vars(part).items():
            if "_hooks" in name and value:
                computing = {key: hook for key, hook in value.items() if computes_weight(hook)}
                own = type(value)(value if hooks else computing)
                memo.setdefault(id(value), value if hooks and not computing else own)
            elif isinstance(value, Tensor) and not value.is_leaf:  # a hook computes it: pruning, weight norm
                memo.setdefault(id(value), value.detach().clone())
    made = copy.deepcopy(module, memo)
    for part in module.modules():
        held, other = vars(part)["_load_state_dict_pre_hooks"], memo.get(id(part))
        if held and isinstance(other, nn.Module):  # torch wraps these with a reference to their module
            rebound = {
                k: type(hook)(hook.hook, other if hook.with_module else None) for k, hook in held.items()
            }
            other._load_state_dict_pre_hooks = type(held)(rebound)
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


def hook_on_itself(module: nn.Module) -> str:
    """The place of a hook that refers to the module itself, so that a copy would call it for the old one."""
    parts = {id(part) for part in module.modules()}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            for hook in value.values() if "_hooks" in name else ():
                hook = getattr(hook, "hook", hook)
                cells = [
                    cell.cell_contents
                    for cell in getattr(hook, "__closure__", None) or ()
                    if cell != CellType()
                ]
                if parts & set(
                    map(id, (getattr(hook, "__self__", None), *getattr(hook, "args", ()), *cells))
                ):
                    return f"{path}.{name}".lstrip(".")
    return ""


def without_weights(module: nn.Module) -> nn.Module:
    """A deep copy with its parameters on the meta device: what the module is, without its weights."""
    return duplicate(
        module, {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    )


def computed_weights(module: nn.Module, before: nn.Module) -> dict[str, Tensor]:
    """The weights that a module computes with, after it was parametrized or pruned.

    Args:
        module: parametrized or pruned in some layers.
        before: a copy from before that (`without_weights`); it gets the module's mode and buffers.

    Returns:
        The value for each parameter of `before`, by name.

    Raises:
        EwavitError: a layer was replaced, added or no longer computes its weight.
    """
    now, then = (
        {name: part for name, part in each.named_modules() if "parametrizations" not in name.split(".")}
        for each in (module, before)
    )
    for name in {**then, **now}:
        part, kind = now.get(name), type(now.get(name))
        plain = kind.__mro__[1] if part is not None and parametrize.is_parametrized(part) else kind
        if part is None or name not in then or type(then[name]) not in (kind, plain):
            raise unknown_mean(
                name, "is missing" if part is None else f"is a {kind.__module__}.{kind.__name__}"
            )
        for hook in list(part._forward_pre_hooks.values()):
            if computes_weight(hook):
                hook(part, ())
        then[name].training = part.training
        then[name]._buffers |= {k: v for k, v in part._buffers.items() if k in then[name]._buffers}
    try:
        found: list[tuple[str, Any]] = [
            (name, reduce(getattr, name.split("."), module)) for name, _ in before.named_parameters()
        ]
    except AttributeError as problem:
        raise unknown_mean(str(problem.name), "is gone") from None
    return dict(found)


def unknown_mean(name: str, what: str) -> EwavitError:
    """The error for experts that were changed in a way that leaves their mean unknown."""
    return EwavitError(
        f"{name} of an expert {what} since ewavit.expand, so the mean weight is not known: merge it first "
        "(peft: merge_and_unload), or call expand after the change"
    )


def keep_attributes(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Give a parameter the attributes of another one, such as `_no_weight_decay`."""
    for name, value in vars(parameter).items():
        other.__dict__.setdefault(name, value)


def all_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters under all their names."""
    return list(module.named_parameters(remove_duplicate=False))


def tie(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Let copies share parameters where the modules do; `pairs` are modules with their copies."""
    kept: dict[nn.Parameter, nn.Parameter] = {}
    for module, made in pairs:
        copied = dict(all_parameters(made))
        for name, parameter in all_parameters(module):
            if name in copied:  # not in what was parametrized or pruned since
                holder, _, key = name.rpartition(".")
                made.get_submodule(holder)._parameters[key] = kept.setdefault(parameter, copied[name])


def share_call_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let a module have the hooks of another one; adding or removing a hook then changes both."""
    for name in CALL_HOOKS:
        target.__dict__[name] = source.__dict__[name]


def without_call_hooks(module: nn.Module) -> dict[int, Any]:
    """A memo for `duplicate` that leaves the module's own hooks out; those of its parts stay."""
    return {id(vars(module)[name]): type(vars(module)[name])() for name in CALL_HOOKS if vars(module)[name]}


def called_within(module: nn.Module) -> str:
    """The name of a part with a hook of its calls, torch's that compute weights left out; "" without any."""
    for name, part in module.named_modules():
        held = (getattr(part, kind) for kind in _CALLED if name)
        if any(not computes_weight(hook) for hooks in held for hook in hooks.values()):
            return str(name)
    return ""


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
