"""Training steps on busy cores and on free ones, by the number of threads and how they wait for each other.

    python benchmarks/busy_cores.py
    python benchmarks/busy_cores.py --alone   # on a machine with other work, as root

Each arm is a process of its own, with OpenMP's settings for waiting threads in its environment. A round takes
a window of steps of each arm in turn on the cores as they are ("free"). The first rounds take another with an
endless loop for each core beside it ("busy"). `--alone` gives the free windows precedence over all other
processes (SCHED_FIFO, for a second each; it needs root). `others` is the mean number of cores that
other processes used. Context switches are those of all threads: voluntary when a thread goes to sleep,
involuntary when it loses its core. Writes records/busy_cores-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F

import ewavit as ewa
from ewavit.cli import SPIN_COUNT
from ewavit.study.bench import Trainee, interval_of_median
from ewavit.training.processes import keep_freed_memory
from records import write_record
from step_time import ON_CPU, trainee

DEMO = {"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 3, "in_chans": 1}
POLICIES: dict[str, dict[str, str]] = {
    "libgomp's default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "ewavit's default": {"GOMP_SPINCOUNT": SPIN_COUNT},
}
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def demo() -> Trainee:
    """The model of recipes/demo.yaml with its experts."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, class_token=False, global_pool="avg", **DEMO
    )
    ewa.expand(model, 4)
    optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr=1e-3, fused=True)
    return Trainee(model.train(), optimizer, ewa.ExpertAveraging(model, 0.3))


def steps(trained: Trainee, images: torch.Tensor, labels: torch.Tensor, seconds: float) -> int:
    """Train until the time is over; returns the number of steps."""
    done, end = 0, time.perf_counter() + seconds
    while not done or time.perf_counter() < end:
        F.cross_entropy(trained.model(images), labels).backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        assert trained.averaging is not None
        trained.averaging.step()
        done += 1
    return done


def precedence(policy: int, priority: int) -> None:
    """Schedule every thread of this process so."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


def machine_seconds() -> float:
    """CPU seconds that the machine has worked so far, in all processes."""
    user, nice, system, _, _, *interrupts = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:8]
    )
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def work(model: str, threads: int) -> None:
    """An arm's process: each line of its input has a window's seconds and whether it runs alone."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    trained, size, batch = (
        (demo(), (1, 28, 28), 64)
        if model == "demo"
        else (trainee(model, "ewa-4", "eager", "cpu"), (3, 64, 64), ON_CPU[model])
    )
    images, labels = torch.randn(batch, *size), torch.randint(10, (batch,))
    for line in sys.stdin:
        seconds, alone = json.loads(line)
        if alone:
            precedence(os.SCHED_FIFO, 1)
        before, all_before = resource.getrusage(resource.RUSAGE_SELF), machine_seconds()
        begun = time.perf_counter()
        done = steps(trained, images, labels, seconds)
        elapsed = time.perf_counter() - begun
        after, all_after = resource.getrusage(resource.RUSAGE_SELF), machine_seconds()
        if alone:
            precedence(os.SCHED_OTHER, 0)
        own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        window = {
            "seconds": elapsed / done,
            "cpu_seconds": own / done,
            "voluntary": (after.ru_nvcsw - before.ru_nvcsw) / done,
            "involuntary": (after.ru_nivcsw - before.ru_nivcsw) / done,
            "others": max(0.0, all_after - all_before - own) / elapsed,
        }
        print(json.dumps(window), flush=True)


class Arm:
    """A process that trains for one window at a time."""

    def __init__(self, model: str, threads: int, environment: dict[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        self.windows: dict[str, list[dict[str, float]]] = {"free": [], "busy": []}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", model, "--threads", str(threads)],
            env=kept | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def window(self, seconds: float, alone: bool = False) -> dict[str, float]:
        """Train for so long."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([seconds, alone]), file=self._process.stdin, flush=True)
        window: dict[str, float] = json.loads(self._process.stdout.readline())
        return window

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Loops:
    """One endless loop per core, within the context manager; stopped again at its end."""

    def __init__(self) -> None:
        self._processes = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)
        ]
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)

    def __enter__(self) -> None:
        self.signal(signal.SIGCONT)

    def __exit__(self, *problem: object) -> None:
        self.signal(signal.SIGSTOP)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()


def measure(model: str, options: argparse.Namespace) -> dict[str, Arm]:
    """The arms of one model with their windows."""
    arms = {
        f"{threads} {'thread' if threads == 1 else 'threads'}, {policy}": Arm(model, threads, environment)
        for threads in (1, 2)
        for policy, environment in POLICIES.items()
        if threads > 1 or policy != "passive"
    }
    loops = Loops()
    try:
        for arm in arms.values():
            arm.window(options.seconds, options.alone)
        for turn in range(options.rounds):
            order = list(arms.values())[:: -1 if turn % 2 else 1]
            for arm in order:
                arm.windows["free"].append(arm.window(options.seconds, options.alone))
                if options.alone:
                    time.sleep(options.seconds)
            if turn < options.busy_rounds:
                with loops:
                    for arm in order:
                        arm.windows["busy"].append(arm.window(options.seconds))
    finally:
        loops.end()
        for arm in arms.values():
            arm.end()
    return arms


def summary(arm: Arm, reference: Arm) -> dict[str, Any]:
    """Medians of an arm's windows; its time over that of libgomp's default, by rounds."""
    rows: dict[str, Any] = {}
    for cores, windows in arm.windows.items():
        rows[cores] = {key: float(np.median([window[key] for window in windows])) for key in windows[0]}
        own, other = (
            np.array([window["seconds"] for window in one.windows[cores]]) for one in (arm, reference)
        )
        rows[cores]["ratio"] = float(np.median(own / other))
        rows[cores]["ratio_interval"] = interval_of_median(own / other)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="demo,ti64")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--busy-rounds", type=int, default=5, help="of these, rounds with loops as well")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a window")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.threads)
        return
    result: dict[str, Any] = {"load average at the start": os.getloadavg()[0]}
    for model in options.models.split(","):
        arms = measure(model, options)
        result[model] = {}
        for name, arm in arms.items():
            reference = arms[f"{name.partition(',')[0]}, libgomp's default"]
            result[model][name] = rows = summary(arm, reference)
            for cores, row in rows.items():
                print(
                    f"{model:5} {name:28} {cores}  {row['seconds'] * 1000:8.1f} ms a step, "
                    f"{row['ratio']:.3f} of the default's, CPU {row['cpu_seconds'] * 1000:7.1f} ms, "
                    f"context switches {row['voluntary']:.0f} + {row['involuntary']:.0f}, "
                    f"others {row['others']:.2f} cores",
                    flush=True,
                )
    shown = {key: value for key, value in vars(options).items() if key not in ("work", "threads")}
    write_record("busy_cores-cpu", shown, result)


if __name__ == "__main__":
    main()
