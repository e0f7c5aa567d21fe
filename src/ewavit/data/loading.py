"""Sets whose images are decoded when their turn comes, in worker processes: `LoaderData` and `StreamData`.

The first half is what happens to single images, in a worker; the second half makes batches of them.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ewavit.data.augmentation import Augmentation
from ewavit.data.batches import Batch, BatchPlan, Data, Statistics, entropy
from ewavit.data.sources import ImageSource, Ints, UnreadableImage, class_names, open_timm
from ewavit.errors import EwavitError

PROBED = 64  # images whose size and mode are looked at

BadImages = list[tuple[str, str]]  # (where, reason)
Sample = tuple[Tensor | None, int, BadImages]  # no image: none was readable
Key = tuple[int, int]  # (epoch, index)


def seed_generators(*numbers: int) -> None:
    """Seed `random`, numpy and torch's CPU generator from some numbers; for each image it has to be quick."""
    random.seed(repr(numbers))  # by its SHA-512
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(32))  # not the accelerators, as torch.manual_seed


@contextmanager
def restored_generators() -> Iterator[None]:
    """Give `random`, numpy and torch's CPU generator their states back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Samples(Dataset[Sample]):
    """Loads and transforms single images, each with generators seeded from (seed, epoch, index).

    So a sample depends neither on the worker that makes it nor on the samples before it. Nothing is raised
    for an unreadable image, as torch would wrap it in a worker's traceback: it is reported in the sample.

    Args:
        source: where images come from.
        indices: the images of `source` that are used, (images,); keys count in them.
        transform: PIL image to array or tensor (channels, height, width).
        mode: PIL mode, "L" or "RGB".
        seed: of the random transforms.
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
        """The samples of a batch."""
        with restored_generators():  # once for all: for each image it would take 0.1 ms
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int) -> Sample:
        bad: BadImages = []
        for step in range(len(self.indices) if self.replace_bad else 1):
            candidate = int(self.indices[(index + step) % len(self.indices)])
            try:
                image, label = self.source.load(candidate, self.mode)
            except UnreadableImage as error:
                bad.append((error.where, error.reason))
                continue
            seed_generators(self.seed, epoch, index)
            return torch.as_tensor(self.transform(image)), label, bad
        return None, -1, bad


class BatchKeys(Sampler[list[Key]]):
    """The keys of the batches of one pass; set `epoch` and `batches` before each."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: Iterable[Ints] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        for indices in self.batches:
            yield [(self.epoch, int(index)) for index in indices]


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, BadImages]:
    """Join samples into images (batch, channels, height, width), labels (batch,) and what was unreadable."""
    images = [image for image, _, _ in samples if image is not None]
    labels = [label for image, label, _ in samples if image is not None]
    bad = [entry for _, _, entries in samples for entry in entries]
    return torch.stack(images) if images else torch.empty(0), torch.tensor(labels, dtype=torch.int64), bad


def common_size(sizes: set[tuple[int, int]]) -> int | None:
    """The side, in pixels, of images that are all square, of one size and at most 224; else None."""
    width, height = min(sizes, default=(0, 0))
    return width if len(sizes) == 1 and width == height <= 224 else None


def look_at(source: ImageSource) -> tuple[int | None, int]:
    """Find the common size (see `common_size`) and the channels, 1 or 3, from images spread over a set."""
    sizes, modes = set(), set()
    for index in np.unique(np.linspace(0, len(source) - 1, PROBED).astype(int)):
        try:
            image, _ = source.open(int(index))
        except Exception:  # it is named when its turn to be read comes
            continue
        sizes.add(image.size)
        modes.add(image.mode)
    return common_size(sizes), 1 if modes == {"L"} else 3


def usual_statistics(in_chans: int) -> Statistics:
    """Mean and standard deviation per channel: ImageNet's for three channels, 0.5 and 0.5 for one."""
    return ((0.5,), (0.5,)) if in_chans == 1 else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def transforms(
    augmentation: Augmentation, img_size: int, native_size: int | None, statistics: Statistics
) -> tuple[Any, Any]:
    """Make timm's transforms to train and to evaluate.

    They leave bytes, a quarter of the floats to send from a worker, and `normalize` does the rest for whole
    batches; but erasing fills normalised images, so with it the training images are that already.

    Args:
        augmentation: what happens to training images.
        img_size: height and width of the result, pixels.
        native_size: size of the stored images where they have one; equal to `img_size`, they are evaluated
            as stored, without the usual resize and centre crop.
        statistics: mean and standard deviation per channel.

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
    crop_pct = 1.0 if img_size == native_size else None
    evaluate = create_transform(img_size, interpolation="bicubic", crop_pct=crop_pct, use_prefetcher=True)
    return train, evaluate


def normalize(images: Tensor, statistics: Statistics) -> Tensor:
    """Turn uint8 (batch, channels, h, w) into float32 of mean 0 and standard deviation 1; leave floats."""
    if images.dtype != torch.uint8:
        return images
    mean, std = (
        torch.tensor(each).view(-1, 1, 1).to(images.device, non_blocking=True) for each in statistics
    )
    return images.to(torch.float32).sub_(mean * 255).div_(std * 255)


class LoaderData(Data):
    """A set of image files, decoded and transformed one by one by timm's transforms in worker processes.

    A batch depends on the seed, the epoch and its number only: not on the number of workers, on where the
    epoch was begun, or on the global generators, which are left as they are. With `skip_bad_images` an
    unreadable image is replaced by the next readable one in training and left out in evaluation.

    Args:
        name: short name for logs.
        train: training images.
        indices: which of them are used, in the order that `plan` counts, (plan.num_train,).
        val: evaluation images.
        eval_indices: which of them are used, (plan.num_eval,).
        plan: the order of the images.
        augmentation: what happens to training images.
        img_size: height and width in pixels; None follows the images.
        statistics: to normalise with; None takes the usual ones.
        device: where batches are put.
        workers: processes for training and as many for evaluation; 0 works in this process.
        skip_bad_images: go on where an image cannot be read, and count it.
    """

    def __init__(
        self,
        name: str,
        train: ImageSource,
        indices: Ints,
        val: ImageSource,
        eval_indices: Ints,
        plan: BatchPlan,
        augmentation: Augmentation,
        img_size: int | None,
        statistics: Statistics | None,
        device: torch.device,
        workers: int,
        skip_bad_images: bool,
    ) -> None:
        native_size, self.in_chans = look_at(train)
        self.name = name
        self.classes = train.classes
        self.img_size = img_size or native_size or 224
        self.num_train, self.num_eval = plan.num_train, plan.num_eval
        self.batches_per_epoch = plan.batches_per_epoch
        self.mean, self.std = statistics or usual_statistics(self.in_chans)
        self._plan = plan
        self._device = device
        self._skip = skip_bad_images
        self._bad: set[str] = set()

        mode = "L" if self.in_chans == 1 else "RGB"
        to_train, to_eval = transforms(augmentation, self.img_size, native_size, (self.mean, self.std))
        self._train_keys, self._eval_keys = BatchKeys(), BatchKeys()
        self._train_loader = _loader(
            Samples(train, indices, to_train, mode, plan.seed, replace_bad=skip_bad_images),
            self._train_keys,
            workers,
            device,
        )
        self._eval_loader = _loader(
            Samples(val, eval_indices, to_eval, mode, plan.seed, replace_bad=False),
            self._eval_keys,
            workers,
            device,
        )

    @property
    def bad_images(self) -> int:
        return len(self._bad)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self._batches(self._train_loader, self._train_keys, epoch, self._plan.train(epoch, start))

    def eval_batches(self) -> Iterator[Batch]:
        return self._batches(self._eval_loader, self._eval_keys, 0, self._plan.eval())

    def _batches(
        self, loader: DataLoader[Any], keys: BatchKeys, epoch: int, batches: Iterable[Ints]
    ) -> Iterator[Batch]:
        keys.epoch, keys.batches = epoch, batches
        any_bad = any_good = False
        for images, labels, bad in loader:
            for where, reason in bad:
                if not self._skip:
                    loader._iterator = None  # stops the workers now; as garbage they would take seconds each
                    raise EwavitError(
                        f"cannot read {where} ({reason}): repair or remove it, or skip such images with "
                        "--skip-bad-images"
                    )
                self._bad.add(where)
                any_bad = True
            if len(labels):
                any_good = True
                images = images.to(self._device, non_blocking=True)
                yield normalize(images, (self.mean, self.std)), labels.to(self._device, non_blocking=True)
        if any_bad and not any_good:
            raise EwavitError(f"no image of {self.name} can be read: give another set")


def _loader(samples: Samples, keys: BatchKeys, workers: int, device: torch.device) -> DataLoader[Sample]:
    return DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else each pass would draw from the global one
    )


class StreamData(Data):
    """One of timm's streamed sets (wds/, tfds/, hfids/), which cannot seek: `start` skips by drawing.

    An epoch is the same again for the same seed, number of workers and ranks; at least one worker process
    works, a new one each epoch, so that nothing of an epoch leaks into the next. timm shares the shards
    among ranks and workers: with several ranks an evaluation may miss or repeat a few images. Unreadable
    images are skipped with timm's own warning. Where the set does not name its classes, they are counted
    by reading the evaluation split once.

    Args:
        spec: timm's name of the set.
        data_dir: timm's root.
        splits: names of the training and of the evaluation split.
        batch_size: images per batch and rank.
        seed: decides the order, with the epoch.
        augmentation: what happens to training images.
        img_size: height and width in pixels; None follows the images.
        statistics: to normalise with; None takes the usual ones.
        device: where batches are put.
        workers: processes that read.
        world_size: processes that share each epoch.
    """

    def __init__(
        self,
        spec: str,
        data_dir: str | None,
        splits: tuple[str, str],
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        img_size: int | None,
        statistics: Statistics | None,
        device: torch.device,
        workers: int,
        world_size: int,
    ) -> None:
        def stream(split: str, is_training: bool) -> Any:
            options = {"is_training": is_training, "batch_size": batch_size, "seed": seed % 2**31}
            return open_timm(spec, data_dir, split, **options)

        self._train, self._eval = stream(splits[0], True), stream(splits[1], False)
        self._batch_size, self._seed, self._device, self._workers = batch_size, seed, device, max(1, workers)
        self.name = spec
        # timm tells the share of a rank
        self.num_train, self.num_eval = len(self._train) * world_size, len(self._eval) * world_size
        self.in_chans = 3  # timm's readers convert to RGB
        self.mean, self.std = statistics or usual_statistics(self.in_chans)

        self.classes = class_names(self._train.reader)
        sizes: set[tuple[int, int]] = set()
        highest = -1
        for number, (image, label) in enumerate(stream(splits[1], False)):
            if number < PROBED:
                sizes.add(image.size)
            elif self.classes:
                break
            highest = max(highest, int(label))
        self.classes = self.classes or tuple(str(label) for label in range(highest + 1))
        if len(self.classes) < 2:
            raise EwavitError(f"{spec} has fewer than two classes in {splits[1]}: give another set or split")
        self.img_size = img_size or common_size(sizes) or 224
        self._train.transform, self._eval.transform = transforms(
            augmentation, self.img_size, common_size(sizes), (self.mean, self.std)
        )
        self._train.set_loader_cfg(num_workers=self._workers)
        self._eval.set_loader_cfg(num_workers=self._workers)
        self.batches_per_epoch = len(self._train) // batch_size

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._train.set_epoch(epoch)
        return islice(self._batches(self._train, epoch), start, self.batches_per_epoch)

    def eval_batches(self) -> Iterator[Batch]:
        return self._batches(self._eval, 0)

    def _batches(self, dataset: Any, epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(int(entropy(self._seed, epoch).generate_state(1)[0]))
        loader: DataLoader[Any] = DataLoader(
            dataset,
            self._batch_size,
            num_workers=self._workers,
            drop_last=dataset is self._train,
            pin_memory=self._device.type == "cuda",
            generator=generator,
        )
        for images, labels in loader:
            images = images.to(self._device, non_blocking=True)
            yield normalize(images, (self.mean, self.std)), labels.to(self._device, non_blocking=True)
