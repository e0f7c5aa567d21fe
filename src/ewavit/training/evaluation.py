"""Loss and accuracy of a model on the evaluation set, each image once over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy


@dataclass(frozen=True)
class Metrics:
    """`loss` is the mean cross-entropy, `top1` and `top5` are percentages of the `images`."""

    loss: float
    top1: float
    top5: float
    images: int


@torch.inference_mode()
def evaluate_batches(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device | str = "cpu",
) -> Metrics:
    """Evaluate a model; with torch.distributed running, over the shares of all processes.

    Args:
        predict: images (batch, channels, height, width) -> logits (batch, classes).
        batches: this process's share as (images, labels).
        num_classes: number of classes; top-5 becomes top-`num_classes` below five.
        device: where the metrics are kept.
    """
    loss, count = MeanMetric().to(device), SumMetric().to(device)
    accuracy = {
        k: MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro").to(device)
        for k in (1, 5)
    }
    for images, labels in batches:
        logits = predict(images).float()
        count.update(len(labels))
        loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        for metric in accuracy.values():
            metric.update(logits, labels)
    values = [float(metric.compute()) for metric in (loss, accuracy[1], accuracy[5])]
    return Metrics(values[0], round(100 * values[1], 4), round(100 * values[2], 4), int(count.compute()))


@torch.inference_mode()
def predictions(
    predict: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> list[tuple[int, int]]:
    """The label and the predicted class of each image of this process's share."""
    rows: list[tuple[int, int]] = []
    for images, labels in batches:
        rows += zip(labels.tolist(), predict(images).argmax(1).tolist(), strict=True)
    return rows
