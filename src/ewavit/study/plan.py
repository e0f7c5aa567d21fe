"""What a recipe will make of a model, and what it costs, before anything is trained."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ewavit.core.ffn import FFN, find_ffns, select_ffns
from ewavit.core.moe import moe_layers
from ewavit.core.surgery import summary
from ewavit.data.batches import Data
from ewavit.study.bench import activation_bytes
from ewavit.study.scaling import Work, check_devices, table
from ewavit.tasks.choice import task_for
from ewavit.training.building import (
    expand_by_recipe,
    ffn_input_shapes,
    model_inputs,
    model_settings,
    set_grad_checkpointing,
    units_by_layer,
)
from ewavit.training.recipe import Recipe

BYTES = 4  # of a float32
# Float32 values read or written per extra expert parameter in a step: the optimizer (AdamW reads the weight,
# gradient and two moments, writes three) and clearing the gradient; the averaging (reads twice, writes once).
ACCESSES_PER_PARAMETER, ACCESSES_OF_AVERAGING = 7 + 1, 3
SLOW = 1.05  # expected step over the dense one above which the plan gives advice
MOVES_PER_TOKEN = 4  # into the experts and back, forward and backward; each reads and writes


@dataclass(frozen=True)
class Plan:
    """The plan of a run. FLOPs are of one image's forward pass, a multiply-add counted as two."""

    model: str
    images: str  # what it is for: size, channels, classes
    num_experts: int
    candidates: tuple[dict[str, str], ...]  # name, class, verdict
    dense_parameters: int
    training_parameters: int
    dense_optimizer_bytes: int
    training_optimizer_bytes: int
    forward_flops_per_image: int  # dense, and of a mixture dealt at random
    routed_flops_per_image: int | None  # with a router, whose experts have spare room
    router_parameters: int
    batch_size: int
    expected_step_ratio: float
    advice: str = ""  # if the step is expected to be slow because experts have few tokens
    devices: int | None = None
    layouts: tuple[tuple[str, ...], ...] = ()  # a row of titles, then what each device needs in each layout

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def __str__(self) -> str:
        width = {key: max((len(row[key]) for row in self.candidates), default=0) for key in ("name", "class")}
        lines = [f"{self.model} for {self.images}; experts per mixture: {self.num_experts}"]
        for row in self.candidates:
            columns = (row["name"].ljust(width["name"]), row["class"].ljust(width["class"]), row["verdict"])
            lines.append("  " + "  ".join(columns))
        dense, training = self.dense_optimizer_bytes / 2**20, self.training_optimizer_bytes / 2**20
        flops = self.forward_flops_per_image / 1e9
        where, routed = "in training and deployed", []
        if self.routed_flops_per_image is not None:
            where = "dense"
            gflops, parameters = self.routed_flops_per_image / 1e9, self.router_parameters
            routed = [f"routed       {gflops:>12.3f} GFLOPs an image, {parameters:,} parameters of routers"]
        lines += [
            f"parameters   {self.dense_parameters:>12,} dense  {self.training_parameters:>12,} in training",
            f"optimizer    {dense:>8,.1f} MiB dense  {training:>8,.1f} MiB in training (AdamW's two moments)",
            f"forward      {flops:>12.3f} GFLOPs an image (a multiply-add is two), {where}",
            *routed,
            f"step time    {self.expected_step_ratio:>12.3f} x dense at {self.batch_size} a step, "
            "at best, by this machine's rates; ewavit bench measures it",
            *([f"advice       {self.advice}"] if self.advice else []),
        ]
        if self.layouts:
            widths = [max(map(len, column)) for column in zip(*self.layouts, strict=True)]
            lines.append(
                f"each of {self.devices} devices, bf16 with AdamW (docs/scaling.md says what is left out)"
            )
            lines += [
                f"  {row[0].ljust(widths[0])}"
                + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
                for row in self.layouts
            ]
        return "\n".join(lines)


def plan(recipe: Recipe, data: Data | None = None, devices: int | None = None) -> Plan:
    """Find the FFNs that a recipe expands and what that costs, without training.

    Args:
        recipe: the settings.
        data: what the model is for; without it the images and classes that timm's weights were made for.
        devices: also what each of so many would need, in each layout of experts over devices.

    Raises:
        EwavitError: unknown model, nothing to expand, more experts than units in a batch, or a router, which
            the forms for many devices do not know.
    """
    if devices is not None:
        check_devices(devices, recipe.router)
    inputs = model_inputs(recipe, data)
    name, kwargs = model_settings(recipe, inputs)
    model, _ = task_for(recipe.data, recipe.task).build_model(name, inputs, **kwargs)
    sample = inputs.sample()
    chosen = select_ffns(model, recipe.select, recipe.unit) if recipe.experts > 1 else []
    names = {ffn.name for ffn in chosen}
    units = units_by_layer(model, chosen, sample, recipe.unit)
    moved = sum(shape.numel() for shape in ffn_input_shapes(model, chosen, sample).values())
    candidates = tuple(
        {
            "name": ffn.name or "the model",
            "class": ffn.class_name,
            "verdict": _verdict(ffn.name in names, ffn.reason),
        }
        for ffn in (chosen if "" in names else find_ffns(model))
    )
    flops = _forward_flops(model, sample)
    dense = sum(parameter.numel() for parameter in model.parameters())
    layouts: tuple[tuple[str, ...], ...] = ()
    if devices is not None:
        work = _work(model, chosen, sample, dense, flops, recipe.grad_checkpointing)
        layouts = tuple(
            table(
                work, devices, num_experts=recipe.experts, batch_size=recipe.batch_size,
                checkpointing=recipe.grad_checkpointing,
            )
        )  # fmt: skip
    expand_by_recipe(model, recipe, sample)
    training = summary(model).parameters
    routers = [p.numel() for moe in moe_layers(model).values() for p in moe.dispatcher.parameters()]
    routed_flops = _forward_flops(model, sample) if routers else None
    accesses = ACCESSES_PER_PARAMETER + ACCESSES_OF_AVERAGING / recipe.average_every
    images = str(inputs) if data is not None else f"{inputs} (no --data given: planned for timm's weights)"
    matmul, copy = _rates()
    seconds = 3 * flops * recipe.batch_size / matmul
    of_experts = BYTES * accesses * (training - dense) / copy / seconds
    others = BYTES * 2 * MOVES_PER_TOKEN * moved * recipe.batch_size / copy / seconds
    ratio = (routed_flops or flops) / flops + of_experts + others
    return Plan(
        name, images, recipe.experts, candidates, dense, training, 2 * BYTES * dense,
        2 * BYTES * training, flops, routed_flops, sum(routers), recipe.batch_size,
        ratio, _advice(recipe, units, ratio, of_experts), devices, layouts,
    )  # fmt: skip


def _advice(recipe: Recipe, units: dict[str, int], ratio: float, of_experts: float) -> str:
    """What to change where experts have few tokens for their parameters; empty if the step is not slow.

    Args:
        recipe: the settings.
        units: of one image, by layer.
        ratio: expected step over the dense one.
        of_experts: the part of it that the parameters of all experts but one cost.
    """
    if ratio <= SLOW or not units:
        return ""
    layer = min(units, key=units.__getitem__)
    each = units[layer] * recipe.batch_size // recipe.experts
    unit = recipe.unit if layer else "image"
    # With n experts the parameters cost (n - 1) / (N - 1) of what they cost now.
    spared = (ratio - SLOW) / of_experts * (recipe.experts - 1) if of_experts else math.inf
    fewer = math.floor(recipe.experts - spared) if spared < recipe.experts else 0
    take = f"--experts {fewer} (at most {SLOW} x dense), " if fewer > 1 else ""
    elsewhere = f", or a --select without {layer}" if min(units.values()) < max(units.values()) else ""
    return (
        f"a step has only {each} {unit}s for each expert of {layer or 'the model'}: take {take}"
        f"a larger --batch-size{elsewhere}"
    )


def _work(
    model: nn.Module, chosen: list[FFN], sample: Tensor, parameters: int, flops: int, checkpointing: bool
) -> Work:
    """What a model asks of its devices, its activations measured on images of this shape."""

    measured = copy.deepcopy(model).train()

    def per_image() -> int:  # the third image's, without what a batch keeps once: weights in half precision
        def loss(model: nn.Module, batch: int) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                output: Tensor = model(sample.expand(batch, *sample.shape[1:]).clone())
            return output.float().sum()

        two, three = (activation_bytes(measured, partial(loss, batch=batch)) for batch in (2, 3))
        return three - two

    blocks = {ffn.block for ffn in chosen or find_ffns(model)}
    block = max(sum(p.numel() for p in model.get_submodule(name).parameters()) for name in blocks)
    plain = checkpointed = per_image()
    if checkpointing:
        set_grad_checkpointing(measured)
        checkpointed = per_image()
        checkpointed += (plain - checkpointed) // len({ffn.block for ffn in find_ffns(model)})
    return Work(
        parameters, sum(ffn.num_parameters for ffn in chosen), len(chosen), block,
        flops, plain, checkpointed,
    )  # fmt: skip


def _forward_flops(model: nn.Module, sample: Tensor) -> int:
    # Attention runs as matrix products: torch 2.11 does not count the fused one of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(sample)
    flops: int = counter.get_total_flops()
    return flops


def _verdict(chosen: bool, reason: str) -> str:
    return "becomes a mixture of experts" if chosen else reason or "stays dense: not selected"


def _rates(device: torch.device | None = None) -> tuple[float, float]:
    """This machine's float32 matmul rate (FLOP/s) and copy rate (bytes read and written per second)."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    source = torch.randn(2**24, device=device)
    target = torch.empty_like(source)
    matmul = 2 * size**3 / _seconds(lambda: torch.mm(a, b), device)
    copy = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    return matmul, copy


def _seconds(call: Any, device: torch.device) -> float:
    """The fastest of a few calls."""
    times = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)
