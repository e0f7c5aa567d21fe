"""Give damaged and odd input to every reader of files and settings, many thousand times.

A right answer to bad input is an `EwavitError`, on the command line exit status 2 and one line. A finding is
any other exception, more than 2 seconds, more than 1 GiB of memory, a crash, or a result that another reader
contradicts. The cases come from hypothesis; a seed repeats them.

    python tests/faults/fuzz.py --cases 100000
    python tests/faults/fuzz.py --cases 2000 --only "pcd files" --keep findings/

Exit status 1: there are findings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fuzz_comparison
import fuzz_images
import fuzz_points
import fuzz_settings
import fuzz_weights
from fuzz_inputs import TARGETS, Target, Wrong

TARGET_FILES = (fuzz_comparison, fuzz_images, fuzz_points, fuzz_settings, fuzz_weights)
MOST_SECONDS = 2.0  # of the processor, for one case
MOST_WAITING = 20.0  # seconds on the clock, for a case that waits: other work may keep the processor busy
MOST_MEMORY = 2**30  # bytes beside what the process has at its start
BATCH = 2000  # cases of one process
ROOT = Path(__file__).resolve().parents[2]


class Hang(BaseException):
    """A case takes too long. No reader catches it."""


class Network(BaseException):
    """A case looks for another machine. No reader catches it."""


def _raise_hang(number: int, frame: Any) -> None:
    raise Hang


def _raise_network(*where: Any, **more: Any) -> None:
    raise Network(str(where[:1]))


def run(target: Target, seed: int, cases: int, keep: Path | None = None) -> tuple[Counter[str], list[Any]]:
    """Try cases of a target in processes of their own.

    Args:
        target: from `TARGETS`.
        seed: of the cases; each batch adds its number.
        cases: how many, about: hypothesis may try some more.
        keep: a folder for the files of the first case of each finding; None keeps none.

    Returns:
        The number of cases by outcome, and the findings: kind, place, message and number of cases.
    """
    counts: Counter[str] = Counter()
    found: dict[str, Any] = {}
    for first in range(0, cases, BATCH):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            more, findings = _batch(target, seed + first, min(BATCH, cases - first), Path(folder), keep)
        counts += more
        for finding in findings:
            known = found.setdefault(f"{finding['kind']} {finding['place']}", {**finding, "cases": 0})
            known["cases"] += finding["cases"]
    return counts, list(found.values())


def _batch(
    target: Target, seed: int, cases: int, folder: Path, keep: Path | None
) -> tuple[Counter[str], list[Any]]:
    """One process: it writes a line for every fiftieth case and its results at the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        status = 1
        try:
            with os.fdopen(writing, "wb", buffering=0) as report:
                _work(target, seed, cases, folder, keep, report)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as report:
        text, silent = b"", False
        while not silent:
            ready = select.select([report], [], [], 60 * MOST_SECONDS)[0]
            silent = not ready
            if silent:
                os.kill(child, signal.SIGKILL)
            elif not (piece := report.read(65536)):
                break
            else:
                text += piece
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    last = text.splitlines()[-1] if text else b"{}"
    if not status and last.startswith(b'{"counts"'):
        made = json.loads(last)
        return Counter(made["counts"]), made["findings"]
    if keep is not None:
        shutil.copytree(folder, keep / f"{target.name} crash {seed}", symlinks=True, dirs_exist_ok=True)
    kind = "hang in a library" if silent else "crash"
    finding = {
        "kind": kind,
        "place": f"{target.name}, status {status}",
        "message": f"seed {seed}",
        "cases": 1,
    }
    return Counter({"cases": 50 * text.count(b"\n")}), [finding]


def _work(target: Target, seed: int, cases: int, folder: Path, keep: Path | None, report: BinaryIO) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.chdir(folder)
    socket.getaddrinfo = socket.create_connection = _raise_network  # type: ignore[assignment]
    shared = target.prepare(folder)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _raise_hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY,) * 2)
    counts: Counter[str] = Counter()
    findings: dict[str, Any] = {}

    @hypothesis.seed(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def each(data: st.DataObject) -> None:
        if problem := _tried(target, data, shared, counts):
            kind, place = _kind(problem), _place(problem)
            message = f"{type(problem).__name__}: {str(problem)[:200]}"
            finding = {"kind": kind, "place": place, "message": message, "cases": 0}
            known = findings.setdefault(f"{kind} {place}", finding)
            known["cases"] += 1
            if keep is not None and known["cases"] == 1:
                name = re.sub(r"[^\w.,-]+", "-", f"{target.name} {kind} {place}")
                shutil.copytree(folder, keep / name, symlinks=True, dirs_exist_ok=True)
                (keep / f"{name}.txt").write_text(
                    "".join(traceback.format_exception(problem)), errors="replace"
                )
        if counts["cases"] % 50 == 0:
            report.write(b"\n")

    each()
    report.write(json.dumps({"counts": counts, "findings": list(findings.values())}).encode() + b"\n")


def _tried(target: Target, data: st.DataObject, shared: Any, counts: Counter[str]) -> BaseException | None:
    """One case within its limits; what went wrong, if anything did."""
    problem: BaseException | None = None
    try:
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, MOST_WAITING)
        try:
            counts[target.case(data.draw, shared)] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except HypothesisException:
        raise
    except (Exception, Hang, Network, SystemExit) as found:
        problem = found
    counts["cases"] += 1
    return problem


def _kind(problem: BaseException) -> str:
    kinds = {Hang: "hang", Network: "network", MemoryError: "memory", Wrong: "wrong result"}
    return next((name for kind, name in kinds.items() if isinstance(problem, kind)), "traceback")


def _place(problem: BaseException) -> str:
    """The line of the project that a problem comes from."""
    while isinstance(problem, MemoryError) and problem.__cause__ is not None:
        problem = problem.__cause__
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if "/ewavit/" in frame.filename] or [
        frame for frame in frames if "/faults/" in frame.filename
    ]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else "?"


def record(rows: dict[str, Any], seed: int) -> dict[str, Any]:
    """What a run of this tool leaves: how it was made, and the cases and findings by target."""
    packages = ("hypothesis", "torch", "numpy", "pillow", "safetensors", "trimesh", "h5py", "timm", "pyyaml")
    total: Counter[str] = Counter()
    for row in rows.values():
        total += Counter(row["cases"])
    return {
        "command": shlex.join(["python", *(word.removeprefix(f"{ROOT}/") for word in sys.argv)]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "limits": {"seconds": MOST_SECONDS, "seconds waiting": MOST_WAITING, "bytes": MOST_MEMORY},
        "seconds": round(sum(row["seconds"] for row in rows.values())),
        "cases": total,
        "findings": sum(len(row["findings"]) for row in rows.values()),
        "targets": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000, help="in all (default: 100000)")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=TARGETS, help="this target alone; may be repeated")
    parser.add_argument("--keep", type=Path, help="folder for the files of each finding")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    options = parser.parse_args()
    chosen = {name: each for name, each in TARGETS.items() if not options.only or name in options.only}
    shares = sum(each.share for each in chosen.values())
    keep = None if options.keep is None else options.keep.absolute()
    begun, rows = time.perf_counter(), {}
    for name, each in chosen.items():
        if time.perf_counter() - begun > 60 * options.minutes:
            print(f"stopped after {options.minutes:g} minutes, before {name}", flush=True)
            break
        at = time.perf_counter()
        number = zlib.crc32(name.encode()) % 1000 * 10**6  # each target has seeds of its own
        counts, findings = run(
            each, options.seed * 10**9 + number, round(options.cases * each.share / shares), keep
        )
        rows[name] = {"cases": counts, "findings": findings, "seconds": round(time.perf_counter() - at, 1)}
        said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if what != "cases")
        print(f"{name}: {counts['cases']:,} cases ({said}) in {rows[name]['seconds']} s", flush=True)
        for finding in findings:
            print(
                f"  {finding['kind']} at {finding['place']}, {finding['cases']} cases: {finding['message']}"
            )
    if options.record is not None and options.record.exists() and options.only:
        rows = json.loads(options.record.read_text())["targets"] | rows
    made = record(rows, options.seed)
    if options.record is not None:
        options.record.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{made['cases']['cases']:,} cases, {made['findings']} findings, {made['seconds']} s")
    return int(made["findings"] > 0)


if __name__ == "__main__":
    sys.exit(main())
