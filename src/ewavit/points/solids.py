"""`solids`, ten classes of generated solids, and `solid-parts`, four kinds of solids with labelled parts.

Both are for training on point clouds without a download.
Every solid is the surface of revolution of a profile; solids with edges have few segments. Each cloud has its
own proportions, pose, cut and noise. All come from one seed and are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TRAIN, EVAL = 200, 50  # clouds per class
NOISE = 0.02  # largest standard deviation, of the radius
TILT = np.pi / 4  # largest angle between a solid's axis and the vertical
ROUND = 24  # segments of a round solid


def _arc(
    start: float, end: float, radius: float = 1.0, r: float = 0.0, z: float = 0.0
) -> list[tuple[float, float]]:
    angles = np.linspace(start, end, 9)
    return [(r + radius * float(np.cos(a)), z + radius * float(np.sin(a))) for a in angles]


_HALF = np.pi / 2
# name: segments around the axis, and the profile as (distance from the axis, height)
SOLIDS: dict[str, tuple[int, list[tuple[float, float]]]] = {
    "box": (4, [(0, -1), (1, -1), (1, 1), (0, 1)]),
    "capsule": (ROUND, [*_arc(-_HALF, 0, 0.6, z=-0.7), *_arc(0, _HALF, 0.6, z=0.7)]),
    "cone": (ROUND, [(0, -1), (1, -1), (0, 1)]),
    "cylinder": (ROUND, [(0, -1), (0.8, -1), (0.8, 1), (0, 1)]),
    "dome": (ROUND, [(0, 0), *_arc(0, _HALF)]),
    "octahedron": (4, [(0, -1), (1, 0), (0, 1)]),
    "prism": (3, [(0, -1), (1, -1), (1, 1), (0, 1)]),
    "pyramid": (4, [(0, -1), (1, -1), (0, 1)]),
    "sphere": (ROUND, _arc(-_HALF, _HALF)),
    "torus": (ROUND, _arc(0, 2 * np.pi, 0.35, r=0.8)),
}
# category: segments, the profile, and the part of each of its lines
ASSEMBLED: dict[str, tuple[int, list[tuple[float, float]], list[str]]] = {
    "bottle": (
        ROUND,
        [(0, -1), (0.6, -1), (0.6, 0.2), (0.2, 0.5), (0.2, 0.8), (0.28, 0.8), (0.28, 1), (0, 1)],
        ["body", "body", "body", "neck", "cap", "cap", "cap"],
    ),
    "lamp": (
        ROUND,
        [(0, -1), (0.6, -1), (0.6, -0.9), (0.08, -0.85), (0.08, 0.3), (0.7, 0.3), (0.35, 1)],
        ["foot", "foot", "foot", "pole", "shade", "shade"],
    ),
    "mushroom": (
        ROUND,
        [(0, -1), (0.3, -1), (0.25, 0.1), *_arc(0, _HALF, 0.9, z=0.1)],
        ["stem", "stem", *["cap"] * 9],
    ),
    "pencil": (6, [(0, -1), (0.25, -1), (0.25, 0.5), (0, 1)], ["shaft", "shaft", "tip"]),
}
PART_TRAIN, PART_EVAL = 50, 25  # clouds per category
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def make_solids(
    num_points: int, seed: int = 0, normals: bool = False
) -> tuple[tuple[str, ...], Floats, Ints, Floats, Ints]:
    """Generate the set.

    Args:
        num_points: points per cloud.
        seed: seed of all random draws.
        normals: let the outward normal of the surface follow each point, without noise.

    Returns:
        Class names; training points (clouds, num_points, 3 or 6), in the unit sphere except for noise, and
        labels (clouds,); evaluation points and labels. Classes alternate.
    """
    rng = np.random.default_rng(seed)
    surfaces = [_triangles(*solid) for solid in SOLIDS.values()]
    labels = np.tile(np.arange(len(surfaces)), TRAIN + EVAL)
    channels = 6 if normals else 3
    clouds = np.stack([_cloud(surfaces[label], num_points, rng)[0][:, :channels] for label in labels])
    first = TRAIN * len(surfaces)
    return tuple(SOLIDS), clouds[:first], labels[:first], clouds[first:], labels[first:]


@dataclass(frozen=True)
class Clouds:
    """Clouds with labelled parts.

    Attributes:
        points: (clouds, points, 3 or 6).
        parts: the part of each point, (clouds, points).
        category: (clouds,).
    """

    points: Floats
    parts: Ints
    category: Ints


def make_solid_parts(
    num_points: int, seed: int = 0, normals: bool = False
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...], Clouds, Clouds]:
    """Generate the set of solids with labelled parts.

    Args:
        num_points: points per cloud.
        seed: seed of all random draws.
        normals: let the outward normal of the surface follow each point, without noise.

    Returns:
        Names of the parts, "category part"; the parts of each category; training and evaluation clouds.
        Categories alternate.
    """
    rng = np.random.default_rng(seed)
    names = tuple(
        dict.fromkeys(f"{category} {part}" for category, solid in ASSEMBLED.items() for part in solid[2])
    )
    categories = tuple(
        tuple(number for number, name in enumerate(names) if name.split()[0] == category)
        for category in ASSEMBLED
    )
    surfaces = []
    for category, (segments, profile, parts) in ASSEMBLED.items():
        of_line = [names.index(f"{category} {part}") for part in parts]
        # `_triangles` has two triangles for each segment of each line: first all of one kind, then the others
        surfaces.append((_triangles(segments, profile), np.tile(np.repeat(of_line, segments), 2)))
    order = np.tile(np.arange(len(surfaces)), PART_TRAIN + PART_EVAL)
    points, labels = [], []
    for category in order:
        triangles, parts_of = surfaces[category]
        cloud, chosen = _cloud(triangles, num_points, rng)
        points.append(cloud[:, : 6 if normals else 3])
        labels.append(parts_of[chosen])
    clouds, parts_of_clouds = np.stack(points), np.stack(labels)
    first = PART_TRAIN * len(surfaces)
    train, held = (
        Clouds(clouds[part], parts_of_clouds[part], order[part])
        for part in (slice(first), slice(first, None))
    )
    return names, categories, train, held


def _triangles(segments: int, profile: list[tuple[float, float]]) -> npt.NDArray[np.float64]:
    """The surface of revolution of a profile, (triangles, 3 corners, 3)."""
    angles = 2 * np.pi * np.arange(segments + 1) / segments
    r, z = np.array(profile, float).T
    grid = np.stack(
        [np.outer(r, np.cos(angles)), np.outer(r, np.sin(angles)), np.tile(z[:, None], segments + 1)], -1
    )
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    return np.concatenate(
        [np.stack([a, b, c], 2).reshape(-1, 3, 3), np.stack([a, c, d], 2).reshape(-1, 3, 3)]
    )


def _cloud(triangles: npt.NDArray[np.float64], count: int, rng: np.random.Generator) -> tuple[Floats, Ints]:
    """Points and normals (count, 6) of one solid: random proportions, samples by area, cut, pose and noise.

    Also the triangle of each point, (count,).
    """
    triangles = triangles * rng.uniform(0.6, 1.4, 3)
    points, chosen = _sample(triangles, 2 * count, rng)
    direction = rng.normal(size=3)
    height = points @ (direction / np.linalg.norm(direction))
    lost = rng.uniform(0, 0.25)  # the share of the surface beyond a plane is cut off
    kept = height <= np.quantile(height, 1 - lost)
    points, chosen = points[kept][:count], chosen[kept][:count]
    pose = _pose(rng)
    corner, second, third = triangles[chosen].swapaxes(0, 1)
    normals = np.cross(third - corner, second - corner)  # profiles go up on the outside
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = points @ pose
    points -= points.mean(0)
    points /= np.linalg.norm(points, axis=1).max()
    points += rng.uniform(0, NOISE) * rng.normal(size=points.shape)
    return np.asarray(np.concatenate([points, normals @ pose], 1), np.float32), chosen


def _sample(
    triangles: npt.NDArray[np.float64], count: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], Ints]:
    edges = triangles[:, 1:] - triangles[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    shares = np.cumsum(areas) / areas.sum()
    chosen = np.minimum(np.searchsorted(shares, rng.random(count)), len(triangles) - 1)
    along = rng.random((count, 2, 1))
    along = np.where(
        along.sum(1, keepdims=True) > 1, 1 - along, along
    )  # fold the parallelogram into the triangle
    return np.asarray(triangles[chosen, 0] + (edges[chosen] * along).sum(1)), chosen


def _pose(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A rotation matrix (3, 3): any turn about the vertical axis, then a tilt in any direction."""
    turn, side, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(0, TILT)
    return _about_vertical(turn) @ _about_vertical(-side) @ _about_first(tilt) @ _about_vertical(side)


def _about_vertical(angle: float) -> npt.NDArray[np.float64]:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def _about_first(angle: float) -> npt.NDArray[np.float64]:
    return np.roll(_about_vertical(angle), 1, (0, 1))
