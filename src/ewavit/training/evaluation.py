"""Metrics and predictions of a model on the evaluation set, each input once over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import zip_longest

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ewavit.data.batches import Batch, Data
from ewavit.tasks.task import Listed, Meter, Metrics, Task


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
def predictions(predict: Callable[[Tensor], Tensor], data: Data, task: Task) -> list[Listed]:
    """What a model predicts for each evaluation input, in the data's order, gathered from all processes.

    Args:
        predict: inputs -> outputs.
        data: of `p` processes each has every p-th input.
        task: it says what is kept of an output.
    """
    mine: list[Listed] = []
    for inputs, targets in data.eval_batches():
        mine += task.predictions(data, inputs, predict(inputs).float(), targets)
    return _gathered(mine, data.eval_names())


def _gathered(mine: list[Listed], names: list[str] | None) -> list[Listed]:
    if names is not None:
        mine = [row._replace(name=name) for row, name in zip(mine, names, strict=True)]
    return [row for group in zip_longest(*gather_object([mine])) for row in group if row is not None]


class Listing(Meter):
    """Another meter, and what the model predicts for each input: `predictions` without a pass of its own.

    Args:
        meter: the other one, empty.
        data: the evaluation inputs.
        task: it says what is kept of an output.
    """

    def __init__(self, meter: Meter, data: Data, task: Task) -> None:
        self.meter, self.data, self.task = meter, data, task
        self.rows: list[Listed] = []
        self.names: list[str] | None = None

    def update(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.meter.update(inputs, outputs, targets)
        self.rows += self.task.predictions(self.data, inputs, outputs, targets)

    def compute(self) -> Metrics:
        self.names = self.data.eval_names()
        return self.meter.compute()

    def gathered(self) -> list[Listed]:
        """As `predictions`; with torch.distributed running a collective."""
        return _gathered(self.rows, self.names)
