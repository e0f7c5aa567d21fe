"""Make the bundled data set from the Debian package `dataset-fashion-mnist`.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb unpacked
    python tools/make_fashion_mnist_mini.py unpacked/usr/share/datasets/fashion-mnist

The result is a class-balanced subset of Fashion-MNIST, 10,000 training and 2,000 test images. Every ten
images in a row hold each class once, so that every prefix is balanced too. Two runs give the same bytes.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CREDIT = (
    "Fashion-MNIST, Copyright 2017 Zalando SE (Zalando Research), MIT licence. Han Xiao, Kashif Rasul, "
    "Roland Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, "
    "2017, arXiv:1708.07747. This is a class-balanced subset of 10,000 training and 2,000 test images."
)
SEED = 20170825
OUTPUT = Path(__file__).parent.parent / "src/ewavit/training/fashion_mnist_mini.npz"


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped file of the IDX format: two zeros, type (8 = uint8), number of axes, sizes, values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def choose(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `per_class` indices of each class; ten in a row hold each class once, in random order."""
    by_class = [
        rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(len(CLASSES))
    ]
    rows = np.stack(by_class, axis=1)  # (per_class, classes)
    return rng.permuted(rows, axis=1).reshape(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the four *-ubyte.gz files")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()

    rng = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {}
    for split, prefix, per_class in (("train", "train", 1000), ("test", "t10k", 200)):
        labels = read_idx(args.folder / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = choose(labels, per_class, rng)
        arrays[f"{split}_images"] = read_idx(args.folder / f"{prefix}-images-idx3-ubyte.gz")[chosen]
        arrays[f"{split}_labels"] = labels[chosen]
    np.savez_compressed(args.output, **arrays, classes=np.array(CLASSES), credit=np.array(CREDIT))
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
