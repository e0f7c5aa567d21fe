"""Keep what a comparison found: DIR/NAME/results.json without its curves becomes records/compare-NAME.json.

    ewavit compare --config recipes/search/fashion-2k.yaml --output runs
    python benchmarks/keep.py runs/fashion-2k

The record has the command, the device, the versions, every run's accuracy and all statistics.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from records import FOLDER


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        results = json.loads((folder / "results.json").read_text())
        for arm in results["arms"]:
            for run in arm["runs"]:
                run.pop("curve", None)
        file = FOLDER / f"compare-{folder.name}.json"
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {file.relative_to(FOLDER.parent)}: {results['statistics']['claim']}")


if __name__ == "__main__":
    main()
