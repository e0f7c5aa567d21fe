"""`Task`: what a run learns. The loop, evaluation, export and comparisons ask it and know no task by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ewavit.data.batches import Batch, Data, Inputs
from ewavit.tasks.judge import Judge

Mixing = Callable[[Tensor, Tensor], Batch]  # inputs and targets -> mixed inputs and targets


@dataclass(frozen=True)
class Metrics:
    """The metrics of one evaluation by column, `loss` first, over `count` inputs, and all in one sentence."""

    values: Mapping[str, float]
    count: int
    kind: str  # of the inputs
    sentence: str

    def __getitem__(self, column: str) -> float:
        return self.values[column]

    def row(self, prefix: str = "eval") -> dict[str, float]:
        """The columns of `summary.csv`."""
        return {f"{prefix}_{column}": value for column, value in self.values.items()}

    def as_dict(self) -> dict[str, float]:
        """For `--json`."""
        return {**self.values, self.kind: self.count}


class Meter(ABC):
    """Collects a model's outputs over an evaluation, on all processes, and gives the metrics."""

    @abstractmethod
    def update(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch: the model's inputs, its float32 outputs, and the targets."""

    @abstractmethod
    def compute(self) -> Metrics:
        """The metrics of all batches. With torch.distributed running this is a collective."""


class Task(ABC):
    """A task: head, loss, targets, metrics, the judging metric, and the picture of a run.

    Attributes:
        kind: the inputs in messages, "images" or "clouds".
        judge: the metric by which runs are judged and compared.
        names_classes: whether `predictions.csv` lists a label and a predicted class for every input.
        no_mixing: why mixup and cutmix do not apply, as an error message; None where they do.
        fewest_per_batch: smallest batch that the model trains on, and why, as an error message.
    """

    kind: ClassVar[str]
    judge: ClassVar[Judge]
    names_classes: ClassVar[bool] = True
    no_mixing: ClassVar[str | None] = None
    fewest_per_batch: ClassVar[tuple[int, str]] = (1, "")

    # The model.

    @abstractmethod
    def inputs(self, classes: int, in_chans: int, img_size: int, num_points: int | None) -> Inputs:
        """The inputs of a model of this task from the numbers that a model card holds."""

    @abstractmethod
    def default_model(self, inputs: Inputs, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The name of a small model that fits the inputs, and its settings, where the recipe names none."""

    @abstractmethod
    def build_model(
        self,
        name: str,
        inputs: Inputs,
        *,
        pretrained: bool = False,
        initial_checkpoint: str | None = None,
        **kwargs: Any,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A model with this task's head that fits the inputs, checked with one forward pass.

        Args:
            name: of the model.
            inputs: shape of the inputs and number of classes.
            pretrained: load the library's weights.
            initial_checkpoint: load this file of the same model, with its head if the class counts agree.
            kwargs: settings of the model.

        Returns:
            The model and all settings that `create_model` needs to build it again.

        Raises:
            EwavitError: unknown model, settings it refuses, inputs it cannot take, wrong or missing weights.
        """

    @abstractmethod
    def create_model(self, name: str, settings: Mapping[str, Any]) -> nn.Module:
        """The model that `build_model` built, with fresh weights."""

    @abstractmethod
    def loading_code(self, name: str, settings: Mapping[str, Any], file: Path) -> str:
        """Python lines that load a plain model of this task from a file."""

    @abstractmethod
    def input_text(self, inputs: Inputs, mean: Sequence[float], std: Sequence[float]) -> str:
        """What the model has to be given, in words."""

    # Learning.

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean training loss of a batch."""

    def mixing(self, mixup: float, cutmix: float, num_classes: int) -> Mixing | None:
        """Mixup and CutMix of a batch with these alphas; None where both are 0."""
        return None

    # Judging.

    @abstractmethod
    def meter(self, data: Data, device: torch.device | str = "cpu") -> Meter:
        """An empty meter for the evaluation set of some data."""

    def picture(self, data: Data, predictions: Sequence[tuple[int, int]], path: Path) -> None:  # noqa: B027
        """Draw a few evaluation inputs with the label and the predicted class of each, where there is a way.

        Args:
            data: has the evaluation inputs.
            predictions: label and predicted class of each of them.
            path: of the picture.
        """
