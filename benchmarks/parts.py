"""What a mixture adds to a training step, piece by piece, and other ways to do each piece that were tried.

    python benchmarks/parts.py        # ViT-Ti's shapes on a CPU, those of ViT-B/16 at batch 256 on a GPU

Draw: what `RandomPartition` does (`randperm` with a generator of seed, layer and step) against the global
generator, sorting random or hashed numbers, and one draw for all layers.
Move: dispatch and combine, forward and backward. Multiply: N experts as one batched matmul against the dense
layer and against a loop. Average: what `average_experts_` does against passes expert by expert and against
one compiled kernel. Rounds are interleaved; medians, and ratios to the first row of a group with a bootstrap
interval. Writes records/parts-DEVICE.json, or with --draws records/parts-draws-DEVICE.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ewavit.core import RandomPartition
from ewavit.core.experts import ExpertLinear
from ewavit.study.bench import interval_of_median
from ewavit.training.processes import keep_freed_memory
from records import write_record

Ways = dict[str, Callable[[], object]]


def draws(tokens: int, experts: int, layers: int, device: str) -> Ways:
    """Partitions for all layers of one step."""
    partition = RandomPartition(experts)

    def each_its_own() -> None:
        for _ in range(layers):
            partition.draw(tokens, device)

    def from_the_global_generator() -> None:
        for _ in range(layers):
            order = torch.randperm(tokens, device=device)
            torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=device))

    step = torch.zeros((), dtype=torch.int64, device=device)

    def hashed() -> None:
        for layer in range(layers):
            mixed = torch.arange(tokens, device=device) + (step + layer) * 0x9E3779B1
            for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
                mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
            order = mixed.argsort()
            torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=device))
        step.add_(1)

    def sorting() -> None:
        for _ in range(layers):
            torch.rand(tokens, device=device).argsort()

    return {
        "a draw per layer": each_its_own,
        "from the global generator": from_the_global_generator,
        "sorting hashed numbers": hashed,
        "sorting random numbers": sorting,
        "one draw for all layers": lambda: partition.draw(tokens, device),
        "one batched sort": lambda: torch.rand(layers, tokens, device=device).argsort(1),
    }


def moves(x: Tensor, experts: int) -> Ways:
    """There and back, forward and backward, of one layer's tokens; a copy of them for comparison."""
    partition = RandomPartition(experts)
    grad = torch.randn_like(x)

    def there_and_back() -> None:
        block, state = partition.dispatch(x)
        partition.combine(block, state).backward(grad)
        x.grad = None

    return {"copy": lambda: x.detach().clone(), "dispatch, combine, backward": there_and_back}


def multiplications(x: Tensor, hidden: int, experts: int) -> Ways:
    """One layer of the FFN, forward and backward, into gradients that are made anew as in training."""
    dim = x.shape[1]
    layer = ExpertLinear(torch.nn.Linear(dim, hidden), experts).to(x.device, x.dtype)
    weight = torch.randn(hidden, dim, device=x.device, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(hidden, device=x.device, dtype=x.dtype, requires_grad=True)
    weights, biases = layer.parameters()
    block = x.view(experts, -1, dim)
    grad = torch.randn(len(x), hidden, device=x.device, dtype=x.dtype)
    split = grad.view(experts, -1, hidden)

    def loop() -> Tensor:
        each = zip(block, weights.unbind(), biases.unbind(), strict=True)
        return torch.stack([F.linear(*of_one) for of_one in each])

    def anew(multiply: Callable[[], Tensor], grad: Tensor) -> Callable[[], None]:
        def there_and_back() -> None:
            for parameter in (weight, bias, weights, biases):
                parameter.grad = None
            multiply().backward(grad)

        return there_and_back

    return {
        "dense": anew(lambda: F.linear(x, weight, bias), grad),
        "batched": anew(lambda: layer(block), split),
        "loop over experts": anew(loop, split),
    }


def averagings(dim: int, hidden: int, experts: int, layers: int, device: str) -> Ways:
    """Eq. 6 on all experts of a model, as stacked tensors."""
    shapes = [(hidden, dim), (hidden,), (dim, hidden), (dim,)] * layers
    stacks = [torch.randn(experts, *shape, device=device) for shape in shapes]
    weight = 0.1

    def by_stack() -> None:
        for stack in stacks:
            stack.lerp_(stack.mean(0), weight)

    def by_expert() -> None:
        each = [[stack[i] for stack in stacks] for i in range(experts)]
        mean = torch._foreach_add(each[0], each[1])
        for expert in each[2:]:
            torch._foreach_add_(mean, expert)
        torch._foreach_div_(mean, experts)
        for expert in each:
            torch._foreach_lerp_(expert, mean, weight)

    compiled = torch.compile(by_stack)
    return {"stack by stack": by_stack, "expert by expert": by_expert, "compiled": compiled}


def medians(ways: Ways, rounds: int, synchronize: Callable[[], None]) -> dict[str, dict[str, object]]:
    """Interleaved times of several ways, in milliseconds, and over the first one's."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(3 + rounds):
        for name, way in ways.items():
            synchronize()
            begun = time.perf_counter()
            way()
            synchronize()
            if number >= 3:
                seconds[name].append(time.perf_counter() - begun)
    first = np.array(next(iter(seconds.values())))
    result = {}
    for name, values in seconds.items():
        ratio = np.array(values) / first
        milliseconds = float(np.median(values) * 1e3)
        low, high = interval_of_median(ratio)
        result[name] = {"ms": milliseconds, "ratio": float(np.median(ratio)), "interval": [low, high]}
        print(
            f"  {name:28} {milliseconds:9.3f} ms  {np.median(ratio):7.3f} [{low:.3f}, {high:.3f}]", flush=True
        )
    return result


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256 * 197 // 4 * 4 if on_gpu else 64 * 65)
    parser.add_argument("--dim", type=int, default=768 if on_gpu else 192)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draws", action="store_true", help="the draws alone, into a record of their own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = "cuda" if on_gpu else "cpu"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    dtype = torch.bfloat16 if on_gpu else torch.float32
    hidden = 4 * args.dim
    x = torch.randn(args.tokens, args.dim, device=device, dtype=dtype, requires_grad=True)
    groups = {
        f"draw, {args.layers} layers": draws(args.tokens, args.experts, args.layers, device),
        "move, one layer": moves(x, args.experts),
        "multiply, one of an FFN's two matrices": multiplications(x.detach(), hidden, args.experts),
        f"average, {args.layers} layers": averagings(args.dim, hidden, args.experts, args.layers, device),
    }
    result = {}
    if args.draws:
        groups = dict(list(groups.items())[:1])
    for title, ways in groups.items():
        print(title)
        result[title] = medians(ways, args.rounds, synchronize)
    write_record(f"parts-{'draws-' if args.draws else ''}{device}", vars(args), result)


if __name__ == "__main__":
    main()
