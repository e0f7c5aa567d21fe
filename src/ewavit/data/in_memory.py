"""`TensorData`: a set that lies in memory as one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from ewavit.data.augmentation import Augmentation, TensorAugmentation
from ewavit.data.batches import Batch, BatchPlan, Data, Statistics
from ewavit.data.sources import Arrays, Ints


class TensorData(Data):
    """A set that lies on the device as one uint8 tensor and is augmented there in batches.

    Augmentation draws from the global generators of torch and `random`: who seeds them before each batch
    gets the same batch again.
    Images per second: benchmarks/data_rate.py.

    Args:
        arrays: the images; resized once if `img_size` differs.
        indices: which training images are used, in the order that `plan` counts, (plan.num_train,).
        plan: the order of the images.
        augmentation: what happens to training images.
        img_size: height and width in pixels; None keeps the stored size.
        statistics: to normalise with; None takes those of the training images.
        device: where the tensor lies and the batches are made.
    """

    def __init__(
        self,
        arrays: Arrays,
        indices: Ints,
        plan: BatchPlan,
        augmentation: Augmentation,
        img_size: int | None,
        statistics: Statistics | None,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._train_images = _resized(arrays.train_images[indices], img_size, device)
        self._train_labels = torch.from_numpy(arrays.train_labels[indices]).to(device)
        self._eval_images = _resized(arrays.eval_images, img_size, device)
        self._eval_labels = torch.from_numpy(arrays.eval_labels).to(device)
        self.name = arrays.name
        self.classes = arrays.classes
        self.num_train, self.num_eval = plan.num_train, plan.num_eval
        self.batches_per_epoch = plan.batches_per_epoch
        self.in_chans, self.img_size = self._train_images.shape[1:3]
        self.mean, self.std = statistics or _channel_statistics(self._train_images)
        self._augment = TensorAugmentation(augmentation, self.img_size, self.mean, self.std, device)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for indices in self._plan.train(epoch, start):
            chosen = torch.from_numpy(indices).to(self._train_images.device)
            yield self._augment(self._train_images[chosen]), self._train_labels[chosen]

    def eval_batches(self) -> Iterator[Batch]:
        for indices in self._plan.eval():
            chosen = torch.from_numpy(indices).to(self._eval_images.device)
            yield self._augment.normalize(self._eval_images[chosen]), self._eval_labels[chosen]


def _resized(images: Any, img_size: int | None, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(images).to(device)
    if img_size is None or img_size == tensor.shape[-1]:
        return tensor
    resize = v2.Resize([img_size, img_size], antialias=True)
    return torch.cat([resize(part) for part in torch.split(tensor, 1000)])


def _channel_statistics(images: Tensor) -> Statistics:
    """Mean and standard deviation per channel of uint8 (images, channels, h, w), of values scaled to 0..1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).cpu().double()
        mean = (counts @ values / counts.sum()).item()
        std = (counts @ (values - mean) ** 2 / counts.sum()).sqrt().item()
        means.append(mean)
        stds.append(max(std, 1 / 255))  # a constant channel has none
    return tuple(means), tuple(stds)
