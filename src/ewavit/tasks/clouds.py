"""Classification of point clouds, with a point transformer instead of a timm model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ewavit.data.batches import Data, Inputs
from ewavit.data.input_files import InputFiles
from ewavit.data.options import DataOptions
from ewavit.data.weight_files import read_weights
from ewavit.errors import EwavitError, first_line
from ewavit.points.batches import CloudInputs, PointData
from ewavit.points.cloud_files import CloudFiles
from ewavit.points.sources import SUFFIXES
from ewavit.points.transformer import create_point_model, load_point_weights
from ewavit.tasks.classification import Classification
from ewavit.tasks.sheet import draw_sheet, short
from ewavit.tasks.task import Listed, Mixing
from ewavit.tasks.timm_models import check_settings
from ewavit.tasks.weights import LoadReport

SHOWN = 10  # clouds in the picture of a run


class CloudClassification(Classification):
    """One class for each cloud."""

    kind = "clouds"
    no_mixing = "--mixup and --cutmix mix images: leave them out for point clouds"
    fewest_per_batch = (2, "is too small for the point transformer's BatchNorm: choose 2 or more")
    model = "point_transformer_s"
    suffixes = SUFFIXES
    own_settings = ("point_features",)

    def open_data(self, spec: str, options: DataOptions) -> Data:
        return PointData.open(spec, options)

    def preparation(self, model: str | None) -> dict[str, Any]:
        return {}

    def inputs(self, classes: int, in_chans: int, img_size: int, num_points: int | None) -> Inputs:
        assert num_points is not None
        return CloudInputs(classes, in_chans, num_points)

    def default_model(self, inputs: Inputs, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return self.model, kwargs

    def build_model(
        self,
        name: str,
        inputs: Inputs,
        *,
        pretrained: bool = False,
        initial_checkpoint: str | None = None,
        say: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> tuple[nn.Module, dict[str, Any]]:
        if pretrained:
            raise EwavitError(
                "--pretrained loads timm's weights: use --initial-checkpoint FILE for a point model"
            )
        assert isinstance(inputs, CloudInputs)
        settings = {"num_classes": inputs.num_classes, **kwargs}
        if inputs.features:
            settings["features"] = inputs.features
        model = self.create_model(name, settings)
        if initial_checkpoint is not None:
            weights = read_weights(Path(initial_checkpoint))
            new, left_over = load_point_weights(model, weights, initial_checkpoint)
            loaded = [key for key in model.state_dict() if key not in new]
            if say is not None:
                report = LoadReport(initial_checkpoint, loaded, new=new, left_over=left_over)
                say("\n".join(report.lines()))
        try:
            with torch.no_grad():
                model.eval()(inputs.sample())
        except EwavitError:
            raise
        except Exception as problem:  # whatever a setting that does not work makes the layers raise
            raise EwavitError(
                f"{name} does not work with these --model-kwargs ({first_line(problem)}): change them"
            ) from None
        return model.train(), settings

    def create_model(self, name: str, settings: Mapping[str, Any]) -> nn.Module:
        check_settings(settings)
        if "num_classes" not in settings:
            raise EwavitError(f"{name} has no num_classes among its settings: give a card with all of them")
        return create_point_model(name, **settings)

    def loading_code(
        self, name: str, settings: Mapping[str, Any], file: Path, pretrained_cfg: Mapping[str, Any]
    ) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        return (
            "from ewavit.points.transformer import create_point_model, load_point_checkpoint\n"
            f"model = create_point_model({name!r}, {arguments}).eval()\n"
            f"load_point_checkpoint(model, {str(file)!r})"
        )

    def open_files(
        self, names: Sequence[str], inputs: Inputs, options: DataOptions, classes: Sequence[str]
    ) -> InputFiles:
        assert isinstance(inputs, CloudInputs)
        return CloudFiles(names, inputs, options)

    def input_text(self, inputs: Inputs) -> str:
        assert isinstance(inputs, CloudInputs)
        shape = f"(batch, {inputs.num_points}, {inputs.in_chans})"
        features = "; x, y, z, then the --point-features of the training" if inputs.features else ""
        return f"clouds {shape}, centred and scaled into the unit sphere{features}"

    def mixing(self, mixup: float, cutmix: float, num_classes: int) -> Mixing | None:
        return None

    def picture(
        self, data: Data, predictions: Sequence[Listed], predict: Callable[[Tensor], Tensor], path: Path
    ) -> None:
        clouds: Callable[[Sequence[int]], Any] | None = getattr(data, "evaluation_clouds", None)
        if not predictions or clouds is None:
            return
        order = np.random.default_rng(0).permutation(len(predictions)).tolist()
        wrong = [index for index in order if predictions[index][0] != predictions[index][1]][: SHOWN // 2]
        right = [index for index in order if predictions[index][0] == predictions[index][1]]
        chosen = right[: SHOWN - len(wrong)] + wrong
        names = [tuple(data.classes[number] for number in predictions[index][:2]) for index in chosen]
        captions = [
            short(label) if label == found else f"{short(label)}\npredicted {short(found)}"
            for label, found in names
        ]
        mistaken = [label != found for label, found in names]
        draw_sheet(list(clouds(chosen)), captions, path, mistaken, clouds=True)
