"""A small set of images of several sizes, a model for it, and what a run predicted."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

MODEL = {"model_kwargs": "patch_size=8,embed_dim=32,depth=2,num_heads=2", "img_size": 32, "lr": 3e-3}
SIZES = ((40, 40), (61, 44), (32, 32), (33, 70), (90, 48))


def write_folder(root: Path, mode: str = "RGB", sizes=SIZES, train_images=96, val_images=90) -> Path:
    """Three classes of noisy stripes of different directions, in images of several sizes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train_images), ("val", val_images)):
        for number in range(count):
            label, (width, height) = number % 3, sizes[number % len(sizes)]
            y, x = np.mgrid[:height, :width]
            stripes = np.sin(0.7 * (x, y, x + y)[label] + generator.uniform(0, 6))
            pixels = 128 + 40 * stripes[..., None] + generator.normal(0, 70, (height, width, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
            path = root / split / f"stripes, {label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def predicted(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))
