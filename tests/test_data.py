"""Properties of the data room: order, augmentation, formats, and what wrong input gets."""

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.dataset import IterableImageDataset
from torchvision.transforms import v2

from ewavit.data import loading, rand_augment
from ewavit.data.arrays import read_bundled
from ewavit.data.augmentation import (
    Augmentation,
    Mix,
    TensorAugmentation,
    random_crop,
    random_flip,
    tensor_auto_augment,
)
from ewavit.data.batches import BatchPlan, Data
from ewavit.data.loading import LoaderData
from ewavit.data.options import DataOptions
from ewavit.data.sources import FileImages, UnreadableImage, read_folder
from ewavit.errors import EwavitError
from ewavit.training.opening import open_data
from image_sets import write_cifar, write_tiny_imagenet

PLAIN = Augmentation(hflip=0, crop_padding=0, scale=(1, 1), color_jitter=0)


def write_folder(
    root: Path,
    classes: tuple[str, ...] = ("cat", "dog", "eel"),
    per_class: int = 4,
    size: tuple[int, int] = (16, 16),
    mode: str = "RGB",
    val: str = "val",
) -> Path:
    """Write train/ and val/ of class folders with PNGs of random pixels."""
    rng = np.random.default_rng(0)
    for split in ("train", val):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def write_fashion_mnist(root: Path) -> Path:
    """Write torchvision's layout of Fashion-MNIST with 20 images per split."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, 20, 28, 28) + pixels.tobytes()
        )
        labels = (np.arange(20) % 10).astype(np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 20) + labels.tobytes())
    return root


def error_of(call: object, *args: object, **kwargs: object) -> str:
    """The message of the EwavitError that `call` must raise; it must be one line."""
    with pytest.raises(EwavitError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def opened(spec: str, **options: Any) -> Data:
    return open_data(spec, DataOptions(**options))


def seeded_batches(data: Data, epoch: int, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training batches, with the generators seeded before each as the training loop does."""
    batches = data.train_batches(epoch, start)
    result = []
    for number in range(start, data.batches_per_epoch):
        torch.manual_seed(number)
        random.seed(number)
        result.append(next(batches))
    assert next(batches, None) is None
    return result


def same(
    left: list[tuple[torch.Tensor, torch.Tensor]], right: list[tuple[torch.Tensor, torch.Tensor]]
) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


# --- the order of the images ---

plans = st.builds(
    BatchPlan,
    num_train=st.integers(1, 200),
    num_eval=st.integers(1, 200),
    batch_size=st.integers(1, 16),
    seed=st.integers(-3, 2**70),
)


@given(plan=plans, epoch=st.integers(0, 5), world_size=st.integers(1, 4))
def test_ranks_share_every_global_batch_without_overlap(plan: BatchPlan, epoch: int, world_size: int) -> None:
    total = plan.batch_size * world_size
    alone = BatchPlan(plan.num_train, plan.num_eval, total, plan.seed)
    ranks = [
        BatchPlan(plan.num_train, plan.num_eval, plan.batch_size, plan.seed, rank, world_size)
        for rank in range(world_size)
    ]
    shares = [list(rank.train_indices(epoch)) for rank in ranks]
    batches = list(alone.train_indices(epoch))
    assert len(batches) == alone.batches_per_epoch == ranks[0].batches_per_epoch
    for batch, *parts in zip(batches, *shares, strict=True):
        assert sorted(batch) == sorted(np.concatenate(parts))
    if batches:
        assert len(np.unique(np.concatenate(batches))) == len(batches) * total


@given(plan=plans, world_size=st.integers(1, 5))
def test_evaluation_takes_every_image_once_over_all_ranks(plan: BatchPlan, world_size: int) -> None:
    shares = [
        BatchPlan(1, plan.num_eval, plan.batch_size, 0, rank, world_size).eval_indices()
        for rank in range(world_size)
    ]
    indices = [int(i) for share in shares for batch in share for i in batch]
    assert sorted(indices) == list(range(plan.num_eval))


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = {
        tuple(next(BatchPlan(100, 1, 100, seed).train_indices(epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


# --- sets in memory ---


@pytest.mark.parametrize("limit", [10, 130, 1000, 10_000])
def test_every_prefix_of_the_bundled_set_is_class_balanced(limit: int) -> None:
    counts = np.bincount(read_bundled().train_labels[:limit], minlength=10)
    assert (counts == limit // 10).all()


def test_the_bundled_set_is_what_it_says() -> None:
    data = open_data("fashion-mnist-mini", DataOptions(batch_size=100))
    assert (data.num_train, data.num_eval, data.num_classes) == (10_000, 2000, 10)
    assert (data.in_chans, data.img_size, data.batches_per_epoch) == (1, 28, 100)
    assert data.classes[9] == "Ankle boot"
    labels = torch.cat([labels for _, labels in data.eval_batches()])
    assert torch.bincount(labels).tolist() == [200] * 10


def test_training_images_are_normalised_to_mean_zero_and_deviation_one() -> None:
    data = open_data("fashion-mnist-mini", DataOptions(batch_size=500, limit=500, augmentation=PLAIN))
    images, labels = next(data.train_batches(0))
    assert (images.shape, images.dtype, labels.dtype) == ((500, 1, 28, 28), torch.float32, torch.int64)
    assert abs(images.mean().item()) < 1e-5
    assert abs(images.std().item() - 1) < 1e-4


def test_without_augmentation_batches_are_the_stored_images_in_planned_order() -> None:
    stored = read_bundled()
    data = open_data("fashion-mnist-mini", DataOptions(batch_size=50, limit=100, augmentation=PLAIN, seed=3))
    for (images, labels), chosen in zip(
        data.train_batches(2), BatchPlan(100, 1, 50, 3).train_indices(2), strict=True
    ):
        pixels = (images * data.std[0] + data.mean[0]) * 255
        torch.testing.assert_close(
            pixels, torch.from_numpy(stored.train_images[chosen]).float(), atol=1e-3, rtol=0
        )
        assert labels.tolist() == stored.train_labels[chosen].tolist()


@pytest.mark.parametrize("aa", [None, "rand-m9-mstd0.5-inc1"])
def test_a_resumed_epoch_in_memory_goes_on_bitwise(aa: str | None) -> None:
    augmentation = Augmentation(aa=aa, reprob=0.5)
    whole, resumed = (
        open_data("fashion-mnist-mini", DataOptions(batch_size=32, limit=200, augmentation=augmentation))
        for _ in range(2)
    )
    assert same(seeded_batches(whole, 1)[2:], seeded_batches(resumed, 1, start=2))


def test_random_crop_equals_a_slow_crop_of_each_image() -> None:
    images = torch.randint(0, 256, (20, 3, 9, 7), dtype=torch.uint8)
    torch.manual_seed(0)
    fast = random_crop(images, 2)
    torch.manual_seed(0)
    offsets = torch.randint(5, (2, 20))
    for image, result, top, left in zip(images, fast, *offsets.tolist(), strict=True):
        padded = torch.zeros(3, 13, 11, dtype=torch.uint8)
        padded[:, 2:11, 2:9] = image
        assert torch.equal(result, padded[:, top : top + 9, left : left + 7])
    assert len({tuple(pair) for pair in offsets.T.tolist()}) > 5


def test_random_flip_mirrors_about_the_asked_share_and_leaves_the_rest() -> None:
    images = torch.rand(1000, 1, 3, 4)
    flipped = random_flip(images, 0.3)
    mirrored = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped, images, strict=True)]
    assert all(torch.equal(new, old) for new, old, m in zip(flipped, images, mirrored, strict=True) if not m)
    assert 230 < sum(mirrored) < 370
    assert torch.equal(random_flip(images, 1.0), images.flip(-1))


@pytest.mark.parametrize("aa", ["original", "augmix-m5-w2-d1-a1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_auto_augment_draws_anew_for_each_group_of_the_batch(aa: str, channels: int) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, channels, 28, 28), dtype=torch.uint8).expand(80, -1, -1, -1)
    result = tensor_auto_augment(aa)(images)
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)
    assert len({image.numpy().tobytes() for image in result}) >= 4


@pytest.mark.parametrize("name", rand_augment.NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_equals_torchvisions_operation_on_each_image(name: str, channels: int) -> None:
    images = v2.functional.resize(torch.randint(0, 256, (24, channels, 5, 5), dtype=torch.uint8), [18, 15])
    full, signed = rand_augment.OPERATIONS[name]
    amounts = torch.linspace(-full if signed else 0, full, 24)
    operation = torch.full((24,), rand_augment.NAMES.index(name))
    twin = v2.RandAugment()
    for image, amount, result in zip(
        images, amounts.tolist(), rand_augment.apply(images, operation, amounts), strict=True
    ):
        unit = {"TranslateX": 15, "TranslateY": 18}.get(name, 1)
        magnitude = {"Posterize": 8 - round(amount), "Solarize": 1 - amount}.get(name, amount * unit)
        bilinear = v2.InterpolationMode.BILINEAR
        slow = twin._apply_image_or_video_transform(image, name, magnitude, bilinear, twin._fill)
        difference = (result.int() - slow.int()).abs()
        assert difference.max() <= 1  # where a value lies between two
        assert (difference > 0).float().mean() < 0.05


def test_each_image_gets_its_own_operation_in_its_own_place() -> None:
    images = torch.randint(0, 256, (40, 3, 9, 8), dtype=torch.uint8)
    operation = torch.arange(40) % len(rand_augment.NAMES)
    amounts = torch.rand(40) * 0.3
    together = rand_augment.apply(images, operation, amounts)
    alone = [
        rand_augment.apply(images[i : i + 1], operation[i : i + 1], amounts[i : i + 1]) for i in range(40)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_rand_augment_draws_for_each_image_with_the_asked_probability() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8).expand(600, -1, -1, -1)
    result = tensor_auto_augment("rand-m5-n1-p0.5-mstd1")(images)
    changed = [not torch.equal(new, old) for new, old in zip(result, images, strict=True)]
    assert 600 * 0.5 * 0.75 < sum(changed) < 600 * 0.5 * 1.05  # Identity, and what this image does not feel
    assert len({image.numpy().tobytes() for image in result}) > 150


def test_augmentation_reads_nothing_back_from_the_device() -> None:
    """A meta tensor has no values: who asks for one, as a GPU would have to be waited for, fails."""
    meta = torch.device("meta")
    options = Augmentation(aa="rand-m9-n3-p0.9-mstd0.5", reprob=0.5)
    augment = TensorAugmentation(options, 16, (0.5,) * 3, (0.2,) * 3, meta)
    result = augment(torch.empty(64, 3, 16, 16, dtype=torch.uint8, device=meta))
    assert (result.device, result.shape, result.dtype) == (meta, (64, 3, 16, 16), torch.float32)
    mixed, targets = Mix(0.8, 1.0, 10)(result, torch.empty(64, dtype=torch.int64, device=meta))
    assert (mixed.shape, targets.shape, targets.dtype) == ((64, 3, 16, 16), (64, 10), torch.float32)


def mixed_numbers(mix: Mix, size: tuple[int, int] = (9, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix images that hold nothing but their number, which is their class too."""
    labels = torch.arange(mix.num_classes)
    return mix(labels.float().view(-1, 1, 1, 1).expand(-1, 2, *size), labels)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_mixed_targets_have_the_shares_that_the_pixels_have(alphas: tuple[float, float], batch: int) -> None:
    images, targets = mixed_numbers(Mix(*alphas, batch))
    torch.testing.assert_close(targets.sum(1), torch.ones(batch))
    torch.testing.assert_close(targets @ torch.arange(batch).float(), images.mean((1, 2, 3)))
    partners = torch.eye(batch).bool() | torch.eye(batch).bool().flip(0)
    assert not targets[~partners].any()  # an image's partner has its place from the end


def test_mixup_blends_an_image_evenly_by_a_share_from_the_beta_distribution() -> None:
    images, targets = mixed_numbers(Mix(2.0, 0.0, 4000), size=(1, 2))
    torch.testing.assert_close(images, images[:, :1, :1, :1].expand_as(images))
    share = targets.diagonal().sort().values
    beta = torch.distributions.Beta(torch.tensor(2.0), torch.tensor(2.0))
    assert abs(share.mean() - beta.mean) < 4 * beta.stddev / 4000**0.5
    assert abs(share.std() - beta.stddev) < 0.02


def test_cutmix_puts_one_rectangle_of_the_partner_into_an_image() -> None:
    images, _ = mixed_numbers(Mix(0.0, 1.0, 200), size=(9, 7))
    areas = set()
    for number, image in enumerate(images):
        pasted = image[0] == 199 - number
        assert torch.equal(image[0], torch.where(pasted, 199.0 - number, float(number)))
        assert torch.equal(pasted, pasted.any(1, keepdim=True) & pasted.any(0, keepdim=True))
        for line in (pasted.any(1), pasted.any(0)):
            assert (line.int().diff() != 0).sum() <= 2  # without a gap
        areas.add(int(pasted.sum()))
    assert {0, 63} & areas
    assert len(areas) > 20  # each image has its own


def test_with_mixup_and_cutmix_half_the_images_get_each() -> None:
    images, _ = mixed_numbers(Mix(50.0, 1.0, 1000), size=(16, 16))
    blended = (images.flatten(1).min(1).values == images.flatten(1).max(1).values).sum()
    assert 440 < blended < 600  # a cut of no area looks like a blend too


def test_rand_augment_of_probability_or_operations_zero_changes_nothing() -> None:
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(tensor_auto_augment("rand-m9-p0")(images), images)
    assert torch.equal(tensor_auto_augment("rand-m9-n0")(images), images)


def test_random_erasing_changes_every_image_where_it_is_certain() -> None:
    plain, erased = (
        next(
            open_data(
                "fashion-mnist-mini", DataOptions(batch_size=64, limit=64, augmentation=augmentation)
            ).train_batches(0)
        )[0]
        for augmentation in (PLAIN, Augmentation(hflip=0, crop_padding=0, reprob=1.0))
    )
    assert all(not torch.equal(a, b) for a, b in zip(plain, erased, strict=True))


def test_img_size_resizes_a_set_in_memory_once() -> None:
    data = open_data("fashion-mnist-mini", DataOptions(batch_size=10, limit=100, img_size=20))
    assert data.img_size == 20
    assert next(data.train_batches(0))[0].shape == (10, 1, 20, 20)
    assert next(data.eval_batches())[0].shape == (10, 1, 20, 20)


def test_a_given_mean_and_deviation_replace_those_of_the_data(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path, mode="L"))
    for spec in ("fashion-mnist-mini", folder):
        usual, given = (
            open_data(spec, DataOptions(batch_size=4, workers=0, **options))  # type: ignore[arg-type]
            for options in ({}, {"mean": (0.25,), "std": (0.125,)})
        )
        assert (given.mean, given.std) == ((0.25,), (0.125,))
        pixels = [next(data.eval_batches())[0] * data.std[0] + data.mean[0] for data in (usual, given)]
        torch.testing.assert_close(*pixels)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_10_is_read_as_published(tmp_path: Path, protocol: int, inside: bool) -> None:
    folder = write_cifar(tmp_path, protocol=protocol)
    data = open_data(str(folder if inside else tmp_path), DataOptions(batch_size=30, augmentation=PLAIN))
    assert (data.name, data.num_train, data.num_eval) == ("cifar-10-batches-py", 30, 6)
    assert (data.in_chans, data.img_size, data.classes[:2]) == (3, 32, ("name0", "name1"))
    images, labels = next(data.eval_batches())
    stored = pickle.loads((folder / "test_batch").read_bytes())[b"data"].reshape(6, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    torch.testing.assert_close(
        (images * std + mean) * 255, torch.from_numpy(stored).float(), atol=1e-3, rtol=0
    )
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_cifar_100_uses_the_fine_labels(tmp_path: Path) -> None:
    write_cifar(tmp_path, coarse=True)
    data = open_data(str(tmp_path), DataOptions(batch_size=6))
    assert data.num_classes == 100
    assert next(data.eval_batches())[1].tolist() == [0, 1, 2, 2, 1, 0]


# --- sets read from files ---


@pytest.mark.parametrize("val", ["val", "validation", "valid", "test"])
def test_a_folder_of_class_folders_is_read(tmp_path: Path, val: str) -> None:
    data = open_data(str(write_folder(tmp_path, val=val)), DataOptions(batch_size=5, workers=0))
    assert (data.classes, data.num_train, data.num_eval) == (("cat", "dog", "eel"), 12, 12)
    assert (data.in_chans, data.img_size, data.batches_per_epoch) == (3, 16, 2)
    images, labels = next(data.train_batches(0))
    assert (images.shape, images.dtype, labels.dtype) == ((5, 3, 16, 16), torch.float32, torch.int64)
    assert torch.cat([labels for _, labels in data.eval_batches()]).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_images_of_the_right_size_are_evaluated_as_stored(tmp_path: Path) -> None:
    data = open_data(str(write_folder(tmp_path, mode="L")), DataOptions(batch_size=12, workers=0))
    stored = np.asarray(Image.open(tmp_path / "val" / "cat" / "0.png"))
    pixels = (next(data.eval_batches())[0][0, 0] * 0.5 + 0.5) * 255
    torch.testing.assert_close(pixels, torch.from_numpy(stored.copy()).float(), atol=1e-3, rtol=0)


def test_grey_folders_have_one_channel_and_mixed_ones_three(tmp_path: Path) -> None:
    grey = write_folder(tmp_path / "grey", mode="L")
    data = open_data(str(grey), DataOptions(batch_size=4, workers=0, augmentation=Augmentation(aa="rand-m9")))
    assert (data.in_chans, data.mean, data.std) == (1, (0.5,), (0.5,))
    assert next(data.train_batches(0))[0].shape == (4, 1, 16, 16)
    mixed = write_folder(tmp_path / "mixed")
    Image.new("L", (16, 16)).save(mixed / "train" / "cat" / "0.png")
    data = open_data(str(mixed), DataOptions(batch_size=12, workers=0))
    assert data.in_chans == 3
    assert next(data.train_batches(0))[0].shape == (12, 3, 16, 16)


def test_folders_of_other_than_small_squares_are_brought_to_224(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, size=(20, 16), per_class=1)
    data = open_data(str(folder), DataOptions(batch_size=2, workers=0))
    assert data.img_size == 224
    assert next(data.eval_batches())[0].shape == (2, 3, 224, 224)
    assert open_data(str(folder), DataOptions(batch_size=2, workers=0, img_size=48)).img_size == 48


def test_tiny_imagenet_is_read_as_published(tmp_path: Path) -> None:
    root = write_tiny_imagenet(tmp_path)
    for spec in (root, tmp_path):
        data = open_data(str(spec), DataOptions(batch_size=6, workers=0))
        assert (data.classes, data.in_chans, data.img_size) == (("n01", "n02", "n03"), 3, 64)
        assert (data.num_train, data.num_eval) == (6, 3)
        assert next(data.eval_batches())[1].tolist() == [2, 0, 1]


def test_held_out_images_are_evaluated_and_never_trained_on() -> None:
    options = {"batch_size": 30, "limit": 200, "augmentation": PLAIN, "mean": (0.0,), "std": (1.0,)}
    whole = open_data("fashion-mnist-mini", DataOptions(**options))
    sets = [
        open_data("fashion-mnist-mini", DataOptions(**options, holdout=0.25, seed=seed)) for seed in (0, 1)
    ]
    data = sets[0]
    assert (data.num_train, data.num_eval) == (150, 50)

    def images(batches):
        return {image.numpy().tobytes() for batch, _ in batches for image in batch}

    trained, held = images(data.train_batches(0)), images(data.eval_batches())
    assert len(trained) == 150
    assert len(held) == 50
    assert not trained & held
    assert images(whole.train_batches(0)) <= trained | held
    assert images(sets[1].eval_batches()) == held  # whatever the seed


def test_held_out_files_come_from_the_training_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, classes=("cat", "dog"), per_class=10)
    data = open_data(str(tmp_path), DataOptions(batch_size=4, holdout=0.3, workers=0, augmentation=PLAIN))
    assert (data.num_train, data.num_eval) == (14, 6)
    assert sum(len(labels) for _, labels in data.eval_batches()) == 6


@pytest.mark.parametrize("share", [-0.1, 1.0, 0.001])
def test_a_holdout_that_leaves_one_side_empty_is_refused(share: float) -> None:
    with pytest.raises(EwavitError, match="holdout"):
        open_data("fashion-mnist-mini", DataOptions(batch_size=8, limit=100, holdout=share))


@pytest.mark.parametrize("limit", [6, 7, 11])
def test_a_limit_takes_the_classes_of_a_folder_in_turn(tmp_path: Path, limit: int) -> None:
    data = open_data(str(write_folder(tmp_path)), DataOptions(batch_size=limit, limit=limit, workers=0))
    counts = Counter(next(data.train_batches(0))[1].tolist())
    assert data.num_train == limit
    assert set(counts.values()) <= {limit // 3, limit // 3 + 1}
    assert len(counts) == 3


def test_file_batches_depend_on_neither_start_nor_workers_nor_the_global_generators(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path))
    augmentation = Augmentation(aa="rand-m9-mstd0.5", reprob=0.5)

    def batches(workers: int, seed: int, epoch: int, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        torch.manual_seed(torch.seed())
        data = open_data(
            folder, DataOptions(batch_size=3, seed=seed, workers=workers, augmentation=augmentation)
        )
        first = list(data.train_batches(epoch, start))
        assert same(first, list(data.train_batches(epoch, start)))
        return first

    reference = batches(0, 0, 1, 0)
    assert len(reference) == 4
    assert same(reference, batches(1, 0, 1, 0))
    assert same(reference[2:], batches(2, 0, 1, 2))
    assert not same(reference, batches(0, 0, 2, 0))
    assert not same(reference, batches(0, 1, 1, 0))


def test_an_epoch_left_early_does_not_disturb_the_next(tmp_path: Path) -> None:
    data = open_data(str(write_folder(tmp_path)), DataOptions(batch_size=2, workers=2))
    reference = list(data.train_batches(1))
    left = data.train_batches(0)
    again = data.train_batches(1)
    next(left)
    assert same(reference, list(again))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_that_comes_while_they_start(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loading.outlive_first_signal

    def late(worker: int) -> None:
        os.kill(os.getpid(), number)  # before the worker is prepared
        original(worker)

    monkeypatch.setattr(loading, "outlive_first_signal", late)
    folder = str(write_folder(tmp_path))
    batches, reference = (
        open_data(folder, DataOptions(batch_size=2, workers=workers)).train_batches(0) for workers in (2, 0)
    )
    assert same(list(batches), list(reference))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_to_all_processes_of_a_run(tmp_path: Path, number: signal.Signals) -> None:
    folder, before = str(write_folder(tmp_path)), multiprocessing.active_children()
    data = open_data(folder, DataOptions(batch_size=1, workers=2))
    batches = data.train_batches(0)
    first = [next(batches), next(batches)]  # one from each worker
    workers = [process for process in multiprocessing.active_children() if process not in before]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid or 0, number)
    reference = open_data(folder, DataOptions(batch_size=1, workers=0))
    assert same([*first, *batches], list(reference.train_batches(0)))


BY_FORKSERVER = """
import multiprocessing, os, signal, sys

from ewavit.data.options import DataOptions
from ewavit.training.opening import open_data

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    signal.signal(signal.SIGTERM, lambda *_: None)
    data = open_data(sys.argv[1], DataOptions(batch_size=1, workers=1))
    batches = data.train_batches(0)
    next(batches)
    os.killpg(0, signal.SIGTERM)
    print(1 + len(list(batches)), "of", data.batches_per_epoch)
"""


def test_the_server_of_workers_outlives_a_signal_to_all_processes_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "read.py").write_text(BY_FORKSERVER)
    command = [sys.executable, str(tmp_path / "read.py"), str(write_folder(tmp_path / "images"))]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read, _, count = done.stdout.split()
    assert read == count
    assert int(count) > 5  # a worker without its server ends after the batches that were asked for


def test_reading_files_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    data = open_data(str(write_folder(tmp_path)), DataOptions(batch_size=4, workers=0))
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    list(data.train_batches(0))
    list(data.eval_batches())
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_torchvision_sets_open_through_timm(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    data = open_data("torch/fashion_mnist", DataOptions(data_dir=str(tmp_path), batch_size=10, workers=0))
    assert (data.num_train, data.num_classes, data.in_chans, data.img_size) == (20, 10, 1, 28)
    assert torch.cat([labels for _, labels in data.eval_batches()]).tolist() == list(range(10)) * 2

    folder = write_folder(tmp_path / "folder")
    data = open_data(
        "torch/image_folder", DataOptions(data_dir=str(folder), batch_size=6, limit=6, workers=0)
    )
    assert data.classes == ("cat", "dog", "eel")
    assert sorted(next(data.train_batches(0))[1].tolist()) == [0, 0, 1, 1, 2, 2]


# --- values of other types, orientation, files that do not count ---


def write_pixels(root: Path, pixels: np.ndarray, suffix: str = ".png") -> Path:
    """Write train/ and val/ of two classes with one image each, all of these pixels."""
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (root / place).mkdir(parents=True)
        Image.fromarray(pixels).save(root / place / f"0{suffix}")
    return root


def eval_pixels(folder: Path, **options: Any) -> torch.Tensor:
    """The first evaluation image, in 0..255."""
    data = open_data(str(folder), DataOptions(batch_size=2, workers=0, **options))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return (next(data.eval_batches())[0][0] * std + mean) * 255


@pytest.mark.parametrize(
    ("suffix", "order"),
    [(".png", "<u2"), (".tif", "<u2"), (".tiff", "<u2"), (".pgm", "<u2"), (".png", ">u2"), (".tif", ">u2")],
)
def test_16_bit_images_are_scaled_and_not_cut_off(tmp_path: Path, suffix: str, order: str) -> None:
    values = np.linspace(0, 65535, 16 * 16).round().reshape(16, 16)
    found = eval_pixels(write_pixels(tmp_path, values.astype(order), suffix))
    expected = torch.from_numpy(values / 257).float().expand(3, -1, -1)
    torch.testing.assert_close(found, expected, atol=0.51, rtol=0)


@pytest.mark.parametrize(
    ("kind", "suffix", "mode"), [("i4", ".tif", "I"), ("f4", ".tif", "F"), ("f4", ".tiff", "F")]
)
@pytest.mark.parametrize("largest", [1.0, 255.0, 1e6])
def test_images_without_a_fixed_range_are_refused_by_name(
    tmp_path: Path, kind: str, suffix: str, mode: str, largest: float
) -> None:
    folder = write_pixels(tmp_path, np.full((16, 16), largest, kind), suffix)
    for skip in (False, True):
        data = open_data(str(folder), DataOptions(batch_size=1, workers=0, skip_bad_images=skip))
        message = error_of(list, data.eval_batches())
        assert skip or (f"val/a/0{suffix}" in message and f"(mode {mode})" in message)


def test_dark_16_bit_images_get_a_note(tmp_path: Path) -> None:
    for largest, notes in ((4095, 1), (65535, 0)):
        folder = write_pixels(tmp_path / str(largest), np.full((16, 16), largest, np.uint16))
        data = open_data(str(folder), DataOptions(batch_size=1, workers=0))
        assert len(data.notes) == notes
        assert not notes or "up to 4095 of 65535, scaled to 16 of 255" in data.notes[0]


def test_16_bit_images_of_torchvisions_image_folder_are_scaled_too(tmp_path: Path) -> None:
    folder = write_pixels(tmp_path, np.full((16, 16), 30000, np.uint16))
    data = open_data("torch/image_folder", DataOptions(data_dir=str(folder), batch_size=2, workers=0))
    pixels = (next(data.eval_batches())[0] * torch.tensor(data.std).view(3, 1, 1)).mean((0, 2, 3))
    torch.testing.assert_close((pixels + torch.tensor(data.mean)) * 255, torch.full((3,), 117.0))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_as_exif_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    write_pixels(tmp_path, upright)
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {"lossless": True}
    options = {} if suffix in (".png", ".tif") else options
    (tmp_path / "val" / "a" / "0.png").unlink()
    Image.fromarray(stored).save(tmp_path / "val" / "a" / f"0{suffix}", exif=exif, **options)
    found = eval_pixels(tmp_path)
    torch.testing.assert_close(found, torch.from_numpy(upright).permute(2, 0, 1).float(), atol=3, rtol=0)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_images_are_turned_upright_too(tmp_path: Path, suffix: str) -> None:
    values = (np.arange(16 * 16).reshape(16, 16) * 257).astype(np.uint16)
    exif = Image.Exif()
    exif[274] = 6
    folder = write_pixels(tmp_path, values)
    (folder / "val" / "a" / "0.png").unlink()
    Image.fromarray(np.rot90(values, 1).copy()).save(folder / "val" / "a" / f"0{suffix}", exif=exif)
    expected = torch.arange(256).float().view(16, 16).expand(3, -1, -1)
    torch.testing.assert_close(eval_pixels(folder), expected, atol=0.01, rtol=0)


def test_damaged_exif_beside_good_pixels_is_ignored(tmp_path: Path) -> None:
    folder = write_pixels(tmp_path, np.full((16, 16, 3), 90, np.uint8))
    Image.new("RGB", (16, 16), (90, 90, 90)).save(folder / "val" / "a" / "0.png", exif=b"Exif\0\0MM\0*\0\0")
    torch.testing.assert_close(eval_pixels(folder), torch.full((3, 16, 16), 90.0), atol=0.01, rtol=0)


def _hide(place: Path, name: str) -> None:
    (place / name).mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(place / name / "copy.png")


@pytest.mark.parametrize(
    "change",
    [
        lambda place: _hide(place, ".ipynb_checkpoints"),
        lambda place: _hide(place, "@eaDir"),
        lambda place: _hide(place, "deep/__MACOSX"),
        lambda place: _hide(place.parent, ".cache"),
        lambda place: _hide(place.parent, "@eaDir"),
        lambda place: (place / "._0.png").write_bytes(b""),
        lambda place: (place / "self").symlink_to("."),
        lambda place: (place / "up").symlink_to(".."),
        lambda place: (place / "far_up").symlink_to(place.parent.parent.parent.absolute()),
        lambda place: (place.parent / "self").symlink_to("."),
        lambda place: (place.parent / "root").symlink_to("../.."),
    ],
)
def test_hidden_folders_and_links_to_a_folder_above_do_not_count(tmp_path: Path, change: Any) -> None:
    folder = write_folder(tmp_path / "around" / "set")
    change(folder / "train" / "cat")
    for spec in (str(folder), "torch/image_folder"):
        data = open_data(spec, DataOptions(batch_size=2, workers=0, data_dir=str(folder)))
        assert (data.classes, data.num_train, data.notes) == (("cat", "dog", "eel"), 12, ())
        assert {int(label) for _, labels in data.train_batches(0) for label in labels} == {0, 1, 2}


def test_links_to_other_places_are_followed_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    _hide(tmp_path, "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder / "train")
    for name in ("one", "two"):
        (folder / "train" / "cat" / name).symlink_to(tmp_path / "elsewhere")
    (folder / "train" / "dog").rename(tmp_path / "dogs")
    (folder / "train" / "dog").symlink_to(tmp_path / "dogs")
    data = open_data(str(folder), DataOptions(batch_size=2, workers=0))
    assert (data.classes, data.num_train) == (("cat", "dog", "eel"), 13)


def test_files_of_other_formats_are_counted_aloud(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    for name in ("a.heic", "b.HEIC", "c.gif", "d.txt", ".e.gif"):
        (folder / "train" / "cat" / name).write_bytes(b"")
    (folder / "val" / "dog" / "f").write_bytes(b"")
    data = open_data(str(folder), DataOptions(batch_size=2, workers=0))
    assert data.notes == (
        "not read beside the training images: 3 files of other formats (.heic 2, .gif 1)",
        "not read beside the evaluation images: 1 file of other formats (no suffix 1)",
    )
    for image in (folder / "train" / "cat").glob("*.png"):
        image.unlink()
    message = error_of(opened, str(folder), batch_size=2)
    assert "train/cat has no images, but 3 files of other formats (.heic 2, .gif 1)" in message


@pytest.mark.parametrize("layout", ["train alone", "classes alone", "another name"])
def test_holdout_needs_no_evaluation_folder(tmp_path: Path, layout: str) -> None:
    folder = write_folder(tmp_path, per_class=10)
    shutil.rmtree(folder / "val")
    options: dict[str, Any] = {"batch_size": 4, "workers": 0, "augmentation": PLAIN}
    if layout == "another name":
        (folder / "train").rename(folder / "images")
        options["train_split"] = "images"
    elif layout == "classes alone":
        for name in ("cat", "dog", "eel"):
            (folder / "train" / name).rename(folder / name)
        (folder / "train").rmdir()
        assert "give --holdout 0.2" in error_of(opened, str(folder), **options)
    data = opened(str(folder), **options, holdout=0.2)
    assert (data.classes, data.num_train, data.num_eval) == (("cat", "dog", "eel"), 24, 6)
    batches = [*data.train_batches(0), *data.eval_batches()]
    assert len({image.numpy().tobytes() for images, _ in batches for image in images}) == 30


def test_a_folder_with_an_evaluation_split_alone_is_not_taken_for_one_of_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "train").rename(folder / "trian")
    assert "has no train/" in error_of(opened, str(folder), batch_size=2, holdout=0.2)


class _Reader:
    """Stands for one of timm's streaming readers: shuffles with the epoch, cannot seek."""

    class_to_idx: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, is_training: bool) -> None:
        self.is_training = is_training
        self.epoch = 0

    def __len__(self) -> int:
        return 20

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def set_loader_cfg(self, num_workers: int) -> None:
        assert num_workers == 1

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        order = list(range(20))
        if self.is_training:
            random.Random(self.epoch).shuffle(order)
        return ((self.picture(i), i % 3) for i in order)

    @staticmethod
    def picture(number: int) -> Image.Image:
        return Image.new("RGB", (16, 16), (10 * number, 0, 0))


def test_a_streamed_set_repeats_its_epochs_and_skips_by_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_timm(*_: object, is_training: bool, **__: object) -> IterableImageDataset:
        return IterableImageDataset("", reader=_Reader(is_training))

    monkeypatch.setattr("ewavit.data.loading.open_timm", open_timm)
    data = open_data("wds/set", DataOptions(batch_size=8, workers=0))
    assert (data.classes, data.img_size, data.in_chans, data.batches_per_epoch) == (("0", "1", "2"), 16, 3, 2)
    whole = list(data.train_batches(1))
    assert [len(images) for images, _ in whole] == [8, 8]
    assert same(whole[1:], list(data.train_batches(1, start=1)))
    assert not same(whole, list(data.train_batches(2)))
    assert torch.cat([labels for _, labels in data.eval_batches()]).tolist() == [i % 3 for i in range(20)]
    monkeypatch.setattr(_Reader, "picture", lambda _, number: Image.new("F", (16, 16), number))
    assert "wds/set: an image of the stream cannot be read: its values are floats" in error_of(
        list, data.eval_batches()
    )
    assert "limit" in error_of(opened, "wds/set", batch_size=8, limit=4)


# --- unreadable images ---


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["text", "truncated", "missing"])
def test_an_unreadable_image_is_named_in_one_line(tmp_path: Path, workers: int, damage: str) -> None:
    folder = write_folder(tmp_path)
    image = folder / "train" / "dog" / "2.png"
    data = open_data(str(folder), DataOptions(batch_size=3, workers=workers))
    if damage == "missing":
        image.unlink()
    else:
        image.write_bytes(b"no image" if damage == "text" else image.read_bytes()[:300])
    message = error_of(list, data.train_batches(0))
    assert str(image) in message
    assert "--skip-bad-images" in message
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_in_training_left_out_in_evaluation_counted_once(
    tmp_path: Path, workers: int
) -> None:
    folder = write_folder(tmp_path)
    for name in ("train/cat/0.png", "train/cat/1.png", "val/dog/0.png"):
        (folder / name).write_bytes(b"no image")
    data = open_data(str(folder), DataOptions(batch_size=6, workers=workers, skip_bad_images=True))
    for epoch in range(2):
        batches = list(data.train_batches(epoch))
        assert [len(images) for images, _ in batches] == [6, 6]
        assert torch.bincount(torch.cat([labels for _, labels in batches])).tolist() == [4, 4, 4]
    assert data.num_skipped == 2
    assert torch.cat([labels for _, labels in data.eval_batches()]).tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert data.num_skipped == 3


def test_a_set_without_any_readable_image_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    for image in (*folder.glob("train/*/*"), *folder.glob("val/*/*")):
        image.write_bytes(b"no image")
    data = open_data(str(folder), DataOptions(batch_size=2, workers=0, skip_bad_images=True))
    assert "no image" in error_of(list, data.train_batches(0))
    assert "no image" in error_of(list, data.eval_batches())


# --- wrong input ---


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("imagenet", {}, ["imagenet", "fashion-mnist-mini", "train/", "torch/"]),
        ("/no/such/folder", {}, ["/no/such/folder", "train/"]),
        ("fashion-mnist-mini", {"batch_size": 0}, ["batch_size 0"]),
        ("fashion-mnist-mini", {"limit": 0}, ["limit 0"]),
        ("fashion-mnist-mini", {"limit": 1, "batch_size": 1}, ["limit 1", "one class", "raise"]),
        ("fashion-mnist-mini", {"img_size": 0}, ["img_size 0"]),
        ("fashion-mnist-mini", {"workers": -1}, ["workers -1"]),
        ("fashion-mnist-mini", {"mean": (0.5,)}, ["std is missing", "give both"]),
        ("solids", {"num_points": 0}, ["num_points 0"]),
        ("solids", {"votes": 0}, ["votes 0"]),
        ("torch/fashion_mnist", {"data_dir": "/no/such"}, ["torch/fashion_mnist", "/no/such", "--data-dir"]),
        ("torch/no_such_set", {}, ["torch/no_such_set", "check the name"]),
        ("torch/image_folder", {"data_dir": "/no/such"}, ["torch/image_folder", "/no/such"]),
        ("tfds/mnist", {}, ["tfds/mnist", "pip install tensorflow_datasets"]),
        (
            "fashion-mnist-mini",
            {"augmentation": Augmentation(aa="v0")},
            ["'v0'", "rand-m9", "augmix", "original"],
        ),
        ("fashion-mnist-mini", {"augmentation": Augmentation(aa="rand-x3")}, ["'x3'", "rand-m9"]),
    ],
)
def test_a_wrong_option_is_named_with_its_remedy(
    spec: str, options: dict[str, object], words: list[str]
) -> None:
    message = error_of(opened, spec, **{"batch_size": 8, **options})
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"hflip": 1.5}, "hflip"),
        ({"reprob": -0.1}, "reprob"),
        ({"remode": "blue"}, "blue"),
        ({"crop_padding": -2}, "crop_padding"),
        ({"scale": (0.9, 0.1)}, "scale"),
        ({"color_jitter": -1.0}, "color_jitter"),
    ],
)
def test_an_impossible_augmentation_is_named(options: dict[str, object], word: str) -> None:
    assert word in error_of(Augmentation, **options)


def test_an_augmentation_unknown_to_timm_is_named(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path))
    for aa in ("nonsense", "rand-x3"):
        message = error_of(opened, folder, batch_size=2, augmentation=Augmentation(aa=aa))
        assert aa in message
        assert "rand-m9" in message


def test_wrong_folders_are_named_with_their_remedy(tmp_path: Path) -> None:
    def message(change: object) -> str:
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, per_class=1)
        change(folder)  # type: ignore[operator]
        return error_of(opened, str(folder), batch_size=2)

    def remove(*names: str) -> object:
        return lambda folder: [shutil.rmtree(folder / name) for name in names]

    assert "set has no train/" in message(remove("train"))
    assert "set has no val/" in message(remove("val"))
    assert "train holds no class folders" in message(remove("train/cat", "train/dog", "train/eel"))
    assert "train holds one class only (eel)" in message(remove("train/cat", "train/dog"))
    differs = message(remove("val/dog"))
    assert "3 classes to train on and 2 to evaluate" in differs
    assert "only in train: dog" in differs
    assert "only in val: dog" in message(remove("train/dog"))
    for split in ("train", "val"):
        assert f"{split}/dog has no images" in message(lambda f, s=split: os.remove(f / s / "dog" / "0.png"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty has no train/" in error_of(opened, str(empty), batch_size=2)


def test_wrong_tiny_imagenet_annotations_are_named(tmp_path: Path) -> None:
    annotations = write_tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn03\nval_1.JPEG\tn99\n")
    assert "val_annotations.txt line 2" in error_of(opened, str(tmp_path), batch_size=2)
    annotations.write_text("../train/x.JPEG\tn03\n")
    assert "val_annotations.txt line 1 names no image" in error_of(opened, str(tmp_path), batch_size=2)
    annotations.write_bytes(b"val_0.JPEG\tn0\xff\n")
    assert "val_annotations.txt cannot be read" in error_of(opened, str(tmp_path), batch_size=2)
    annotations.write_text("")
    assert "val_annotations.txt is empty" in error_of(opened, str(tmp_path), batch_size=2)


def test_classes_of_timm_sets_must_agree_and_be_several(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    shutil.rmtree(folder / "val" / "eel")
    options = {"data_dir": str(folder), "batch_size": 2}
    assert "only in train: eel" in error_of(opened, "torch/image_folder", **options)
    shutil.rmtree(folder / "train" / "eel")
    for split in ("train", "val"):
        shutil.rmtree(folder / split / "dog")
    assert "one class" in error_of(opened, "torch/image_folder", **options)


def test_damaged_cifar_files_are_named(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path)
    file = folder / "data_batch_3"
    whole = file.read_bytes()

    def message() -> str:
        text = error_of(opened, str(folder), batch_size=2)
        assert str(file) in text
        return text

    for length in (0, 10, len(whole) // 2, len(whole) - 5):
        file.write_bytes(whole[:length])
        assert "download it again" in message()
    file.write_bytes(bytes(len(whole)))
    assert "download it again" in message()
    for content in (
        [1, 2],
        {b"data": np.zeros((2, 3000), np.uint8), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]},
        {b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]},
        {b"labels": [0, 1]},
    ):
        file.write_bytes(pickle.dumps(content))
        assert "download it again" in message()
    file.unlink()
    assert "missing" in message()
    write_cifar(tmp_path, coarse=True)
    assert "cifar-10-batches-py and cifar-100-python" in error_of(opened, str(tmp_path), batch_size=2)


class _Malicious:
    def __init__(self, function: object, argument: object) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple[object, tuple[object]]:
        return self.function, (self.argument,)


@pytest.mark.parametrize("function", [os.system, eval, getattr, np.load])
def test_a_malicious_cifar_file_is_refused_and_nothing_runs(tmp_path: Path, function: object) -> None:
    folder = write_cifar(tmp_path)
    trace = tmp_path / "trace"
    payload = _Malicious(function, f"touch {trace}")
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": payload, b"labels": [0]}))
    message = error_of(opened, str(folder), batch_size=2)
    assert "data_batch_1" in message
    assert "it imports" in message
    assert not trace.exists()


def test_opened_folders_are_loader_data_with_names_and_counts(tmp_path: Path) -> None:
    data = open_data(str(write_folder(tmp_path / "pets")), DataOptions(batch_size=2, workers=0))
    assert isinstance(data, LoaderData)
    assert (data.name, data.num_skipped, data.num_classes) == ("pets", 0, 3)


def test_a_file_that_pil_would_give_to_another_program_is_no_image(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(file, "eps")
    with pytest.raises(UnreadableImage, match="no image that PIL can read"):
        FileImages([str(file)], [0], ("a", "b")).load(0, "RGB")


def test_class_folders_may_have_any_digits_in_their_names(tmp_path: Path) -> None:
    for name in ("m²", "m10", "m2"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "train" / name / "a.png")
    train, _ = read_folder(tmp_path, "train", "val", holdout=True)
    assert train.classes == ("m2", "m10", "m²")
