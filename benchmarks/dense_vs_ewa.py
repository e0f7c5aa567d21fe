"""EWA against dense training, same budget, paired by seed: same first weights, same images in the same order.

    python benchmarks/dense_vs_ewa.py --config recipes/demo.yaml --seeds 42,43,44

Runs are `ewavit train` processes of one thread, both arms of a seed at once; finished runs stay.
Prints each top-1, the mean paired difference and its 95 % interval by Student's t, and writes them to
records/dense_vs_ewa.json.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from scipy import stats

from records import write_record


def last_row(run: Path) -> dict[str, float]:
    """The last epoch of a finished run."""
    rows = list(csv.DictReader((run / "summary.csv").open()))
    return {key: float(value) for key, value in rows[-1].items()}


def finished(run: Path) -> bool:
    return (run / "model.safetensors").exists()


def start(args: argparse.Namespace, run: Path, experts: int, seed: int) -> subprocess.Popen[bytes]:
    """Start or resume one run as a process with one thread, its lines in a log beside it."""
    command = [sys.executable, "-m", "ewavit.cli", "train"]
    if (run / "checkpoint").exists():
        command += ["--resume", str(run)]
    else:
        command += ["--config", str(args.config), "--experts", str(experts), "--seed", str(seed)]
        command += ["--output", str(args.output), "--name", run.name]
    args.output.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/dense_vs_ewa"))
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]

    arms = {"dense": 1, "ewa": args.experts}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for seed in seeds:
        runs = {name: args.output / f"{name}-{seed}" for name in arms}
        started = [start(args, run, arms[name], seed) for name, run in runs.items() if not finished(run)]
        if any(process.wait() for process in started):
            raise SystemExit(f"a run of seed {seed} failed")
        for name, run in runs.items():
            rows[name].append(last_row(run))

    top1 = {name: np.array([row["eval_top1"] for row in found]) for name, found in rows.items()}
    difference = top1["ewa"] - top1["dense"]
    mean = float(difference.mean())
    half = float(stats.t.ppf(0.975, len(seeds) - 1) * difference.std(ddof=1) / len(seeds) ** 0.5)
    for name, values in top1.items():
        print(f"{name:6} top-1 {values.mean():.2f} % ({', '.join(f'{value:.2f}' for value in values)})")
    print(f"EWA - dense: {mean:+.2f} points, 95 % interval [{mean - half:+.2f}, {mean + half:+.2f}]")
    result = {
        "seeds": seeds,
        "top1": {name: values.tolist() for name, values in top1.items()},
        "last_rows": rows,
        "mean_difference": mean,
        "interval": [mean - half, mean + half],
    }
    write_record("dense_vs_ewa", {"recipe": yaml.safe_load(args.config.read_text()), **vars(args)}, result)


if __name__ == "__main__":
    main()
