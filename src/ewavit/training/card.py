"""`ModelCard`: what builds a run's model again and feeds it, kept in the metadata of its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ewavit.core.moe import moe_layers
from ewavit.core.routing import TopK, TopKRouter
from ewavit.core.surgery import expand
from ewavit.data.batches import Inputs
from ewavit.points.transformer import create_point_model
from ewavit.training.opening import Data


@dataclass(frozen=True)
class RoutedMixture:
    """How to expand a dense model into the routed mixture that a file holds."""

    num_experts: int
    layers: tuple[str, ...]
    router: dict[str, Any]  # the settings of `TopK`

    @classmethod
    def of(cls, model: nn.Module) -> RoutedMixture:
        """The mixture that an expanded model with routers is."""
        layers = moe_layers(model)
        router = next(module for module in model.modules() if isinstance(module, TopKRouter))
        return cls(router.num_experts, tuple(layers), asdict(router.config))


@dataclass(frozen=True)
class ModelCard:
    """What is needed to build a run's model again and to feed it; kept in its file's metadata.

    `model_kwargs` is all that `timm.create_model` takes beside the name. `top1` is in percent, on `data`.
    `mixture` is None for a plain model.
    """

    model: str
    model_kwargs: dict[str, Any]
    classes: tuple[str, ...]
    in_chans: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str
    top1: float | None = None
    mixture: RoutedMixture | None = None
    num_points: int | None = None

    @classmethod
    def of(cls, model: str, model_kwargs: dict[str, Any], spec: str, data: Data) -> ModelCard:
        """The card of a timm model trained on some data."""
        kwargs = {key: value for key, value in model_kwargs.items() if key != "drop_path_rate"}
        mean, std = tuple(data.mean), tuple(data.std)
        card = cls(model, kwargs, tuple(data.classes), data.in_chans, data.img_size, mean, std, spec)
        return replace(card, num_points=data.num_points)

    @classmethod
    def from_dict(cls, card: dict[str, Any]) -> ModelCard:
        """The inverse of `asdict` after a trip through JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card.items()}
        if mixture := values.get("mixture"):
            values["mixture"] = RoutedMixture(**mixture | {"layers": tuple(mixture["layers"])})
        return cls(**values)

    def metadata(self) -> dict[str, str]:
        """The card as metadata of a safetensors or ONNX file."""
        return {"ewavit": json.dumps(asdict(self))}

    def build(self) -> nn.Module:
        """The model, with fresh weights."""
        model: nn.Module
        if self.num_points is not None:
            model = create_point_model(self.model, **self.model_kwargs)
        else:
            model = timm.create_model(self.model, **self.model_kwargs)
        if self.mixture is not None:
            router = TopK(**self.mixture.router)
            expand(model, self.mixture.num_experts, select=self.mixture.layers, router=router)
        return model

    def loading_code(self, file: Path) -> str:
        """Lines that load the file: of timm, or of ewavit for a mixture or a point transformer."""
        if self.mixture is not None:
            return f"import ewavit\nmodel = ewavit.load({str(file)!r})"
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.model_kwargs.items())
        if self.num_points is not None:
            return (
                "from ewavit.points.transformer import create_point_model, load_point_checkpoint\n"
                f"model = create_point_model({self.model!r}, {arguments}).eval()\n"
                f"load_point_checkpoint(model, {str(file)!r})"
            )
        return (
            "import timm\n"
            f"settings = dict({arguments})\n"
            f"model = timm.create_model({self.model!r}, checkpoint_path={str(file)!r}, **settings).eval()"
        )

    def input_text(self) -> str:
        """What the model is to be given."""
        if self.num_points is not None:
            return f"clouds (batch, {self.num_points}, {self.in_chans}), centred, scaled into the unit sphere"
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        return f"images in 0 to 1, less the mean {mean}, divided by {std}"

    def sample(self, batch: int) -> Tensor:
        """Random inputs in the shape that the model takes."""
        inputs = Inputs(len(self.classes), self.in_chans, self.img_size, self.num_points)
        return torch.randn_like(inputs.sample(batch))
