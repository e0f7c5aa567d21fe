"""What happens to training clouds, to whole batches on their device, from torch's global generators."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ewavit.errors import EwavitError


@dataclass(frozen=True)
class PointAugmentation:
    """Random scale, shift, rotation, jitter and dropout of points, its own draw for every cloud.

    Args:
        scale: each axis is multiplied by a factor between 1/scale and scale; 1 is off.
        shift: each axis is moved by up to so much; clouds have radius 1.
        rotx, roty, rotz: rotation about this axis by up to so many degrees, either way.
        jitter: standard deviation of the noise of each coordinate, cut off at five of them.
        drop: up to this share of a cloud's points are dropped, that is put where another point is.
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
            raise EwavitError(f"scale {self.scale} is less than 1: give the largest factor")
        if not 0 <= self.drop < 1:
            raise EwavitError(f"drop {self.drop} is not a share: give 0 or more and less than 1")

    @classmethod
    def parse(cls, policy: str | None) -> PointAugmentation:
        """Read "scale1.5-shift0.2-rotz180-jitter0.01-drop0.5"; what is not named is off, None is the default.

        Raises:
            EwavitError: an unknown part, or a value out of range.
        """
        if policy is None:
            return cls()
        known = [setting.name for setting in fields(cls)]
        values = dict.fromkeys(known, 0.0) | {"scale": 1.0}
        for part in policy.split("-"):
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
            if part != "none" and (match is None or match[1] not in known):
                raise EwavitError(
                    f"aa {policy!r}: {part!r} is unknown for point clouds; what works: "
                    "scale1.5-shift0.2-rotz180-jitter0.01-drop0.5 (any of these and rotx, roty), or none"
                )
            if match is not None:
                values[match[1]] = float(match[2])
        return cls(**values)

    def __call__(self, points: Tensor) -> Tensor:
        """Augment clouds (B, N, 3); returns the same shape."""
        for axis, degrees in enumerate((self.rotx, self.roty, self.rotz)):
            if degrees:
                points = points @ _rotations(axis, math.radians(degrees) * _uniform(points, 1)[:, 0, 0])
        if self.scale > 1:
            low, high = 1 / self.scale, self.scale
            points = points * ((high - low) / 2 * _uniform(points, 3) + (high + low) / 2)
        if self.shift:
            points = points + self.shift * _uniform(points, 3)
        if self.jitter:
            points = points + self.jitter * torch.randn_like(points).clamp_(-5, 5)
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
