"""A function run in a group of CPU processes (gloo), for the tests of several devices.

The processes are forked from a server that has imported torch once, so that a group starts in half a second.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "ewavit.training.loop",
        "pytest",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.debug",
        "torch.distributed.tensor.parallel.ddp",
    ]
)


def in_processes(world: int, check: Callable[..., None], *args) -> None:
    """Run `check(*args)` in each of `world` processes and fail with what the first of them says."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_one, args=(rank, world, port, theirs, check, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    said = []
    for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
        try:
            problem = pipe.recv() if pipe.poll(120) else "said nothing in 120 s"
        except EOFError:
            problem = "died"
        process.join(10)
        if process.is_alive():
            process.kill()
        if problem:
            said.append(f"process {rank} of {world}: {problem}")
    # The others complain that the first to fail left; an assertion is told first.
    said.sort(key=lambda text: "AssertionError" not in text)
    assert not said, said[0]


def _one(rank, world, port, pipe, check, args) -> None:
    """What torchrun sets, a process group, and the check in it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        check(*args)
        if dist.is_initialized():  # accelerate ends the group itself
            dist.barrier()
            dist.destroy_process_group()
        pipe.send(None)
    except BaseException:
        pipe.send(traceback.format_exc())
