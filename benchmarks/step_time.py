"""Time of a whole training step of EWA over the dense one, and of its parts, interleaved in one process.

    python benchmarks/step_time.py            # ViT-Tiny at 64x64/8, batch 64, N = 4, every second FFN

Dense and EWA steps alternate, so that whatever else the machine does hits both; medians of the per-round
ratios with a bootstrap interval. Writes records/step_time-DEVICE.json.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import timm
import torch
import torch.nn.functional as F

import ewavit as ewa
from records import add_model_arguments, interval_of_median, write_record


def build(args: argparse.Namespace, experts: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model on the device and its optimizer, dense for one expert."""
    torch.manual_seed(0)
    model = timm.create_model(args.model, img_size=args.img_size, patch_size=args.patch_size, num_classes=100)
    model.to(args.device).train()
    if experts > 1:
        ewa.expand(model, experts, select=args.select)
    groups = ewa.param_groups(model, weight_decay=0.05)
    return model, torch.optim.AdamW(groups, lr=1e-4, fused=args.fused)


def step(model, optimizer, averaging, images, labels, synchronize) -> dict[str, float]:
    """One training step; seconds of its parts."""
    marks = [time.perf_counter()]

    def mark() -> None:
        synchronize()
        marks.append(time.perf_counter())

    loss = F.cross_entropy(model(images), labels)
    mark()
    loss.backward()
    mark()
    optimizer.step()
    optimizer.zero_grad()
    mark()
    if averaging is not None:
        averaging.step()
    mark()
    names = ("forward", "backward", "optimizer", "averaging")
    parts = dict(zip(names, np.diff(marks).tolist(), strict=True))
    return {**parts, "step": sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--select", default="alternate")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--no-fused", dest="fused", action="store_false", help="AdamW tensor by tensor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    labels = torch.randint(100, (args.batch_size,), device=args.device)
    arms = {}
    for name, experts in (("dense", 1), ("ewa", args.experts)):
        model, optimizer = build(args, experts)
        arms[name] = (model, optimizer, ewa.ExpertAveraging(model, 0.1) if experts > 1 else None)

    times: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for number in range(args.warm_up + args.rounds):
        order = list(arms) if number % 2 else list(arms)[::-1]
        for name in order:
            seconds = step(*arms[name], images, labels, synchronize)
            if number >= args.warm_up:
                times[name].append(seconds)

    parts = list(times["dense"][0])
    result: dict[str, object] = {}
    print(f"{'part':10} {'dense ms':>10} {'EWA ms':>10} {'ratio':>8}  95 % interval")
    for part in parts:
        dense, ours = (np.array([seconds[part] for seconds in times[name]]) for name in ("dense", "ewa"))
        ratio = ours / dense if part != "averaging" else ours / np.array([s["step"] for s in times["ewa"]])
        low, high = interval_of_median(ratio)
        middle = float(np.median(ratio))
        label = "of the step" if part == "averaging" else ""
        print(f"{part:10} {np.median(dense) * 1e3:10.2f} {np.median(ours) * 1e3:10.2f} {middle:8.4f}  "
              f"[{low:.4f}, {high:.4f}] {label}")  # fmt: skip
        result[part] = {
            "dense_ms": float(np.median(dense) * 1e3),
            "ewa_ms": float(np.median(ours) * 1e3),
            "ratio": middle,
            "interval": [low, high],
        }
    write_record(f"step_time-{args.device}", vars(args), result)


if __name__ == "__main__":
    main()
