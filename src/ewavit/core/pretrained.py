"""`PretrainedSaver`: `save_pretrained` of an expanded transformers model never leaves an FFN without weights.

`from_pretrained` builds the plain model, and fills what a file does not hold with random values.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ewavit.core.devices import at_least_float32, is_sharded
from ewavit.core.experts import SeparateExperts, weighted
from ewavit.core.mixing import Mixer
from ewavit.core.moe import MoE, moe_layers
from ewavit.errors import EwavitError

_NAME = "save_pretrained"


class PretrainedSaver:
    """The `save_pretrained` of an expanded transformers model.

    Without `state_dict` it saves the plain model with the mean experts. With `state_dict` it also keeps the
    experts, because the checkpoints of a Trainer, which passes one, must resume.

    Args:
        model: the transformers model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model; arguments as in transformers.

        Raises:
            EwavitError: without `state_dict`, and no plain model computes the same, or the experts are spread
                over processes.
        """
        save = getattr(type(self.model), _NAME)
        layers = moe_layers(self.model)
        given = inspect.signature(save).bind(self.model, *args, **kwargs).arguments
        if not layers:
            return save(self.model, *args, **kwargs)
        for_trainer = "state_dict" in given
        if not for_trainer:
            self._check_plain(layers)
        state = given.get("state_dict") or self.model.state_dict()
        given["state_dict"] = with_mean_ffns(self.model, state, keep_experts=for_trainer)
        if for_trainer and "save_original_format" in inspect.signature(save).parameters:
            # Else transformers 5 writes the keys of version 4, and its Trainer finds none of them when it
            # resumes or loads the best model (https://github.com/huggingface/transformers/issues/48805).
            given.setdefault("save_original_format", False)
        more = given.pop("kwargs", {})
        return save(**given, **more)

    def _check_plain(self, layers: Mapping[str, MoE]) -> None:
        if any(moe.routed for moe in layers.values()):
            raise EwavitError(
                "the model is a routed mixture; from_pretrained builds a plain model, another one: "
                "save model.state_dict(), or a collapsed copy (a different model)"
            )
        sharded = any(is_sharded(parameter) for parameter in self.model.parameters())
        if sharded or any(moe.experts.peers is not None for moe in layers.values()):
            raise EwavitError(
                "save_pretrained cannot collect experts of other processes: call state = "
                "ewavit.dense_state_dict(model) in every process and pass state_dict=state in process 0"
            )


def guard_save_pretrained(model: nn.Module) -> None:
    """Put a `PretrainedSaver` on each transformers model that holds mixtures, `model` or a part of it."""
    for module in model.modules():
        save = getattr(type(module), _NAME, None)
        if save is not None and "state_dict" in inspect.signature(save).parameters and moe_layers(module):
            vars(module)[_NAME] = PretrainedSaver(module)


def unguard_save_pretrained(model: nn.Module) -> None:
    """Remove what `guard_save_pretrained` put on the parts of a model."""
    for module in model.modules():
        if isinstance(vars(module).get(_NAME), PretrainedSaver):
            del vars(module)[_NAME]


@torch.no_grad()
def with_mean_ffns(model: nn.Module, state: Mapping[str, Tensor], keep_experts: bool) -> dict[str, Tensor]:
    """A state dict of an expanded model with the mean FFNs under the keys of the plain model.

    Args:
        model: expanded; only its structure is used.
        state: whole tensors, of all experts. A state dict of the plain model is returned as it is.
        keep_experts: also keep the experts, under their own keys.

    Raises:
        EwavitError: experts were parametrized, pruned or wrapped since `expand`; their keys give no mean FFN.
    """
    result = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        start = f"{name}.experts."
        if not isinstance(module, MoE) or not any(key.startswith(start) for key in state):
            continue
        if module.experts.changed:
            raise EwavitError(
                f"{name} was parametrized, pruned or wrapped since ewavit.expand, so its experts give no "
                "plain weights by name: save ewavit.collapse(copy.deepcopy(model))"
            )
        ffn = module.experts.ffns()[0]
        parameters = {key for key, _ in ffn.named_parameters(remove_duplicate=False)}
        for key in ffn.state_dict():
            if isinstance(module.experts, SeparateExperts):
                copies = [state[f"{start}copies.{number}.{key}"] for number in range(module.num_experts)]
                value = torch.stack(copies) if key in parameters else copies[0]
            else:
                value = state[f"{start}ffn.{key}"]
            own = module.dispatcher.weights if isinstance(module.dispatcher, Mixer) else None
            mean = weighted(at_least_float32(value), own) if key in parameters else value.clone()
            mean = mean.to(value.dtype)
            result[f"{name}.{key}"] = mean
        for key in () if keep_experts else list(state):
            if key.startswith(start):
                del result[key]
    return result
