"""What EWA costs in training: whole steps of several models, interleaved in one process.

Every round takes one step of each model, in alternating order, so that whatever else the machine does hits
all of them; figures are medians, and ratios are medians of the per-round ratios with a bootstrap interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ewavit.core.averaging import ExpertAveraging
from ewavit.data.batches import Data
from ewavit.tasks.choice import task_for
from ewavit.training.building import (
    build_optimizer,
    expand_by_recipe,
    expert_averaging,
    model_inputs,
    model_settings,
    set_grad_checkpointing,
)
from ewavit.training.processes import keep_freed_memory
from ewavit.training.recipe import Recipe

PARTS = ("forward", "backward", "optimizer", "averaging")
WARM_UP = 3  # rounds that are not counted; the first one compiles


@dataclass
class Trainee:
    """A model in training mode on its device, with its optimizer and, if it is a mixture, its averaging."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaging: ExpertAveraging | None = None


@dataclass
class Times:
    """What was measured of one model; `seconds[part]` has one entry per round, `step` is their sum.

    `peak_bytes` is the most that a step allocated on a GPU above the resting state; `first_step`, in seconds,
    has the compilation in it.
    """

    seconds: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    first_step: float = 0.0
    activation_bytes: int = 0
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Ratio:
    """A part's time in milliseconds, and over the reference's with a 95 % interval.

    The averaging, which a dense model lacks, is given as a share of its own model's whole step.
    """

    ms: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Bench:
    """Dense and expanded training of one recipe, part by part. Memory is in bytes."""

    model: str
    images: str
    device: str
    rounds: int
    dense: dict[str, Ratio]
    ewa: dict[str, Ratio]
    dense_activation_bytes: int
    ewa_activation_bytes: int
    dense_first_step: float
    ewa_first_step: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.images}, {self.device}; medians of {self.rounds} rounds",
            f"{'part':10} {'dense ms':>10} {'EWA ms':>10} {'ratio':>8}  95 % interval",
        ]
        for part, ours in self.ewa.items():
            unit = "  of the step" if part == "averaging" else ""
            lines.append(
                f"{part:10} {self.dense[part].ms:10.2f} {ours.ms:10.2f} {ours.ratio:8.4f}  "
                f"{ours.low:.4f} to {ours.high:.4f}{unit}"
            )
        dense, experts = self.dense_activation_bytes, self.ewa_activation_bytes
        lines += [
            f"{'activations':10} {dense / 2**20:9.1f} {experts / 2**20:10.1f} {experts / dense:8.4f}  "
            "MiB kept for the backward pass",
            f"{'first step':10} {self.dense_first_step:9.2f}s {self.ewa_first_step:9.2f}s",
        ]
        return "\n".join(lines)


def bench(recipe: Recipe, rounds: int = 20, data: Data | None = None) -> Bench:
    """Measure the training steps of a recipe's mixture against those of its dense model, on random images.

    Args:
        recipe: model, experts, batch size, optimizer, precision, compilation and checkpointing count.
        rounds: steps of each model that are counted.
        data: what the model is for; without it the images that timm's weights were made for.

    Raises:
        EwavitError: what `train` would refuse in the model and its mixtures.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = model_inputs(recipe, data)
    name, kwargs = model_settings(recipe, inputs)
    task = task_for(recipe.data, recipe.task)

    def trainee(experts: bool) -> Trainee:
        torch.manual_seed(recipe.seed)
        model, _ = task.build_model(name, inputs, **kwargs)
        if recipe.grad_checkpointing:
            set_grad_checkpointing(model)
        if experts:
            expand_by_recipe(model, recipe, inputs.sample())
        model.to(device).train()
        averaging = expert_averaging(model, recipe, updates_per_epoch=1) if experts else None
        return Trainee(model, build_optimizer(model, recipe), averaging)

    images = torch.randn_like(inputs.sample(recipe.batch_size).to(device))
    dense_model, mixture = trainee(False), trainee(True)
    with torch.no_grad():
        outputs = dense_model.model(images)
    shape = (
        len(outputs),
        *outputs.shape[2:],
    )  # one label for each input, or for each of its pixels or points
    labels = torch.randint(inputs.num_classes, shape, device=device)
    precision = {"bfloat16": torch.bfloat16, "float16": torch.float16}[recipe.amp_dtype]
    times = measure(
        {"dense": dense_model, "ewa": mixture},
        images,
        labels,
        rounds=rounds,
        amp_dtype=precision if recipe.amp else None,
        compile=recipe.compile,
        loss=task.loss,
    )
    dense, ewa = times["dense"], times["ewa"]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return Bench(
        name, f"{recipe.batch_size} {inputs.kind} of {inputs.size}", where, rounds,
        ratios(dense, dense), ratios(ewa, dense), dense.activation_bytes, ewa.activation_bytes,
        dense.first_step, ewa.first_step,
    )  # fmt: skip


def measure(
    trainees: Mapping[str, Trainee],
    images: Tensor,
    labels: Tensor,
    *,
    rounds: int,
    amp_dtype: torch.dtype | None = None,
    compile: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, Times]:
    """Take training steps of every model in turn.

    Args:
        trainees: by name; all on the images' device.
        images, labels: one batch, used in every step.
        rounds: steps of each model that are counted, after a few that are not.
        amp_dtype: autocast to this precision.
        compile: `torch.compile` each model first.
        loss: from outputs and labels.

    Returns:
        Times by name. Activation bytes are counted before compiling, which may keep less.
    """
    keep_freed_memory()
    times = {name: Times() for name in trainees}
    clock = _CudaClock if images.is_cuda else _Clock

    def loss_of(model: nn.Module) -> Tensor:
        with torch.autocast(images.device.type, amp_dtype) if amp_dtype else nullcontext():
            output: Tensor = model(images)
            return loss(output.float(), labels)

    for name, trainee in trainees.items():
        times[name].activation_bytes = activation_bytes(trainee.model, loss_of)
        trainee.optimizer.zero_grad()
        if compile:
            trainee.model.compile()
    counted: dict[str, list[list[float]]] = {name: [] for name in trainees}
    for number in range(WARM_UP + rounds):
        for name in list(trainees)[:: 1 if number % 2 else -1]:
            begun = time.perf_counter()
            seconds, peak = _step(trainees[name], loss_of, clock())
            if number == 0:
                times[name].first_step = time.perf_counter() - begun
            if number >= WARM_UP:
                counted[name].append(seconds)
                times[name].peak_bytes = peak
    for name, rows in counted.items():
        columns = np.array(rows)
        times[name].seconds = {part: columns[:, i] for i, part in enumerate(PARTS)} | {"step": columns.sum(1)}
    return times


def ratios(times: Times, reference: Times) -> dict[str, Ratio]:
    """Each part of a model's step over the reference's, and the averaging over its own step."""
    result = {}
    for part, seconds in times.seconds.items():
        below = times.seconds["step"] if part == "averaging" else reference.seconds[part]
        ratio = seconds / below
        low, high = interval_of_median(ratio)
        result[part] = Ratio(float(np.median(seconds) * 1e3), float(np.median(ratio)), low, high)
    return result


def interval_of_median(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _step(
    trainee: Trainee, loss_of: Callable[[nn.Module], Tensor], clock: _Clock
) -> tuple[list[float], int | None]:
    """One training step: seconds of its parts, and the bytes it allocated at most."""
    clock.mark()
    loss = loss_of(trainee.model)
    clock.mark()
    torch.autograd.backward(loss)
    clock.mark()
    trainee.optimizer.step()
    trainee.optimizer.zero_grad()
    clock.mark()
    if trainee.averaging is not None:
        trainee.averaging.step()
    clock.mark()
    return clock.read()


class _Clock:
    """Times between marks, on a CPU."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def read(self) -> tuple[list[float], int | None]:
        return np.diff(self.marks).tolist(), None


class _CudaClock(_Clock):
    """Times between marks on the GPU's own clock, so that the queue is never drained within a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.cuda.synchronize()
        self.resting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.marks.append(event)

    def read(self) -> tuple[list[float], int | None]:
        torch.cuda.synchronize()
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        peak = torch.cuda.max_memory_allocated() - self.resting
        return [start.elapsed_time(end) / 1e3 for start, end in pairs], peak


def activation_bytes(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters left out; gradients are left behind."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model)
    total = sum(kept.values())
    torch.autograd.backward(loss)
    return total
