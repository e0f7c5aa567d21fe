"""How long do commands take to answer, and how many tiny runs does a comparison train in an hour?

    python benchmarks/start_up.py                         # this checkout
    python benchmarks/start_up.py --beside PATH/src       # and another one, in turn

Each command runs in a process of its own, with one thread. CPU seconds are those of the command's process:
other work on the machine changes them less than the clock. The comparison trains a small dense model for one
epoch on 200 of the bundled images, at so many seeds, one run at a time; its runs are in other processes, so
the clock counts. Writes records/start_up-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ewavit.study.bench import interval_of_median
from records import write_record

HERE = Path(__file__).parent.parent / "src"
COMMANDS = {
    "--help": ["--help"],
    "compare --seeds 1 (refused)": ["compare", "--seeds", "1"],
    "plan --devices 0 (refused)": ["plan", "--devices", "0"],
    "plan --model no-such (refused)": ["plan", "--model", "no-such"],
}
TINY = [
    "--arms", "dense", "--jobs", "1", "--quiet", "--name", "tiny", "--epochs", "1", "--limit", "200",
    "--batch-size", "100", "--model", "vit_tiny_patch16_224",
    "--model-kwargs", "patch_size=7,depth=2,embed_dim=32,num_heads=2",
]  # fmt: skip


def seconds_of(words: list[str], source: Path) -> tuple[float, float]:
    """Seconds of the clock and of the CPU of `ewavit` of this source with these words."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        used, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "ewavit.cli", *words], cwd=folder, env=environment, capture_output=True
        )
        taken, now = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2):
        raise SystemExit(done.stderr.decode())
    return taken, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, help="src folder of another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=8, help="runs of the comparison")
    args = parser.parse_args()
    commands = {**COMMANDS, "compare": ["compare", *TINY, "--seeds", str(args.seeds)]}
    sources = {"here": HERE, **({"beside": args.beside.resolve()} if args.beside else {})}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for _ in range(args.rounds):
        for name, words in commands.items():
            for which, source in sources.items():
                found.setdefault(name, {}).setdefault(which, []).append(seconds_of(words, source))
    result = {}
    for name, by_source in found.items():
        counted = 0 if name == "compare" else 1  # the clock, or the CPU
        seconds = {which: np.array(rows)[:, counted] for which, rows in by_source.items()}
        result[name] = {which: float(np.median(values)) for which, values in seconds.items()}
        said = ", ".join(f"{which} {value:.2f} s" for which, value in result[name].items())
        if args.beside:
            ratio = seconds["here"] / seconds["beside"]
            result[name] |= {"ratio": float(np.median(ratio)), "interval": interval_of_median(ratio)}
            said += f", ratio {result[name]['ratio']:.3f} {result[name]['interval']}"
        if name == "compare":
            result[name]["runs_per_hour"] = 3600 * args.seeds / result[name]["here"]
        print(f"{name:32} {said}", flush=True)
    settings = {"rounds": args.rounds, "seeds": args.seeds}
    write_record("start_up-cpu", settings, {"seconds": result, "all": found})


if __name__ == "__main__":
    main()
