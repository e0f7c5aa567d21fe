"""How many images per second do the two data paths deliver, without a model?

    python benchmarks/data_rate.py --seconds 5

(a) the bundled set, in memory, with the default augmentation and with RandAugment; (b) a generated folder of
64x64 JPEGs through timm's transforms, in this process and with workers. Writes records/data_rate-DEVICE.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ewavit.training.batches import Data
from ewavit.training.data import Augmentation, open_data
from records import write_record


def images_per_second(data: Data, seconds: float) -> float:
    """Draw training batches for `seconds`, after one batch of warm-up, and count images."""
    images = epoch = 0
    begin = None
    while True:
        for batch, _ in data.train_batches(epoch):
            if begin is None:
                begin = time.perf_counter()
                continue
            images += len(batch)
            if batch.is_cuda:
                torch.cuda.synchronize()
            if time.perf_counter() - begin > seconds:
                return images / (time.perf_counter() - begin)
        epoch += 1


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
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder))
        for label, spec, aa, workers in (
            ("in memory, default", "fashion-mnist-mini", None, 0),
            ("in memory, rand-m9", "fashion-mnist-mini", "rand-m9", 0),
            ("JPEG 64x64, default, 0 workers", folder, None, 0),
            ("JPEG 64x64, default, 2 workers", folder, None, 2),
        ):
            data = open_data(
                spec,
                batch_size=args.batch_size,
                augmentation=Augmentation(aa=aa),
                workers=workers,
                device=device,
            )
            rates[label] = round(images_per_second(data, args.seconds))
            print(f"{label:<32}{rates[label]:>9,} images/s", flush=True)
    write_record(f"data_rate-{args.device}", vars(args), {"images_per_second": rates})


if __name__ == "__main__":
    main()
