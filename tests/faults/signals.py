"""Stop `ewavit train` by SIGTERM and SIGINT at any moment, start-up included.

    python tests/faults/signals.py --cases 30 --record

The command must end within 10 seconds. Once training has begun its exit status is 143 or 130, and the run
ends later with the bits of a run that was not stopped. Before that the status is the same, or that of a
process which the signal ended.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import TINY, arguments, ended, forked, go_on, report

from ewavit.training.run_folder import RunFolder
from runs import assert_same_end

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
SETTINGS = {**TINY, "limit": 2048, "recovery_interval": 2}


def stopped(tmp: Path, name: str, number: signal.Signals, delay: float) -> tuple[str, float]:
    """Send a signal after a delay; what was right or wrong with the end, and the seconds that it took."""
    words = [sys.executable, "-m", "ewavit.cli", "train", "--output", str(tmp), "--name", name]
    for key, value in SETTINGS.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(number)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    seconds, status = time.monotonic() - begun, process.returncode
    run = RunFolder(tmp / name)
    if status == 0 and run.is_finished:
        return "finished before", seconds
    if status not in (SIGNALS[number], -number):
        return f"wrong: exit status {status} after {delay:.2f} s: {said[-300:]}", seconds
    if "Traceback" in said and run.has_checkpoint:
        return f"wrong: a traceback after {delay:.2f} s: {said[-300:]}", seconds
    if not run.has_checkpoint:
        return "stopped while starting", seconds
    if status == -number:
        return "wrong: killed in training", seconds
    if ended(forked(lambda: go_on(tmp, name, **SETTINGS))):
        return "wrong: does not go on", seconds
    assert_same_end(tmp / "whole", tmp / name)
    return "stopped in training", seconds


def main() -> None:
    args = arguments(__doc__, cases=30)
    begun = time.monotonic()
    found: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        if ended(forked(lambda: go_on(tmp, "whole", **SETTINGS), log=tmp / "log")):
            raise SystemExit((tmp / "log").read_text())
        for case in range(args.cases):
            delay = random.uniform(0.05, 14)
            outcome, seconds = stopped(tmp, f"run-{case}", random.choice(list(SIGNALS)), delay)
            if outcome.startswith("wrong"):
                print(outcome, flush=True)
            found[outcome.partition(":")[0]] += 1
            slowest = max(slowest, seconds)
    result: dict[str, object] = {"cases": args.cases, **found, "slowest end, s": round(slowest, 1)}
    report("signals", args, begun, result)
    sys.exit(bool(found["wrong"]) or slowest > 10)


if __name__ == "__main__":
    main()
