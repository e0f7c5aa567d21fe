"""What the data path leaves of a training step: ViT-S at 32x32/4, N = 4, on images that lie in memory.

    python benchmarks/busy.py

Windows of steps that each take a new batch with everything drawn (crop, flip, RandAugment, erasing, mixup and
cutmix), in turn with windows of steps on one batch made before. The share is the time of the latter over that
of the former, so 1 where data cost nothing. On a GPU, compiled and in bfloat16, torch's profiler also tells
in which share of the former's time a kernel ran. Writes records/busy-DEVICE.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice, repeat

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ewavit.data.augmentation import Augmentation, Mix
from ewavit.data.batches import Batch, BatchPlan
from ewavit.data.in_memory import TensorData
from ewavit.data.sources import Arrays
from ewavit.study.bench import Trainee, interval_of_median
from ewavit.training.processes import keep_freed_memory
from records import write_record
from step_time import ON_CPU, ON_GPU, trainee

CLASSES = 100


def batches(batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Augmented batches of random images without end."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50 * batch_size, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, len(images))
    arrays = Arrays("random", tuple(map(str, range(CLASSES))), images, labels, images[:1], labels[:1])
    plan = BatchPlan(len(images), 1, batch_size)
    options = Augmentation(aa="rand-m9-mstd0.5", reprob=0.25)
    data = TensorData(arrays, np.arange(len(images)), plan, options, None, None, device)
    mix = Mix(0.8, 1.0, CLASSES)
    return (mix(*batch) for epoch in range(10**6) for batch in data.train_batches(epoch))


def train(trained: Trainee, source: Iterator[Batch], steps: int) -> float:
    """Seconds of so many steps; as in `ewavit train` each loss is read when the next step has begun."""
    begun, losses = time.perf_counter(), []
    for images, targets in islice(source, steps):
        with torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext():
            loss = F.cross_entropy(trained.model(images), targets)
        loss.backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        assert trained.averaging is not None
        trained.averaging.step()
        losses.append(loss.detach())
        if len(losses) > 1:
            float(losses[-2])
    float(losses[-1])
    return time.perf_counter() - begun


def kernel_share(trained: Trainee, source: Iterator[Batch], steps: int) -> float:
    """The share of the time from the first to the last kernel in which one ran."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        train(trained, source, steps)
    ranges = [event.time_range for event in profiled.events() if event.device_type == DeviceType.CUDA]
    busy = last = 0.0
    for span in sorted(ranges, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, last))
        last = max(last, span.end)
    return busy / (last - min(span.start for span in ranges))


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=(ON_GPU if on_gpu else ON_CPU)["s32"])
    parser.add_argument("--steps", type=int, default=50 if on_gpu else 2, help="of a window")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = torch.device("cuda" if on_gpu else "cpu")
    trained = trainee("s32", "ewa-4", "compiled" if on_gpu else "eager", device.type)
    if on_gpu:
        trained.model.compile()
    new = batches(args.batch_size, device)
    same = repeat(next(new))
    for source in (new, same):
        train(trained, source, 5)
    seconds = np.array(
        [[train(trained, source, args.steps) for source in (new, same)] for _ in range(args.rounds)]
    )
    share = seconds[:, 1] / seconds[:, 0]
    rates = args.steps * args.batch_size / np.median(seconds, 0)
    result = {
        "images_per_second": {"new batches": float(rates[0]), "one batch": float(rates[1])},
        "share": float(np.median(share)),
        "interval": interval_of_median(share),
    }
    told = f"{rates[0]:,.0f} images/s, {rates[1]:,.0f} on one batch"
    print(f"{told}: the model gets {np.median(share):.1%} of a step")
    if on_gpu:
        result["kernel_share"] = kernel_share(trained, new, args.steps)
        print(f"a kernel ran in {result['kernel_share']:.1%} of the time")
    write_record(f"busy-{device.type}", vars(args), result)


if __name__ == "__main__":
    main()
