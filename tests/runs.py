"""Short runs for tests: a tiny recipe, observers of its steps, and the comparison of two ends."""

import csv
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from ewavit.training.card import ModelCard
from ewavit.training.checkpoint import Progress
from ewavit.training.loop import TrainingRun
from ewavit.training.recipe import Recipe

TINY = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": "patch_size=7,embed_dim=32,depth=2,num_heads=2",
    "limit": 256,
    "batch_size": 32,
    "epochs": 2,
    "warmup_epochs": 1,
}


def facts(number=1):
    """What a checkpoint says beside its tensors, after so many epochs."""
    recipe = Recipe(epochs=9)
    card = ModelCard("vit_tiny_patch16_224", {}, ("a", "b"), 1, 28, (0.5,), (0.5,), recipe.data)
    progress = Progress(epoch=number, rows=[{"epoch": 0, "eval_loss": 1.0, "eval_top1": 50.0}])
    return {"recipe": asdict(recipe), "card": asdict(card), "progress": asdict(progress), "layers": []}


def recipe(tmp_path, name, **settings):
    return Recipe(**{**TINY, "output": str(tmp_path), **settings}, name=name)


def observe(monkeypatch, observer: Callable[[TrainingRun], None]):
    """Call `observer(run)` after every optimizer step of every run, before the run follows the step."""
    original = TrainingRun.after_step

    def after_step(run):
        observer(run)
        original(run)

    monkeypatch.setattr(TrainingRun, "after_step", after_step)


def stop_after(monkeypatch, updates, signal_number=signal.SIGTERM):
    """Send this process a signal in the given optimizer step."""

    def stop(run):
        if run.progress.update == updates:
            os.kill(os.getpid(), signal_number)

    observe(monkeypatch, stop)


def raise_after(monkeypatch, updates, error):
    """Raise an error in the given optimizer step."""

    def fail(run):
        if run.progress.update == updates:
            raise error

    observe(monkeypatch, fail)


def assert_same_end(one: Path, other: Path):
    for file in ("model.safetensors", "checkpoint/model.safetensors", "checkpoint/training.safetensors"):
        first, second = load_file(one / file), load_file(other / file)
        assert list(first) == list(second)
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"{file}: {name}"
    rows = [list(csv.DictReader((run / "summary.csv").open())) for run in (one, other)]
    for first, second in zip(*rows, strict=True):
        measured = {name: "" for name in first if name.endswith(("_per_second", "seconds", "_mib"))}
        assert first | measured == second | measured
    assert (one / "predictions.csv").read_text() == (other / "predictions.csv").read_text()
