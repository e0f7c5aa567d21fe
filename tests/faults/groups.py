"""Kill one process of a run in two or four; the run goes on to the bits of one that was never killed.

    python tests/faults/groups.py --rounds 4 --record

The first process writes. It is killed at a random moment, at a random call of `os.replace` or of `os.fsync`,
in the write of a tensor or in the evaluation. The others are killed at a random moment. A process still there
10 seconds later is killed, where torchrun kills it at once.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import TRACEBACK, arguments, forked, go_on, is_finished, report
from kill import MOMENTS, prepared

from ewavit.training.processes import ProcessLost
from runs import TINY, assert_same_end

GROUPS: dict[str, tuple[int, dict[str, object]]] = {
    "2 processes, data parallel, EMA": (2, {"model_ema": True}),
    "2 processes, replicas": (2, {"placement": "replicas"}),
    "4 processes, data parallel": (4, {}),
    "4 processes, replicas": (4, {"placement": "replicas"}),
}
LOST = 1
PATIENCE = 10  # seconds


def start(tmp: Path, title: str, name: str, arm: dict[int, Callable[[], None]]) -> list[int]:
    """Fork the processes of a group; returns their process numbers. `arm` has what kills which of them."""
    world, settings = GROUPS[title]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
        try:
            go_on(tmp, name, **{**TINY, "batch_size": 8, **settings})
        except ProcessLost as problem:
            print(problem, flush=True)
            os._exit(LOST)

    never: Callable[[], None] = lambda: None  # noqa: E731
    log = tmp / "log"
    return [forked(partial(work, rank), arm.get(rank, never), log) for rank in range(world)]


def ends(pids: list[int]) -> tuple[list[int], int]:
    """Wait for the processes of a group; their exit statuses, and how many had to be killed."""
    statuses: dict[int, int] = {}
    deadline, killed = float("inf"), 0
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
                if statuses[pid]:
                    deadline = min(deadline, time.monotonic() + PATIENCE)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
                killed += 1
            deadline = float("inf")
        time.sleep(0.02)
    return [statuses[pid] for pid in pids], killed


def kill_one(tmp: Path, title: str, name: str, seconds: float) -> tuple[int, int, str]:
    """Kill a process of a run and let the run go on: kills, processes that waited too long, what is wrong."""
    world = GROUPS[title][0]
    victim = random.randrange(world)
    moment = random.choice(MOMENTS) if victim == 0 else "time"
    (tmp / "log").unlink(missing_ok=True)
    statuses, waited = ends(start(tmp, title, name, {victim: prepared(moment, seconds)}))
    kills = int(statuses[victim] == -signal.SIGKILL)
    case = f"{title}, process {victim}, {moment}"
    if TRACEBACK in statuses:
        return kills, waited, f"{case}: {statuses}: {(tmp / 'log').read_text()[-600:]}"
    if not is_finished(tmp / name):
        again, _ = ends(start(tmp, title, name, {}))
        if any(again):
            return kills, waited, f"{case}: does not go on: {again}: {(tmp / 'log').read_text()[-600:]}"
    try:
        assert_same_end(tmp / title, tmp / name)
    except AssertionError as problem:
        return kills, waited, f"{case}: {problem}"
    return kills, waited, ""


def main() -> None:
    args = arguments(__doc__, rounds=6, groups=len(GROUPS))
    begun = time.monotonic()
    by_group: dict[str, str] = {}
    kills = late = runs = 0
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        for title in list(GROUPS)[: args.groups]:
            started = time.monotonic()
            statuses, _ = ends(start(tmp, title, title, {}))
            if any(statuses):
                raise SystemExit(f"the run that is not killed failed:\n{(tmp / 'log').read_text()[-2000:]}")
            seconds, before = time.monotonic() - started, (kills, len(problems))
            for number in range(args.rounds):
                killed, waited, problem = kill_one(tmp, title, f"{title} {number}", seconds)
                kills, late, runs = kills + killed, late + waited, runs + 1
                if problem:
                    problems.append(problem)
                    print(problem, flush=True)
            by_group[title] = f"{kills - before[0]} kills, {len(problems) - before[1]} wrong ends"
            print(f"{title}: {by_group[title]}, {time.monotonic() - begun:.0f} s", flush=True)
    result: dict[str, object] = {"runs": runs, "kills": kills, "wrong ends": len(problems)}
    result |= {"groups": by_group, f"processes that did not end in {PATIENCE} s": late}
    report("groups", args, begun, result)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
