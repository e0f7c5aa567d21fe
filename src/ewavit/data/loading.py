"""`LoaderData` and `StreamData`: worker processes decode each image when a batch needs it.

The first half handles single images, in a worker; the second half makes batches of them.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import Compose

from ewavit.data.arrays import Ints
from ewavit.data.augmentation import Augmentation
from ewavit.data.batches import Batch, Data, Resizing, Statistics, entropy
from ewavit.data.folders import formats_text
from ewavit.data.options import DataOptions
from ewavit.data.sources import (
    FileImages,
    ImageSource,
    UnreadableImage,
    class_names,
    decoded,
    is_16_bit,
    is_timm,
    open_timm,
    read_folder,
    read_timm,
)
from ewavit.data.subsets import split
from ewavit.errors import EwavitError, first_line

PROBED = 64  # images inspected for their size and mode
DARK = 2**14  # a set of 16-bit images with all values below this is worth a note

BadImages = list[tuple[str, str]]  # (where, reason)
Sample = tuple[Tensor | None, Any, BadImages]  # no image: none was readable
Key = tuple[int, int]  # (epoch, index)


def seed_generators(*numbers: int) -> None:
    """Seed `random`, numpy and torch's CPU generator from some numbers; quick, as it runs for every image."""
    random.seed(repr(numbers))  # by its SHA-512
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(32))  # not the accelerators, as torch.manual_seed


@contextmanager
def restored_generators() -> Iterator[None]:
    """A context manager that restores the states of `random`, numpy and torch's CPU generator."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Samples(Dataset[Sample]):
    """Loads and transforms single images, each with generators seeded from (seed, epoch, index).

    So a sample depends neither on the worker that makes it nor on the samples before it. An unreadable image
    raises nothing, as torch would wrap the error in a worker's traceback; the sample reports it instead.

    Args:
        source: the images.
        indices: the images of `source` that are used, (images,); keys are positions in this array.
        transform: PIL image to array or tensor (channels, height, width).
        mode: PIL mode, "L" or "RGB".
        seed: seed of the random transforms.
        replace_bad: return the next readable image in place of an unreadable one.
    """

    def __init__(
        self, source: ImageSource, indices: Ints, transform: Any, mode: str, seed: int, replace_bad: bool
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.mode = mode
        self.seed = seed
        self.replace_bad = replace_bad

    def __getitems__(self, keys: list[Key]) -> list[Sample]:
        """The samples of a batch, one for each (epoch, index)."""
        with restored_generators():  # once for all: for each image it would take 0.1 ms
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int) -> Sample:
        bad: BadImages = []
        for step in range(len(self.indices) if self.replace_bad else 1):
            candidate = int(self.indices[(index + step) % len(self.indices)])
            try:
                image, label = self.load(candidate)
            except UnreadableImage as error:
                bad.append((error.where, error.reason))
                continue
            seed_generators(self.seed, epoch, index)
            return *self.prepare(image, label), bad
        return None, -1, bad

    def load(self, index: int) -> tuple[Any, Any]:
        """Image and label of the source.

        Raises:
            UnreadableImage: they cannot be read.
        """
        return self.source.load(index, self.mode)

    def prepare(self, image: Any, label: Any) -> tuple[Tensor, Any]:
        """The transformed image and its label."""
        return torch.as_tensor(self.transform(image)), label


class BatchKeys(Sampler[list[Key]]):
    """The keys of each batch of one pass; set `epoch` and `batches` before each pass."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: Iterable[Ints] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        for indices in self.batches:
            yield [(self.epoch, int(index)) for index in indices]


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, BadImages]:
    """Join samples: images (batch, channels, height, width), labels (batch, ...), unreadable images."""
    images = [image for image, _, _ in samples if image is not None]
    labels = [torch.as_tensor(label) for image, label, _ in samples if image is not None]
    bad = [entry for _, _, entries in samples for entry in entries]
    stacked = [torch.stack(tensors) if tensors else torch.empty(0) for tensors in (images, labels)]
    return stacked[0], stacked[1].long(), bad


def common_size(sizes: set[tuple[int, int]]) -> int | None:
    """The side in pixels if all images are squares of one size, at most 224 pixels; else None."""
    width, height = min(sizes, default=(0, 0))
    return width if len(sizes) == 1 and width == height <= 224 else None


def look_at(source: ImageSource) -> tuple[int | None, int, str | None]:
    """Look at 64 images spread over a set.

    Returns:
        The common size (see `common_size`), the channels, 1 or 3, and a note if 16-bit images are so dark
        that few grey levels are left of them.
    """
    sizes, modes, brightest = set(), set(), 0
    for index in np.unique(np.linspace(0, len(source) - 1, PROBED).astype(int)):
        try:
            image, _ = source.open(int(index))
            if is_16_bit(image):
                brightest = max(brightest, int(np.asarray(image).max()))
        except Exception:  # a batch that needs the image will name it
            continue
        sizes.add(image.size)
        modes.add(image.mode)
    note = None
    if 0 < brightest < DARK:
        note = (
            f"the 16-bit images have values up to {brightest} of 65535, scaled to "
            f"{(brightest + 128) // 257} of 255: scale the files to their whole range"
        )
    return common_size(sizes), 1 if modes == {"L"} else 3, note


def usual_statistics(in_chans: int) -> Statistics:
    """Mean and standard deviation per channel: ImageNet's for three channels, 0.5 and 0.5 for one."""
    return ((0.5,), (0.5,)) if in_chans == 1 else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def transforms(
    augmentation: Augmentation, img_size: int, resizing: Resizing, statistics: Statistics
) -> tuple[Any, Any]:
    """Make timm's transforms for training and for evaluation.

    They return bytes, a quarter of what floats would take to send from a worker; `normalize` turns whole
    batches into floats. Random erasing fills normalised images, so with it the training transform
    normalises as well.

    Args:
        augmentation: augmentation of training images.
        img_size: height and width of the result, in pixels.
        resizing: how evaluation images are resized and cropped.
        statistics: mean and standard deviation per channel, of values in 0..1.

    Returns:
        The training and the evaluation transform, from PIL image to array or tensor.

    Raises:
        EwavitError: timm does not know the string `augmentation.aa`.
    """
    mean, std = statistics
    try:
        train = create_transform(
            img_size,
            is_training=True,
            mean=mean,
            std=std,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.aa,
            interpolation="random",
            re_prob=augmentation.reprob,
            re_mode=augmentation.remode,
            use_prefetcher=not augmentation.reprob,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise EwavitError(
            f"timm does not know aa {augmentation.aa!r}: try rand-m9-mstd0.5-inc1, original or augmix-m3"
        ) from error
    return train, evaluation_transform(img_size, resizing, mean)


def evaluation_transform(img_size: int, resizing: Resizing, mean: tuple[float, ...]) -> Any:
    """Make timm's transform for evaluation, from PIL image to bytes (channels, height, width).

    Args:
        img_size: height and width of the result, in pixels.
        resizing: how images are resized and cropped.
        mean: mean per channel, of values in 0..1; it fills borders.
    """
    return create_transform(img_size, **asdict(resizing), mean=mean, use_prefetcher=True)


def refusal(where: str, reason: str) -> EwavitError:
    """The error for an image that cannot be read and is not skipped."""
    return EwavitError(
        f"cannot read {where} ({reason}): repair or remove it, or skip unreadable images with "
        "--skip-bad-images"
    )


def normalize(images: Tensor, statistics: Statistics) -> Tensor:
    """Turn uint8 (batch, channels, h, w) into float32 of mean 0 and standard deviation 1; leave floats."""
    if images.dtype != torch.uint8:
        return images
    mean, std = (
        torch.tensor(each).view(-1, 1, 1).to(images.device, non_blocking=True) for each in statistics
    )
    return images.to(torch.float32).sub_(mean * 255).div_(std * 255)


class LoaderData(Data):
    """A set of image files; worker processes decode and transform them one by one with timm's transforms.

    A batch depends only on the seed, the epoch and its number. It does not depend on the number of workers,
    on the batch at which an epoch was resumed, or on the global generators, and it leaves those unchanged.
    With `skip_bad_images` the next readable image replaces an unreadable one in training; evaluation leaves
    it out.

    Args:
        name: short name for logs.
        train: training images.
        indices: the images of `train` that are used, (images,).
        val: evaluation images.
        eval_indices: the images of `val` that are used, (images,).
        options: batch size, seed, ranks, augmentation, image size, statistics, device, workers and
            `skip_bad_images`; without statistics ImageNet's, or 0.5 for one channel.

    Raises:
        EwavitError: timm does not know the augmentation.
    """

    resizing: Resizing

    def __init__(
        self,
        name: str,
        train: ImageSource,
        indices: Ints,
        val: ImageSource,
        eval_indices: Ints,
        options: DataOptions,
    ) -> None:
        plan = options.plan(len(indices), len(eval_indices), lambda: train.labels()[indices])
        native_size, self.in_chans, dark = look_at(train)
        self.name = name
        self.classes = train.classes
        sources = {"training": train} if val is train else {"training": train, "evaluation": val}
        self.notes = tuple(
            f"not read beside the {split} images: {formats_text(source.others)}"
            for split, source in sources.items()
            if isinstance(source, FileImages) and source.others
        )
        self.notes += () if dark is None else (dark,)
        self.img_size = options.img_size or native_size or 224
        self.num_train, self.num_eval = plan.num_train, plan.num_eval
        self.batches_per_epoch = plan.batches_per_epoch
        self.mean, self.std = options.statistics(self.in_chans) or usual_statistics(self.in_chans)
        self.resizing = options.resizing(as_stored=self.img_size == native_size)
        self._plan = plan
        self._device = options.device
        self._skip = options.skip_bad_images
        self._bad: set[str] = set()
        self._bad_of_pass: set[str] = set()  # of the latest pass over training or evaluation images
        self._val, self._eval_indices = val, eval_indices
        self._train, self._train_indices = train, indices

        self._train_keys, self._eval_keys = BatchKeys(), BatchKeys()
        to_train, to_eval = self._samples(options)
        self._train_loader = loader_of(to_train, self._train_keys, options)
        self._eval_loader = loader_of(to_eval, self._eval_keys, options)

    def _samples(self, options: DataOptions) -> tuple[Samples, Samples]:
        """The training and the evaluation images, with their transforms."""
        mode = "L" if self.in_chans == 1 else "RGB"
        to_train, to_eval = transforms(
            options.augmentation, self.img_size, self.resizing, (self.mean, self.std)
        )
        return (
            Samples(self._train, self._train_indices, to_train, mode, options.seed, replace_bad=self._skip),
            Samples(self._val, self._eval_indices, to_eval, mode, options.seed, replace_bad=False),
        )

    def class_counts(self) -> Ints | None:
        return np.bincount(self._train.labels()[self._train_indices], minlength=self.num_classes)

    @classmethod
    def open(cls, spec: str, options: DataOptions) -> LoaderData:
        """Open a map-style set of timm's, or a folder of class folders or of Tiny-ImageNet.

        Raises:
            EwavitError: a split or a class is missing, or an option does not work for the set.
        """
        train: ImageSource
        val: ImageSource | None
        splits, holding = (options.train_split, options.val_split), options.on_training_samples
        if is_timm(spec):
            name = spec
            train, val = read_timm(spec, options.data_dir, *splits, holding)
        else:
            path = Path(spec).expanduser()
            name = path.resolve().name
            train, val = read_folder(path, *splits, holding)
        indices, held = split(len(train), options, train.labels)
        if held is not None:
            return cls(name, train, indices, train, held, options)
        assert val is not None  # read, for there is nothing else to evaluate on
        return cls(name, train, indices, val, np.arange(len(val)), options)

    @property
    def num_skipped(self) -> int:
        return len(self._bad)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self._batches(
            self._train_loader, self._train_keys, epoch, self._plan.train_indices(epoch, start)
        )

    def eval_batches(self) -> Iterator[Batch]:
        return self._batches(self._eval_loader, self._eval_keys, 0, self._plan.eval_indices())

    def eval_names(self) -> list[str]:
        numbers = (int(number) for batch in self._plan.eval_indices() for number in batch)
        names = (self._val.where(int(self._eval_indices[number])) for number in numbers)
        return [name for name in names if name not in self._bad_of_pass]

    def _batches(
        self, loader: DataLoader[Any], keys: BatchKeys, epoch: int, batches: Iterable[Ints]
    ) -> Iterator[Batch]:
        keys.epoch, keys.batches = epoch, batches
        self._bad_of_pass = set()
        any_bad = any_good = False
        for images, labels, bad in started(loader):
            for where, reason in bad:
                if not self._skip:
                    loader._iterator = None  # stops the workers now; as garbage they would take seconds each
                    raise refusal(where, reason)
                self._bad.add(where)
                self._bad_of_pass.add(where)
                any_bad = True
            if len(labels):
                any_good = True
                images = images.to(self._device, non_blocking=True)
                yield normalize(images, (self.mean, self.std)), labels.to(self._device, non_blocking=True)
        if any_bad and not any_good:
            raise EwavitError(f"no image of {self.name} can be read: give another set")


def outlive_first_signal(worker: int) -> None:
    """Let a worker go on after a signal to all processes of a run: the run needs it to end its step.

    Args:
        worker: its number, which the DataLoader passes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A second one ends it, as it does where the DataLoader ends a stuck worker.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


_STOPS = {signal.SIGINT, signal.SIGTERM}


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start a pass. Signals to its new workers wait until `outlive_first_signal` has prepared them."""
    # With forkserver, the server must not end by a signal to all processes either: its workers would follow.
    # It inherits the mask, unless the resource tracker starts with it: before Python 3.13 that unblocks both.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loader_of(samples: Samples, keys: BatchKeys, options: DataOptions) -> DataLoader[Any]:
    """A loader of the batches that `keys` names; workers stay for the next pass."""
    return DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=options.workers,
        collate_fn=collate,
        persistent_workers=options.workers > 0,
        pin_memory=options.device.type == "cuda",
        worker_init_fn=outlive_first_signal,
        generator=torch.Generator(),  # else each pass would draw from the global one
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image of a stream, see `decoded`.

    Raises:
        EwavitError: its values have no fixed range.
    """
    try:
        return decoded(image, "RGB")
    except ValueError as problem:
        raise EwavitError(f"an image of the stream cannot be read: {first_line(problem)}") from None


class StreamData(Data):
    """One of timm's streamed sets (wds/, tfds/, hfids/). They cannot seek: `start` reads and drops batches.

    An epoch repeats with the same seed, number of workers and ranks. There is at least one worker process,
    a new one each epoch, so that nothing of an epoch leaks into the next. timm shares the shards among ranks
    and workers; with several ranks an evaluation may miss or repeat a few images. timm skips unreadable
    images with a warning of its own. If the set does not name its classes, they are counted by reading the
    evaluation split once.

    Args:
        spec: timm's name of the set.
        options: everything but `limit`, `shots`, `holdout` and `skip_bad_images`.

    Raises:
        EwavitError: the set cannot be opened, has fewer than two classes, or timm does not know the
            augmentation.
    """

    def __init__(self, spec: str, options: DataOptions) -> None:
        def stream(split: str, is_training: bool) -> Any:
            given: dict[str, Any] = {
                "is_training": is_training,
                "batch_size": options.batch_size,
                "seed": options.seed % 2**31,
            }
            if not spec.lower().startswith("tfds/"):
                given["input_img_mode"] = ""  # as stored; timm would cut 16-bit values off
            return open_timm(spec, options.data_dir, split, **given)

        self._train, self._eval = stream(options.train_split, True), stream(options.val_split, False)
        self._options, self._workers = options, max(1, options.workers)
        self.name = spec
        # The lengths are those of one rank.
        self.num_train = len(self._train) * options.world_size
        self.num_eval = len(self._eval) * options.world_size
        self.in_chans = 3
        self.mean, self.std = options.statistics(self.in_chans) or usual_statistics(self.in_chans)

        self.classes = class_names(self._train.reader)
        sizes: set[tuple[int, int]] = set()
        highest = -1
        for number, (image, label) in enumerate(stream(options.val_split, False)):
            if number < PROBED:
                sizes.add(image.size)
            elif self.classes:
                break
            highest = max(highest, int(label))
        self.classes = self.classes or tuple(str(label) for label in range(highest + 1))
        if len(self.classes) < 2:
            raise EwavitError(
                f"{spec} has fewer than two classes in {options.val_split}: give another set or split"
            )
        self.img_size = options.img_size or common_size(sizes) or 224
        self.resizing = options.resizing(as_stored=self.img_size == common_size(sizes))
        self._train.transform, self._eval.transform = (
            Compose([to_rgb, transform])
            for transform in transforms(
                options.augmentation, self.img_size, self.resizing, (self.mean, self.std)
            )
        )
        self._train.set_loader_cfg(num_workers=self._workers)
        self._eval.set_loader_cfg(num_workers=self._workers)
        self.batches_per_epoch = len(self._train) // options.batch_size

    @classmethod
    def open(cls, spec: str, options: DataOptions) -> StreamData:
        """Open a streamed set of timm's.

        Raises:
            EwavitError: as the constructor, or a subset is wanted.
        """
        if given := [name for name in ("limit", "shots", "holdout") if getattr(options, name)]:
            raise EwavitError(
                f"{given[0]} does not work for {spec}, a streamed set: name a smaller --train-split"
            )
        return cls(spec, options)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._train.set_epoch(epoch)
        return islice(self._batches(self._train, epoch), start, self.batches_per_epoch)

    def eval_batches(self) -> Iterator[Batch]:
        return self._batches(self._eval, 0)

    def _batches(self, dataset: Any, epoch: int) -> Iterator[Batch]:
        device = self._options.device
        generator = torch.Generator().manual_seed(
            int(entropy(self._options.seed, epoch).generate_state(1)[0])
        )
        loader: DataLoader[Any] = DataLoader(
            dataset,
            self._options.batch_size,
            num_workers=self._workers,
            drop_last=dataset is self._train,
            pin_memory=device.type == "cuda",
            generator=generator,
        )
        try:
            for images, labels in loader:
                images = images.to(device, non_blocking=True)
                yield normalize(images, (self.mean, self.std)), labels.to(device, non_blocking=True)
        except EwavitError as problem:  # torch puts the worker's traceback before the message
            message = str(problem).strip().splitlines()[-1].rpartition("EwavitError: ")[2]
            raise EwavitError(f"{self.name}: {message}") from None
