"""Keep what a comparison or a run found, as records/compare-NAME.json or records/run-NAME.json.

    ewavit compare --config recipes/search/screening.yaml --output runs
    python benchmarks/keep.py runs/screening

Of a comparison: the command, the device, the versions, every run's accuracy and all statistics, without the
curves. Of a run: its command, its settings and the last row of its summary.csv; device and threads are
those of this process.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from ewavit.training.recipe import flag, settings
from records import FOLDER, write_record


def keep_comparison(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    for arm in results["arms"]:
        for run in arm["runs"]:
            run.pop("curve", None)
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
