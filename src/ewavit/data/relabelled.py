"""`with_classes`: data whose labels follow another order of the same class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ewavit.data.arrays import Ints
from ewavit.data.batches import Batch, Data, Inputs
from ewavit.errors import EwavitError

NAMED = 5  # class names in a message


def with_classes(data: Data, classes: Sequence[str]) -> Data:
    """The data with labels in the order of a model's classes; names decide, not positions.

    Args:
        data: a data set, opened.
        classes: names of the model's classes, in the order of its outputs.

    Returns:
        `data` itself if the names have this order already.

    Raises:
        EwavitError: the names differ.
    """
    if tuple(classes) == data.classes:
        return data
    of_data, of_model = set(data.classes), set(classes)
    sides = [
        f"{len(names)} only in {where}: {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"
        for where, names in (
            ("the data", [name for name in data.classes if name not in of_model]),
            ("the model", [name for name in classes if name not in of_data]),
        )
        if names
    ]
    if sides or len(of_data) != len(data.classes) or len(of_model) != len(classes):
        raise EwavitError(
            f"{data.name} has {len(data.classes)} classes and the model {len(classes)}, with other names "
            f"({'; '.join(sides) or 'names occur twice'}): give data with the class names of the training"
        )
    return _Relabelled(data, tuple(classes))


class _Relabelled(Data):
    """Another data set with its classes in another order."""

    def __init__(self, data: Data, classes: tuple[str, ...]) -> None:
        position = {name: label for label, name in enumerate(classes)}
        self._data, self._labels = data, torch.tensor([position[name] for name in data.classes])
        self.classes = classes
        self.categories = tuple(
            tuple(position[data.classes[part]] for part in parts) for parts in data.categories
        )
        # These have a default in the class.
        self.num_points, self.notes, self.resizing = data.num_points, data.notes, data.resizing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    @property
    def inputs(self) -> Inputs:
        return self._data.inputs

    @property
    def num_skipped(self) -> int:
        return self._data.num_skipped

    def class_counts(self) -> Ints | None:
        counts = self._data.class_counts()
        return None if counts is None else counts[self._labels.argsort().numpy()]

    def voting(self, predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return self._data.voting(predict)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self._renamed(self._data.train_batches(epoch, start))

    def eval_batches(self) -> Iterator[Batch]:
        return self._renamed(self._data.eval_batches())

    def eval_names(self) -> list[str] | None:
        return self._data.eval_names()

    def _renamed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for inputs, labels in batches:
            renamed = self._labels.to(labels.device)[labels.clamp(min=0)]
            yield inputs, renamed.where(labels >= 0, labels)  # below 0: without a class
