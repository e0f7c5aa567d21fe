"""`make_shapes`: generated images of shapes with exact masks, for segmentation without a download.

Each image has one to three shapes on a background of any colour; later shapes lie on earlier ones. The colour
of a shape is half that of its class, half random, and noise is added: colour alone does not tell the class.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CLASSES = ("background", "disc", "square", "triangle", "ring")
TRAIN, EVAL = 400, 200
SIDE = 32  # pixels
NOISE = 24.0  # standard deviation, of 255

COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], float)  # of the classes

Bytes = npt.NDArray[np.uint8]


def make_shapes(seed: int = 0) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Generate the set, the same on every machine.

    Args:
        seed: seed of all random draws.

    Returns:
        Training images (images, SIDE, SIDE, 3) and masks (images, SIDE, SIDE) of class numbers; evaluation
        images and masks.
    """
    rng = np.random.default_rng(seed)
    pairs = [_image(rng) for _ in range(TRAIN + EVAL)]
    images, masks = (np.stack(each) for each in zip(*pairs, strict=True))
    return images[:TRAIN], masks[:TRAIN], images[TRAIN:], masks[TRAIN:]


def _image(rng: np.random.Generator) -> tuple[Bytes, Bytes]:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    image = np.empty((SIDE, SIDE, 3))
    image[:] = rng.uniform(0, 255, 3)
    for _ in range(rng.integers(1, 4)):
        label = int(rng.integers(1, len(CLASSES)))
        inside = _shape(CLASSES[label], rng)
        mask[inside] = label
        image[inside] = (COLOURS[label] + rng.uniform(0, 255, 3)) / 2
    noisy = image + rng.normal(0, NOISE, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), mask


def _shape(name: str, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """The pixels of one shape at a random place, of a random size and turn, (SIDE, SIDE)."""
    size, angle = rng.uniform(0.15, 0.3) * SIDE, rng.uniform(0, 2 * np.pi)
    centre = rng.uniform(size, SIDE - size, 2)
    y, x = (np.indices((SIDE, SIDE)) + 0.5 - centre[:, None, None]) / size
    x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    radius = np.hypot(x, y)
    inside = {
        "square": np.maximum(abs(x), abs(y)) < 0.8,
        "triangle": np.maximum.reduce([-2 * y, y + 3**0.5 * x, y - 3**0.5 * x]) < 1,
        "disc": radius < 1,
        "ring": (radius < 1) & (radius > 0.5),
    }
    return np.asarray(inside[name], np.bool_)
