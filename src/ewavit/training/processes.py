"""The processes of a run: how they start, meet again after a restart, lose one another and are stopped."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from ewavit.data.batches import Batch
from ewavit.errors import EwavitError, first_line
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder
from ewavit.training.trackers import check_trackers


class ProcessLost(Exception):
    """Another process of the run ended."""

    exit_status = 1


class Interrupted(Exception):
    """The run was stopped by a signal after its checkpoint was written."""

    def __init__(self, run: Path, signal_number: int) -> None:
        super().__init__(f"stopped; go on with: ewavit train --resume {run}")
        self.exit_status = 128 + signal_number


def started_again() -> bool:
    """Whether torchrun has started these processes anew after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def keep_freed_memory() -> None:
    """Let glibc keep for the next step what a step has freed, where it would give it back to the system.

    Fetched again page by page it took up to a quarter of a step on a CPU, and more of one model than of the
    other that was measured beside it (docs/performance.md). Other C libraries are left as they are.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        library.mallopt(trim_threshold, -1)
        library.mallopt(mmap_threshold, 2**30)


def start_accelerator(recipe: Recipe, run: Path) -> Accelerator:
    """Accelerate for a recipe, on the GPU or else the CPU.

    Raises:
        EwavitError: the precision does not work here.
    """
    precision = {"bfloat16": "bf16", "float16": "fp16"}[recipe.amp_dtype] if recipe.amp else "no"
    check_trackers(recipe)
    cpu = (
        not torch.accelerator.is_available()
    )  # said, or accelerate leaves launched CPU processes on their own
    _meet_again(cpu)
    keep_freed_memory()
    # Else DDP orders its buckets anew after the first step of each start. The sums of more than two processes
    # are rounded by a number's place in a bucket, and a resumed run would end with other last bits.
    steady = DistributedDataParallelKwargs(find_unused_parameters=int(os.environ.get("WORLD_SIZE", 1)) > 2)
    try:
        return Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            project_dir=str(run),
            kwargs_handlers=[steady],
        )
    except ValueError as problem:
        if not recipe.amp:
            raise
        raise EwavitError(f"--amp-dtype {recipe.amp_dtype} does not work here ({problem})") from None


def _meet_again(cpu: bool) -> None:
    """After a restart by torchrun on one machine: let the processes find each other by keys of this start.

    torchrun keeps one store for all its starts, in which they might read where the dead ones listened
    (pytorch/pytorch#135712). On several machines the starts are not counted together; there set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if not started_again() or not one_machine or dist.is_initialized():
        return
    store, rank, processes = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo" if cpu else None, store=store, rank=rank, world_size=processes)


@contextmanager
def told_of_lost_processes(accelerator: Accelerator, run: Path) -> Iterator[None]:
    """Within, what torch raises when another process of the run has ended becomes `ProcessLost`."""
    try:
        yield
    except RuntimeError as problem:
        lost = re.search("gloo|nccl|connection|socket", str(problem), re.IGNORECASE)
        if accelerator.num_processes == 1 or not lost:
            raise
        reason = re.sub(r"^\[\S+\] |\. This is .*", "", first_line(problem))
        saved = RunFolder(run).has_checkpoint
        kept = "its last checkpoint is whole" if saved else "no checkpoint was written yet"
        raise ProcessLost(
            f"process {accelerator.process_index} lost another one ({reason}), which says why itself or was "
            f"killed; {kept}: start the same processes with `train --resume {run}`, or let "
            "`torchrun --max-restarts` do it"
        ) from None


_Sent = tuple[Tensor, "dist.Work"]  # the largest signal number of all processes, once the work is done


class StopSignals:
    """SIGINT and SIGTERM in a run: collected while it steps, so that a step ends and is saved.

    All processes of a group stop after the same step, whichever of them received the signal.

    Args:
        run: the run's folder, for the message.
        accelerator: of the processes that train.
    """

    def __init__(self, run: Path, accelerator: Accelerator) -> None:
        self._run, self._device = run, accelerator.device
        self._alone = accelerator.num_processes == 1
        self._at_once = False
        self._received: list[int] = []
        self._sent: _Sent | None = None

    @contextmanager
    def collected(self) -> Iterator[None]:
        """A context manager in which signals are collected."""
        with collected_signals(self._note) as self._received:
            yield

    @contextmanager
    def raised(self) -> Iterator[None]:
        """A context manager in which a signal raises at once, for work that can be done again.

        In a group it raises only at the beginning and where `until` or `check` is called: an exception in one
        process would leave the others waiting in a collective.

        Raises:
            Interrupted: a signal came, here or before.
        """
        try:
            self._at_once = self._alone
            self.check()
            yield
        finally:
            self._at_once = False
        if self._alone:
            self.check()  # an exception raised by a handler may be lost, in a destructor for one

    def after_step(self) -> int:
        """The signal that ends the run after this step, or 0.

        Each process of a group sends what it received and reads what was sent after the step before. So no
        step waits, and all processes read the same.
        """
        if self._alone:
            return self._first()
        sent, self._sent = self._sent, self._send()
        return 0 if sent is None else _read(sent)

    def until(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches up to a signal to this process. All processes of a group must take all that it gives.

        Raises:
            Interrupted: a signal came to one of the processes.
        """
        for batch in batches:
            yield batch
            if self._received:
                break
        self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal came. In a group this is a collective."""
        if number := self._first() if self._alone else _read(self._send()):
            raise Interrupted(self._run, number)

    def _first(self) -> int:
        return self._received[0] if self._received else 0

    def _send(self) -> _Sent:
        number = torch.tensor(self._first(), device=self._device)
        return number, dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)

    def _note(self, received: list[int]) -> None:
        if self._at_once:
            raise Interrupted(self._run, received[0])


def _read(sent: _Sent) -> int:
    number, work = sent
    work.wait()
    return int(number)


@contextmanager
def collected_signals(at_each: Callable[[list[int]], None]) -> Iterator[list[int]]:
    """A context manager that yields the list of SIGINT and SIGTERM received so far, instead of ending.

    Args:
        at_each: called at each signal, with that list.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        at_each(received)

    handlers = {}
    with suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
