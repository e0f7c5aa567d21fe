"""Numbers that are not finite, float16 that overflows, and equal runs on 1, 2 and 4 threads.

    python tests/faults/not_finite.py --record

NaN and infinity in inputs, weights, gradients and losses must stop a run as `Diverged`, and no checkpoint may
hold them. A GradScaler that skips steps must leave the averaging's count and the experts as they were. Two
equal runs must write equal bytes.
"""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import REFUSED, arguments, ended, forked, report
from torch import Tensor, nn

import ewavit as ewa
from ewavit.errors import Diverged
from ewavit.training.checkpoint import load_checkpoint
from ewavit.training.loop import TrainingRun, train
from ewavit.training.run_folder import RunFolder
from runs import recipe

BAD = (math.nan, math.inf, -math.inf)
PLACES = ("input", "weight", "gradient", "loss")
BYTES = (
    "model.safetensors", "predictions.csv", "config.json", "curves.png", "args.yaml",
    "checkpoint/model.safetensors", "checkpoint/training.safetensors",
)  # fmt: skip


def spoil(patch: pytest.MonkeyPatch, place: str, value: float, step: int) -> None:
    """Put a value into every run of this process at one step."""
    original: Callable[..., Any] = TrainingRun._forward_backward

    def forward_backward(run: TrainingRun, batches: Any) -> Tensor:
        if run.progress.update != step:
            return original(run, batches)
        weight = random.choice([p for p in run.state.model.parameters() if p.requires_grad])
        if place == "weight":
            with torch.no_grad():
                weight.view(-1)[random.randrange(weight.numel())] = value
        if place == "input":
            images, targets = next(batches)
            images.view(-1)[random.randrange(images.numel())] = value
            batches = iter([(images, targets)])
        loss: Tensor = original(run, batches)
        if place == "gradient":
            assert weight.grad is not None
            weight.grad.view(-1)[0] = value
        return loss * value if place == "loss" else loss

    patch.setattr(TrainingRun, "_forward_backward", forward_backward)


def not_finite(tmp: Path, place: str, value: float, clip: bool) -> str:
    """Train with a spoilt step; what is wrong with how it ended, or nothing."""
    name, log = f"{place} {value} {clip}", tmp / "log"
    log.unlink(missing_ok=True)
    step = random.randrange(3, 11)

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, place, value, step)
            try:
                train(recipe(tmp, name, recovery_interval=1, holdout=0.2, clip_grad=1.0 if clip else None))
            except Diverged as problem:
                print(problem, flush=True)
                os._exit(REFUSED)

    status = ended(forked(work, log=log))
    if status != REFUSED or "Traceback" in log.read_text():
        return f"{name}: status {status}: {log.read_text()[-300:]}"
    run = RunFolder(tmp / name)
    if run.model.exists():
        return f"{name}: it wrote a model"
    if run.has_checkpoint:
        checkpoint = load_checkpoint(run.path)  # refuses weights that are not finite
        if checkpoint.warning:
            return f"{name}: {checkpoint.warning}"
    return ""


class Small(nn.Module):
    """One FFN, to step by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


def overflow(steps: int) -> dict[str, object]:
    """Step with a float16 GradScaler on the CPU, gradients that overflow at random; count what is amiss."""
    model = ewa.expand(Small(), 4, select=["mlp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averaging = ewa.ExpertAveraging(model, 0.3)
    averaging.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**9, backoff_factor=0.999)
    taken = skipped = wrong = 0
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(2, 6, 8)).square().mean()
        bad = random.random() < 0.3
        scaler.scale(loss * (math.inf if bad else 1.0)).backward()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
        taken, skipped = taken + (not bad), skipped + bad
        wrong += same != bad or averaging.steps_done != taken
    return {"steps": steps, "skipped": skipped, "wrong": wrong}


def equal_runs(tmp: Path, threads: int) -> str:
    """Train twice on so many threads; what differs, or nothing."""
    for number in range(2):
        place = tmp / f"{threads}-{number}"
        place.mkdir()

        def work(place: Path = place) -> None:
            os.chdir(place)
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            kwargs = "patch_size=4,embed_dim=64,depth=2,num_heads=2"  # large enough to be shared by threads
            train(recipe(Path("."), "run", model_kwargs=kwargs, model_ema=True, limit=160, holdout=0.2))

        if status := ended(forked(work, log=tmp / "log")):
            return f"{threads} threads: status {status}: {(tmp / 'log').read_text()[-300:]}"
    first, second = (tmp / f"{threads}-{number}" / "run" for number in range(2))
    differ = [name for name in BYTES if (first / name).read_bytes() != (second / name).read_bytes()]
    return f"{threads} threads: {', '.join(differ)} differ" if differ else ""


def main() -> None:
    args = arguments(__doc__, rounds=1, steps=1000)
    begun = time.monotonic()
    problems: list[str] = []
    cases = 0
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        for threads in (1, 2, 4):  # first: this process has started no threads yet
            problems.append(equal_runs(tmp, threads))
        for number in range(args.rounds):
            place = tmp / f"round {number}"
            place.mkdir()
            for where in PLACES:
                for value in BAD:
                    problems.append(not_finite(place, where, value, clip=random.random() < 0.5))
                    cases += 1
    skipping = overflow(args.steps)
    problems = [problem for problem in problems if problem]
    result: dict[str, object] = {
        "not finite": cases, "equal runs, pairs": 3, "overflow": skipping, "wrong": len(problems),
        "problems": problems,
    }  # fmt: skip
    report("not-finite", args, begun, result)
    sys.exit(bool(problems) or skipping["wrong"] != 0)


if __name__ == "__main__":
    main()
