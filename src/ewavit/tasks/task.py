"""`Task`: the interface between a task and the loop, evaluation, export and comparisons."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ewavit.data.batches import Batch, Data, Inputs
from ewavit.data.input_files import InputFiles
from ewavit.data.options import DataOptions
from ewavit.tasks.confusion import Confusion
from ewavit.tasks.inference import Inference, InferenceOptions
from ewavit.tasks.judge import Judge

Mixing = Callable[[Tensor, Tensor], Batch]  # inputs and targets -> mixed inputs and targets
Listed = Any  # a named tuple with the field `name`: what a task keeps of its prediction for one input
Cell = str | int | float
Table = tuple[Sequence[str], Iterable[Sequence[Cell]]]  # header and rows


@dataclass(frozen=True)
class LossOptions:
    """Settings of a loss with a state.

    Attributes:
        margin: similarity from which a pair of two classes counts.
        koleo: weight of the KoLeo regulariser.
        memory: descriptors of earlier batches that are kept.
    """

    margin: float
    koleo: float
    memory: int


@dataclass(frozen=True)
class Metrics:
    """The metrics of one evaluation.

    Attributes:
        values: the metrics by column, `loss` first.
        count: number of inputs evaluated.
        kind: kind of the inputs, "images" or "clouds".
        sentence: all of this in one sentence.
        confusion: the confusion matrix, where one was asked for.
    """

    values: Mapping[str, float]
    count: int
    kind: str
    sentence: str
    confusion: Confusion | None = None

    def __getitem__(self, column: str) -> float:
        return self.values[column]

    def row(self, prefix: str = "eval") -> dict[str, float]:
        """The metrics as columns of `summary.csv`, with a prefix."""
        return {f"{prefix}_{column}": value for column, value in self.values.items()}

    def as_dict(self) -> dict[str, float]:
        """The metrics and the number of inputs, for `--json`."""
        return {**self.values, self.kind: self.count}


class Prediction(NamedTuple):
    """What a model predicted for one input.

    Attributes:
        label: true class.
        prediction: predicted class.
        probability: of the predicted class.
        top: the five most probable classes, the most probable first.
        name: of the input; None if it has none.
    """

    label: int
    prediction: int
    probability: float
    top: tuple[int, ...]
    name: str | None = None


class Meter(ABC):
    """Accumulates a model's outputs during an evaluation, over all processes, and computes the metrics."""

    @abstractmethod
    def update(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: the model's inputs, its float32 outputs, and the targets."""

    @abstractmethod
    def compute(self) -> Metrics:
        """The metrics of all batches. With torch.distributed running this is a collective."""


class Task(ABC):
    """A task: head, loss, targets, metrics, the judging metric, the picture of a run, and its predictions.

    Attributes:
        name: of the task, as `--task` takes it.
        kind: kind of the inputs in messages, "images" or "clouds".
        judge: the metric that judges and compares runs.
        names_classes: whether every input has one class, for a confusion matrix.
        fixed_classes: whether the outputs are classes, so that data must have those of the training.
        own_settings: settings of a recipe that this task alone uses.
        no_mixing: error message if mixup and CutMix do not apply; None if they do.
        fewest_per_batch: smallest training batch of the model, and the error message for smaller ones.
        suffixes: endings of the files that `open_files` takes from a folder, such as ".png".
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    judge: ClassVar[Judge]
    names_classes: ClassVar[bool] = True
    fixed_classes: ClassVar[bool] = True
    own_settings: ClassVar[tuple[str, ...]] = ()
    no_mixing: ClassVar[str | None] = None
    fewest_per_batch: ClassVar[tuple[int, str]] = (1, "")
    suffixes: ClassVar[tuple[str, ...]]

    # The data.

    @abstractmethod
    def open_data(self, spec: str, options: DataOptions) -> Data:
        """Open a data set for training and evaluation.

        Args:
            spec: the data set.
            options: batch size, augmentation and everything else.

        Returns:
            The data, with the batches of this rank.

        Raises:
            EwavitError: the set is unknown, cannot be read, or does not go with an option.
        """

    def preparation(self, model: str | None) -> dict[str, Any]:
        """How images are prepared for the pretrained weights of a model, as fields of `DataOptions`.

        Args:
            model: name of the model; None for the default model.
        """
        return {}

    # The model.

    @abstractmethod
    def inputs(self, classes: int, in_chans: int, img_size: int, num_points: int | None) -> Inputs:
        """The inputs of a model of this task, from the numbers of a model card.

        Args:
            classes: number of classes.
            in_chans: channels of an image or of a point.
            img_size: height and width in pixels; 0 for clouds.
            num_points: points per cloud; None for images.
        """

    @abstractmethod
    def default_model(self, inputs: Inputs, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The default model for the inputs, a small one: its name and `kwargs` with its settings added."""

    @abstractmethod
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
        """Build a model for the inputs, with this task's head, and check it with one forward pass.

        Args:
            name: name of the model.
            inputs: shape of the inputs and number of classes.
            pretrained: load the pretrained weights of the library.
            initial_checkpoint: file with weights of the same model, or a run's folder, see
                `ewavit.tasks.weights`; its head is loaded if the numbers of classes agree.
            say: gets three lines about what was loaded from the file, resized, new and left over.
            kwargs: settings of the model.

        Returns:
            The model, and the settings for `create_model`.

        Raises:
            EwavitError: the model is unknown, its settings do not work, it cannot take the inputs, or the
                weights are missing or of another model.
        """

    @abstractmethod
    def create_model(self, name: str, settings: Mapping[str, Any]) -> nn.Module:
        """Create the same model as `build_model`, from its name and settings, with fresh weights."""

    @abstractmethod
    def loading_code(
        self, name: str, settings: Mapping[str, Any], file: Path, pretrained_cfg: Mapping[str, Any]
    ) -> str:
        """Python code that loads a plain model of this task from a file.

        Args:
            name: name of the model.
            settings: settings of the model.
            file: the weights.
            pretrained_cfg: how to prepare images, under timm's names; empty for clouds.
        """

    def transform_code(self, pretrained_cfg: Mapping[str, Any]) -> str:
        """Python code that makes `transform`, the preparation of an image; empty if the task has none."""
        return ""

    def timm_config(
        self,
        name: str,
        settings: Mapping[str, Any],
        classes: Sequence[str],
        pretrained_cfg: Mapping[str, Any],
    ) -> dict[str, Any] | None:
        """The `config.json` by which timm loads the folder of a plain model; None where timm cannot."""
        return None

    @abstractmethod
    def input_text(self, inputs: Inputs) -> str:
        """A description of the model's inputs and their preparation, by the lines of `loading_code`."""

    # Learning.

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean training loss of a batch.

        Args:
            outputs: the model's outputs.
            targets: labels, or the mixed targets of `mixing`.
            smoothing: label smoothing, 0 to 1.
        """

    def criterion(self, options: LossOptions) -> nn.Module | None:
        """A loss of outputs and targets with a state, kept in checkpoints; None where `loss` is all."""
        return None

    def mixing(self, mixup: float, cutmix: float, num_classes: int) -> Mixing | None:
        """A function that mixes a batch by Mixup and CutMix with these alphas; None if both are 0."""
        return None

    # Judging.

    @abstractmethod
    def meter(self, data: Data, device: torch.device | str = "cpu") -> Meter:
        """A new meter for the evaluation set of `data`."""

    @abstractmethod
    def predictions(self, data: Data, inputs: Tensor, outputs: Tensor, targets: Tensor) -> list[Listed]:
        """What is kept of a batch for `table` and `picture`, one tuple for each input.

        Args:
            data: the data with the evaluation inputs.
            inputs: the model's inputs.
            outputs: the model's float32 outputs.
            targets: the targets.
        """

    @abstractmethod
    def table(self, predictions: Sequence[Listed], classes: Sequence[str], names: Sequence[Cell]) -> Table:
        """The predictions as a table, for `predictions.csv`.

        Args:
            predictions: one for each evaluation input, in the data's order.
            classes: names of the classes.
            names: names of the inputs, or their numbers.
        """

    def picture(  # noqa: B027
        self, data: Data, predictions: Sequence[Listed], predict: Callable[[Tensor], Tensor], path: Path
    ) -> None:
        """Draw a few evaluation inputs with what was predicted for them, if the task has a picture.

        Args:
            data: the data with the evaluation inputs.
            predictions: one for each evaluation input, in the data's order.
            predict: the model: inputs -> outputs.
            path: file of the picture.
        """

    # Predicting: `ewavit predict`.

    @abstractmethod
    def open_files(
        self, names: Sequence[str], inputs: Inputs, options: DataOptions, classes: Sequence[str]
    ) -> InputFiles:
        """Inputs without labels, one in each file, prepared as in evaluation.

        Args:
            names: the files, in the order of the output.
            inputs: shape of the model's inputs.
            options: batch size, preparation, device, workers and `skip_bad_images`.
            classes: names of the model's classes.
        """

    @abstractmethod
    def inference(self, files: InputFiles, options: InferenceOptions) -> Inference:
        """A new, empty `Inference` for these files.

        Raises:
            EwavitError: something was asked for that the task does not have.
        """
