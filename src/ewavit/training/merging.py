"""Interpolation of trained weights towards the weights they started from, tensor by tensor.

A chosen share of the way is WiSE-FT (arXiv 2109.01903); Model Stock (arXiv 2403.19522) finds the share from
the angle between models that started from the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ewavit.core.devices import at_least_float32
from ewavit.errors import EwavitError


def stock_share(trained: Sequence[Tensor], start: Tensor) -> float:
    """The share of the way back to the start that Model Stock takes for one tensor: 1 - t, from 0 to 1.

    t = N cos / (1 + (N - 1) cos); cos is the mean cosine of the angles between the N moves from the start.

    Args:
        trained: the tensor in N >= 2 trained models.
        start: the same tensor in the weights that all of them started from.
    """
    moves = [(at_least_float32(each) - start).flatten() for each in trained]
    moves = [move / norm for move in moves if (norm := float(move.norm()))]
    n, still = len(trained), len(trained) - len(moves)
    if still:  # not trained
        return 0.0 if still == n else 1.0
    cosine = (float(torch.stack(moves).sum(0).square().sum()) - n) / (n * (n - 1))
    cosine = min(1.0, max(0.0, cosine))
    return 1 - n * cosine / (1 + (n - 1) * cosine)


@torch.no_grad()
def interpolated(
    trained: Sequence[Mapping[str, Tensor]], start: Mapping[str, Tensor], by: float | None
) -> tuple[dict[str, Tensor], int]:
    """The mean of trained state dicts, moved towards the start: `(1 - by) mean + by start`.

    Args:
        trained: state dicts with the same keys, of one model or of several.
        start: the first weights. Tensors that it lacks, or has in another shape, stay as trained.
        by: the share of the way back, 0 to 1; None takes Model Stock's, for each tensor its own.

    Returns:
        The merged state dict, and the number of tensors that the start has.

    Raises:
        EwavitError: `by` is out of range, Model Stock has one model only, or the start has no such tensor.
    """
    if by is not None and not 0 <= by <= 1:
        raise EwavitError(f"by={by} is out of range: choose 0 (as trained) to 1 (the start)")
    if by is None and len(trained) < 2:
        raise EwavitError("Model Stock needs the angle between two trained models, and here is one")
    merged, found = {}, 0
    for key, first in trained[0].items():
        values = [each[key] for each in trained]
        begin = start.get(key)
        if not first.is_floating_point():
            merged[key] = first.clone()
            continue
        mean = torch.stack([at_least_float32(value) for value in values]).mean(0)
        if begin is not None and begin.shape == first.shape:
            found += 1
            begin = begin.to(mean)
            mean = mean.lerp(begin, stock_share(values, begin) if by is None else by)
        merged[key] = mean.to(first.dtype)
    if not found:
        raise EwavitError(
            "the start has no tensor of the model's names and shapes: give weights of this model"
        )
    return merged, found
