"""Runs in processes of their own, here or as tasks of a Ray cluster: a crash of one run ends no other run.

A run's process trains from the start or from the last checkpoint, writes its output to a log beside the run's
folder, and reports how it ended. It writes a checkpoint and ends when the process that started it has ended.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from ewavit.errors import Diverged, EwavitError, Refused, first_line
from ewavit.files import regular
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder


class Kind(Enum):
    """How a run ended."""

    DONE = "done"
    DIVERGED = "diverged"  # its loss or its weights are not finite
    REFUSED = "refused"  # its settings cannot work: nothing was trained
    STOPPED = "stopped"  # by a signal, after a checkpoint
    FAILED = "failed"  # any other error


@dataclass(frozen=True)
class End:
    """The end of a run; `error` is one line, empty for a run that is done."""

    recipe: Recipe
    kind: Kind
    error: str = ""


class Engine(Protocol):
    """What trains the runs of a comparison.

    Attributes:
        device: the type of their devices, e.g. "cuda".
        machine: the same in more words, for the results.
    """

    device: str
    machine: str

    def start(self, recipe: Recipe) -> bool:
        """Start a run, or return False while no place is free."""

    def ended(self, seconds: float) -> list[End]:
        """The runs that ended since the last call. Waits so long for one, but not if no run is left."""

    def stop(self) -> None:
        """Stop all runs after a checkpoint, and wait for their ends."""

    def kill(self) -> None:
        """End all runs at once."""


def gpus_here() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
    return list(names)[: torch.cuda.device_count()]


def execute(recipe: Recipe, threads: int) -> End:
    """Train a run to its end in this process, from its checkpoint if it has one. Output goes to its log."""
    from ewavit.training.processes import Interrupted

    run = RunFolder.of(recipe)
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        run.log.touch()
        regular(run.log)  # else opening it could wait for ever
        with run.log.open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        with suppress(OSError):  # some network folders have no locks
            fcntl.flock(1, fcntl.LOCK_EX)  # until a process that an earlier start left has ended
        torch.set_num_threads(threads)
        _train_or_resume(recipe, run)
        return End(recipe, Kind.DONE)
    except Interrupted:
        return End(recipe, Kind.STOPPED, "stopped by a signal")
    except EwavitError as problem:
        kinds = {Refused: Kind.REFUSED, Diverged: Kind.DIVERGED}
        end = End(recipe, kinds.get(type(problem), Kind.FAILED), first_line(problem))
    except Exception as problem:
        with suppress(OSError):
            traceback.print_exc()
        end = End(recipe, Kind.FAILED, f"{type(problem).__name__}: {first_line(problem)}")
    with suppress(OSError):
        print(end.error, flush=True)
    return end


def _train_or_resume(recipe: Recipe, run: RunFolder) -> None:
    from ewavit.training.loop import resume, train
    from ewavit.training.places import given_spec

    if run.is_finished:
        return
    run.model.unlink(missing_ok=True)  # written before the end was reached
    if run.has_checkpoint:
        same = {name: getattr(recipe, name) for name in ("data_dir", "workers", "log")}
        resume(run.path, **same, **given_spec(recipe.data))
    else:
        shutil.rmtree(run.path, ignore_errors=True)
        train(recipe)


class Processes:
    """Runs on this machine; GPUs are given to them in turn.

    Args:
        jobs: how many run at a time.
        threads: CPU threads of each run.
    """

    def __init__(self, jobs: int, threads: int) -> None:
        # A server that has imported torch and timm forks one process per run: seconds are saved in each.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["ewavit.training.loop", "matplotlib.pyplot", "torchmetrics"])
        self._threads, self._gpus = threads, gpus_here()
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self.device = accelerator.type if accelerator else "cpu"
        self.machine = torch.cuda.get_device_name() if self._gpus else _processor()
        self._free = deque(range(jobs))
        self._running: dict[int, tuple[Recipe, Any, Connection, int]] = {}  # by sentinel

    def start(self, recipe: Recipe) -> bool:
        if not self._free:
            return False
        slot = self._free.popleft()
        gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_in_process, args=(recipe, self._threads, gpu, sender))
        process.start()
        sender.close()
        self._running[process.sentinel] = (recipe, process, receiver, slot)
        return True

    def ended(self, seconds: float) -> list[End]:
        ends = []
        ready = connection.wait(list(self._running), seconds if self._running else 0)
        for sentinel in [one for one in self._running if one in ready]:
            recipe, process, receiver, slot = self._running.pop(sentinel)
            process.join()
            try:
                ends.append(receiver.recv())
            except (EOFError, OSError):
                ends.append(End(recipe, Kind.FAILED, _exit_in_words(process.exitcode)))
            receiver.close()
            self._free.append(slot)
        return ends

    def stop(self) -> None:
        self._signal("terminate")
        for _, process, _, _ in list(self._running.values()):
            process.join()

    def kill(self) -> None:
        self._signal("kill")

    def _signal(self, method: str) -> None:
        for _, process, _, _ in list(self._running.values()):
            getattr(process, method)()


def _in_process(recipe: Recipe, threads: int, gpu: str | None, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes as the parent's SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA starts later than this
    end = execute(recipe, threads)
    with suppress(OSError):  # the parent is gone
        sender.send(end)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def _exit_in_words(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit status {code}"
    return f"killed by {signal.Signals(-code).name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"


class RayTasks:
    """Runs as tasks of a Ray cluster, which decides how many run at a time. It must share the output folder.

    Args:
        address: of the cluster; "" starts one on this machine with `jobs` x `threads` CPUs.
        jobs: how many run at a time on a cluster on this machine.
        threads: CPU threads of each run.

    Raises:
        EwavitError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, address: str, jobs: int, threads: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise EwavitError("--ray needs Ray: pip install 'ewavit[ray]'") from None
        self._ray, self._tasks = ray, dict[Any, Recipe]()
        self._ours = not ray.is_initialized()
        if self._ours:
            local = {"num_cpus": jobs * threads, "include_dashboard": False}
            quiet = {"log_to_driver": False, "logging_level": "ERROR"}
            try:
                ray.init(address or "local", **quiet, **({} if address else local))
            except (ConnectionError, RuntimeError, ValueError, OSError) as problem:
                raise EwavitError(f"--ray {address} cannot be reached ({problem})") from None
        has_gpus = "GPU" in ray.cluster_resources()
        self.device = "cuda" if has_gpus else "cpu"
        self.machine = f"Ray cluster of {len(ray.nodes())}, on {self.device}"
        # max_calls: each run has a process of its own, as here
        self._task = ray.remote(num_cpus=threads, num_gpus=int(has_gpus), max_calls=1, max_retries=0)(
            _in_task
        )
        self._threads = threads

    def start(self, recipe: Recipe) -> bool:
        self._tasks[self._task.remote(recipe, self._threads, os.getcwd())] = recipe
        return True

    def ended(self, seconds: float) -> list[End]:
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=seconds)
        ends = []
        for task in ready:
            recipe = self._tasks.pop(task)
            try:
                ends.append(self._ray.get(task))
            except self._ray.exceptions.RayError as problem:
                ends.append(End(recipe, Kind.FAILED, f"{type(problem).__name__}: {first_line(problem)}"))
        return ends

    def stop(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task)  # comes as SIGINT
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks))
        if self._ours:
            self._ray.shutdown()

    def kill(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=True)


def _in_task(recipe: Recipe, threads: int, folder: str) -> End:
    with suppress(OSError):  # relative paths are relative to the folder of the machine that started the task
        os.chdir(folder)
    return execute(recipe, threads)
