"""Kill runs anywhere; every run that goes on must end with the bits of one that was never killed.

    python tests/faults/kill.py --rounds 2 --record

Each round kills each of eight settings with SIGKILL: at a random moment, at a random call of `os.replace`,
of `os.fsync` or of the write of a tensor, and in the evaluation. After each kill the run goes on, and may be
killed again. Further kills hit a comparison: its parent, its children and its workers in Ray in turn.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common import SETTINGS, arguments, ended, forked, go_on, is_finished, report, settings_of

import ewavit.files
import ewavit.training.loop
from runs import assert_same_end

VICTIMS = ("parent", "child", "ray")
MOMENTS = ("time", "replace", "fsync", "write", "evaluate")


def kill_at_call(owner: object, name: str, number: int) -> None:
    """Let this process kill itself at the call of that number of a function, before or after the call."""
    original, calls = getattr(owner, name), [0]
    after = random.random() < 0.5

    def counted(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def prepared(moment: str, seconds: float) -> Callable[[], None]:
    """What arms a process: the place or the time at which it kills itself."""
    if moment == "time":
        delay = random.uniform(0, seconds)
        return lambda: threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    owner, name, most = {
        "replace": (os, "replace", 30),
        "fsync": (os, "fsync", 60),
        "write": (ewavit.training.checkpoint, "_bytes", 300),
        "evaluate": (ewavit.training.loop, "evaluate_batches", 3),
    }[moment]
    number = random.randint(1, most)
    return lambda: kill_at_call(owner, name, number)


def kill_run(tmp: Path, setting: str, moment: str, seconds: float, name: str) -> tuple[int, int]:
    """Kill a run up to three times, let it end, and compare; returns kills and wrong ends."""
    settings, kills, log = settings_of(setting, tmp), 0, tmp / f"{name}.log"
    for _ in range(3):
        status = ended(forked(lambda: go_on(tmp, name, **settings), prepared(moment, seconds), log))
        if status == -signal.SIGKILL:
            kills += 1
            if is_finished(tmp / name):  # killed after its last file
                break
        elif status:
            print(f"{setting}, {moment}: exit status {status} after {kills} kills\n{log.read_text()[-2000:]}")
            return kills, 1
        else:
            break
    if not is_finished(tmp / name):
        status = ended(forked(lambda: go_on(tmp, name, **settings), log=log))
        if status:
            print(f"{setting}, {moment}: exit status {status} after {kills} kills\n{log.read_text()[-2000:]}")
            return kills, 1
    try:
        assert_same_end(tmp / setting, tmp / name)
    except AssertionError as problem:
        print(f"{setting}, {moment}: {problem}")
        return kills, 1
    return kills, 0


def kill_comparison(tmp: Path, victim: str) -> tuple[int, int]:
    """Kill a comparison ("parent"), a process of a run within ("child") or a worker of Ray ("ray").

    It is started again, and its results are compared.
    """
    words = [
        sys.executable, "-m", "ewavit.cli", "compare", "--arms", "dense,ewa", "--seeds", "2", "--limit",
        "128", "--epochs", "2", "--batch-size", "32", "--warmup-epochs", "1", "--model-kwargs",
        "patch_size=7,embed_dim=32,depth=2,num_heads=2", "--output", str(tmp), "--jobs", "2",
    ]  # fmt: skip

    def results(name: str) -> list[str]:
        table = (tmp / name / "results.csv").read_text().splitlines()
        return [",".join(row.split(",")[:7]) for row in table]

    if not (tmp / "whole").exists():
        subprocess.run([*words, "--name", "whole"], check=True, capture_output=True)
    name = f"killed-{random.randrange(10**9)}"
    start = [*words, "--name", name, *(["--ray"] if victim == "ray" else [])]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(start, **silent, start_new_session=True)
    time.sleep(random.uniform(3, 12) if victim != "ray" else random.uniform(0, 3))
    found = [process.pid]
    while victim != "parent" and process.poll() is None:
        below = children(process.pid)
        found = below if victim == "child" else [pid for pid in below if command_of(pid) == "ray::_in_task"]
        if found:
            break
        time.sleep(0.1)
    kills = int(bool(found) and process.poll() is None)
    if kills:
        with suppress(ProcessLookupError):
            os.kill(random.choice(found), signal.SIGKILL)
    process.wait()
    with_children_gone(process.pid)
    again = subprocess.run(start, capture_output=True, text=True)
    same = again.returncode == 0 and results(name) == results("whole")
    if not same:
        print(f"comparison, {victim}: {again.returncode} {again.stdout[-500:]}{again.stderr[-500:]}")
    return kills, int(not same)


def command_of(pid: int) -> str:
    """The command line of a process, without its arguments."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode()
    return ""


def children(pid: int) -> list[int]:
    """The processes below one, by /proc."""
    found: list[int] = []
    for task in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(task.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == pid:
            number = int(task.parent.name)
            found += [number, *children(number)]
    return found


def with_children_gone(session: int) -> None:
    """End what a killed parent left behind, as its container would."""
    for task in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(task.read_text().rpartition(")")[2].split()[3]) == session:
                os.kill(int(task.parent.name), signal.SIGKILL)
        except (OSError, ValueError, IndexError):
            continue


def main() -> None:
    args = arguments(__doc__, rounds=2, comparisons=6, settings=len(SETTINGS))
    begun = time.monotonic()
    by_setting: dict[str, str] = {}
    kills = wrong = runs = 0
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        for setting in random.sample(list(SETTINGS), args.settings):
            settings = settings_of(setting, tmp)
            start = time.monotonic()
            pid = forked(lambda name=setting, s=settings: go_on(tmp, name, **s), log=tmp / "log")
            if ended(pid):
                raise SystemExit(f"the run that is not killed failed:\n{(tmp / 'log').read_text()[-2000:]}")
            seconds, counts = time.monotonic() - start, [0, 0]
            for number in range(args.rounds):
                for moment in MOMENTS:
                    killed, failed = kill_run(tmp, setting, moment, seconds, f"{setting} {number} {moment}")
                    counts, runs = [counts[0] + killed, counts[1] + failed], runs + 1
            by_setting[setting] = f"{counts[0]} kills, {counts[1]} wrong ends"
            kills, wrong = kills + counts[0], wrong + counts[1]
            print(f"{setting}: {by_setting[setting]}, {time.monotonic() - begun:.0f} s", flush=True)
        victims = [VICTIMS[number % len(VICTIMS)] for number in range(args.comparisons)]
        ends = [kill_comparison(tmp / "compare", victim) for victim in victims]
    result: dict[str, object] = {"runs": runs, "kills": kills, "wrong ends": wrong, "settings": by_setting}
    result["comparisons"] = f"{sum(k for k, _ in ends)} kills, {sum(w for _, w in ends)} wrong ends"
    report("kill", args, begun, result)
    sys.exit(wrong + sum(w for _, w in ends) > 0)


if __name__ == "__main__":
    main()
