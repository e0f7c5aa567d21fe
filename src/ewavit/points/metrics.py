"""Parts of clouds: their categories, the predicted part of each point, intersection over union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ewavit.points.transformer import NUM_CATEGORIES

Categories = Sequence[Sequence[int]]  # the parts of each category


def part_ious(logits: Tensor, labels: Tensor, category: Tensor, categories: Categories) -> Tensor:
    """The IoU of each cloud, the mean over the parts of its category, as ShapeNetPart defines it.

    The prediction of a point is the best of the category's own parts. A part that is neither present nor
    predicted counts as 1. Instance mIoU is the mean over clouds, class mIoU the mean over the categories'
    means.

    Args:
        logits: (B, parts, N).
        labels: (B, N), the part of each point.
        category: (B,), the category of each cloud.
        categories: the parts of each category.

    Returns:
        (B,), 0 to 1.
    """
    own = _own_parts(logits, category, categories)
    predicted = predicted_parts(logits, category, categories)
    parts = torch.arange(logits.shape[1], device=logits.device)
    here, there = (x.unsqueeze(-1) == parts for x in (predicted, labels))  # (B, N, parts)
    union = (here | there).sum(1)
    iou = torch.where(union > 0, (here & there).sum(1) / union.clamp(min=1), 1.0)
    return (iou * own).sum(1) / own.sum(1)


def predicted_parts(logits: Tensor, category: Tensor, categories: Categories) -> Tensor:
    """The best of its category's own parts for each point, (B, N); arguments as in `part_ious`."""
    own = _own_parts(logits, category, categories)
    return logits.masked_fill(~own.unsqueeze(-1), -torch.inf).argmax(1)


def _own_parts(logits: Tensor, category: Tensor, categories: Categories) -> Tensor:
    """Whether a part belongs to the category of a cloud, (B, parts)."""
    own = torch.zeros(len(categories), logits.shape[1], dtype=torch.bool, device=logits.device)
    for number, members in enumerate(categories):
        own[number, list(members)] = True
    return own[category]


def category_of(inputs: Tensor) -> Tensor:
    """The category of each cloud (B,), from the inputs of a model of parts (B, N, channels)."""
    return inputs[:, 0, -NUM_CATEGORIES:].argmax(-1)


def categories_of(classes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The parts of each category by its name, in the order of the categories.

    Args:
        classes: names of the parts, "category part".
    """
    found: dict[str, tuple[int, ...]] = {}
    for number, name in enumerate(classes):
        category = name.rpartition(" ")[0]
        found[category] = (*found.get(category, ()), number)
    return found
