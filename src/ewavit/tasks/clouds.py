"""Classification of point clouds, with a point transformer instead of a timm model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ewavit.data.batches import Data, Inputs
from ewavit.data.weight_files import read_weights
from ewavit.errors import EwavitError, first_line
from ewavit.files import replacing
from ewavit.points.batches import CloudInputs
from ewavit.points.transformer import create_point_model, load_point_weights
from ewavit.tasks.classification import Classification
from ewavit.tasks.task import Mixing, Prediction
from ewavit.tasks.timm_models import check_settings
from ewavit.tasks.weights import LoadReport

SHOWN = 10  # clouds in the picture of a run


class CloudClassification(Classification):
    """One class for each cloud."""

    kind = "clouds"
    no_mixing = "--mixup and --cutmix mix images: leave them out for point clouds"
    fewest_per_batch = (2, "is too small for the point transformer's BatchNorm: choose 2 or more")
    model = "point_transformer_s"

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
        settings = {"num_classes": inputs.num_classes, **kwargs}
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

    def input_text(self, inputs: Inputs) -> str:
        assert isinstance(inputs, CloudInputs)
        shape = f"(batch, {inputs.num_points}, {inputs.in_chans})"
        return f"clouds {shape}, centred and scaled into the unit sphere"

    def mixing(self, mixup: float, cutmix: float, num_classes: int) -> Mixing | None:
        return None

    def picture(self, data: Data, predictions: Sequence[Prediction], path: Path) -> None:
        clouds: Callable[[Sequence[int]], Any] | None = getattr(data, "evaluation_clouds", None)
        if not predictions or clouds is None:
            return
        order = np.random.default_rng(0).permutation(len(predictions)).tolist()
        wrong = [index for index in order if predictions[index][0] != predictions[index][1]][: SHOWN // 2]
        right = [index for index in order if predictions[index][0] == predictions[index][1]]
        chosen = right[: SHOWN - len(wrong)] + wrong
        named = [tuple(data.classes[number] for number in predictions[index][:2]) for index in chosen]
        draw_clouds(clouds(chosen), named, path)


def draw_clouds(clouds: Any, names: Sequence[tuple[str, ...]], path: Path) -> None:
    """Draw point clouds with their classes as one picture.

    Args:
        clouds: coordinates, (clouds, points, 3).
        names: true and predicted class of each cloud; wrong predictions are red.
        path: file of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = pyplot.figure(figsize=(2.4 * columns, 2.6 * rows), layout="constrained")
    for number, (points, (label, found)) in enumerate(zip(clouds, names, strict=True), 1):
        axis = figure.add_subplot(rows, columns, number, projection="3d")
        x, y, z = points.T
        axis.scatter(x, y, z, c=y, s=2, cmap="viridis", linewidths=0)
        axis.set_box_aspect((1, 1, 1), zoom=1.3)
        for limits in (axis.set_xlim, axis.set_ylim, axis.set_zlim):
            limits(-0.8, 0.8)
        axis.set_axis_off()
        right = label == found
        title = label if right else f"{label}\npredicted {found}"
        axis.set_title(title, fontsize=9, color="black" if right else "tab:red")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
