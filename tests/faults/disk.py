"""Runs on disks that are full, slow, read-only, gone, or hold something else where a file should go.

    python tests/faults/disk.py --record

A full disk is a tmpfs of several sizes where this process may mount one, and otherwise a limit on the size of
files. A run must end with one line and status 2, leave nothing half-written, and after making room end with
the bits of a run that was never stopped.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import INTERRUPTED, REFUSED, arguments, ended, forked, go_on, is_finished, report

from runs import assert_same_end


def mounted(folder: Path, kibibytes: int) -> bool:
    """Mount a tmpfs of that size on a folder; False where that is not allowed."""
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    return subprocess.run(["mount", *options], capture_output=True).returncode == 0


def remounted(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def unmounted(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def limit_files(size: int) -> Callable[[], None]:
    """Let writes beyond a size fail as on a full disk."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return prepare


def complaint(tmp: Path, folder: Path, prepare: Callable[[], None] = lambda: None) -> str:
    """Train a run until the disk stops it; what is wrong with how it ended, or nothing."""
    log = tmp / "log"
    log.unlink(missing_ok=True)
    status = ended(forked(lambda: go_on(folder, "run"), prepare, log))
    said = log.read_text()
    if status not in (0, REFUSED):
        return f"exit status {status}: {said[-300:]}"
    left = [file.name for file in folder.rglob("*.ewavit-partial")] if folder.exists() else []
    return f"left {left}" if status == REFUSED and left else ""


def after_room(tmp: Path, folder: Path) -> str:
    """Let a stopped run go on; what is wrong with its end, or nothing."""
    log = tmp / "log"
    if not is_finished(folder / "run") and (status := ended(forked(lambda: go_on(folder, "run"), log=log))):
        return f"does not go on: {status}, {log.read_text()[-300:]}"
    try:
        assert_same_end(tmp / "whole" / "run", folder / "run")
    except AssertionError as problem:
        return str(problem)[:300]
    return ""


def full(tmp: Path, size: int) -> str:
    """A disk of `size` KiB, which is enlarged afterwards."""
    folder = tmp / "disk"
    if not mounted(folder, size):
        return full_by_limit(tmp, size * 1024)
    try:
        problem = complaint(tmp, folder)
        remounted(folder, "size=100m")
        return problem or after_room(tmp, folder)
    finally:
        unmounted(folder)


def full_by_limit(tmp: Path, size: int) -> str:
    """Files of at most `size` bytes."""
    folder = fresh(tmp)
    return complaint(tmp, folder, limit_files(size)) or after_room(tmp, folder)


def read_only(tmp: Path) -> str:
    """A disk that becomes read-only in the middle of a run, as after an error of its own."""
    folder = tmp / "disk"
    if not mounted(folder, 100_000):
        return "not tried: no mount"
    try:
        pid = forked(lambda: go_on(folder, "run"), log=tmp / "log")
        while not (folder / "run" / "checkpoint").exists():
            time.sleep(0.01)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=False, capture_output=True)
        status = ended(pid)
        remounted(folder, "rw")
        if status not in (0, REFUSED):
            return f"exit status {status}: {(tmp / 'log').read_text()[-300:]}"
        return after_room(tmp, folder)
    finally:
        unmounted(folder)


def vanishing(tmp: Path) -> str:
    """The run's folder is removed in the middle of the run."""
    folder = fresh(tmp)
    pid = forked(lambda: go_on(folder, "run"), log=tmp / "log")
    while not (folder / "run" / "checkpoint").exists():
        time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)
    status = ended(pid)
    return "" if status in (0, REFUSED) else f"exit status {status}: {(tmp / 'log').read_text()[-300:]}"


def slow(tmp: Path) -> str:
    """Each sync and each rename takes up to 0.3 s, and a signal stops the run among them."""
    folder, log = fresh(tmp), tmp / "log"
    log.unlink(missing_ok=True)

    def prepare() -> None:
        for name in ("fsync", "replace"):
            setattr(os, name, delayed(getattr(os, name)))

    pid = forked(lambda: go_on(folder, "run"), prepare, log)
    while not (folder / "run" / "checkpoint").exists():
        time.sleep(0.01)
    time.sleep(random.uniform(0, 3))
    os.kill(pid, signal.SIGTERM)
    begun, status = time.monotonic(), ended(pid)
    if status not in (0, INTERRUPTED) or time.monotonic() - begun > 10:
        return f"exit status {status} after {time.monotonic() - begun:.0f} s: {log.read_text()[-300:]}"
    return after_room(tmp, folder)


def delayed(function: Callable[..., object]) -> Callable[..., object]:
    """The function, up to 0.3 s later."""

    def later(*args: object) -> object:
        time.sleep(random.uniform(0, 0.3))
        return function(*args)

    return later


def something_else(tmp: Path, name: str, make: Callable[[Path], object]) -> str:
    """Something stands where a run writes a file; it is removed afterwards."""
    folder = fresh(tmp)
    place = folder / "run" / name
    place.parent.mkdir(parents=True)
    make(place)
    problem = complaint(tmp, folder)
    if not problem and not is_finished(folder / "run") and place.exists():
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    return problem or after_room(tmp, folder)


def fresh(tmp: Path) -> Path:
    folder = tmp / f"place-{random.randrange(10**9)}"
    folder.mkdir()
    return folder


def main() -> None:
    args = arguments(__doc__, sizes=8)
    begun = time.monotonic()
    problems: list[str] = []
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        (tmp / "whole").mkdir()
        if ended(forked(lambda: go_on(tmp / "whole", "run"), log=tmp / "log")):
            raise SystemExit((tmp / "log").read_text())
        sizes = [round(60 * 1.45**number) for number in range(args.sizes)]
        cases: list[tuple[str, Callable[[], str]]] = [
            *((f"full, {size} KiB", lambda size=size: full(tmp, size)) for size in sizes),
            *(
                (f"limit, {size} KiB", lambda size=size: full_by_limit(tmp, size * 1024))
                for size in sizes[::2]
            ),
            ("read-only", lambda: read_only(tmp)),
            ("vanishing", lambda: vanishing(tmp)),
            *(("slow", lambda: slow(tmp)) for _ in range(4)),
        ]
        for file in ("model.safetensors", "summary.csv", "args.yaml", "predictions.csv", "checkpoint-new"):
            for make in (Path.mkdir, os.mkfifo):
                case = lambda file=file, make=make: something_else(tmp, file, make)  # noqa: E731
                cases.append((f"{make.__name__} in the place of {file}", case))
        for title, case in cases:
            problem = case()
            kind = title.partition(",")[0].partition(" ")[0]
            counts[kind] = counts.get(kind, 0) + 1
            if problem:
                problems.append(f"{title}: {problem}")
                print(problems[-1], flush=True)
    result: dict[str, object] = {"cases": counts, "wrong": len(problems), "problems": problems}
    report("disk", args, begun, result)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
