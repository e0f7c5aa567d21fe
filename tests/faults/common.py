"""What the fault tools share: short runs in forked processes, their settings, and their records.

A run is forked from this process, which has imported torch once, so that a start costs a moment and not
seconds. Each tool prints its figures and, with `--record`, writes records/faults-NAME.json.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "benchmarks")]

from ewavit.errors import EwavitError
from ewavit.training.loop import resume, train
from ewavit.training.processes import Interrupted
from ewavit.training.run_folder import RunFolder
from records import write_record
from runs import recipe

CLOUDS = {
    "data": "solids", "model": "point_transformer_s",
    "model_kwargs": "dim=32,depth=2,num_heads=2,num_group=8,group_size=8",
    "num_points": 64, "epochs": 2, "limit": 96, "batch_size": 32, "warmup_epochs": 1,
}  # fmt: skip
SETTINGS = {
    "plain": {},
    "EMA": {"model_ema": True},
    "router": {"router": "topk", "k": 1},
    "SWA": {"swa": 0.34, "epochs": 3},
    "TWA": {"twa": 1, "epochs": 3},
    "accumulation and amp": {"grad_accum_steps": 2, "amp": True},
    "folder with workers": {"workers": 2},
    "clouds": CLOUDS,
}
REFUSED, INTERRUPTED, TRACEBACK = 2, 3, 4


def go_on(tmp: Path, name: str, **settings: object) -> None:
    """Train a run to its end, from its checkpoint if it has one."""
    run = RunFolder(tmp / name)
    if run.has_checkpoint:
        resume(run.path)
    else:
        train(recipe(tmp, name, recovery_interval=2, **settings))


def is_finished(run: Path) -> bool:
    """Whether a run has ended: a command that resumes such a run is refused."""
    files = RunFolder(run)
    return files.is_finished and files.damage() is None


def forked(
    work: Callable[[], None], prepare: Callable[[], None] = lambda: None, log: Path | None = None
) -> int:
    """Fork a process that calls `prepare()` and `work()`; returns its process number.

    Its exit status is 0, `REFUSED` after an EwavitError or OSError, `INTERRUPTED` after a signal, `TRACEBACK`
    after anything else.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 0
    try:
        target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.setpgid(0, 0)
        torch.set_num_threads(1)
        prepare()
        work()
    except Interrupted:
        status = INTERRUPTED
    except (EwavitError, OSError) as problem:  # the command prints either in one line
        print(f"refused: {problem}", flush=True)
        status = REFUSED
    except BaseException:
        traceback.print_exc()
        status = TRACEBACK
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a process: its exit status, or minus the signal that killed it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def folder_of_images(root: Path) -> str:
    """A small folder of images, for the runs that read files with workers."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 16)):
        for number in range(count):
            file = root / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(file)
    return str(root)


def settings_of(name: str, tmp: Path) -> dict[str, object]:
    """The recipe of one of `SETTINGS`; it may need files below `tmp`."""
    settings = dict(SETTINGS[name])
    if name == "folder with workers":
        data = tmp / "images"
        settings |= {"data": folder_of_images(data) if not data.exists() else str(data), "img_size": 28}
        settings |= {"limit": None, "batch_size": 8}
    return settings


def arguments(doc: str, seed: int = 0, **defaults: int) -> argparse.Namespace:
    """The flags of a tool: `--seed`, `--record` and whole numbers with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--record", action="store_true", help="write records/faults-NAME.json")
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    return args


def report(name: str, args: argparse.Namespace, begun: float, result: dict[str, object]) -> None:
    """Print figures and keep them if that was asked for."""
    result = {**result, "minutes": round((time.monotonic() - begun) / 60, 1)}
    for key, value in result.items():
        print(f"{key}: {value}")
    if args.record:
        settings = {key: value for key, value in vars(args).items() if key != "record"}
        words = " ".join(["python", f"tests/faults/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        write_record(f"faults-{name}", settings, result, words)
