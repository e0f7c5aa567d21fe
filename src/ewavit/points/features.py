"""Features of points beside their coordinates: normals and colours, from the columns of a file to the model.

`point_features` names them: "normals", "colours" or "normals,colours". In a cloud they follow x, y, z in this
order, three columns each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ewavit.errors import EwavitError

Floats = npt.NDArray[np.float32]
COLUMNS = {"normals": ("nx", "ny", "nz"), "colours": ("r", "g", "b")}
_ALIASES = {"normal_x": "nx", "normal_y": "ny", "normal_z": "nz", "red": "r", "green": "g", "blue": "b"}


def columns(features: str | None) -> tuple[str, ...]:
    """The names of the columns that follow x, y, z."""
    return tuple(name for each in features.split(",") for name in COLUMNS[each]) if features else ()


def named_columns(names: Sequence[str], features: str | None) -> list[int]:
    """Where x, y, z and the features are in a table whose columns have names.

    Raises:
        ValueError: a column is missing.
    """
    known = [_ALIASES.get(name, name) for name in names]
    if missing := [name for name in ("x", "y", "z", *columns(features)) if name not in known]:
        raise ValueError(f"its columns {' '.join(names)} have no {missing[0]}")
    return [known.index(name) for name in ("x", "y", "z", *columns(features))]


def checked_features(points: npt.NDArray[Any], where: str, features: str | None) -> Floats:
    """Check the features of a cloud and normalise them.

    Args:
        points: (points, columns), the features after x, y, z.
        where: name of the cloud in messages.
        features: which they are; None for none.

    Returns:
        Features (points, 3 for each feature), float32: normals of length 1, colours from -1 to 1.

    Raises:
        EwavitError: the cloud has no such features.
    """
    kinds = features.split(",") if features else []
    if points.shape[1] < 3 + 3 * len(kinds):
        raise EwavitError(
            f"{where} has {points.shape[1]} columns, too few for --point-features {features}: leave it out, "
            "or give clouds that have them"
        )
    found = []
    for number, kind in enumerate(kinds, 1):
        values = points[:, 3 * number : 3 * number + 3].astype(np.float64)
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        if kind == "normals" and ((lengths > 0.5) & (lengths < 2)).all():
            found.append(values / lengths)
        elif kind == "colours" and ((values >= 0) & (values <= 255)).all():
            found.append(2 * values / (255 if values.max() > 1 else 1) - 1)
        else:
            what = "of length 1" if kind == "normals" else "from 0 to 255, or from 0 to 1"
            raise EwavitError(
                f"{where} has no {kind} {what} in columns {3 * number + 1} to {3 * number + 3}: leave out "
                f"--point-features {features}, or give clouds that have them"
            )
    return np.asarray(np.concatenate([points[:, :0], *found], 1), np.float32)
