"""Run what `make demo` runs, after installation, and keep its time and accuracy.

    python benchmarks/demo.py

Writes records/demo.json.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from records import write_record

COMMAND = ["-m", "ewavit.cli", "train", "--config", "recipes/demo.yaml"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        subprocess.run([sys.executable, *COMMAND, "--output", folder, "--name", "demo"], check=True)
        seconds = time.perf_counter() - begun
        rows = list(csv.DictReader((Path(folder) / "demo" / "summary.csv").open()))
    row = {key: float(value) for key, value in rows[-1].items()}
    print(f"{seconds:.0f} s, top-1 {row['eval_top1']:.2f} %")
    write_record("demo", {"arguments": COMMAND}, {"seconds": seconds, "epochs": len(rows), "last_row": row})


if __name__ == "__main__":
    main()
