"""The recipes of the paper's breadth, one cell each, and how a cell is shrunk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ewavit.errors import EwavitError

FOLDER = Path(__file__).parent / "paper"
FEWEST_SEEDS = 2  # of a comparison


def cells() -> dict[str, Path]:
    """The files of all cells, by name; a file that begins with _ is shared by several."""
    return {file.stem: file for file in sorted(FOLDER.glob("[!_]*.yaml"))}


def title(cell: Path) -> str:
    """The first line of a cell's header."""
    return cell.read_text().partition("\n")[0].removeprefix("# ")


def shrunk(settings: Mapping[str, Any], scale: float, samples: int) -> dict[str, int]:
    """What a smaller cell changes: epochs, warm-up, training samples and seeds, each by the same factor.

    Args:
        settings: `epochs`, `warmup_epochs`, `val_interval` and `seeds` of the cell.
        scale: the factor, above 0 and up to 1.
        samples: training samples of the data.

    Returns:
        The changed settings; empty at scale 1. No count falls below 1, and there are at least two seeds.

    Raises:
        EwavitError: the factor is out of range.
    """
    if not 0 < scale <= 1:
        raise EwavitError(f"--scale {scale:g} is out of range: choose more than 0 and at most 1")
    if scale == 1:
        return {}
    epochs = max(1, round(scale * settings["epochs"]))
    return {
        "epochs": epochs,
        "warmup_epochs": round(scale * settings["warmup_epochs"]),
        "val_interval": min(settings["val_interval"], epochs),
        "limit": max(1, round(scale * samples)),
        "seeds": max(FEWEST_SEEDS, round(scale * settings["seeds"])),
    }
