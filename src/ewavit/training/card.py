"""`ModelCard`: what builds a run's model again and feeds it, kept in the metadata of its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ewavit.core.mixing import Hybrid
from ewavit.core.moe import moe_layers
from ewavit.core.routing import TopK, routers
from ewavit.core.surgery import expand
from ewavit.data.batches import Data, Inputs
from ewavit.data.options import PREPARATION
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular
from ewavit.tasks.block_diagonal import group_ffns
from ewavit.tasks.choice import task_for
from ewavit.tasks.task import Task
from ewavit.training.card_check import build_for, check_fields, parse_card
from ewavit.training.places import absolute_spec, portable_spec


@dataclass(frozen=True)
class RoutedMixture:
    """How to expand a dense model into the routed mixture that a file holds."""

    num_experts: int
    layers: tuple[str, ...]
    router: dict[str, Any]  # the settings of `TopK` or `Hybrid`

    @classmethod
    def of(cls, model: nn.Module) -> RoutedMixture:
        """The mixture that an expanded model with routers is."""
        found, layers = routers(model), moe_layers(model)
        num_experts = next(iter(layers.values())).num_experts
        config = next(iter(found.values())).config if found else Hybrid(num_experts - 1)
        return cls(num_experts, tuple(layers), asdict(config))

    @property
    def config(self) -> TopK | Hybrid:
        """What `expand` takes as its router."""
        kind = Hybrid if "specialists" in self.router else TopK
        return kind(**self.router)


@dataclass(frozen=True)
class ModelCard:
    """What is needed to build a run's model again and to feed it; kept in its file's metadata.

    `model_kwargs` is all that `timm.create_model` takes beside the name. `interpolation`, `crop_pct` and
    `crop_mode` say in timm's words how evaluation images are resized; None for clouds and in old files.
    `task_name` is None in old files, whose task follows from `data`.
    `ffn_groups` is above 1 for block-diagonal FFNs, which stock timm does not have. `point_features` is None
    for clouds of coordinates alone.
    `metric` is the task's judging metric on `data`, None within the first epoch. `mixture` is None for a
    plain model. `absolute_data` and `data_dir` are where the run read its data, as absolute paths. They
    are in `state.json` of a checkpoint, never in the metadata of a file.
    """

    model: str
    model_kwargs: dict[str, Any]
    classes: tuple[str, ...]
    in_chans: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str
    metric: float | None = None
    mixture: RoutedMixture | None = None
    num_points: int | None = None
    absolute_data: str | None = None
    data_dir: str | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    task_name: str | None = None
    ffn_groups: int = 1
    point_features: str | None = None

    @classmethod
    def of(
        cls,
        model: str,
        model_kwargs: dict[str, Any],
        spec: str,
        data: Data,
        data_dir: str | None = None,
        task: str | None = None,
    ) -> ModelCard:
        """The card of a model trained on some data, for the task of this name or the data's default."""
        kwargs = {key: value for key, value in model_kwargs.items() if key != "drop_path_rate"}
        mean, std = tuple(data.mean), tuple(data.std)
        card = cls(model, kwargs, tuple(data.classes), data.in_chans, data.img_size, mean, std, spec)
        root = None if data_dir is None else str(Path(data_dir).expanduser().absolute())
        resizing = {} if data.resizing is None else asdict(data.resizing)
        place = absolute_spec(spec)
        named = task_for(spec, task).name
        return replace(
            card, num_points=data.num_points, absolute_data=place, data_dir=root, task_name=named, **resizing
        )

    @classmethod
    def from_dict(cls, card: dict[str, Any], source: str = "the card") -> ModelCard:
        """The inverse of `asdict` after a trip through JSON; `source` is the file, for messages.

        Raises:
            EwavitError: a field is missing, unknown or wrong.
        """
        if "top1" in card:  # the name of the field in files of version 0.1
            card = {**card, "metric": card["top1"]}
            del card["top1"]
        check_fields(card, source)
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card.items()}
            if mixture := values.get("mixture"):
                values["mixture"] = RoutedMixture(**mixture | {"layers": tuple(mixture["layers"])})
                values["mixture"].config  # noqa: B018
        except (EwavitError, TypeError) as problem:
            raise EwavitError(f"{source} does not describe a model: {first_line(problem)}") from None
        return cls(**values)

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str], source: str) -> ModelCard | None:
        """The card in the metadata of a file; None if there is none. Places of data are not taken from it.

        Raises:
            EwavitError: as `from_dict`.
        """
        if "ewavit" not in metadata:
            return None
        card = parse_card(metadata["ewavit"], source)
        return replace(cls.from_dict(card, source), absolute_data=None, data_dir=None)

    @classmethod
    def of_file(cls, file: Path) -> ModelCard | None:
        """The card in a safetensors file or in a run's folder; None if there is none.

        Raises:
            EwavitError: as `from_dict`.
        """
        file = file / "model.safetensors" if file.is_dir() else file
        try:
            with safe_open(regular(file), "pt") as handle:
                metadata = handle.metadata() or {}
        except (OSError, SafetensorError):  # missing, or of another format: the loader of weights says so
            return None
        return cls.of_metadata(metadata, str(file))

    def metadata(self) -> dict[str, str]:
        """The card as metadata of a safetensors or ONNX file, without the places of this machine."""
        card = asdict(replace(self, data=portable_spec(self.data)))
        del card["absolute_data"], card["data_dir"]
        if self.ffn_groups == 1:
            del card["ffn_groups"]
        if self.point_features is None:
            del card["point_features"]
        pretrained_cfg = self.pretrained_cfg
        more = {"pretrained_cfg": json.dumps(pretrained_cfg)} if pretrained_cfg else {}
        return {"ewavit": json.dumps(card), **more}

    @property
    def preparation(self) -> dict[str, Any]:
        """The fields of `DataOptions` that prepare inputs as in the training."""
        fields = {name: getattr(self, name) for name in (*PREPARATION, "num_points", "point_features")}
        return {**fields, "img_size": self.img_size or None}

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """How to prepare images, in the words of timm's `pretrained_cfg`; empty for clouds and old files."""
        if self.crop_pct is None:
            return {}
        size = (self.in_chans, self.img_size, self.img_size)
        return {"input_size": size, **{name: getattr(self, name) for name in PREPARATION}}

    @property
    def task(self) -> Task:
        """What the model was trained for."""
        return task_for(self.data, self.task_name)

    @property
    def inputs(self) -> Inputs:
        """Shape of the model's inputs, and its number of classes."""
        return self.task.inputs(len(self.classes), self.in_chans, self.img_size, self.num_points)

    def build(self, weights: Mapping[str, Tensor], source: str, num_experts: int = 1) -> nn.Module:
        """The dense model, with fresh weights, if a file holds such a model.

        Args:
            weights: what the file holds.
            source: the file, for messages.
            num_experts: experts in each mixture of the file.

        Raises:
            EwavitError: the weights are those of another model, or it cannot be built.
        """

        def create() -> nn.Module:
            return group_ffns(self.task.create_model(self.model, self.model_kwargs), self.ffn_groups)

        model = build_for(weights, create, source, num_experts)
        if self.pretrained_cfg:
            model.pretrained_cfg = {**model.pretrained_cfg, **self.pretrained_cfg}  # type: ignore[dict-item, assignment]
        return model

    def build_deployed(self, weights: Mapping[str, Tensor], source: str) -> nn.Module:
        """As `build`, but the routed mixture if it is one."""
        if self.mixture is None:
            return self.build(weights, source)
        model = self.build(weights, source, self.mixture.num_experts)
        mixture = self.mixture
        try:
            return expand(model, mixture.num_experts, select=mixture.layers, router=mixture.config)
        except EwavitError as problem:
            raise EwavitError(f"{source} does not describe its mixture: {first_line(problem)}") from None

    def loading_code(self, file: Path) -> str:
        """Python lines that load the file: with the task's own library, or with ewavit where that cannot."""
        if self.mixture is not None or self.ffn_groups > 1:
            code = f"import ewavit\nmodel = ewavit.load({str(file)!r})"
        else:
            code = self.task.loading_code(self.model, self.model_kwargs, file, self.pretrained_cfg)
        return f"{code}\n{self.task.transform_code(self.pretrained_cfg)}".rstrip()

    def input_text(self) -> str:
        """What the model has to be given, in words."""
        return self.task.input_text(self.inputs)

    def timm_config(self) -> dict[str, Any] | None:
        """The `config.json` with which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads a file.

        None where timm cannot: for clouds, a mixture, and a card of an old file.
        """
        if self.mixture is not None or self.ffn_groups > 1 or not self.pretrained_cfg:
            return None
        return self.task.timm_config(self.model, self.model_kwargs, self.classes, self.pretrained_cfg)

    def sample(self, batch: int) -> Tensor:
        """Random inputs in the shape that the model takes."""
        return torch.randn_like(self.inputs.sample(batch))
