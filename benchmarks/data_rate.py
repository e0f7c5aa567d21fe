"""How many images per second do the two data paths deliver, and what do they leave of a training step?

    python benchmarks/data_rate.py            # without a model
    python benchmarks/data_rate.py --share    # beside the steps of a model

(a) Sets in memory: the bundled 28x28x1, and random 32x32x3 with each thing that is drawn for an image; beside
ours torchvision's RandAugment, image after image, and kornia's where it is installed. (b) A generated folder
of 64x64 JPEGs through our loader and through timm's `create_loader`, with the same transforms. The paths take
turns. Writes records/data_rate-DEVICE.json, with the name of the decoder.

`--share`: ViT-S at 32x32/4, N = 4, on images in memory. Windows of steps that each take a new batch with
everything drawn (crop, flip, RandAugment, erasing, mixup and cutmix), in turn with windows of steps on one
batch made before. The share is the time of the latter over that of the former, so 1 where data cost nothing.
On a GPU, compiled and in bfloat16, torch's profiler also measures in which share of the former's time a
kernel ran. Writes records/data_share-DEVICE.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, features
from timm.data import Mixup, create_dataset, create_loader
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torchvision.transforms import v2

from ewavit.data.arrays import Arrays
from ewavit.data.augmentation import Augmentation, Mix, TensorAugmentation, tensor_auto_augment
from ewavit.data.batches import Batch, Data
from ewavit.data.in_memory import TensorData
from ewavit.data.options import DataOptions
from ewavit.study.bench import Trainee, interval_of_median
from ewavit.training.opening import open_data
from ewavit.training.processes import keep_freed_memory
from records import write_record
from step_time import ON_CPU, ON_GPU, trainee

CLASSES = 100

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


def augmented_batches(batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Augmented batches of random images without end."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50 * batch_size, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, len(images))
    arrays = Arrays("random", tuple(map(str, range(CLASSES))), images, labels, images[:1], labels[:1])
    augmentation = Augmentation(aa="rand-m9-mstd0.5", reprob=0.25)
    options = DataOptions(batch_size=batch_size, augmentation=augmentation, device=device)
    data = TensorData(arrays, np.arange(len(images)), options)
    mix = Mix(0.8, 1.0, CLASSES)
    return (mix(*batch) for epoch in range(10**6) for batch in data.train_batches(epoch))


def train_for(trained: Trainee, source: Iterator[Batch], steps: int) -> float:
    """Seconds of so many steps; as in `ewavit train` each loss is read when the next step has begun."""
    begun, losses = time.perf_counter(), []
    for images, targets in islice(source, steps):
        with torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext():
            loss = F.cross_entropy(trained.model(images), targets)
        loss.backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        assert trained.averaging is not None
        trained.averaging.step()
        losses.append(loss.detach())
        if len(losses) > 1:
            float(losses[-2])
    float(losses[-1])
    return time.perf_counter() - begun


def kernel_share(trained: Trainee, source: Iterator[Batch], steps: int) -> float:
    """The share of the time from the first to the last kernel in which one ran."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        train_for(trained, source, steps)
    ranges = [event.time_range for event in profiled.events() if event.device_type == DeviceType.CUDA]
    busy = last = 0.0
    for span in sorted(ranges, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, last))
        last = max(last, span.end)
    return busy / (last - min(span.start for span in ranges))


def measure_share(steps: int, batch_size: int, rounds: int) -> None:
    """What new batches leave of a training step, against steps on one batch made before."""
    on_gpu = torch.cuda.is_available()
    keep_freed_memory()
    device = torch.device("cuda" if on_gpu else "cpu")
    trained = trainee("s32", "ewa-4", "compiled" if on_gpu else "eager", device.type)
    if on_gpu:
        trained.model.compile()
    new = augmented_batches(batch_size, device)
    same = repeat(next(new))
    for source in (new, same):
        train_for(trained, source, 5)
    seconds = np.array([[train_for(trained, source, steps) for source in (new, same)] for _ in range(rounds)])
    share = seconds[:, 1] / seconds[:, 0]
    rates = steps * batch_size / np.median(seconds, 0)
    result = {
        "images_per_second": {"new batches": float(rates[0]), "one batch": float(rates[1])},
        "share": float(np.median(share)),
        "interval": interval_of_median(share),
    }
    found = f"{rates[0]:,.0f} images/s, {rates[1]:,.0f} on one batch"
    print(f"{found}: the model gets {np.median(share):.1%} of a step")
    if on_gpu:
        result["kernel_share"] = kernel_share(trained, new, steps)
        print(f"a kernel ran in {result['kernel_share']:.1%} of the time")
    settings = {"steps": steps, "batch_size": batch_size, "rounds": rounds}
    write_record(f"data_share-{device.type}", settings, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="over all paths; medians are told")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--share", action="store_true", help="what the data path leaves of a training step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.share:
        on_gpu = torch.cuda.is_available()
        batch_size = (ON_GPU if on_gpu else ON_CPU)["s32"]
        return measure_share(50 if on_gpu else 2, batch_size, rounds=10)
    device = torch.device(args.device)

    def opened(spec: str, aa: str | None, workers: int) -> Batches:
        options = Augmentation(aa=aa)
        return epochs_of(
            open_data(
                spec,
                DataOptions(batch_size=args.batch_size, augmentation=options, workers=workers, device=device),
            )
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
