"""Short runs of the fault tools; `make faults` runs them at length (docs/reliability.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults"
SHORT = {
    "kill": ["--rounds", "1", "--settings", "2", "--comparisons", "0"],
    "damage": ["--cases", "100", "--cuts", "400"],
    "groups": ["--rounds", "1", "--groups", "1"],
    "disk": ["--sizes", "3"],
    "signals": ["--cases", "3"],
    "not_finite": ["--rounds", "0", "--steps", "200"],
    "load": ["--steps", "2000", "--files", "10000"],
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", SHORT)
def test_a_short_run_finds_no_fault(tool):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FAULTS / f"{tool}.py"), *SHORT[tool]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
