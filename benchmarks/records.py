"""Records: the figures of every benchmark with command, date, versions, device and threads.

As a command it keeps what a comparison or a run found, as records/compare-NAME.json or records/run-NAME.json:

    ewavit compare --config recipes/search/screening.yaml --output runs
    python benchmarks/records.py runs/screening

Of a comparison: the command, the device, the versions, the results of every run and all statistics, without
the curves. Of a run: its command, its settings and the last row of its summary.csv. Device and threads are
those of this process.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from ewavit.compare.record import RECORD, comparison_record
from ewavit.training.recipe import settings
from ewavit.training.setting import flag

FOLDER = Path(__file__).parent.parent / "records"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of benchmarks that build one model; ViT-Tiny at 64x64/8, batch 64, N = 4 by default."""
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def write_record(name: str, settings: dict[str, Any], result: Any, command: str = "") -> Path:
    """Write records/NAME.json and say so; the command is this process's unless another made the figures."""
    on_gpu = torch.cuda.is_available()
    record = {
        "command": command or " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "settings": settings,
        "result": result,
    }
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}.json"
    file.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(f"wrote {file.relative_to(FOLDER.parent)}")
    return file


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def keep_comparison(folder: Path) -> None:
    kept = folder / RECORD  # of ewavit reproduce, which says more
    results = json.loads(kept.read_text()) if kept.exists() else comparison_record(folder)
    file = FOLDER / f"compare-{folder.name}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {file.relative_to(FOLDER.parent)}: {results['statistics']['claim']}")


def keep_run(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    last = {key: float(value) for key, value in rows[-1].items()}
    recipe = yaml.safe_load((folder / "args.yaml").read_text())
    recipe.pop("output")
    kind, colon, _ = recipe["data"].partition(":")  # where the clouds lay says nothing
    recipe["data"] = f"{kind}:PATH" if colon else kind
    write_record(f"run-{folder.name}", recipe, {"epochs": len(rows), "last_row": last}, train_command(recipe))


def train_command(recipe: dict[str, Any]) -> str:
    """The shortest `ewavit train` with these settings."""
    words = ["ewavit train"]
    for setting in settings():
        value = recipe.get(setting.name, setting.default)
        if value == setting.default:
            continue
        name = flag(setting.name)
        words.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {value}")
    return " ".join(words)


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        keep_comparison(folder) if (folder / "results.json").exists() else keep_run(folder)


if __name__ == "__main__":
    main()
