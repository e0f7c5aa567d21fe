"""The record of a comparison: its results without the curves, which the records of this project keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ewavit.errors import EwavitError, first_line
from ewavit.files import regular
from ewavit.training.places import portable_spec

RECORD = "record.json"


def comparison_record(folder: Path) -> dict[str, Any]:
    """Command, device, versions, results and statistics; of an absolute path of the data its last name.

    Args:
        folder: of a comparison.

    Raises:
        EwavitError: it has no results, or they cannot be read.
    """
    file = folder / "results.json"
    try:
        text = regular(file).read_text()
        data = str(json.loads(text)["recipe"]["data"])
        found: dict[str, Any] = json.loads(text.replace(data, portable_spec(data)))
        for arm in found["arms"]:
            for run in arm["runs"]:
                run.pop("curve", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise EwavitError(f"{file} cannot be read ({first_line(problem)}): compare again") from None
    return found
