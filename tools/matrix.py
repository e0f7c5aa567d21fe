"""Run the suite with the oldest and the newest Python and packages that ewavit supports, and record what ran.

    python tools/matrix.py                  say what would run
    python tools/matrix.py --run            make the environments in .venv-matrix/ (5 GB each), run, record
    python tools/matrix.py --run --row oldest --python /path/to/python --tests tests/test_partition.py

A row of records/matrix.json says which versions met, which tests ran and how they ended. `--python` takes an
environment that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "records/matrix.json"
# Python, and how uv chooses the versions. The lower bounds have wheels for the oldest Python alone.
ROWS = {
    "oldest": ("3.10", ["--resolution", "lowest-direct"]),
    "oldest Python, newest packages": ("3.10", []),
    "newest": ("3.13", []),
}
DAY = "2026-11-24"  # no newer package is taken, so that a row can be repeated
PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "safetensors", "accelerate", "pytest")
_VERSIONS = """import json, platform
from importlib.metadata import version
print(json.dumps({"python": platform.python_version()} | {name: version(name) for name in %r}))
"""


def environment(row: str) -> Path:
    """Make the virtual environment of a row; its Python."""
    number, options = ROWS[row]
    place = ROOT / ".venv-matrix" / row.replace(" ", "-").replace(",", "")
    python = place / "bin/python"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "-q", "--allow-existing", "--python", number, place], check=True)
    install = [*uv, "pip", "install", "-q", "--python", python, *options, "--exclude-newer", DAY]
    subprocess.run([*install, "-e", f"{ROOT}[all,dev]"], check=True)
    return python


def ran(row: str, python: Path, tests: list[str]) -> dict[str, Any]:
    """Run tests in an environment: its versions, and how they ended."""
    ask = [python, "-c", _VERSIONS % (PACKAGES,)]
    versions = subprocess.run(ask, check=True, capture_output=True, text=True)
    command = ["python", "-m", "pytest", "-q", *(tests or ["-n", "auto"])]
    paths = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([python, *command[1:]], cwd=ROOT, env=paths, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:]
    return {
        "versions": json.loads(versions.stdout),
        "command": " ".join(command),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "status": done.returncode,
        "result": re.sub(r" in [\d.]+s.*|=", "", last[0]).strip() if last else "",
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="run, instead of saying what would run")
    parser.add_argument("--row", action="append", choices=ROWS, help="this row alone; may be repeated")
    parser.add_argument("--python", type=Path, help="of an environment that is there, for one --row")
    parser.add_argument("--tests", nargs="+", default=[], help="these tests alone (default: the whole suite)")
    options = parser.parse_args()
    rows = options.row or list(ROWS)
    if options.python and len(rows) != 1:
        parser.error("--python goes with one --row")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for row in rows:
        number, resolution = ROWS[row]
        what = "the lower bounds of pyproject.toml" if resolution else f"the newest packages of {DAY}"
        last = record.get(row)
        known = f"last: {last['date']}, {last['command']}: {last['result']}" if last else "never ran"
        print(f"{row}: Python {number}, {what}; {known}", flush=True)
        if options.run:
            record[row] = ran(row, options.python or environment(row), options.tests)
            print(f"  {record[row]['result']}", flush=True)
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return int(options.run and any(record[row]["status"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
