"""`TensorData`: a set in memory as one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from ewavit.data.arrays import Arrays, Ints, find_cifar, read_bundled, read_cifar
from ewavit.data.augmentation import TensorAugmentation
from ewavit.data.batches import Batch, Data, Resizing, Statistics
from ewavit.data.options import DataOptions
from ewavit.data.subsets import split

BUNDLED = "fashion-mnist-mini"


def is_in_memory(spec: str) -> bool:
    """Whether a data spec names the bundled images or a folder of CIFAR.

    Raises:
        EwavitError: the folder holds both CIFAR-10 and CIFAR-100.
    """
    return spec == BUNDLED or find_cifar(Path(spec).expanduser()) is not None


class TensorData(Data):
    """A set on the device as one uint8 tensor, augmented there in batches.

    Augmentation draws from the global generators of torch and `random`; the same seeds before a batch give
    the same batch.
    Images per second: benchmarks/data_rate.py.

    Args:
        arrays: the images; resized once if `options.img_size` differs.
        indices: the training images that are used, (images,).
        options: batch size, seed, ranks, augmentation, image size, statistics and device; without statistics
            the images are normalised with those of the training images.

    Raises:
        EwavitError: the augmentation does not work for these images.
    """

    def __init__(self, arrays: Arrays, indices: Ints, options: DataOptions) -> None:
        device, count = options.device, len(arrays.eval_labels)
        plan = options.plan(len(indices), count, lambda: arrays.train_labels[indices])
        self._plan = plan
        self._train_images = _resized(arrays.train_images[indices], options.img_size, device)
        self._train_labels = torch.from_numpy(arrays.train_labels[indices]).to(device)
        self._eval_images = _resized(arrays.eval_images, options.img_size, device)
        self._eval_labels = torch.from_numpy(arrays.eval_labels).to(device)
        self.name = arrays.name
        self.classes = arrays.classes
        self.num_train, self.num_eval = plan.num_train, plan.num_eval
        self.batches_per_epoch = plan.batches_per_epoch
        self.in_chans, self.img_size = self._train_images.shape[1:3]
        self.mean, self.std = options.statistics(self.in_chans) or _channel_statistics(self._train_images)
        self.resizing = Resizing("bilinear", 1.0, "squash")  # what `_resized` does
        self._augment = TensorAugmentation(options.augmentation, self.img_size, self.mean, self.std, device)

    def class_counts(self) -> Ints:
        counts: Ints = torch.bincount(self._train_labels, minlength=self.num_classes).cpu().numpy()
        return counts

    @classmethod
    def open(cls, spec: str, options: DataOptions) -> TensorData:
        """Open a spec of the kind `is_in_memory`.

        Raises:
            EwavitError: files are missing or damaged, or an option does not work for the set.
        """
        folder = find_cifar(Path(spec).expanduser()) if spec != BUNDLED else None
        arrays = read_bundled() if folder is None else read_cifar(folder)
        indices, held = split(len(arrays.train_labels), options, lambda: arrays.train_labels)
        if held is not None:
            images, labels = arrays.train_images[held], arrays.train_labels[held]
            arrays = replace(arrays, eval_images=images, eval_labels=labels)
        return cls(arrays, indices, options)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for indices in self._plan.train_indices(epoch, start):
            chosen = torch.from_numpy(indices).to(self._train_images.device)
            yield self._augment(self._train_images[chosen]), self._train_labels[chosen]

    def eval_batches(self) -> Iterator[Batch]:
        for indices in self._plan.eval_indices():
            chosen = torch.from_numpy(indices).to(self._eval_images.device)
            yield self._augment.normalize(self._eval_images[chosen]), self._eval_labels[chosen]


def _resized(images: Any, img_size: int | None, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(images).to(device)
    if img_size is None or img_size == tensor.shape[-1]:
        return tensor
    resize = v2.Resize([img_size, img_size], antialias=True)
    return torch.cat([resize(part) for part in torch.split(tensor, 1000)])


def _channel_statistics(images: Tensor) -> Statistics:
    """Mean and standard deviation per channel of uint8 images (N, channels, h, w), values scaled to 0..1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).cpu().double()
        mean = (counts @ values / counts.sum()).item()
        std = (counts @ (values - mean) ** 2 / counts.sum()).sqrt().item()
        means.append(mean)
        stds.append(max(std, 1 / 255))  # a constant channel has none
    return tuple(means), tuple(stds)
