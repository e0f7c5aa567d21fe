"""Peak memory of EWA training over dense training, against what the extra expert parameters alone take.

    python benchmarks/memory.py

Each arm runs in a process of its own. `saved` are the bytes that autograd keeps for the backward pass, which
is activation memory, counted exactly; `peak` is the process's peak resident memory above its state before the
model was built (on a GPU torch's peak of allocated memory). The extra parameters cost weight, gradient and
AdamW's two moments, 16 bytes each. Writes records/memory-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from typing import Any

import timm
import torch
import torch.nn.functional as F

import ewavit as ewa
from ewavit.study.bench import activation_bytes
from records import add_model_arguments, write_record

BYTES_PER_PARAMETER = 16


def measure(args: argparse.Namespace) -> dict[str, int]:
    """Train a few steps in this process; bytes of one arm."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    labels = torch.randint(100, (args.batch_size,), device=args.device)
    F.linear(
        images.flatten(1)[:, :64], images.flatten(1)[:8, :64]
    ).sum()  # load the libraries before counting
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    settings = {"img_size": args.img_size, "patch_size": args.patch_size, "num_classes": 100}
    model = timm.create_model(args.model, **settings).to(args.device).train()
    if args.experts > 1:
        ewa.expand(model, args.experts)
    optimizer = torch.optim.AdamW(ewa.param_groups(model), lr=1e-4, fused=True)
    averaging = ewa.ExpertAveraging(model, 0.1).attach(optimizer) if args.experts > 1 else None
    for _ in range(args.steps):
        saved = activation_bytes(model, lambda made: F.cross_entropy(made(images), labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    if averaging is not None:
        averaging.detach()
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "saved": saved,
        "peak": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arm", action="store_true", help="measure this process only and print JSON")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args)))
        return

    arms: dict[str, list[dict[str, int]]] = {"dense": [], "ewa": []}
    for _ in range(args.repeats):
        for name, experts in (("dense", 1), ("ewa", args.experts)):
            given = {key: value for key, value in vars(args).items() if key != "arm"} | {"experts": experts}
            words = [
                word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))
            ]
            done = subprocess.run(
                [sys.executable, __file__, "--arm", *words], capture_output=True, check=True
            )
            arms[name].append(json.loads(done.stdout))
    dense, ours = (
        {key: statistics.median(run[key] for run in runs) for key in runs[0]} for runs in arms.values()
    )
    extra = BYTES_PER_PARAMETER * (ours["parameters"] - dense["parameters"])
    result: dict[str, Any] = {
        "dense": dense,
        "ewa": ours,
        "saved_ratio": ours["saved"] / dense["saved"],
        "peak_difference": ours["peak"] - dense["peak"],
        "extra_parameters_bytes": extra,
    }
    mib = 2**20
    print(f"saved for backward  {dense['saved'] / mib:8.1f} MiB dense  {ours['saved'] / mib:8.1f} MiB EWA  "
          f"ratio {result['saved_ratio']:.4f}")  # fmt: skip
    print(f"peak                {dense['peak'] / mib:8.1f} MiB dense  {ours['peak'] / mib:8.1f} MiB EWA  "
          f"difference {result['peak_difference'] / mib:.1f} MiB")  # fmt: skip
    print(f"extra parameters, gradients and moments: {extra / mib:.1f} MiB")
    settings = {key: value for key, value in vars(args).items() if key != "arm"}
    write_record(f"memory-{args.device}", settings, result)


if __name__ == "__main__":
    main()
