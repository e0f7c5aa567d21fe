"""How many images per second do the two data paths deliver, without a model?

    python benchmarks/data_rate.py

(a) Sets in memory: the bundled 28x28x1, and random 32x32x3 with each thing that is drawn for an image; beside
ours torchvision's RandAugment, image after image, and kornia's where it is installed. (b) A generated folder
of 64x64 JPEGs through our loader and through timm's `create_loader`, with the same transforms. The paths take
turns. Writes records/data_rate-DEVICE.json, with the name of the decoder.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, features
from timm.data import Mixup, create_dataset, create_loader
from torch import Tensor
from torchvision.transforms import v2

from ewavit.data.augmentation import Mix, TensorAugmentation, tensor_auto_augment
from ewavit.data.batches import Data
from ewavit.training.opening import Augmentation, open_data
from records import write_record

Batches = Iterator[Tensor]


def images_per_second(make: Callable[[], Batches], seconds: float) -> float:
    """Draw batches for `seconds`, after one of warm-up, and count images."""
    batches = make()
    wait = torch.cuda.synchronize if next(batches).is_cuda else lambda: None
    images, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        images += len(next(batches))
        wait()
    return images / (time.perf_counter() - begin)


def epochs_of(data: Data) -> Batches:
    """Training images without end."""
    return (images for epoch in range(10**6) for images, _ in data.train_batches(epoch))


def of_timm(folder: str, batch_size: int, workers: int, device: torch.device) -> Batches:
    """The same transforms of a folder by timm's own loader; its prefetcher normalises, as on a GPU."""
    loader = create_loader(
        create_dataset("", root=folder, split="train", is_training=True),
        input_size=(3, 64, 64), batch_size=batch_size, is_training=True, num_workers=workers, device=device,
        persistent_workers=False, interpolation="random",
    )  # fmt: skip
    return (images for epoch in repeat(loader) for images, _ in epoch)


def made_from(images: Tensor, change: Callable[[Tensor], Tensor]) -> Batches:
    """The same images changed again and again."""
    return (change(images) for _ in repeat(None))


def device_side(batch_size: int, device: torch.device) -> dict[str, Callable[[], Batches]]:
    """What happens on the device to uint8 images of 32x32x3, one thing at a time and all together."""
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (batch_size,), device=device)
    scale = ((0.5,) * 3, (0.25,) * 3)

    def augmented(**options: object) -> Callable[[Tensor], Tensor]:
        options = {"hflip": 0.0, "crop_padding": 0} | options
        return TensorAugmentation(Augmentation(**options), 32, *scale, device)  # type: ignore[arg-type]

    mix = Mix(0.8, 1.0, 10)
    mixup, elementwise = (Mixup(0.8, 1.0, mode=mode, num_classes=10) for mode in ("batch", "elem"))
    one_by_one = v2.RandAugment(num_ops=2, magnitude=27, interpolation=v2.InterpolationMode.BILINEAR)
    plain, everything = augmented(), augmented(hflip=0.5, crop_padding=4, aa="rand-m9", reprob=0.25)
    found = {
        "normalise": plain,
        "+ crop": augmented(crop_padding=4),
        "+ flip": augmented(hflip=0.5),
        "+ erasing 0.25": augmented(reprob=0.25),
        "+ mixup or cutmix": lambda x: mix(plain(x), labels)[0],
        "+ mixup or cutmix, timm's, a draw an image": lambda x: elementwise(plain(x), labels)[0],
        "+ mixup or cutmix, timm's, a draw a batch": lambda x: mixup(plain(x), labels)[0],
        "all of these and rand-m9, then mixup": lambda x: mix(everything(x), labels)[0],
        "rand-m9-p1, uint8 to uint8": tensor_auto_augment("rand-m9-p1"),
        "rand-m9-p1, torchvision image by image": lambda x: torch.stack([one_by_one(image) for image in x]),
    }
    try:
        from kornia import __version__
        from kornia.augmentation.auto import RandAugment
    except ImportError:
        print("kornia is not installed: left out")
    else:
        kornia = RandAugment(n=2, m=27)
        name = f"rand-m9-p1, kornia {__version__}, one operation for the batch"
        found[name] = lambda x: kornia(x.float() / 255)
    return {f"32x32x3: {name}": partial(made_from, images, change) for name, change in found.items()}


def decoder() -> str:
    """Who decodes JPEGs, for timm and for us."""
    simd = "-SIMD" if "post" in PIL.__version__ else ""
    turbo = features.version_feature("libjpeg_turbo")
    return f"Pillow{simd} {PIL.__version__} with " + (f"libjpeg-turbo {turbo}" if turbo else "libjpeg")


def write_jpegs(root: Path, per_class: int = 400) -> None:
    """Write ten classes of smooth random 64x64 JPEGs (noise alone would decode slower than photographs)."""
    rng = np.random.default_rng(0)
    for split, count in (("train", per_class), ("val", 1)):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
                image.save(folder / f"{number}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="over all paths; medians are told")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    def opened(spec: str, aa: str | None, workers: int) -> Batches:
        options = Augmentation(aa=aa)
        return epochs_of(
            open_data(spec, batch_size=args.batch_size, augmentation=options, workers=workers, device=device)
        )

    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder))
        paths = {
            "28x28x1 in memory, default": partial(opened, "fashion-mnist-mini", None, 0),
            "28x28x1 in memory, rand-m9": partial(opened, "fashion-mnist-mini", "rand-m9", 0),
            **device_side(args.batch_size, device),
        }
        for workers in (0, 2):
            paths[f"JPEG 64x64, {workers} workers"] = partial(opened, folder, None, workers)
            timm = partial(of_timm, folder, args.batch_size, workers, device)
            paths[f"JPEG 64x64, {workers} workers, timm's loader"] = timm
        rates: dict[str, list[float]] = {label: [] for label in paths}
        for label, make in chain.from_iterable(repeat(list(paths.items()), args.rounds)):
            rates[label].append(images_per_second(make, args.seconds))
    middle = {label: round(statistics.median(found)) for label, found in rates.items()}
    for label, rate in middle.items():
        print(f"{label:<60}{rate:>9,} images/s", flush=True)
    result = {"decoder": decoder(), "images_per_second": middle, "all": rates}
    write_record(f"data_rate-{args.device}", vars(args), result)


if __name__ == "__main__":
    main()
