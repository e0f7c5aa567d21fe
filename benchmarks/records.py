"""What every benchmark writes: its figures with command, date, versions, device and threads."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch

FOLDER = Path(__file__).parent.parent / "records"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of benchmarks that build one model; ViT-Tiny at 64x64/8, batch 64, N = 4 by default."""
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def write_record(name: str, settings: dict[str, Any], result: Any, command: str = "") -> Path:
    """Write records/NAME.json and say so; the command is this process's unless another made the figures."""
    on_gpu = torch.cuda.is_available()
    record = {
        "command": command or " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "settings": settings,
        "result": result,
    }
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}.json"
    file.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(f"wrote {file.relative_to(FOLDER.parent)}")
    return file


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
