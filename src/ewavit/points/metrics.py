"""Intersection over union of part segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    own = torch.zeros(len(categories), logits.shape[1], dtype=torch.bool, device=logits.device)
    for number, members in enumerate(categories):
        own[number, list(members)] = True
    own = own[category]  # (B, parts)
    predicted = logits.masked_fill(~own.unsqueeze(-1), -torch.inf).argmax(1)
    parts = torch.arange(logits.shape[1], device=logits.device)
    here, there = (x.unsqueeze(-1) == parts for x in (predicted, labels))  # (B, N, parts)
    union = (here | there).sum(1)
    iou = torch.where(union > 0, (here & there).sum(1) / union.clamp(min=1), 1.0)
    return (iou * own).sum(1) / own.sum(1)
