"""What training large ViTs asks of 8 to 4,096 devices by `ewavit.study.scaling`; its checks.

    python benchmarks/scaling.py

Writes records/scaling.json and, from it, the tables of docs/scaling.md. Parameters and FLOPs are compared
with torch's counts of the real models on the meta device, activations with what autograd keeps.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from ewavit.study.bench import activation_bytes
from ewavit.study.scaling import Cost, ViT, Work, cost, layouts
from records import FOLDER, write_record

SIZES = {
    "ViT-L/16": {"depth": 24, "dim": 1024, "heads": 16, "patch": 16},
    "ViT-H/14": {"depth": 32, "dim": 1280, "heads": 16, "patch": 14},
    "ViT-22B-like/14": {"depth": 48, "dim": 6144, "heads": 48, "patch": 14},
}
SMALL = {"depth": 4, "dim": 192, "heads": 3, "patch": 8, "img_size": 64, "num_classes": 100}
DEVICES = (8, 64, 512, 4096)
EXPERTS, BATCH = 4, 32
PAGE = FOLDER.parent / "docs" / "scaling.md"


def real(depth: int, dim: int, heads: int, patch: int, **more: int) -> VisionTransformer:
    """timm's model of a size."""
    return VisionTransformer(depth=depth, embed_dim=dim, num_heads=heads, patch_size=patch, **more)


def counted(size: dict[str, int]) -> dict[str, int]:
    """Parameters and forward FLOPs of an image, of the real model on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = real(**size).eval()
        model(torch.empty(1, 3, size.get("img_size", 224), size.get("img_size", 224)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "forward_flops": counter.get_total_flops()}


def kept(half: bool, images: int = 64) -> float:
    """Bytes that autograd keeps for each further image of a small model on the CPU."""
    model = real(**SMALL).train()

    def loss(model: torch.nn.Module, batch: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(torch.randn(batch, 3, SMALL["img_size"], SMALL["img_size"])).float().sum()

    few, many = (activation_bytes(model, lambda m, n=n: loss(m, n)) for n in (images, 2 * images))
    return (many - few) / images


def forms() -> dict[str, Any]:
    """The part of the record that follows from the code alone."""
    works: dict[str, Work] = {name: ViT(**size).work() for name, size in SIZES.items()}
    return {
        "work": {name: asdict(work) for name, work in works.items()},
        "cost": {
            name: {
                str(devices): {
                    layout: asdict(cost(work, layout, devices, num_experts=EXPERTS, batch_size=BATCH))
                    for layout in layouts(devices)
                }
                for devices in DEVICES
            }
            for name, work in works.items()
        },
    }


def checks() -> list[tuple[str, float, float]]:
    """What was checked: the closed form's figure and the counted one."""
    rows: list[tuple[str, float, float]] = []
    for name, size in SIZES.items():
        work = ViT(**size).work()
        rows += [(f"{name}: {what}", getattr(work, what), value) for what, value in counted(size).items()]
    for half, precision in ((False, "float32"), (True, "bfloat16 autocast")):
        form = ViT(**SMALL).work(half=half).activation_bytes
        rows.append(
            (f"ViT 192 wide, 4 deep, 64x64/8: activation bytes of an image, {precision}", form, kept(half))
        )
    memory = json.loads((FOLDER / "memory-cpu.json").read_text())
    settings, dense = memory["settings"], memory["result"]["dense"]
    tiny = ViT(12, 192, 3, settings["patch_size"], img_size=settings["img_size"], num_classes=100).work(
        half=False
    )
    rows.append(("ViT-Tiny of records/memory-cpu.json: parameters", tiny.parameters, dense["parameters"]))
    rows.append(
        (
            "ViT-Tiny of records/memory-cpu.json: activation bytes of the batch",
            settings["batch_size"] * tiny.activation_bytes,
            dense["saved"],
        )
    )
    state = 16 * (memory["result"]["ewa"]["parameters"] - dense["parameters"])
    rows.append(("the same with EWA: further peak memory", state, memory["result"]["peak_difference"]))
    return rows


def page_tables(result: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/scaling.md by name, from a record's result."""
    checks = [(what, f"{x:,.0f}", f"{y:,.0f}", f"{x / y:.4f}") for what, x, y in result["checks"]]
    tables = {"checks": _table(("what", "closed form", "counted", "form / counted"), checks)}
    for name, by_devices in result["cost"].items():
        rows = [
            (devices, layout, *_in_words(Cost(**each)))
            for devices, by_layout in by_devices.items()
            for layout, each in by_layout.items()
        ]
        titles = ("devices", "layout", "GiB", "state", "working", "activations", "TFLOPs", "GB sent")
        tables[name] = _table(titles, rows)
    return tables


def _in_words(found: Cost) -> tuple[str, ...]:
    parts = (found.memory_bytes, found.state_bytes, found.working_bytes, found.activation_bytes)
    memory = (f"{each / 2**30:,.1f}" for each in parts)
    return (*memory, f"{found.flops / 1e12:,.0f}", f"{found.sent_bytes / 1e9:,.2f}")


def _table(titles: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_page(page: Path, tables: dict[str, str]) -> None:
    """Put each table between its marks."""
    text = page.read_text()
    for name, table in tables.items():
        text, count = re.subn(
            rf"(<!-- {re.escape(name)} -->\n).*?(\n<!-- end -->)",
            lambda m, t=table: m[1] + t + m[2],
            text,
            flags=re.DOTALL,
        )
        assert count == 1, name
    page.write_text(text)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    result = {**forms(), "checks": checks()}
    write_page(PAGE, page_tables(result))
    for what, form, found in result["checks"]:
        print(f"{form / found:.4f}  {what}")
    write_record("scaling", {"experts": EXPERTS, "images_per_device": BATCH, "checkpointing": True}, result)


if __name__ == "__main__":
    main()
