"""`MoE`: a dispatcher and experts in the place of an FFN.

Training mode dispatches. Eval mode uses the mean expert, or dispatches too if there is a router.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.fx import Proxy

from ewavit.core.copying import share_call_hooks
from ewavit.core.dispatch import Dispatcher
from ewavit.core.experts import ExpertLeaf, Experts, SeparateExperts, refuse_tracing
from ewavit.core.mixing import Mixer
from ewavit.core.partition import RandomPartition
from ewavit.core.steps import follow_optimizers
from ewavit.errors import EwavitError

Unit = Literal["token", "image"]

_PLAIN = "pass a collapsed copy, ewavit.collapse(copy.deepcopy(model))"


class MoE(nn.Module):
    """A mixture of experts in the place of an FFN, with the FFN's input and output.

    Args:
        experts: the N experts.
        unit: what is dealt to the experts, single "token"s or whole "image"s.
        channels_first: the FFN takes (batch, channels, height, width).
        dispatcher: sends units to experts; a `RandomPartition` by default. A `TopKRouter` takes tokens.

    Attributes:
        whole: the experts are copies of a whole model, which `ewavit.expand` turned into this mixture.
    """

    whole = False

    def __init__(
        self,
        experts: Experts,
        unit: Unit = "token",
        channels_first: bool = False,
        dispatcher: Dispatcher[Any] | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts
        self.unit = unit
        self.channels_first = channels_first
        self.dispatcher: Dispatcher[Any] = dispatcher or RandomPartition(experts.num_experts)
        self.training = self.dispatcher.training = experts.training
        for layer in experts.modules() if self.routed else ():
            if isinstance(layer, ExpertLeaf):
                layer.routed = True
        follow_optimizers(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy, or a model from a file
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        follow_optimizers(self)

    @property
    def num_experts(self) -> int:
        """N."""
        return self.experts.num_experts

    @property
    def routed(self) -> bool:
        """Whether eval mode dispatches too, because a router learned where tokens go."""
        return self.dispatcher.routed

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the experts to their units in training or with a router; otherwise apply the mean expert.

        Args:
            x: (dim,), (tokens, dim), (batch, ..., dim) or, channels first, (batch, dim, ...), any number of
                dimensions.
            *args: passed to the FFN.
            **kwargs: passed to the FFN.

        Returns:
            The FFN's output, in the FFN's shape.

        Raises:
            EwavitError: torch.fx or TorchScript traces the model; its graph would repeat one partition.
        """
        if isinstance(x, Proxy):
            raise EwavitError(f"torch.fx cannot trace an expanded model: {_PLAIN}")
        if isinstance(self.dispatcher, Mixer):
            return self.dispatcher.mix(cast(SeparateExperts, self.experts), x, *args, **kwargs)
        if self.num_experts == 1 or not (self.training or self.routed):
            return self.experts.merged(x, *args, **kwargs)
        refuse_tracing()
        if self.unit == "image":
            return self.dispatcher.compute(x, lambda block: self.experts(block, *args, **kwargs))
        return self._by_token(x, *args, **kwargs)

    def _by_token(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim == 1:
            return self._by_token(x.unsqueeze(0), *args, **kwargs).squeeze(0)
        last = x.movedim(1, -1) if self.channels_first else x

        def compute(block_ECD: Tensor) -> Tensor:
            experts, capacity, dim = block_ECD.shape
            # Each expert gets one "image" of C tokens, with the number of dimensions that the FFN expects.
            image = (capacity,) if x.ndim == 2 else (1, capacity, *(1,) * (x.ndim - 3))
            block = block_ECD.view(experts, *image, dim)
            block = block.movedim(-1, 2) if self.channels_first else block
            y: Tensor = self.experts(block, *args, **kwargs)
            y = y.movedim(2, -1) if self.channels_first else y
            return y.reshape(experts, capacity, y.shape[-1])

        y = self.dispatcher.compute(last.flatten(0, -2), compute)
        y = y.view(*last.shape[:-1], y.shape[-1])
        return y.movedim(-1, 1).contiguous() if self.channels_first else y

    def __prepare_scriptable__(self) -> nn.Module:
        raise EwavitError(f"TorchScript cannot compile an expanded model: {_PLAIN}")

    def collapse(self) -> nn.Module:
        """A new FFN of the original class whose parameters are the experts' mean."""
        if isinstance(self.dispatcher, Mixer):
            ffn = cast(SeparateExperts, self.experts).collapse(self.dispatcher.weights.detach())
        else:
            ffn = self.experts.collapse()
        share_call_hooks(self, ffn)
        return ffn

    def __getattr__(self, name: str) -> Any:
        """Attributes of the FFN that the MoE stands for, such as `fc1`: other code looks at them.

        In eval mode a parameter is the experts' mean: torch's TransformerEncoderLayer computes with it.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "experts" not in self._modules:
                raise
            original = self.experts.original
            if name in original._parameters and not (self.training or self.routed):
                return self.experts.mean_of(name)
            ffn = self.experts.ffns()[0]
            value = getattr(ffn if hasattr(ffn, name) else original, name)
            if self.whole and isinstance(value, MethodType):
                raise AttributeError(
                    f"{name} is a method of the plain model, and here are {self.num_experts} copies of it: "
                    "call it in `with ewavit.collapsed(model)`, or for each of model.experts.ffns()"
                ) from None
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a layer or parameter that would replace one of the FFN: no expert would have it."""
        own = name in vars(self) or name in self.__dict__.get("_modules", ())
        if isinstance(value, nn.Module | Tensor) and not own and hasattr(self, name):
            raise EwavitError(
                f"{name} belongs to the FFN, and no expert would have the new one: set it before "
                "ewavit.expand, or in each of moe.experts.ffns()"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"unit={self.unit!r}" + (", channels_first=True" if self.channels_first else "")


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers of a model by name, in module order; a shared layer appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def require_moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers of a model by name.

    Raises:
        EwavitError: there are none.
    """
    layers = moe_layers(model)
    if not layers:
        raise EwavitError("the model has no MoE layer: call ewavit.expand(model) first")
    return layers


@contextmanager
def dispatching(model: nn.Module) -> Iterator[None]:
    """Context manager: a model in eval mode still uses its experts and branches, without dropout."""
    switched: list[nn.Module] = [
        m for moe in moe_layers(model).values() for m in moe.modules() if isinstance(m, MoE | ExpertLeaf)
    ]
    switched += [m for m in model.modules() if getattr(m, "training_only", False)]
    before = [module.training for module in switched]
    for module in switched:
        module.training = True
    try:
        yield
    finally:
        for module, mode in zip(switched, before, strict=True):
            module.training = mode
