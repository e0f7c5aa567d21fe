"""Part segmentation: a part for each point of a cloud; the judging metric is ShapeNetPart's instance mIoU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from ewavit.data.batches import Data, Inputs
from ewavit.data.input_files import InputFiles
from ewavit.data.options import DataOptions
from ewavit.points.batches import CloudInputs
from ewavit.points.cloud_files import CloudFiles
from ewavit.points.metrics import Categories, categories_of, category_of, part_ious, predicted_parts
from ewavit.tasks.classification import ClassMeter
from ewavit.tasks.clouds import CloudClassification
from ewavit.tasks.inference import Inference, InferenceOptions
from ewavit.tasks.judge import INSTANCE_IOU
from ewavit.tasks.part_inference import PartInference
from ewavit.tasks.sheet import draw_sheet
from ewavit.tasks.task import Cell, Listed, Meter, Metrics, Table

SHOWN = 4  # clouds in the picture of a run


class PartSegmentation(CloudClassification):
    """One part for each point. The category of a cloud follows x, y, z and features as a one-hot vector."""

    name = "segmentation"
    judge = INSTANCE_IOU
    names_classes = False  # not for every point of a cloud
    model = "point_transformer_seg_s"

    def inputs(self, classes: int, in_chans: int, img_size: int, num_points: int | None) -> Inputs:
        assert num_points is not None
        return CloudInputs(classes, in_chans, num_points, parts=True)

    def open_files(
        self, names: Sequence[str], inputs: Inputs, options: DataOptions, classes: Sequence[str]
    ) -> InputFiles:
        assert isinstance(inputs, CloudInputs)
        return CloudFiles(names, inputs, options, list(categories_of(classes)))

    def inference(self, files: InputFiles, options: InferenceOptions) -> Inference:
        return PartInference(files, options)

    def meter(self, data: Data, device: torch.device | str = "cpu") -> Meter:
        return PartMeter(self.kind, data.num_classes, data.categories, device)

    def predictions(self, data: Data, inputs: Tensor, outputs: Tensor, targets: Tensor) -> list[Listed]:
        category = category_of(inputs)
        ious = 100 * part_ious(outputs, targets, category, data.categories)
        of_parts = list(categories_of(data.classes))
        return [
            CloudPrediction(of_parts[number], iou)
            for number, iou in zip(category.tolist(), ious.tolist(), strict=True)
        ]

    def table(self, predictions: Sequence[Listed], classes: Sequence[str], names: Sequence[Cell]) -> Table:
        rows = ((name, row.category, f"{row.iou:.4f}") for name, row in zip(names, predictions, strict=True))
        return ("input", "category", "iou"), rows

    def picture(
        self, data: Data, predictions: Sequence[Listed], predict: Callable[[Tensor], Tensor], path: Path
    ) -> None:
        for inputs, targets in data.eval_batches():
            clouds, labelled = inputs[:SHOWN], targets[:SHOWN].cpu()
            with torch.inference_mode():
                found = predict(clouds).float()
            break
        else:
            return
        parts = predicted_parts(found, category_of(clouds), data.categories)
        pictures, captions = [], []
        for cloud, *both in zip(clouds[..., :3].cpu(), labelled, parts.cpu(), strict=True):
            for words, labels in zip(("labels", "predicted"), both, strict=True):
                pictures.append(torch.cat([cloud, labels.unsqueeze(1)], 1).numpy())
                captions.append(words)
        draw_sheet(pictures, captions, path, clouds=True)


class CloudPrediction(NamedTuple):
    """How well the parts of one cloud were found.

    Attributes:
        category: name of its category.
        iou: mean IoU of the category's parts, in percent.
        name: of the cloud; None if it has none.
    """

    category: str
    iou: float
    name: str | None = None


class PartMeter(ClassMeter):
    """The metrics of `ClassMeter` over points, and instance and class mIoU in percent.

    Args:
        kind: kind of the inputs in the sentence.
        num_classes: number of parts in all categories together.
        categories: the parts of each category.
        device: device of the metrics.
    """

    def __init__(
        self, kind: str, num_classes: int, categories: Categories, device: torch.device | str = "cpu"
    ) -> None:
        from torchmetrics import MeanMetric

        super().__init__(kind, num_classes, device)
        self.categories = categories
        # One for all clouds, then one for each category.
        self.iou = [MeanMetric(nan_strategy="disable").to(device) for _ in range(1 + len(categories))]

    def update(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> None:
        super().update(inputs, outputs, targets)
        category = category_of(inputs)
        ious = part_ious(outputs, targets, category, self.categories)
        self.iou[0].update(ious)
        for number, metric in enumerate(self.iou[1:]):
            metric.update(ious, weight=(category == number).float())

    def compute(self) -> Metrics:
        of_points = super().compute()
        instance, *of_category = (100 * float(metric.compute()) for metric in self.iou)
        by_class = fmean(value for value in of_category if not math.isnan(value))
        values = {**of_points.values, "instance_iou": round(instance, 4), "class_iou": round(by_class, 4)}
        sentence = (
            f"instance mIoU {instance:.2f} %, class mIoU {by_class:.2f} %, "
            f"points right {values['top1']:.2f} %, loss {values['loss']:.4f} "
            f"on {of_points.count:,} {self.kind}"
        )
        return Metrics(values, of_points.count, self.kind, sentence)
