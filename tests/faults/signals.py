"""Stop `ewavit train` by SIGTERM and SIGINT at any moment, start-up included.

    python tests/faults/signals.py --cases 30 --record

The command must end within 10 seconds. Once training has begun its exit status is 143 or 130, and the run
ends later with the bits of a run that was not stopped. Before that the status is the same, or that of a
process which the signal ended. A third of the signals go to the process group of a run that reads images with
workers, as a terminal, Slurm and systemd send them.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import INTERRUPTED, arguments, ended, forked, go_on, is_finished, report, settings_of

from ewavit.training.run_folder import RunFolder
from runs import TINY, assert_same_end

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
SETTINGS = {**TINY, "limit": 2048}


def stopped(tmp: Path, name: str, number: signal.Signals, delay: float) -> tuple[str, float]:
    """Send a signal after a delay; what was right or wrong with the end, and the seconds that it took."""
    words = [sys.executable, "-m", "ewavit.cli", "train", "--output", str(tmp), "--name", name]
    for key, value in {**SETTINGS, "recovery_interval": 2}.items():  # as `go_on` trains
        words += [f"--{key.replace('_', '-')}", str(value)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(number)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    seconds, status = time.monotonic() - begun, process.returncode
    run = RunFolder(tmp / name)
    if status in (0, SIGNALS[number], -number) and is_finished(run.path):
        assert_same_end(tmp / "whole", run.path)
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


def stopped_group(tmp: Path, name: str, number: signal.Signals, delay: float) -> tuple[str, float]:
    """The same for the group of a run with workers, forked from this process: it has started already."""
    settings, log = settings_of("folder with workers", tmp), tmp / f"{name}.log"
    pid = forked(lambda: go_on(tmp, name, **settings), log=log)
    time.sleep(delay)
    begun = time.monotonic()
    os.killpg(pid, number)
    status, seconds = ended(pid), time.monotonic() - begun
    if status == 0:
        return "finished before", seconds
    outside = status == -number or log.read_text().endswith("KeyboardInterrupt\n")  # of the steps
    if status != INTERRUPTED and not outside:
        return f"wrong: group, exit status {status} after {delay:.2f} s: {log.read_text()[-300:]}", seconds
    run = RunFolder(tmp / name)
    if status == INTERRUPTED and not run.has_checkpoint:
        return "wrong: group, no checkpoint", seconds
    if not is_finished(tmp / name) and (
        again := ended(forked(lambda: go_on(tmp, name, **settings), log=log))
    ):
        return f"wrong: group, does not go on: {again}, {log.read_text()[-300:]}", seconds
    assert_same_end(tmp / "group", tmp / name)
    return "group stopped before or after its steps" if outside else "group stopped in training", seconds


def main() -> None:
    args = arguments(__doc__, cases=30)
    begun = time.monotonic()
    found: Counter[str] = Counter()
    slowest = 0.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        if ended(forked(lambda: go_on(tmp, "whole", **SETTINGS), log=tmp / "log")):
            raise SystemExit((tmp / "log").read_text())
        settings, start = settings_of("folder with workers", tmp), time.monotonic()
        if ended(forked(lambda: go_on(tmp, "group", **settings), log=tmp / "log")):
            raise SystemExit((tmp / "log").read_text())
        group_seconds = time.monotonic() - start
        for case in range(args.cases):
            stop, longest = (stopped_group, group_seconds) if case % 3 == 2 else (stopped, 14)
            delay = random.uniform(0.05, longest)
            outcome, seconds = stop(tmp, f"run-{case}", random.choice(list(SIGNALS)), delay)
            if outcome.startswith("wrong"):
                print(outcome, flush=True)
            found[outcome.partition(":")[0]] += 1
            slowest = max(slowest, seconds)
    result: dict[str, object] = {"cases": args.cases, **found, "slowest end, s": round(slowest, 1)}
    report("signals", args, begun, result)
    sys.exit(bool(found["wrong"]) or slowest > 10)


if __name__ == "__main__":
    main()
