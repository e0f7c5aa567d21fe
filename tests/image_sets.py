"""Tiny image sets in the published layouts, which the tests write."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def write_cifar(root: Path, coarse: bool = False, protocol: int = 2) -> Path:
    """Write a tiny CIFAR-10, or CIFAR-100 with `coarse`, in the published format (bytes keys, pickle 2)."""
    rng = np.random.default_rng(0)
    folder = root / ("cifar-100-python" if coarse else "cifar-10-batches-py")
    folder.mkdir(parents=True)

    def dump(name: str, content: object) -> None:
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))

    def batch() -> dict[bytes, object]:
        data = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
        if coarse:
            return {b"data": data, b"coarse_labels": [0] * 6, b"fine_labels": [0, 1, 2, 2, 1, 0]}
        return {b"data": data, b"labels": [0, 1, 2, 3, 4, 5]}

    if coarse:
        dump("meta", {b"fine_label_names": [f"fine{i}".encode() for i in range(100)]})
        dump("train", batch())
        dump("test", batch())
    else:
        dump("batches.meta", {b"label_names": [f"name{i}".encode() for i in range(10)]})
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            dump(name, batch())
    return folder


def write_tiny_imagenet(root: Path) -> Path:
    """Write Tiny-ImageNet's published layout with three classes of 64x64 JPEGs, some of them grey."""
    rng = np.random.default_rng(0)
    root = root / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    rows = []
    for number, wnid in enumerate(("n03", "n01", "n02")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for i in range(2):
            shape = (64, 64) if i else (64, 64, 3)
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        Image.new("RGB", (64, 64)).save(root / "val" / "images" / f"val_{number}.JPEG")
        rows.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63")
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root
