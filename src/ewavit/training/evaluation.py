"""Metrics and predictions of a model on the evaluation set, each input once over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ewavit.data.batches import Batch
from ewavit.tasks.task import Meter, Metrics, Prediction


def on_device(predict: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], torch.device]:
    """Move a model to the GPU, if there is one and it is a model of torch; its device."""
    gpu = torch.cuda.is_available() and isinstance(predict, nn.Module)
    device = torch.device("cuda" if gpu else "cpu")
    return (predict.to(device) if isinstance(predict, nn.Module) else predict), device


@torch.inference_mode()
def evaluate_batches(predict: Callable[[Tensor], Tensor], batches: Iterable[Batch], meter: Meter) -> Metrics:
    """Evaluate a model; with torch.distributed running, over the shares of all processes.

    Args:
        predict: images (batch, channels, height, width) or clouds (batch, points, channels) -> logits
            (batch, classes), or of parts (batch, parts, points).
        batches: this process's share as (inputs, targets).
        meter: of the task, empty.
    """
    for inputs, targets in batches:
        meter.update(inputs, predict(inputs).float(), targets)
    return meter.compute()


@torch.inference_mode()
def predictions(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    names: Callable[[], Sequence[str] | None] = lambda: None,
) -> list[Prediction]:
    """What a model predicts for each input, in the data's order, gathered from all processes.

    Args:
        predict: inputs -> logits (batch, classes).
        batches: this process's share as (inputs, labels); of `p` processes every p-th input.
        names: names of this share's inputs, called after the batches.
    """
    mine: list[Prediction] = []
    for inputs, labels in batches:
        logits = predict(inputs).float()
        found = logits.argmax(1)
        probability = logits.softmax(1).gather(1, found.unsqueeze(1)).squeeze(1)
        top = map(tuple, logits.topk(min(5, logits.shape[1])).indices.tolist())
        mine += map(Prediction, labels.tolist(), found.tolist(), probability.tolist(), top)
    if (named := names()) is not None:
        mine = [row._replace(name=name) for row, name in zip(mine, named, strict=True)]
    return [row for group in zip_longest(*gather_object([mine])) for row in group if row is not None]
