"""RandAugment (arXiv 1909.13719) of a batch of uint8 images on its device, with draws for each image.

The draws are made on the CPU. The number of images for each operation is therefore known there: an operation
computes its own images only, and nothing waits for the device. Operations and magnitudes are those of
torchvision, the slow twin in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

OPERATIONS = {  # name: amount at full strength, and whether it may be negative
    "ShearX": (0.3, True),
    "ShearY": (0.3, True),
    "TranslateX": (150 / 331, True),  # of the width
    "TranslateY": (150 / 331, True),
    "Rotate": (30.0, True),  # degrees
    "Brightness": (0.9, True),
    "Color": (0.9, True),
    "Contrast": (0.9, True),
    "Sharpness": (0.9, True),
    "Posterize": (4.0, False),  # bits removed
    "Solarize": (1.0, False),  # share of the range, from above
    "AutoContrast": (0.0, False),
    "Equalize": (0.0, False),
    "Identity": (0.0, False),
}
NAMES = tuple(OPERATIONS)
GEOMETRIC = 5  # the first five are one affine map each and are computed together


@dataclass(frozen=True)
class RandAugment:
    """Change each image by up to n operations.

    Args:
        m: magnitude, 0 to 10.
        n: number of operations, one after the other.
        p: probability of each operation.
        mstd: standard deviation of the noise on the magnitude; the sum is clamped to 0..10.
    """

    m: float = 10.0
    n: int = 2
    p: float = 0.5
    mstd: float = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """Augment uint8 images (batch, 1 or 3, height, width); draws come from torch's CPU generator."""
        batch = len(images)
        full, signed = (torch.tensor(column) for column in zip(*OPERATIONS.values(), strict=True))
        for _ in range(self.n):
            operation = torch.randint(len(NAMES), (batch,))
            strength = (self.m + self.mstd * torch.randn(batch)).clamp(0, 10) / 10
            negative = signed[operation] & (torch.rand(batch) < 0.5)
            amount = strength * full[operation] * torch.where(negative, -1.0, 1.0)
            operation[torch.rand(batch) >= self.p] = len(NAMES) - 1
            images = apply(images, operation, amount)
        return images


def apply(images: Tensor, operation: Tensor, amount: Tensor) -> Tensor:
    """Change each image by its own operation.

    Args:
        images: uint8 (batch, 1 or 3, height, width).
        operation: (batch,) int64 indices into `NAMES`, on the CPU.
        amount: (batch,) amount of the operation, in its unit, on the CPU.

    Returns:
        The changed images, of the same shape and dtype.
    """
    group = (operation - GEOMETRIC + 1).clamp(min=0)
    order = group.argsort(stable=True)
    counts = group.bincount(minlength=len(NAMES) - GEOMETRIC + 1).tolist()
    moved = order[: counts[0]]
    maps = _affine_maps(operation[moved], amount[moved], *images.shape[-2:])
    amounts = amount[order].view(-1, 1, 1, 1)
    maps, amounts, order, back = (
        tensor.to(images.device, non_blocking=True) for tensor in (maps, amounts, order, order.argsort())
    )
    parts, amounts_of = torch.split(images.index_select(0, order), counts), torch.split(amounts, counts)
    changed = [_moved(parts[0], maps)] if counts[0] else []
    for name, part, of_each in zip(NAMES[GEOMETRIC:], parts[1:], amounts_of[1:], strict=True):
        changed.append(_recoloured(name, part, of_each) if len(part) else part)
    return torch.cat(changed).index_select(0, back)


def _affine_maps(operation: Tensor, amount: Tensor, height: int, width: int) -> Tensor:
    """Affine maps (batch, 2, 3) for `affine_grid`, from a place in the output to the place in the input."""
    shear_x, shear_y, shift_x, shift_y, degrees = (
        torch.where(operation == number, amount, 0.0) for number in range(GEOMETRIC)
    )
    shift_x, shift_y = (shift_x * width).trunc(), (shift_y * height).trunc()
    sine, cosine = degrees.deg2rad().sin(), degrees.deg2rad().cos()
    # In pixels around the centre; a shear leaves the first row or column in place.
    maps = torch.stack(
        [
            torch.stack([cosine, shear_x - sine, shear_x * height / 2 - shift_x], 1),
            torch.stack([shear_y + sine, cosine, shear_y * width / 2 - shift_y], 1),
        ],
        1,
    )
    unit = torch.tensor([width, height, 2.0])  # affine_grid counts -1 to 1 from edge to edge
    return maps * unit / unit[:2].view(2, 1)


def _moved(images: Tensor, maps: Tensor) -> Tensor:
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.to(torch.float32), grid, "bilinear", "zeros", align_corners=False)
    return moved.round_().to(torch.uint8)


def _recoloured(name: str, images: Tensor, amount: Tensor) -> Tensor:
    if name == "Identity":
        return images
    if name == "Posterize":
        lost = amount.round().to(torch.uint8)
        return (images >> lost) << lost
    if name == "Solarize":
        least = (255 * (1 - amount)).ceil().to(torch.uint8)
        return torch.where(images >= least, images.bitwise_not(), images)
    if name in ("AutoContrast", "Equalize"):
        changed: Tensor = vision.autocontrast(images) if name == "AutoContrast" else vision.equalize(images)
        return changed
    pixels = images.to(torch.float32)
    other = _degenerate(name, pixels)  # the result of amount -1; amount 0 is the image itself
    return other.lerp(pixels, 1 + amount).clamp_(0, 255).to(torch.uint8)


def _degenerate(name: str, pixels: Tensor) -> Tensor:
    if name == "Brightness":
        return torch.zeros_like(pixels)
    if name == "Sharpness":
        if min(pixels.shape[-2:]) < 3:
            return pixels
        blurred = pixels.clone()  # a kernel of 1s with a 5 in the middle; the edge is kept
        rows = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
        box = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
        blurred[..., 1:-1, 1:-1].mul_(4).add_(box).div_(13).round_()
        return blurred
    grey = pixels
    if pixels.shape[1] == 3:
        red, green, blue = pixels.unbind(1)
        grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)
    if name == "Contrast":
        grey = grey.mean((1, 2, 3), keepdim=True)
    return grey.expand_as(pixels)
