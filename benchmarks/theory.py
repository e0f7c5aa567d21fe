"""The closed forms of `ewavit.study.theory` beside training: plots and figures of docs/theory.md.

    python benchmarks/theory.py

Everything runs through `ewavit.expand`, real backward passes, torch's optimizers and `ExpertAveraging`. Takes
about five minutes on one thread. Writes docs/theory/*.png and records/theory.json.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ewavit as ewa
from ewavit.core import MoE, StackedExperts, moe_layers
from ewavit.core.moe import dispatching
from ewavit.core.steps import set_step
from ewavit.data.batches import Data
from ewavit.data.options import DataOptions
from ewavit.study import theory
from ewavit.training.opening import open_data
from ewavit.training.prediction import SpreadPrediction
from records import write_record

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLOTS = Path(__file__).parent.parent / "docs" / "theory"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00"]
N = 4
DRAWS = 12


def figure(columns: int = 1, **kwargs: Any) -> tuple[Any, Any]:
    return plt.subplots(1, columns, figsize=(7.2, 3.4), layout="constrained", squeeze=False, **kwargs)


def save(plot: Any, name: str) -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    plot.savefig(PLOTS / f"{name}.png", dpi=110)
    plt.close(plot)


def finish(axis: Any, x: str, y: str, title: str = "", **legend: Any) -> None:
    axis.set(xlabel=x, ylabel=y, title=title)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_subplotspec().is_last_col() or legend:
        axis.legend(frameon=False, fontsize=8, **legend)


def linear_moe(size: int = 32, num_experts: int = N) -> MoE:
    return MoE(StackedExperts(nn.Linear(size, size, bias=False), num_experts))


def deviations(moe: MoE) -> Tensor:
    weight = next(moe.parameters()).detach()
    return weight - weight.mean(0)


# ---------------------------------------------------------------- the linear part


def decay() -> dict[str, Any]:
    """Deviations under averaging alone, at every step and at every eighth."""
    plot, axes = figure()
    found = {}
    for colour, (rate, every) in zip(COLOURS, [(0.3, 1), (0.1, 1), (0.03, 1), (0.03, 8)], strict=False):
        moe = linear_moe().double()
        with torch.no_grad():
            next(moe.parameters()).normal_()
        optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
        ewa.ExpertAveraging(moe, rate, every=every).attach(optimizer)
        start, measured = deviations(moe).norm(), [1.0]
        for _ in range(48):
            moe(torch.randn(8, 32).double()).sum().backward()
            optimizer.step()
            measured.append((deviations(moe).norm() / start).item())
        expected = [theory.deviation_decay(rate, N, step, every) for step in range(49)]
        label = f"β = {rate:.3g}" + (f", every {every}th step" if every > 1 else "")
        style = "steps-post" if every > 1 else "default"
        axes[0, 0].plot(expected, color=colour, drawstyle=style, label=label)
        axes[0, 0].plot(range(0, 49, 2), measured[::2], "o", ms=3.5, color=colour)
        errors = [abs(m - e) for m, e in zip(measured, expected, strict=True)]
        found[label] = {"largest_error": max(errors)}
    axes[0, 0].set(yscale="log", ylim=(1e-4, 1.3))
    finish(axes[0, 0], "optimizer steps", "deviation / its start", "(1 − D)$^t$: lines; training: dots")
    save(plot, "decay")
    return found


def stationary() -> dict[str, Any]:
    """Standard deviation of deviations under gradients of pure noise."""
    units, lr = 64, 0.01
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "SGD": lambda p: torch.optim.SGD(p, lr),
        "SGD, momentum 0.9": lambda p: torch.optim.SGD(p, lr, momentum=0.9),
        "Adam (0.9, 0.99)": lambda p: torch.optim.Adam(p, lr, betas=(0.9, 0.99)),
    }
    settings = {
        "SGD": (units / N, 0, 0),
        "SGD, momentum 0.9": (units / N, 0.9, 0),
        "Adam (0.9, 0.99)": (1, 0.9, 0.9),
    }
    plot, axes = figure()
    found: dict[str, Any] = {}
    for colour, (name, build) in zip(COLOURS, optimizers.items(), strict=False):
        line = np.geomspace(0.003, 0.7, 60)
        expected = [theory.stationary_variance(rate, N, lr, *settings[name]) ** 0.5 for rate in line]
        axes[0, 0].plot(line, expected, color=colour, label=name)
        for rate in (0.01, 0.03, 0.1, 0.3, 0.6):
            moe = linear_moe()
            optimizer = build(moe.parameters())
            ewa.ExpertAveraging(moe, rate).attach(optimizer)
            squares = []
            warm_up = max(100, round(4 / rate))
            for step in range(warm_up + 250):
                optimizer.zero_grad()
                (moe(torch.randn(units, 32)) * torch.randn(units, 32)).sum().backward()
                optimizer.step()
                if step >= warm_up:
                    squares.append(deviations(moe).square().mean().item())
            variance = theory.stationary_variance(rate, N, lr, *settings[name])
            axes[0, 0].plot(rate, np.mean(squares) ** 0.5, "o", ms=5, color=colour)
            found.setdefault(name, {})[str(rate)] = (np.mean(squares) / variance) ** 0.5
    axes[0, 0].set(xscale="log", yscale="log")
    title = "stationary spread under noise: lines; training: dots"
    finish(axes[0, 0], "share rate β", "standard deviation of a weight's deviation", title)
    save(plot, "stationary")
    return {"measured_over_predicted": found}


def history() -> dict[str, Any]:
    """The weight of each past update in the experts at the end; each step of the training marks its own."""
    steps = 60
    schedules = {
        "β = 0.003": ewa.Constant(0.003),
        "β = 0.03": ewa.Constant(0.03),
        "β = 0.3": ewa.Constant(0.3),
        "ramp to 0.1": ewa.LinearRamp(0.1, 60),
        "0.1 until step 30": ewa.Early(ewa.Constant(0.1), 30),
    }
    plot, axes = figure(2, sharey=True)
    found = {}
    for colour, (name, schedule) in zip(COLOURS, schedules.items(), strict=True):
        moe = MoE(StackedExperts(nn.Linear(steps, 1, bias=False), N)).double()
        weight = next(moe.parameters())
        with torch.no_grad():
            weight.zero_()
        optimizer = torch.optim.SGD([weight], lr=1.0)
        ewa.ExpertAveraging(moe, schedule).attach(optimizer)
        for step in range(steps):
            optimizer.zero_grad()
            (-weight[0, 0, step]).backward()  # expert 0 moves by 1 in the coordinate of this step
            optimizer.step()
        own, other = theory.history_weights([schedule(step) for step in range(1, steps + 1)], N)
        final = weight.detach()[:, 0]
        found[name] = {
            "largest_error": max((final[0] - own).abs().max().item(), (final[1] - other).abs().max().item())
        }
        for axis, expected, measured in zip(axes[0], (own, other), final[:2], strict=True):
            axis.plot(range(1, steps + 1), expected, color=colour, label=name)
            axis.plot(range(1, steps + 1, 4), measured[::4], "o", ms=3.5, color=colour)
    for axis, whose in zip(axes[0], ("its own update", "another expert's"), strict=True):
        axis.axhline(1 / N, color="grey", lw=0.8, ls=":")
        finish(axis, "step of the update (of 60)", "weight at the end" if whose[0] == "i" else "", whose)
    save(plot, "history")
    return found


# ---------------------------------------------------------------- real trainings


def small_vit(depth: int, dim: int, **kwargs: Any) -> VisionTransformer:
    settings = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_heads": dim // 16, "num_classes": 10}
    return VisionTransformer(embed_dim=dim, depth=depth, **{**settings, **kwargs})


def batches(data: Data, steps: int, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Step, images and labels; draws of a step depend on the seed and the step alone."""
    for step in range(steps):
        epoch, batch = divmod(step, data.batches_per_epoch)
        if batch == 0:
            epoch_batches = data.train_batches(epoch)
        torch.manual_seed(1_000_000 * seed + step)
        yield step, *next(epoch_batches)


def cosine(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["initial_lr"] = group.get("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * share))


def against_dense() -> dict[str, Any]:
    """Distance of the collapsed weights to dense SGD, with N times its learning rate for the experts."""
    data = open_data("fashion-mnist-mini", DataOptions(batch_size=32, limit=2000))
    torch.manual_seed(0)
    start = small_vit(2, 32).double()
    settings = {"lr": 0.02, "weight_decay": 1e-3}
    steps = 40
    names = [f"blocks.1.mlp.{name}" for name in ("fc1.weight", "fc2.weight")]

    def trajectory(share_rate: float | None) -> list[list[Tensor]]:
        model = copy.deepcopy(start)
        groups: Any = model.parameters()
        if share_rate is not None:
            ewa.expand(model, N)
            inside = [p for moe in moe_layers(model).values() for p in moe.parameters()]
            known = {id(p) for p in inside}
            outside = [p for p in model.parameters() if id(p) not in known]
            groups = [
                {"params": outside},
                {"params": inside, **theory.matched_sgd(**settings, num_experts=N)},
            ]
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, **settings)
        if share_rate is not None:
            ewa.ExpertAveraging(model, share_rate).attach(optimizer)
        found = []
        for _, images, labels in batches(data, steps, 0):
            optimizer.zero_grad()
            F.cross_entropy(model(images.double()), labels).backward()
            optimizer.step()
            state = ewa.dense_state_dict(model) if share_rate is not None else model.state_dict()
            found.append([state[name].clone() for name in names])
        return found

    dense = trajectory(None)
    moved = [[w - start.state_dict()[name] for w, name in zip(ws, names, strict=True)] for ws in dense]
    plot, axes = figure()
    result = {}
    for colour, rate in zip(COLOURS, (0.0, 0.03, 0.3, 0.6, 0.75), strict=True):
        ours = trajectory(rate)
        distance = []
        for step in range(steps):
            apart = sum((a - b).square().sum().item() for a, b in zip(ours[step], dense[step], strict=True))
            distance.append((apart / sum(m.square().sum().item() for m in moved[step])) ** 0.5)
        result[str(rate)] = {"after_10_steps": distance[9], "at_the_end": distance[-1]}
        label = f"β = {rate}" + (" (full averaging)" if rate == 0.75 else "")
        axes[0, 0].plot(range(1, steps + 1), distance, "o-", ms=2.5, lw=1, color=colour, label=label)
    axes[0, 0].set(yscale="log")
    title = "mean of the experts against dense SGD (float64)"
    finish(axes[0, 0], "optimizer steps", "distance / way gone by dense", title, loc="center right")
    save(plot, "against_dense")
    return result


def spread(steps: int) -> dict[str, Any]:
    """Predicted and measured expert spread of real trainings."""
    data = open_data("fashion-mnist-mini", DataOptions(batch_size=32, limit=4000))
    settings = {
        "AdamW, ramp to 0.3": ("adamw", 1e-3, 0.3, True),
        "AdamW, β = 0.03": ("adamw", 1e-3, 0.03, False),
        "AdamW, β = 0.003": ("adamw", 1e-3, 0.003, False),
        "SGD, ramp to 0.3": ("sgd", 0.02, 0.3, True),
        "SGD, β = 0.03": ("sgd", 0.02, 0.03, False),
    }
    plot, axes = figure(2)
    result = {}
    for number, (name, (kind, lr, rate, ramp)) in enumerate(settings.items()):
        torch.manual_seed(0)
        model = ewa.expand(small_vit(4, 32), N)
        groups = ewa.param_groups(model, weight_decay=0.05 if kind == "adamw" else 5e-4)
        if kind == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr)
        else:
            optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
        averaging = ewa.ExpertAveraging(model, rate, ramp_steps=steps // 2 if ramp else 0).attach(optimizer)
        with_slope = SpreadPrediction(model, optimizer, averaging)
        noise_only = SpreadPrediction(model, optimizer, averaging)
        rows = []
        for step, images, labels in batches(data, steps, 0):
            cosine(optimizer, step / steps)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
            if step % 10 == 0:
                with_slope.observe()
                noise_only.observe()
                for part in noise_only._parts:  # as if the gradients did not depend on the deviations
                    part.along = 0.0
            optimizer.step()
            with_slope.step()
            noise_only.step()
            if step % 10 == 9:
                found = (ewa.expert_spread(model), with_slope.relative(), noise_only.relative())
                rows.append([step + 1, *(list(by_layer.values()) for by_layer in found)])
        measured, predicted, plain = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
        axis, colour = axes[0, 0 if kind == "adamw" else 1], COLOURS[number % 3]
        axis.plot([row[0] for row in rows], predicted[:, -1], color=colour, label=name)
        axis.plot([row[0] for row in rows], measured[:, -1], "o", ms=2.5, color=colour)
        phases = {"first_quarter": slice(0, len(rows) // 4), "rest": slice(len(rows) // 4, None)}
        result[name] = {}
        for phase, chosen in phases.items():
            for of, values in (("prediction", predicted), ("noise_alone", plain)):
                ratio = np.log(measured[chosen] / values[chosen])
                result[name][f"{phase}, over_{of}"] = {
                    "geometric_mean": float(np.exp(ratio.mean())),
                    "within_factor": float(np.exp(np.quantile(np.abs(ratio), 0.9))),
                }
        result[name]["rows_step_measured_predicted_noise_alone_by_layer"] = rows[::3]
    for axis, title in zip(
        axes[0], ("AdamW, lr 1e-3, cosine", "SGD, Nesterov 0.9, lr 0.02, cosine"), strict=True
    ):
        axis.set(yscale="log", ylim=(3e-4, None))
        finish(axis, "optimizer steps", "relative expert spread", title, loc="lower left")
    save(plot, "spread")
    return result


def flatness(steps: int, seeds: int) -> dict[str, Any]:
    """The penalty against the loss in training, and traces of the Hessian after dense and EWA training."""
    arms: dict[str, tuple[int, float, Any]] = {  # experts, learning rate, share rate
        "dense": (1, 2e-3, 0.0),
        "dense, lr / 2": (1, 1e-3, 0.0),
        "EWA, ramp to 0.3": (N, 2e-3, ewa.LinearRamp(0.3, steps // 2)),
        "EWA, β = 0.03": (N, 2e-3, 0.03),
        "EWA, β = 0.003": (N, 2e-3, 0.003),
    }
    traces: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    penalties: dict[str, list[dict[str, float]]] = {"image": [], "token": []}
    for seed in range(seeds):
        data = open_data("fashion-mnist-mini", DataOptions(batch_size=50, limit=1000, seed=seed))
        kept = list(data.eval_batches())
        probe, truth = (torch.cat(parts) for parts in zip(*kept, strict=True))
        own, own_truth = (torch.cat(parts) for parts in zip(*list(data.train_batches(0))[:4], strict=True))
        torch.manual_seed(seed)
        start = small_vit(2, 32)
        for name, (experts, lr, rate) in arms.items():
            model = ewa.expand(copy.deepcopy(start), experts, select="all")
            optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr)
            ewa.ExpertAveraging(model, rate).attach(optimizer)
            for step, images, labels in batches(data, steps, seed):
                cosine(optimizer, step / steps)
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                if name == "EWA, β = 0.003" and step == steps // 2 - 1 and seed == 0:
                    penalties = {unit: measure_penalties(model, unit, own, own_truth) for unit in penalties}
            plain = ewa.collapse(model).eval()
            ffns = [p for block in plain.blocks for p in block.mlp.parameters()]
            with sdpa_kernel(SDPBackend.MATH):
                loss = F.cross_entropy(plain(own), own_truth)
                torch.manual_seed(seed)  # the same signs for every arm
                trace = theory.hessian_trace(loss, ffns, samples=20)
            with torch.no_grad():
                output = plain(probe)
            traces[name].append({
                "trace": trace,
                "train_loss": loss.item(),
                "test_loss": F.cross_entropy(output, truth).item(),
                "test_top1": 100 * (output.argmax(1) == truth).float().mean().item(),
            })  # fmt: skip
    plot, axes = figure(2)
    for colour, (unit, points) in zip(COLOURS, penalties.items(), strict=False):
        x = [point["penalty"] for point in points]
        low_high = [1.96 * point["standard_error"] for point in points]
        axes[0, 0].errorbar(x, [point["added"] for point in points], low_high, fmt="o", ms=4, color=colour,
                            label=f"dealt by {unit}")  # fmt: skip
    ends = [0.0, max(x)]
    axes[0, 0].plot(ends, ends, color="grey", lw=0.8, label="equal")
    axes[0, 0].ticklabel_format(style="sci", scilimits=(0, 0))
    title = "what deviations add"
    finish(axes[0, 0], "½ tr(H Cov d)", "loss in training − loss deployed", title, loc="upper left")
    for colour, (name, rows) in zip(COLOURS, traces.items(), strict=True):
        axes[0, 1].plot(
            [r["train_loss"] for r in rows], [r["trace"] for r in rows], "o", color=colour, label=name
        )
    finish(
        axes[0, 1], "training loss at the end", "Hessian trace, FFNs", f"{seeds} seeds each", loc="upper left"
    )
    save(plot, "flatness")
    return {"penalty": penalties, "traces_by_seed": traces, "minus_dense": paired(traces)}


def paired(traces: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Mean and 95 % interval (Student's t) of each arm's paired difference to dense training."""
    result: dict[str, Any] = {}
    for name, rows in traces.items():
        for key in rows[0] if name != "dense" else ():
            gaps = np.array([row[key] - base[key] for row, base in zip(rows, traces["dense"], strict=True)])
            half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
            interval = [float(gaps.mean() - half), float(gaps.mean() + half)]
            result.setdefault(name, {})[key] = {"mean": float(gaps.mean()), "interval": interval}
    return result


def measure_penalties(model: nn.Module, unit: Any, x: Tensor, y: Tensor) -> list[dict[str, float]]:
    """The penalty of a model's deviations, halved three times, and what they add to the loss in training."""
    model = copy.deepcopy(model).double().eval()
    x = x.double()
    layers = list(moe_layers(model).values())
    for moe in layers:
        moe.unit = unit
    points = []
    for _ in range(4):
        with sdpa_kernel(SDPBackend.MATH):
            deployed = F.cross_entropy(model(x), y)
            penalty = theory.flatness_penalty(model, deployed)
        losses = np.zeros((DRAWS, N))
        with torch.no_grad(), dispatching(model):
            for turn in range(N):  # every unit meets every expert of a draw, so that first-order terms cancel
                for draw in range(DRAWS):
                    set_step(model, draw)
                    losses[draw, turn] = F.cross_entropy(model(x), y).item()
                change(layers, lambda values: values[1:] + values[:1])
        added = losses.mean(1) - deployed.item()
        error = float(added.std(ddof=1) / DRAWS**0.5)
        points.append({"penalty": penalty, "added": float(added.mean()), "standard_error": error})
        change(layers, lambda values: [v.lerp(torch.stack(values).mean(0), 1 - 0.5**0.5) for v in values])
    return points


@torch.no_grad()
def change(layers: list[MoE], function: Callable[[list[Tensor]], list[Tensor]]) -> None:
    """Give the experts of layers new values, made from all values of the same parameter."""
    for moe in layers:
        for _, values in moe.experts.values_by_parameter():
            for value, new in zip(values, function([value.clone() for value in values]), strict=True):
                value.copy_(new)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spread-steps", type=int, default=300)
    parser.add_argument("--flatness-steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = {
        "decay": decay(),
        "stationary": stationary(),
        "history": history(),
        "against_dense": against_dense(),
        "spread": spread(args.spread_steps),
        "flatness": flatness(args.flatness_steps, args.seeds),
    }
    write_record("theory", vars(args), result)


if __name__ == "__main__":
    main()
