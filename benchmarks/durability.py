"""What do the digests of a checkpoint cost, and waiting until it is on the disk?

    python benchmarks/durability.py

Writes checkpoints of a ViT-Tiny with 4 experts after an AdamW step. The time of the digests and of `os.fsync`
is taken within each save, and a load is timed with its digests. The seconds per GB are those of one file of
512 MB. Writes records/durability.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

import ewavit as ewa
from ewavit.files import sync
from ewavit.training import checkpoint
from ewavit.training.card import ModelCard
from ewavit.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from ewavit.training.recipe import Recipe
from ewavit.training.seal import digest
from records import add_model_arguments, write_record

LARGE = 2**29  # bytes


class Stopwatch:
    """Seconds spent in a function that it replaces."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        begun = time.perf_counter()
        result = self.function(*args)
        self.seconds += time.perf_counter() - begun
        return result


def timed(call: Callable[..., Any], *args: Any) -> float:
    """Seconds of one call."""
    watch = Stopwatch(call)
    watch(*args)
    return watch.seconds


def per_gb(folder: Path) -> dict[str, float]:
    """Seconds per GB of digests, of fsync, and of the write before it."""
    file = folder / "large"
    content = os.urandom(2**20) * (LARGE // 2**20)
    found = {"write": timed(file.write_bytes, content), "fsync": timed(sync, file)}
    found["digest"] = timed(digest, file)
    file.unlink()
    return {name: round(seconds * 1e9 / LARGE, 2) for name, seconds in found.items()}


def saved(options: argparse.Namespace) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """What a run saves after a step: the model's state, the optimizer's, and the facts."""
    kwargs = {"img_size": options.img_size, "patch_size": options.patch_size, "num_classes": 10}
    model = ewa.expand(timm.create_model(options.model, **kwargs), options.experts)
    optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr=1e-3)
    model(torch.randn(2, 3, options.img_size, options.img_size)).sum().backward()
    optimizer.step()
    size, norm = options.img_size, (0.5, 0.5, 0.5)
    recipe = Recipe()
    card = ModelCard(options.model, kwargs, tuple("0123456789"), 3, size, norm, norm, recipe.data)
    parts = {"recipe": recipe, "card": card, "progress": Progress()}
    facts = {name: asdict(part) for name, part in parts.items()} | {"layers": []}
    return model.state_dict(), {"optimizer": optimizer.state_dict()}, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--saves", type=int, default=9, help="the median of so many counts")
    parser.add_argument("--folder", help="where to write (default: the folder for temporary files)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        large = per_gb(folder)
        parts = saved(options)
        for _ in range(options.saves):
            checkpoint.digests = hashing = Stopwatch(checkpoint.digests)
            fsync, os.fsync = os.fsync, Stopwatch(os.fsync)
            save = timed(save_checkpoint, folder, *parts)
            syncing, os.fsync, checkpoint.digests = os.fsync.seconds, fsync, hashing.function
            load = timed(load_checkpoint, folder)
            rows.append({"save": save, "digests": hashing.seconds, "fsync": syncing, "load": load})
        size = sum(file.stat().st_size for file in (folder / "checkpoint").iterdir())
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    result = {
        "seconds_per_gb": large,
        "checkpoint_mb": round(size / 1e6, 1),
        "milliseconds": {name: round(1000 * seconds, 1) for name, seconds in middle.items()},
        "share_of_save": {name: round(middle[name] / middle["save"], 3) for name in ("digests", "fsync")},
        "share_of_load": round(middle["digests"] / middle["load"], 3),
    }
    print(result)
    write_record("durability", vars(options) | {"folder": None}, result)


if __name__ == "__main__":
    main()
