"""`ewavit doctor`: whether this machine can train: packages, devices, threads, folders."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ewavit import __version__
from ewavit.errors import first_line

SUMMARY = "say whether this machine can train"
DESCRIPTION = (
    "Check packages, devices, threads and folders. Exit status 1: something is wrong; its line says what "
    "to do."
)
NEEDED = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "safetensors",
    "torchmetrics",
    "numpy",
    "pillow",
    "onnxruntime",
)
EXTRAS = {  # what an extra of ewavit brings, by its name in [project.optional-dependencies]
    "points": ("h5py", "trimesh"),
    "compare": ("scipy", "statsmodels"),
    "ray": ("ray",),
    "hf": ("transformers",),
    "lightning": ("lightning",),
    "smp": ("segmentation-models-pytorch",),
}
LEAST_FREE = 5  # GB of free disk below which a line warns
Check = tuple[str, bool, str, str]  # name, whether it is fine, what was found, what to do


def checks(output: Path) -> Iterator[Check]:
    """Everything that is looked at. torch is imported here, and what is wrong with it is a line."""
    yield "python", True, f"{platform.python_version()} on {platform.platform()}", ""
    yield "ewavit", True, __version__, ""
    for name in NEEDED:
        found = _version(name)
        remedy = "" if found else "pip install 'ewavit[train]'"
        yield name, found is not None, found or "not installed", remedy
    yield from _torch()
    yield _threads()
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if _version(name) is None]
        found = ", ".join(f"{name} {_version(name) or 'not installed'}" for name in packages)
        more = f"; to use it: pip install 'ewavit[{extra}]'" if missing else ""
        yield f"extra {extra}", True, found + more, ""
    for folder in dict.fromkeys((output, Path(tempfile.gettempdir()))):
        yield _writable(folder)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch() -> Iterator[Check]:
    """torch starts, its GPU is seen, and torchvision's operators are for this torch."""
    if find_spec("torch") is None:
        return
    try:
        import torch
    except Exception as problem:  # a broken installation raises anything
        yield "import torch", False, first_line(problem), "install torch again, in a new environment"
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    yield "devices", True, f"{', '.join(names) or 'CPU alone'}; torch is {built}", ""
    try:
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        yield "torchvision's operators", True, "work with this torch", ""
    except Exception as problem:
        remedy = "install torch and torchvision together, in one pip command, from one index"
        yield "torchvision's operators", False, first_line(problem), remedy


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    found = f"{cores} usable cores" + "".join(f", {name}={value}" for name, value in given.items())
    wrong = [name for name, value in given.items() if not value.isdecimal() or not 0 < int(value) <= cores]
    remedy = f"set {wrong[0]} to a number from 1 to {cores}, or leave it out" if wrong else ""
    return "threads", not wrong, found, remedy


def _writable(folder: Path) -> Check:
    """Whether a file can be written in a folder, or in the nearest one above that is there, and the room."""
    try:
        place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        with tempfile.NamedTemporaryFile(dir=place):
            free = shutil.disk_usage(place).free / 1e9
    except OSError as problem:
        remedy = "choose another --output, or make room"
        return f"folder {folder}", False, f"cannot be written ({problem.strerror or problem})", remedy
    fine = free >= LEAST_FREE
    remedy = "" if fine else "make room: a checkpoint of a ViT-B with experts takes more than a gigabyte"
    return f"folder {folder}", fine, f"writable, {free:.0f} GB free", remedy


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit doctor`."""
    parser.add_argument(
        "--output", type=Path, default=Path("runs"), help="folder of runs to check (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print what was found; 1 if something is wrong."""
    found = list(checks(options.output))
    wrong = sum(not fine for _, fine, _, _ in found)
    if options.json:
        keys = ("name", "fine", "found", "remedy")
        listed: list[dict[str, Any]] = [dict(zip(keys, check, strict=True)) for check in found]
        print(json.dumps({"checks": listed, "wrong": wrong}, indent=2))
        return int(wrong > 0)
    width = max(len(name) for name, *_ in found)
    for name, fine, what, remedy in found:
        line = f"{'ok   ' if fine else 'WRONG'} {name:<{width}}  {what}"
        print(line + (f": {remedy}" if remedy else ""))
    print(f"{wrong} of {len(found)} checks found something wrong" if wrong else "all is well")
    sys.stdout.flush()
    return int(wrong > 0)
