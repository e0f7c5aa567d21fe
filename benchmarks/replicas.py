"""A training step of replica experts over dense DDP's: time by parts, and bytes given to all-reduce.

    python benchmarks/replicas.py

CPU processes (gloo) of one thread each train on shares of one global batch; every round takes one step of
each arm in turn (`ewavit.study.bench`). All FFNs are mixtures, N is the number of processes. `ewa` holds N
stacked experts in every process. Four processes on two cores take turns, so there the time is no speed: the
ratios tell what the arms add to it. Writes records/replicas-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import socket
from dataclasses import asdict
from typing import Any
from unittest import mock

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

import ewavit as ewa
from ewavit.study.bench import Trainee, measure, ratios
from records import write_record

ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "replicas": {"select": "all", "placement": "replicas"},
    "ewa": {"select": "all"},
}


def trainee(arm: str, args: argparse.Namespace) -> Trainee:
    """A model in DDP with its optimizer and averaging."""
    torch.manual_seed(0)
    settings = {"img_size": args.img_size, "patch_size": args.patch_size, "num_classes": 100}
    model = timm.create_model(args.model, **settings)
    if arm != "dense":
        ewa.expand(model, dist.get_world_size(), **ARMS[arm])
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ewa.param_groups(wrapped), lr=1e-4, fused=True)
    return Trainee(wrapped, optimizer, ewa.ExpertAveraging(wrapped, 0.1) if arm != "dense" else None)


def bytes_of_a_step(trained: Trainee) -> dict[str, int]:
    """What a process gives to all-reduce for the gradients, and for the averaging."""
    averaging: list[int] = []
    if trained.averaging is not None:
        original = dist.all_reduce

        def counted(tensor: torch.Tensor, **kwargs: Any) -> Any:
            averaging.append(tensor.nbytes)
            return original(tensor, **kwargs)

        with mock.patch.object(dist, "all_reduce", counted):
            trained.averaging.step()
    return {
        "gradients": trained.model._get_ddp_logging_data()["total_parameter_size_bytes"],
        "averaging": sum(averaging),
        "parameters": sum(parameter.nbytes for parameter in trained.model.parameters()),
    }


def process(rank: int, world: int, port: int, args: argparse.Namespace, results: Any) -> None:
    """One process of a group; the first reports."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group("gloo")
    trainees = {arm: trainee(arm, args) for arm in ARMS}
    torch.manual_seed(rank)
    images = torch.randn(args.batch_size // world, 3, args.img_size, args.img_size)
    labels = torch.randint(100, (len(images),))
    times = measure(trainees, images, labels, rounds=args.rounds)
    sent = {arm: bytes_of_a_step(trained) for arm, trained in trainees.items()}
    if rank == 0:
        for arm in ARMS:
            parts = ratios(times[arm], times["dense"])
            row = {part: asdict(ratio) for part, ratio in parts.items() if times[arm].seconds[part].any()}
            results.put((arm, {"time": row, "bytes": sent[arm]}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="images over all processes")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    result: dict[str, Any] = {"load average at the start": os.getloadavg()[0]}
    for world in (2, 4):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        results = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(process, (world, port, args, results), nprocs=world)
        result[f"{world} processes"] = rows = dict(results.get() for _ in ARMS)
        for arm, row in rows.items():
            step, sent = row["time"]["step"], {name: size / 2**20 for name, size in row["bytes"].items()}
            print(
                f"{world} processes  {arm:9} {step['ms']:8.1f} ms  {step['ratio']:.3f} "
                f"[{step['low']:.3f}, {step['high']:.3f}]  {sent['gradients']:6.1f} MiB of gradients and "
                f"{sent['averaging']:.1f} of averaging sent  {sent['parameters']:6.1f} MiB of weights"
            )
    write_record("replicas-cpu", vars(args) | {"threads of a process": 1}, result)


if __name__ == "__main__":
    main()
