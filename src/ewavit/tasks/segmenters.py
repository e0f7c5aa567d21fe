"""`Segmenter`: a timm backbone with a small head that classifies pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ewavit.errors import EwavitError, first_line
from ewavit.tasks.timm_models import check_timm_model, create

HEADS = ("linear", "pyramid")
WIDTH = 64  # channels of the pyramid
LEVELS = 4  # feature maps of the pyramid


class Segmenter(nn.Module):
    """A timm model whose feature maps become the logits of pixels.

    `linear`: a linear layer on the last feature map. `pyramid`: linear layers bring up to four feature maps
    to equal widths; their sum, at the size of the largest, is normalised and classified. Logits are resized
    to the image.

    Args:
        backbone: a timm model without classes that has `forward_intermediates`.
        num_classes: number of classes.
        head: "linear" or "pyramid"; None is "pyramid" for a model with feature maps of several sizes.
        sample: a batch of images, to find the shapes of the feature maps.

    Raises:
        EwavitError: the model gives no feature maps.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, head: str | None, sample: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.pretrained_cfg = dict(getattr(backbone, "pretrained_cfg", None) or {})
        maps = _feature_maps(backbone, sample)
        several = len({each[2:] for each in maps}) > 1
        head = head or ("pyramid" if several else "linear")
        last = len(maps) - 1
        self.indices, self.levels, width = [last], nn.ModuleList(), maps[last][1]
        if head == "pyramid":
            count, width = min(LEVELS, len(maps)), WIDTH
            self.indices = [round((number + 1) * len(maps) / count) - 1 for number in range(count)]
            self.levels.extend(nn.Conv2d(maps[index][1], WIDTH, 1) for index in self.indices)
        self.norm = LayerNorm2d(WIDTH) if len(self.levels) else nn.Identity()
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes, height, width) of images (batch, channels, height, width)."""
        maps = self.backbone.forward_intermediates(  # type: ignore[operator]
            images, indices=self.indices, norm=True, intermediates_only=True
        )
        x = maps[-1]
        if len(self.levels):
            size = maps[0].shape[2:]
            leveled = [_resized(level(each), size) for level, each in zip(self.levels, maps, strict=True)]
            x = F.gelu(self.norm(torch.stack(leveled).sum(0)))
        return _resized(self.head(x), images.shape[2:])

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay, by timm's convention."""
        of_backbone: Any = getattr(self.backbone, "no_weight_decay", tuple)
        names: Iterable[str] = of_backbone()
        return {f"backbone.{name}" for name in names}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def _feature_maps(backbone: nn.Module, sample: Tensor) -> list[tuple[int, ...]]:
    was_training = backbone.training
    try:
        found = backbone.eval().forward_intermediates(sample, intermediates_only=True)  # type: ignore[operator]
    except Exception as problem:  # models raise what they like
        raise EwavitError(
            f"{type(backbone).__name__} gives no feature maps of {tuple(sample.shape[2:])} images "
            f"({first_line(problem)}): choose another --model, --img-size or --model-kwargs"
        ) from None
    finally:
        backbone.train(was_training)
    return [tuple(each.shape) for each in found]


def create_segmenter(
    name: str, num_classes: int, in_chans: int, img_size: int, head: str | None = None, **settings: Any
) -> Segmenter:
    """Create a segmenter with fresh weights.

    Args:
        name: timm's name of the backbone.
        num_classes: number of classes.
        in_chans: channels of the images.
        img_size: side of the images, in pixels.
        head: see `Segmenter`.
        settings: further arguments of the backbone.

    Raises:
        EwavitError: timm has no such model, or it does not work with these settings.
    """
    backbone = create(name, backbone_settings(in_chans, img_size, settings))
    return with_head(backbone, num_classes, head, in_chans, img_size)


def backbone_settings(in_chans: int, img_size: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `timm.create_model` for a backbone."""
    return {"num_classes": 0, "in_chans": in_chans, "img_size": img_size, **settings}


def with_head(
    backbone: nn.Module, num_classes: int, head: str | None, in_chans: int, img_size: int
) -> Segmenter:
    """A backbone with a fresh head; arguments as in `create_segmenter`.

    Raises:
        EwavitError: there is no such head, or the backbone gives no feature maps.
    """
    if head not in (None, *HEADS):
        raise EwavitError(f"--model-kwargs head={head} is unknown: choose {' or '.join(HEADS)}")
    device = next(backbone.parameters()).device
    return Segmenter(backbone, num_classes, head, torch.zeros(1, in_chans, img_size, img_size, device=device))


def check_segmenter(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse a name or settings that are more than an architecture's.

    Raises:
        EwavitError: it names the wrong one.
    """
    check_timm_model(name, settings)
    if missing := [key for key in ("num_classes", "in_chans", "img_size") if key not in settings]:
        raise EwavitError(f"{name} has no {missing[0]} among its settings: give a card with all of them")
