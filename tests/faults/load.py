"""Long and large: memory, file handles and speed over many steps, a million files, many runs.

python tests/faults/load.py --steps 200000 --files 1000000 --runs 200 --record
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from common import arguments, ended, forked, report

from ewavit.compare.arms import make_arms
from ewavit.compare.compare import compare
from ewavit.data.options import DataOptions
from ewavit.training.loop import TrainingRun, train
from ewavit.training.opening import open_data
from runs import recipe

TINIEST = {
    "model_kwargs": "patch_size=14,embed_dim=8,depth=1,num_heads=1", "select": "all", "batch_size": 2,
    "limit": 2000, "warmup_epochs": 0, "ramp": 0.1,
}  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many_steps(tmp: Path, steps: int) -> dict[str, object]:
    """Train a tiny model; what it took in memory, handles and time, after a warm-up of a tenth."""
    samples: list[tuple[int, int, float]] = []
    every = max(steps // 200, 1)
    original = TrainingRun.after_step

    def observed(run: TrainingRun) -> None:
        original(run)
        if run.progress.update % every == 0:
            samples.append((resident(), len(os.listdir("/proc/self/fd")), time.monotonic()))

    epochs = max(steps // 1000, 1)

    def work() -> None:
        TrainingRun.after_step = observed  # type: ignore[method-assign]
        train(recipe(tmp, "long", **{**TINIEST, "epochs": epochs, "recovery_interval": 250}))
        rows = samples[len(samples) // 10 :]
        gaps = [later[2] - earlier[2] for earlier, later in pairwise(rows)]
        half = len(gaps) // 2
        memory, handles = [row[0] for row in rows], [row[1] for row in rows]
        found = {
            "steps": epochs * 1000,
            "resident MiB, first and last": [round(memory[i] / 2**20, 1) for i in (0, -1)],
            "growth %": round(100 * (memory[-1] / memory[0] - 1), 2),
            "file handles, least and most": [min(handles), max(handles)],
            "steps/s, first and second half": [round(every / median(g)) for g in (gaps[:half], gaps[half:])],
        }
        (tmp / "found").write_text(json.dumps(found))

    if ended(forked(work, log=tmp / "log")):
        raise SystemExit((tmp / "log").read_text()[-2000:])
    return dict(json.loads((tmp / "found").read_text()))


def many_files(tmp: Path, files: int) -> dict[str, object]:
    """Seconds to open a folder of 1,000 classes with so many images, links to one file."""
    from PIL import Image

    source = tmp / "image.png"
    Image.new("L", (8, 8)).save(source)
    for split, count in (("train", files), ("val", 1000)):
        for number in range(1000):
            folder = tmp / "large" / split / f"class {number}"
            folder.mkdir(parents=True)
            for each in range(count // 1000):
                os.link(source, folder / f"{each}.png")
    begun = time.monotonic()
    data = open_data(str(tmp / "large"), DataOptions(batch_size=8, workers=0))
    return {
        "files": files,
        "classes": data.num_classes,
        "seconds to list": round(time.monotonic() - begun, 1),
    }


def many_runs(tmp: Path, runs: int) -> dict[str, object]:
    """Minutes of a comparison of so many tiny runs."""
    base = recipe(tmp, "many", **{**TINIEST, "limit": 64, "batch_size": 32, "epochs": 1, "warmup_epochs": 0})
    begun = time.monotonic()
    result = compare(base, make_arms(["dense", "ewa"], base), seeds=runs // 2, jobs=2)
    finished = sum(len(arm.runs) for arm in result.arms)
    minutes = (time.monotonic() - begun) / 60
    return {"runs": runs, "finished": finished, "runs/hour": round(60 * finished / minutes)}


def main() -> None:
    args = arguments(__doc__, steps=20_000, files=100_000, runs=0)
    begun = time.monotonic()
    result: dict[str, object] = {}
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.exists() else None) as folder:
        tmp = Path(folder)
        if args.files:
            result["listing"] = many_files(tmp, args.files)
        if args.steps:
            result["steps"] = many_steps(tmp, args.steps)
        if args.runs:
            result["comparison"] = many_runs(tmp, args.runs)
    report("load", args, begun, result)


if __name__ == "__main__":
    main()
