"""Comparisons made up for tests: curves that look like training, without any training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ewavit.compare.arms import Arm
from ewavit.compare.results import ArmRuns, Comparison, Point, Run
from ewavit.compare.tuning import Choice
from ewavit.tasks.judge import TOP1, Judge

GAINS = {
    "dense": 0.0, "dense-lr": 0.45, "ema": 0.35, "swa": 0.2, "switch-ema": 0.15, "lawa": 0.25,
    "rup": -0.9, "full": 0.1, "ewa": 0.8, "ewa+ema": 1.1,
}  # fmt: skip
CONTROLS = {"dense", "dense-lr", "ema", "swa", "switch-ema", "lawa", "twa"}
ERROR = Judge("chamfer", "Chamfer distance", "mm", "mm", higher_is_better=False)
SHARE_RATES = {"rup": 0.0, "full": 0.75}
IMAGES = 2000  # in the evaluation set; a training set has as many


def make_comparison(
    arms: Sequence[str] = ("dense", "dense-lr", "ema", "swa", "rup", "full", "ewa", "ewa+ema"),
    seeds: int = 5,
    epochs: int = 40,
    layers: int = 3,
    failed: Mapping[tuple[str, int], str] | None = None,
    gains: Mapping[str, float] | None = None,
    judge: Judge = TOP1,
    **facts,
) -> Comparison:
    """A comparison of `arms`, each better than dense by its entry of `gains` in points, plus noise.

    `failed`: errors by (arm, seed). `facts` replace fields of the Comparison.
    """
    numbers = tuple(range(seeds))
    labels = np.random.default_rng(0).integers(0, 10, IMAGES)
    made = []
    for order, name in enumerate(arms):
        arm = Arm(name, role="control" if name in CONTROLS else "method", tuned=name == "dense-lr")
        runs = []
        for seed in numbers:
            if error := (failed or {}).get((name, seed)):
                runs.append(Run(seed, error=error))
                continue
            draw = np.random.default_rng((seed, order))
            shared = np.random.default_rng(seed).normal(0, 0.4)
            final = 82 + shared + (GAINS | dict(gains or {})).get(name, 0.3) + draw.normal(0, 0.2)
            made_run = _run(name, seed, final, epochs, layers, labels, draw)
            runs.append(made_run if judge.share_of_samples else replace(made_run, samples=None))
        choice = Choice({"lr": 2e-3}, 4, 1, IMAGES // 5) if arm.tuned else None
        made.append(ArmRuns(arm, 2e-3 if arm.tuned else 1e-3, tuple(runs), choice))
    settings = {
        "name": "mini",
        "command": "ewavit compare --preset mini --arms "
        + ",".join(arms)
        + f" --seeds {seeds} --output runs",
        "date": "2025-03-14T09:26:53+00:00",
        "device": "2 cores of a CPU that has a rather long name @ 2.50 GHz",
        "versions": {"ewavit": "0.1.0", "torch": "2.9.0", "timm": "1.0.20", "python": "3.12.1"},
        "data": "fashion-mnist-mini (2,000 training images, 2,000 test images)",
        "recipe": {"model_kwargs": "patch_size=4,embed_dim=64,depth=6", "lr": 1e-3, "epochs": epochs},
        "seeds": numbers,
        "arms": tuple(made),
        "judge": judge,
        "tuning": tuple(
            {"arm": "dense-lr", "tried": {"lr": lr}, "fold": 1, judge.column: found}
            for lr, found in ((5e-4, 80.9), (1e-3, 82.1), (2e-3, 82.6), (4e-3, 81.7))
            if "dense-lr" in arms
        ),
    }
    return Comparison(**(settings | facts))


def _run(name, seed, final, epochs, layers, labels, draw) -> Run:
    final = min(100.0, max(0.0, round(final * IMAGES / 100) * 100 / IMAGES))  # a whole number of images
    experts = name not in CONTROLS
    rate = SHARE_RATES.get(name, 0.3)
    pace = draw.normal(10, 0.4)
    points = []
    for epoch in range(epochs):
        done = (epoch + 1) / epochs
        warm_up = min(1.0, (epoch + 1) / 5)
        ramp = rate * (1.0 if name == "full" else min(1.0, 2 * done))
        apart = 0.002 if name == "full" else 0.3 * done if name == "rup" else 0.05 * done * (1.1 - done)
        noise = draw.normal(0, 0.4) if epoch + 1 < epochs else 0.0
        points.append(
            Point(
                epoch=epoch,
                images=(epoch + 1) * IMAGES,
                seconds=(epoch + 1) * (pace + 1.5 * experts),
                train_loss=2.3 * math.exp(-3 * done),
                eval_loss=2.3 - 1.7 * (1 - math.exp(-4 * done)),
                metric=min(100.0, final - 22 * (math.exp(-4 * done) - math.exp(-4)) + noise),
                lr=1e-3 * warm_up * (0.5 + 0.5 * math.cos(math.pi * done)) * (2 if name == "dense-lr" else 1),
                share_rate=ramp if experts else 0.0,
                spread={
                    f"blocks.{2 * layer + 1}.mlp": apart
                    * (1 + 0.6 * layer / layers)
                    * draw.uniform(0.97, 1.03)
                    for layer in range(layers if experts else 0)
                },
                predicted_spread=0.9 * apart if experts else None,
            )
        )
    right = draw.permutation(IMAGES) < round(final * IMAGES / 100)
    predictions = np.where(right, labels, (labels + 1) % 10)
    peak = 310.0 + 90 * experts + draw.uniform(0, 4)
    return Run(seed, tuple(points), peak, labels, predictions, IMAGES)
