"""Sampling and grouping of point clouds in batched torch, on any device and without compiled extensions.

Shapes: B clouds of N points, M queries, k neighbours, C channels. Indices are int64, within a cloud.
Every function equals its slow twin in tests/test_points_ops.py exactly. Points per second:
benchmarks/point_ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ewavit.errors import EwavitError

CHUNK = 2**24  # distances in memory at a time; for larger clouds the queries are sliced


def gather_points(points: Tensor, index: Tensor) -> Tensor:
    """Take points by index.

    Args:
        points: (B, N, C).
        index: (B, ...), int64.

    Returns:
        The points, (B, ..., C).
    """
    rows = index.flatten(1).unsqueeze(-1).expand(-1, -1, points.shape[-1])
    return points.gather(1, rows).view(*index.shape, points.shape[-1])


@torch.no_grad()
def farthest_point_sample(points: Tensor, count: int) -> Tensor:
    """Choose points one by one, each the farthest from those chosen before; the first is point 0.

    The public models were trained with an extension that skips points within 0.03 of the origin; here every
    point counts.

    Args:
        points: (B, N, 3).
        count: number of points to choose, at most N.

    Returns:
        Indices (B, count), in the order of choice. They repeat once all distinct points are chosen.

    Raises:
        EwavitError: a cloud has fewer than `count` points.
    """
    _check_count(points, count)
    planes = points.movedim(-1, 0).contiguous()  # (3, B, N): each pass runs over contiguous memory
    nearest = points.new_full(points.shape[:2], torch.inf)
    chosen = torch.zeros(points.shape[0], 1, dtype=torch.int64, device=points.device)
    result = [chosen]
    for _ in range(count - 1):
        centre = planes.gather(2, chosen.expand(3, -1, -1))
        x, y, z = (planes - centre).square().unbind()
        nearest = torch.minimum(nearest, x + y + z)
        chosen = nearest.argmax(1, keepdim=True)
        result.append(chosen)
    return torch.cat(result, 1)


@torch.no_grad()
def knn(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest points of each query.

    Args:
        queries: (B, M, 3).
        points: (B, N, 3).
        k: number of neighbours, at most N.

    Returns:
        Squared distances (B, M, k), ascending, and indices (B, M, k).

    Raises:
        EwavitError: a cloud has fewer than k points.
    """
    _check_count(points, k)
    parts = [_squared_distances(part, points).topk(k, largest=False) for part in _slices(queries, points)]
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


@torch.no_grad()
def ball_query(queries: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    """Find the first k points, in the cloud's order, within a radius of each query, as PointNet++ does.

    Args:
        queries: (B, M, 3).
        points: (B, N, 3).
        radius: of the ball; a point at exactly this distance is inside.
        k: points per ball, at most N.

    Returns:
        Indices (B, M, k). A ball with fewer points repeats its first; an empty ball repeats the point nearest
        to the query.

    Raises:
        EwavitError: a cloud has fewer than k points.
    """
    _check_count(points, k)
    size = points.shape[1]
    order = torch.arange(size, device=points.device)
    parts = []
    for part in _slices(queries, points):
        distances = _squared_distances(part, points)
        found = torch.where(distances <= radius**2, order, size).topk(k, largest=False)[0]
        first = torch.where(found[..., :1] < size, found[..., :1], distances.argmin(-1, keepdim=True))
        parts.append(torch.where(found < size, found, first))
    return torch.cat(parts, 1)


def interpolate(queries: Tensor, points: Tensor, features: Tensor, k: int = 3) -> Tensor:
    """Interpolate features: the mean over the k nearest points, weighted by 1 / (squared distance + 1e-8).

    Args:
        queries: (B, M, 3).
        points: (B, N, 3).
        features: (B, N, C), of the points; gradients flow to them.
        k: number of neighbours; N if a cloud has fewer.

    Returns:
        Features at the queries, (B, M, C).
    """
    distances, index = knn(queries, points, min(k, points.shape[1]))
    # Not one number: the ONNX exporter takes a sum with 1e-8 for one with 0, and leaves it out.
    weights = 1 / (distances + distances.new_full(distances.shape[-1:], 1e-8))
    weights = weights / weights.sum(-1, keepdim=True)
    return (gather_points(features, index) * weights.unsqueeze(-1)).sum(2)


def _squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """(B, M, N), from differences: expanding the square into a matrix product would lose small distances."""
    total: Tensor | None = None
    for axis in range(queries.shape[-1]):
        difference = queries[:, :, None, axis] - points[:, None, :, axis]
        total = difference.square_() if total is None else total.add_(difference.square_())
    assert total is not None
    return total


def _slices(queries: Tensor, points: Tensor) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():  # or exporting: the number of clouds may be unknown
        return (queries,)
    size = max(1, CHUNK // (points.shape[0] * points.shape[1]))
    return tuple(queries[:, first : first + size] for first in range(0, queries.shape[1], size))


def _check_count(points: Tensor, count: int) -> None:
    if not 1 <= count <= points.shape[1]:
        raise EwavitError(
            f"cannot choose {count} of {points.shape[1]} points: choose fewer, or give more points"
        )
