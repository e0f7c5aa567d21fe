"""Loss and accuracy of a model on the evaluation set, each image once over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from statistics import fmean

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from ewavit.points.metrics import Categories, part_ious


@dataclass(frozen=True)
class Metrics:
    """`loss` is the mean cross-entropy, `top1` and `top5` are percentages of `images`, clouds or points.

    `mean_class` is the mean of the classes' top-1; `instance_iou` and `class_iou` are of part segmentation,
    in percent.
    """

    loss: float
    top1: float
    top5: float
    images: int
    mean_class: float
    instance_iou: float | None = None
    class_iou: float | None = None

    def row(self) -> dict[str, float]:
        """The columns of `summary.csv`."""
        values = {key: value for key, value in asdict(self).items() if value is not None and key != "images"}
        return {f"eval_{key}": value for key, value in values.items()}


@torch.inference_mode()
def evaluate_batches(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device | str = "cpu",
    categories: Categories = (),
) -> Metrics:
    """Evaluate a model; with torch.distributed running, over the shares of all processes.

    Args:
        predict: images (batch, channels, height, width) or clouds -> logits (batch, classes), or of parts
            (batch, parts, points).
        batches: this process's share as (images, labels).
        num_classes: number of classes; top-5 becomes top-`num_classes` below five.
        device: where the metrics are kept.
        categories: for part segmentation, the parts of each category; clouds carry it behind x, y, z.
    """
    loss, count = MeanMetric().to(device), SumMetric().to(device)
    accuracy = {
        k: MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro").to(device)
        for k in (1, 5)
    }
    mean_class = MulticlassAccuracy(num_classes, average="macro").to(device)
    iou = [
        MeanMetric(nan_strategy="disable").to(device) for _ in range(1 + len(categories))
    ]  # of all, of each
    for images, labels in batches:
        logits = predict(images).float()
        count.update(len(labels))
        loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        for metric in (*accuracy.values(), mean_class):
            metric.update(logits, labels)
        if categories:
            category = images[:, 0, 3:].argmax(-1)
            ious = part_ious(logits, labels, category, categories)
            iou[0].update(ious)
            for number, metric in enumerate(iou[1:]):
                metric.update(ious, weight=(category == number).float())
    top1, top5, by_class = (
        round(100 * float(metric.compute()), 4) for metric in (accuracy[1], accuracy[5], mean_class)
    )
    result = Metrics(float(loss.compute()), top1, top5, int(count.compute()), by_class)
    if not categories:
        return result
    instance, *of_category = (100 * float(metric.compute()) for metric in iou)
    present = [value for value in of_category if not math.isnan(value)]
    return replace(result, instance_iou=round(instance, 4), class_iou=round(fmean(present), 4))


@torch.inference_mode()
def predictions(
    predict: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> list[tuple[int, int]]:
    """The label and the predicted class of each image, in the images' order, whichever process had it.

    Args:
        predict: images (batch, channels, height, width) or clouds -> logits (batch, classes).
        batches: this process's share as (images, labels): of `p` processes every p-th image.
    """
    mine: list[tuple[int, int]] = []
    for images, labels in batches:
        mine += zip(labels.tolist(), predict(images).argmax(1).tolist(), strict=True)
    return [row for group in zip_longest(*gather_object([mine])) for row in group if row is not None]
