"""What averaging at every k-th step only changes, at equal decay of deviations: k = 1, 4, 8.

    python benchmarks/average_every.py

(a) Under gradients of pure noise: the standard deviation of deviations where the gradients are taken, over
that at k = 1. (b) A small ViT on fashion-mnist-mini, AdamW, ramp to 0.3: the distance of the FFNs' mean
weights at the end to those at k = 1, over the way that those have gone, beside the distance of a training
with other partitions. Half a minute of one core. Writes records/average_every.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ewavit as ewa
from ewavit.data.options import DataOptions
from ewavit.training.opening import open_data
from records import write_record
from theory import batches, cosine, deviations, linear_moe, small_vit

EVERY = (1, 4, 8)
N = 4


def under_noise(steps: int) -> dict[str, Any]:
    """Standard deviation of a weight's deviation before each step, over that at k = 1."""
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "SGD": lambda p: torch.optim.SGD(p, 0.01),
        "Adam (0.9, 0.99)": lambda p: torch.optim.Adam(p, 0.01, betas=(0.9, 0.99)),
    }
    found: dict[str, Any] = {}
    for name, build in optimizers.items():
        for rate in (0.03, 0.1, 0.3):
            spread = {}
            for every in EVERY:
                torch.manual_seed(0)
                moe = linear_moe()
                optimizer = build(moe.parameters())
                ewa.ExpertAveraging(moe, rate, every=every).attach(optimizer)
                squares = []
                for step in range(100 + steps):
                    if step >= 100:
                        squares.append(deviations(moe).square().mean().item())
                    optimizer.zero_grad()
                    (moe(torch.randn(64, 32)) * torch.randn(64, 32)).sum().backward()
                    optimizer.step()
                spread[every] = (sum(squares) / len(squares)) ** 0.5
            ratios = {every: spread[every] / spread[1] for every in EVERY}
            found.setdefault(name, {})[str(rate)] = ratios
            print(f"{name:18} share rate {rate:<5} " + "  ".join(f"k={k} {r:.2f}" for k, r in ratios.items()))
    return found


def trained(every: int, chance: int, steps: int) -> tuple[list[Tensor], list[Tensor], float]:
    """FFN weights of the plain model before and after a training, and its loss on the test images."""
    data = open_data("fashion-mnist-mini", DataOptions(batch_size=32, limit=2000))
    torch.manual_seed(0)
    model = small_vit(4, 32)
    start = [p.detach().clone() for block in model.blocks for p in block.mlp.parameters()]
    torch.manual_seed(chance)  # of the partitions
    ewa.expand(model, N)
    optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), 1e-3)
    ewa.ExpertAveraging(model, 0.3, ramp_steps=steps // 2, every=every).attach(optimizer)
    for step, images, labels in batches(data, steps, 0):
        cosine(optimizer, step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
    plain = ewa.collapse(model).eval()
    with torch.no_grad():
        losses = [F.cross_entropy(plain(x), y, reduction="sum").item() for x, y in data.eval_batches()]
    ends = [p.detach().clone() for block in plain.blocks for p in block.mlp.parameters()]
    return start, ends, sum(losses) / data.num_eval


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return sum((a - b).square().sum().item() for a, b in zip(one, other, strict=True)) ** 0.5


def of_training(steps: int) -> dict[str, Any]:
    """Distances at the end to the training with k = 1, over its way, and losses on the test images."""
    start, reference, loss = trained(1, 0, steps)
    way = distance(start, reference)
    found: dict[str, Any] = {"k=1": {"loss": loss}}
    for name, every, chance in (
        ("k=4", 4, 0), ("k=8", 8, 0), ("k=1, other partitions", 1, 1), ("k=1, other partitions again", 1, 2),
    ):  # fmt: skip
        _, ends, loss = trained(every, chance, steps)
        found[name] = {"distance_over_way": distance(ends, reference) / way, "loss": loss}
        print(f"{name:28} distance / way {found[name]['distance_over_way']:.3f}  loss {loss:.4f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--noise-steps", type=int, default=240)
    parser.add_argument("--steps", type=int, default=240)
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_record(
        "average_every",
        vars(args),
        {"spread_over_k_1": under_noise(args.noise_steps), "training": of_training(args.steps)},
    )


if __name__ == "__main__":
    main()
