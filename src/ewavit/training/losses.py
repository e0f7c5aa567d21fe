"""`training_loss`: what a run minimises: the task's loss, with class weights or by class, and a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import timm
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from ewavit.data.batches import Data
from ewavit.data.relabelled import with_classes
from ewavit.errors import EwavitError, first_line
from ewavit.tasks.task import Task
from ewavit.training.export import load_model
from ewavit.training.recipe import Recipe

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # inputs, outputs and targets -> the mean loss


def training_loss(
    recipe: Recipe, task: Task, data: Data, device: torch.device, criterion: nn.Module | None = None
) -> Loss:
    """The loss that a recipe asks for.

    Args:
        recipe: the settings.
        task: its loss is taken unless the recipe says otherwise.
        data: the training data.
        device: where the model is.
        criterion: the task's loss with a state, if it has one.

    Returns:
        The mean loss of a batch, from its inputs, the model's outputs and labels or mixed targets.

    Raises:
        EwavitError: a setting does not work for the task or the data, or the teacher cannot be used.
    """
    asked = {
        "--bce-loss": recipe.bce_loss,
        "--class-weights": recipe.class_weights != "none",
        "--distill-from": recipe.distill_from is not None,
    }
    if not any(asked.values()):
        if criterion is not None:
            return lambda inputs, outputs, targets: criterion(outputs, targets)
        return lambda inputs, outputs, targets: task.loss(outputs, targets, recipe.smoothing)
    if not task.names_classes:
        name = next(name for name, given in asked.items() if given)
        raise EwavitError(f"{name} is for classification: leave it out")
    loss: Callable[[Tensor, Tensor], Tensor] = partial(task.loss, smoothing=recipe.smoothing)
    if recipe.bce_loss:
        loss = partial(_binary, smoothing=recipe.smoothing)
    elif recipe.class_weights == "balanced":
        weight = balanced_weights(data).to(device)
        loss = partial(F.cross_entropy, weight=weight, label_smoothing=recipe.smoothing)
    if recipe.distill_from is None:
        return lambda inputs, outputs, targets: loss(outputs, targets)
    teacher = Teacher.load(recipe.distill_from, data, device)
    alpha, tau = recipe.distillation_alpha, recipe.distillation_tau
    of_teacher = _hard if recipe.distillation_type == "hard" else partial(_soft, tau=tau)

    def distilled(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return (1 - alpha) * loss(outputs, targets) + alpha * of_teacher(outputs, teacher(inputs))

    return distilled


def balanced_weights(data: Data) -> Tensor:
    """For each class the inverse of its share of the training inputs, over the number of classes.

    Raises:
        EwavitError: the labels are not known beforehand, or a class has no input.
    """
    counts = data.class_counts()
    if counts is None:
        raise EwavitError(
            f"--class-weights balanced counts labels, and {data.name} is streamed: leave it out"
        )
    if empty := [name for name, count in zip(data.classes, counts, strict=True) if not count]:
        raise EwavitError(f"--class-weights balanced: class {empty[0]!r} has no training input: remove it")
    return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)


def _binary(outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Binary cross-entropy of each class, mean over classes and batch, as timm's `--bce-loss`."""
    classes = outputs.shape[1]
    if targets.ndim == 1:
        targets = F.one_hot(targets, classes).to(outputs.dtype)
    loss: Tensor = BinaryCrossEntropy(smoothing=0.0)(outputs, targets * (1 - smoothing) + smoothing / classes)
    return loss


def _hard(outputs: Tensor, taught: Tensor) -> Tensor:
    """DeiT's hard distillation (arXiv 2012.12877): cross-entropy with the teacher's class."""
    return F.cross_entropy(outputs, taught.argmax(1))


def _soft(outputs: Tensor, taught: Tensor, tau: float) -> Tensor:
    """DeiT's soft distillation: the divergence from the teacher at a temperature, divided by the logits."""
    ours, theirs = ((logits / tau).log_softmax(1) for logits in (outputs, taught))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * tau**2 / outputs.numel()


@dataclass(frozen=True)
class Teacher:
    """A trained model, and the step from the student's inputs and outputs to its own.

    Attributes:
        model: in eval mode.
        scale: by which the student's normalised inputs are multiplied, (channels, 1, 1).
        shift: what is then added, (channels, 1, 1).
        order: for each class of the student the number of the teacher's.
    """

    model: nn.Module
    scale: Tensor
    shift: Tensor
    order: Tensor

    @classmethod
    def load(cls, source: str, data: Data, device: torch.device) -> Teacher:
        """Load a teacher and check that it takes the data's inputs and knows its classes.

        Args:
            source: a run's folder, a file that ewavit wrote, or the name of a timm model with weights.
            data: what the student is trained on.
            device: where the teacher runs.

        Raises:
            EwavitError: it cannot be loaded, or is of other inputs or classes.
        """
        if Path(source).exists():
            model, card = load_model(Path(source))
            mean, std = card.mean, card.std
            with_classes(data, card.classes)  # the same names, in any order
            numbers = [card.classes.index(name) for name in data.classes]
        else:
            model, mean, std = _timm_teacher(source, data)
            numbers = list(range(data.num_classes))
        model = model.to(device).eval().requires_grad_(False)
        shape = (-1, 1, 1)
        mine, theirs = ((torch.tensor(m or (0.0,)), torch.tensor(s or (1.0,))) for m, s in
                        ((data.mean, data.std), (mean, std)))  # fmt: skip
        scale, shift = mine[1] / theirs[1], (mine[0] - theirs[0]) / theirs[1]
        order = torch.tensor(numbers, device=device)
        teacher = cls(model, scale.view(shape).to(device), shift.view(shape).to(device), order)
        try:
            logits = teacher.model(data.inputs.sample().to(device))
        except Exception as problem:  # any model's forward may raise anything
            raise EwavitError(
                f"--distill-from {source} does not take the inputs of {data.name} ({first_line(problem)}): "
                "choose a teacher of the same inputs"
            ) from None
        if logits.shape[1] < len(numbers):
            raise EwavitError(
                f"--distill-from {source} has {logits.shape[1]} classes, and {data.name} has {len(numbers)}: "
                "choose a teacher of the same classes"
            )
        return teacher

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The teacher's logits of a batch of the student's inputs, for the student's classes."""
        logits: Tensor = self.model(inputs if inputs.ndim == 3 else inputs * self.scale + self.shift)
        return logits.float()[:, self.order]


def _timm_teacher(name: str, data: Data) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """A timm model with its pretrained weights, if it has the data's number of classes."""
    if not timm.is_model(name):
        raise EwavitError(
            f"--distill-from {name} is no file and no timm model: give a run, a file or a model's name"
        )
    try:
        model = timm.create_model(name, pretrained=True, in_chans=data.in_chans)
    except Exception as problem:  # a download may fail in any way
        raise EwavitError(
            f"--distill-from {name} could not be loaded ({first_line(problem)}): give a file instead"
        ) from None
    if model.num_classes != data.num_classes:
        raise EwavitError(
            f"--distill-from {name} has {model.num_classes} classes, and {data.name} has {data.num_classes}: "
            "choose a teacher of the same classes"
        )
    mean, std = (tuple(model.pretrained_cfg[name]) for name in ("mean", "std"))
    if len(mean) != data.in_chans:  # timm sums the weights of the channels
        mean, std = ((fmean(values),) * data.in_chans for values in (mean, std))
    return model, mean, std
