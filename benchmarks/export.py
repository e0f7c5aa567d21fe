"""How fast, and in how much memory, does `ewavit export` collapse a large checkpoint file?

    python benchmarks/export.py

Writes a checkpoint of the expanded model's shapes with random values, then collapses it, each time in a
process of its own and beside a plain copy of the same file. Both read from the disk, not from its cache, and
are finished when all is on the disk (fsync). MB/s count what is read; `peak` is the memory above
that of the process before the call, the bound the two largest tensors and 200 MB.
Writes records/export-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import timm
import torch

import ewavit as ewa
from records import write_record

ITEM = 4  # bytes of a float32
HEADROOM = 200_000_000  # bytes
COLLAPSE = """
import re, sys, time
import torch, ewavit as ewa
torch.zeros(8, 4096).mean(0)
status = lambda: open("/proc/self/status").read()  # ru_maxrss would be the parent's too
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status())[1])
before, begun = peak(), time.perf_counter()
ewa.collapse_checkpoint(sys.argv[1], sys.argv[2])
print(time.perf_counter() - begun, peak() - before)
"""


def write_expanded(
    file: Path, model: str, num_experts: int, select: str
) -> tuple[list[tuple[int, ...]], int]:
    """Write the checkpoint; the shapes of its tensors and the number of mixtures."""
    dense = timm.create_model(model)
    chosen = {ffn.name for ffn in ewa.surgery.select_ffns(dense, select)}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in dense.state_dict().items():
        owner = next((name for name in chosen if key.startswith(f"{name}.")), None)
        if owner is None:
            shapes[key] = tuple(value.shape)
        else:
            shapes[f"{owner}.experts.ffn{key.removeprefix(owner)}"] = (num_experts, *value.shape)
    header, end = {}, 0
    for key in sorted(shapes):
        begin, end = end, end + ITEM * prod(shapes[key])
        header[key] = {"dtype": "F32", "shape": shapes[key], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for key in sorted(shapes):
            handle.write(torch.randn(shapes[key]).numpy())
        os.fsync(handle.fileno())
    return list(shapes.values()), len(chosen)


def forget(file: Path) -> None:
    """Drop a file from the disk's cache."""
    with file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Time of a copy that is on the disk in the end."""
    forget(source)
    begun = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as handle:
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - begun
    target.unlink()
    return seconds


def collapse_seconds(source: Path, target: Path) -> tuple[float, int]:
    """Time and peak memory of `collapse_checkpoint` in a process of its own."""
    forget(source)
    command = [sys.executable, "-c", COLLAPSE, str(source), str(target)]
    seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), int(peak)


def measure(args: argparse.Namespace, select: str, folder: Path) -> dict[str, Any]:
    """The figures of one choice of FFNs."""
    source, target = folder / "expanded.safetensors", folder / "plain.safetensors"
    shapes, mixtures = write_expanded(source, args.model, args.experts, select)
    size = source.stat().st_size
    copies, collapses = [], []
    for _ in range(args.repeats):
        copies.append(copy_seconds(source, folder / "copy"))
        collapses.append(collapse_seconds(source, target))
    seconds = statistics.median(each for each, _ in collapses)
    copy = statistics.median(copies)
    return {
        "mixtures": mixtures,
        "source_mb": size / 1e6,
        "target_mb": target.stat().st_size / 1e6,
        "seconds": seconds,
        "mb_per_second": size / 1e6 / seconds,
        "copy_mb_per_second": size / 1e6 / copy,
        "speed_over_copy": copy / seconds,
        "all_seconds": [each for each, _ in collapses],
        "all_copy_seconds": copies,
        "peak_mb": max(peak for _, peak in collapses) / 1e6,
        "bound_mb": (HEADROOM + ITEM * sum(sorted(map(prod, shapes))[-2:])) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the default is the system's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {}
    for select in ("alternate", "all"):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            result[select] = found = measure(args, select, Path(folder))
        print(f"{select:10} {found['source_mb']:7,.0f} MB in, {found['target_mb']:5,.0f} MB out, "
              f"{found['seconds']:5.1f} s, {found['mb_per_second']:5,.0f} MB/s "
              f"({found['speed_over_copy']:.2f} x a copy's), peak {found['peak_mb']:.0f} MB "
              f"(bound {found['bound_mb']:.0f})", flush=True)  # fmt: skip
    write_record("export-cpu", vars(args), result)


if __name__ == "__main__":
    main()
