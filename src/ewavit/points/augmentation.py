"""Augmentation of training clouds, whole batches on their device, with torch's global generators."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ewavit.errors import EwavitError


@dataclass(frozen=True)
class PointAugmentation:
    """Random scale, shift, rotation, jitter and dropout of points, with draws for each cloud.

    Args:
        scale: largest factor on an axis; each axis has its own, from 1/scale to scale. 1 switches it off.
        shift: largest shift of an axis, either way; clouds have radius 1.
        rotx, roty, rotz: largest rotation about this axis in degrees, either way.
        jitter: standard deviation of the noise on each coordinate, clamped at five standard deviations.
        drop: largest share of a cloud's points to drop; a dropped point is moved onto the cloud's first.

    Raises:
        EwavitError: `scale` or `drop` is out of range.
    """

    scale: float = 1.5
    shift: float = 0.2
    rotx: float = 0.0
    roty: float = 0.0
    rotz: float = 0.0
    jitter: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise EwavitError(f"scale {self.scale} is less than 1: give the largest factor, 1 or more")
        if not 0 <= self.drop < 1:
            raise EwavitError(f"drop {self.drop} is not a share: give 0 or more and less than 1")

    @classmethod
    def parse(cls, policy: str | None) -> PointAugmentation:
        """Parse a policy such as "scale1.5-shift0.2-rotz180-jitter0.01-drop0.5".

        Args:
            policy: parts that it does not name are off; None gives the defaults, "none" nothing.

        Raises:
            EwavitError: a part is unknown or out of range.
        """
        if policy is None:
            return cls()
        known = [setting.name for setting in fields(cls)]
        values = dict.fromkeys(known, 0.0) | {"scale": 1.0}
        for part in policy.split("-"):
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
            if part != "none" and (match is None or match[1] not in known):
                raise EwavitError(
                    f"aa {policy!r}: {part!r} is unknown for point clouds: give "
                    "scale1.5-shift0.2-rotz180-jitter0.01-drop0.5 (any of these and rotx, roty), or none"
                )
            if match is not None:
                values[match[1]] = float(match[2])
        return cls(**values)

    def __call__(self, points: Tensor, normals: bool = False) -> Tensor:
        """Augment clouds (B, N, 3 or more); returns the same shape.

        Args:
            points: x, y, z, then features, which move with their point.
            normals: whether the first feature is the normal: it is rotated with the cloud, and kept
                perpendicular to the surface when the axes are scaled.
        """
        points, normal, rest = points.tensor_split([3, 3 + 3 * normals], -1)
        for axis, degrees in enumerate((self.rotx, self.roty, self.rotz)):
            if degrees:
                turn = _rotations(axis, math.radians(degrees) * _uniform(points, 1)[:, 0, 0])
                points = points @ turn
                normal = normal @ turn if normals else normal
        if self.scale > 1:
            low, high = 1 / self.scale, self.scale
            factors = (high - low) / 2 * _uniform(points, 3) + (high + low) / 2
            points = points * factors
            normal = F.normalize(normal / factors, dim=-1) if normals else normal
        if self.shift:
            points = points + self.shift * _uniform(points, 3)
        if self.jitter:
            points = points + self.jitter * torch.randn_like(points).clamp_(-5, 5)
        points = torch.cat([points, normal, rest], -1)
        if self.drop:
            share = self.drop * torch.rand(len(points), 1, 1, device=points.device)
            dropped = torch.rand(*points.shape[:2], 1, device=points.device) < share
            points = torch.where(dropped, points[:, :1], points)
        return points


def _uniform(points: Tensor, axes: int) -> Tensor:
    """Draws between -1 and 1 for every cloud, (B, 1, axes)."""
    return 2 * torch.rand(len(points), 1, axes, device=points.device) - 1


def _rotations(axis: int, angles: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that turn row vectors about an axis."""
    cos, sin = angles.cos(), angles.sin()
    result = torch.eye(3, device=angles.device).repeat(len(angles), 1, 1)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    result[:, a, a], result[:, a, b], result[:, b, a], result[:, b, b] = cos, sin, -sin, cos
    return result
