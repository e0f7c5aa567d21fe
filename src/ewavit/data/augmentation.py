"""Augmentation of training images: the options, and their application to whole batches of uint8 tensors.

timm's own transforms augment images read from files, one by one (see `loading.py`). This file does the same
for a set in memory as one tensor, on the tensor's device.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from ewavit.data.rand_augment import RandAugment
from ewavit.errors import EwavitError

# Images that share the drawn operations of AutoAugment and AugMix; smaller groups vary more and are slower.
GROUP = 8

AA_HELP = (
    "rand-m9-n2-p0.5-mstd0.5-inc1 (any of m, n, p, mstd, inc), original (AutoAugment), "
    "augmix-m3-w3-d2-a1 (any of m, w, d, a)"
)


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images; names and meanings follow timm's train.py.

    Args:
        aa: RandAugment, AutoAugment or AugMix as a timm string, e.g. "rand-m9-mstd0.5-inc1".
        hflip: probability of a horizontal flip.
        reprob: probability of random erasing.
        remode: filling of an erased rectangle: "const" (zero), "rand" (one colour) or "pixel" (noise).
        crop_padding: for sets in memory, random crop after zero padding by so many pixels on each side; -1
            pads by img_size // 8.
        scale: for sets read from files, range of the random resized crop's share of the area.
        ratio: for sets read from files, range of the random resized crop's width over height.
        color_jitter: for sets read from files, strength of colour jitter; ignored if `aa` is given, as in
            timm.

    Raises:
        EwavitError: an option is out of range.
    """

    aa: str | None = None
    hflip: float = 0.5
    reprob: float = 0.0
    remode: str = "pixel"
    crop_padding: int = -1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    color_jitter: float = 0.4

    def __post_init__(self) -> None:
        for name in ("hflip", "reprob"):
            if not 0 <= getattr(self, name) <= 1:
                raise EwavitError(f"{name} {getattr(self, name)} is not a probability: give 0 to 1")
        if self.remode not in ("const", "rand", "pixel"):
            raise EwavitError(f"unknown remode {self.remode!r}: give const, rand or pixel")
        if self.crop_padding < -1:
            raise EwavitError(
                f"crop_padding {self.crop_padding} is too small: give pixels, or -1 for img_size // 8"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise EwavitError(
                f"scale {self.scale} is not a range of areas: give 0 < smallest <= largest <= 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise EwavitError(f"ratio {self.ratio} is not a range: give 0 < smallest <= largest")
        if self.color_jitter < 0:
            raise EwavitError(f"color_jitter {self.color_jitter} is negative: give 0 or more")


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image by a random number of pixels, at most `padding` each way, and fill with zeros.

    Args:
        images: (batch, channels, height, width), any dtype.
        padding: pixels of zero padding on each side.

    Returns:
        A tensor of the same shape and dtype.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(
        3, width, 1
    )  # (batch, channels, dy, dx, height, width), a view
    top, left = torch.randint(2 * padding + 1, (2, batch), device=images.device)
    return windows[torch.arange(batch, device=images.device), :, top, left]


def random_flip(images: Tensor, probability: float) -> Tensor:
    """Mirror each image (batch, channels, height, width) left to right with `probability`."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, images.flip(-1), images)


def _numbers(config: str, keys: tuple[str, ...]) -> dict[str, float]:
    """Parse "name-m9-mstd0.5" into {"m": 9.0, "mstd": 0.5}; only `keys` may occur."""
    values = {}
    for part in config.split("-")[1:]:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in keys:
            raise EwavitError(f"aa {config!r}: {part!r} is unknown for a set in memory: give {AA_HELP}")
        values[match[1]] = float(match[2])
    return values


def tensor_auto_augment(config: str) -> Callable[[Tensor], Tensor]:
    """Make the batch version of a timm augmentation string.

    RandAugment draws for each image, AutoAugment and AugMix once for every `GROUP` consecutive images of the
    batch; these are a random group because the batch is random. Draws come from torch's global CPU generator.

    Args:
        config: "rand-...", "original" or "augmix-...", see `AA_HELP`.

    Returns:
        A function on uint8 images (batch, 1 or 3, height, width).

    Raises:
        EwavitError: the string is none of these.
    """
    name = config.split("-")[0]
    if name == "rand":
        # On timm's scale 10 is the strongest. torchvision's operations all grow with it, as with timm's inc1.
        values = {"n": 2.0, **_numbers(config, ("m", "n", "p", "mstd", "inc"))}
        num_ops = int(values.pop("n"))
        values.pop("inc", None)
        return RandAugment(n=num_ops, **values)
    if config == "original":
        transform = v2.AutoAugment(interpolation=v2.InterpolationMode.BILINEAR)
    elif name == "augmix":
        values = {"m": 3.0, "w": 3.0, "d": -1.0, "a": 1.0, **_numbers(config, ("m", "w", "d", "a"))}
        severity = min(max(int(values["m"]), 1), 10)
        transform = v2.AugMix(severity, int(values["w"]), int(values["d"]), values["a"])
    else:
        raise EwavitError(f"aa {config!r} is unknown for a set in memory: give {AA_HELP}")
    return lambda images: torch.cat([transform(group) for group in torch.split(images, GROUP)])


class TensorAugmentation:
    """Augment and normalise a batch of uint8 images on its device: crop, flip, `aa`, normalise, erase.

    All draws come from the global generators of torch (CPU and the device) and, for erasing, of `random`.

    Args:
        options: the augmentation.
        img_size: height and width of the images, in pixels.
        mean: mean of each channel, values in 0..1.
        std: standard deviation of each channel.
        device: device of the images.

    Raises:
        EwavitError: the padding exceeds the images, or `options.aa` is unknown.
    """

    def __init__(
        self,
        options: Augmentation,
        img_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
    ) -> None:
        self.hflip = options.hflip
        self.padding = options.crop_padding if options.crop_padding >= 0 else img_size // 8
        if self.padding > img_size:
            raise EwavitError(
                f"crop_padding {self.padding} exceeds the image side of {img_size} pixels: choose less"
            )
        self.auto_augment = tensor_auto_augment(options.aa) if options.aa else None
        self.erase = (
            RandomErasing(options.reprob, mode=options.remode, device=device) if options.reprob else None
        )
        self.shift = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
        self.factor = 1 / (torch.tensor(std, device=device).view(-1, 1, 1) * 255)

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 (batch, channels, h, w) into float32 of mean 0 and standard deviation 1."""
        return images.to(torch.float32).sub_(self.shift).mul_(self.factor)

    def __call__(self, images: Tensor) -> Tensor:
        """Augment and normalise uint8 (batch, channels, h, w); returns float32 of the same shape."""
        if self.padding:
            images = random_crop(images, self.padding)
        if self.hflip:
            images = random_flip(images, self.hflip)
        if self.auto_augment is not None:
            images = self.auto_augment(images)
        images = self.normalize(images)
        if self.erase is not None:
            images = self.erase(images)
        return images


@dataclass(frozen=True)
class Mix:
    """Mixup (arXiv 1710.09412) and CutMix (1905.04899) of a batch on its device, with a draw for each image.

    Image i of a batch is mixed with image i from the end, as in the mode "elem" of timm's `Mixup`.

    Args:
        mixup: alpha; the image's share is drawn from Beta(alpha, alpha). 0 switches mixup off.
        cutmix: alpha; the share of the area that the image keeps is drawn from Beta(alpha, alpha). 0 switches
            CutMix off. If both are on, each image gets one of the two with probability 0.5.
        num_classes: number of classes of the targets.
    """

    mixup: float
    cutmix: float
    num_classes: int

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch; draws come from torch's CPU generator.

        Args:
            images: float (batch, channels, height, width).
            labels: int64 (batch,).

        Returns:
            The mixed images, and targets (batch, classes) with the shares of both classes.
        """
        batch, _, height, width = images.shape
        cut = torch.rand(batch) < (0.5 if self.mixup and self.cutmix else float(self.cutmix > 0))
        alpha = torch.where(cut, self.cutmix, self.mixup)
        share = torch.distributions.Beta(alpha, alpha).sample()
        sides = torch.tensor([[height], [width]])
        half = ((1 - share).sqrt() * sides).long() // 2
        centre = (torch.rand(2, batch) * sides).long()
        bounds = torch.stack([centre - half, centre + half])  # (first and last, axis, batch)
        share, cut, bounds = (t.to(images.device, non_blocking=True) for t in (share, cut, bounds))

        def within(axis: int, length: int) -> Tensor:
            place = torch.arange(length, device=images.device)
            return (place >= bounds[0, axis, :, None]) & (place < bounds[1, axis, :, None])

        inside = within(0, height)[:, None, :, None] & within(1, width)[:, None, None, :]
        kept = torch.where(cut.view(-1, 1, 1, 1), (~inside).to(images.dtype), share.view(-1, 1, 1, 1))
        targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        return (
            images.flip(0).lerp(images, kept),
            targets.flip(0).lerp(targets, kept.mean((1, 2, 3)).view(-1, 1)),
        )
