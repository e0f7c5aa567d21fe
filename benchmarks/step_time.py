"""Time of a whole training step, and of its parts, over the dense model's: EWA, and naive mixtures of others.

    python benchmarks/step_time.py                      # what this machine can do: minutes a model and mode
    python benchmarks/step_time.py --models ti64 --modes eager --rounds 60

Models: ti64 (ViT-Ti, 64x64/8), s32 (ViT-S, 32x32/4), and ti, s, b, l (ViT/16) and swin_t at 224. Modes:
eager, compiled, checkpointed (activations recomputed; compiled too on a GPU). A GPU trains in bfloat16
autocast at batches of 256 (l: 64), a CPU in float32 at small ones. All arms of a model are measured in one
process, one step of each in turn (`ewavit.study.bench`). The naive mixtures are top-1 with what each maker
needs and no balancing losses, which would cost it more: a linear router, softmax, the chosen expert's output
times its probability. Writes records/step_time-DEVICE-MODEL-MODE.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from types import MethodType
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ewavit as ewa
from ewavit.core import moe_layers
from ewavit.core.experts import ExpertLinear
from ewavit.study.bench import Trainee, measure, ratios
from records import write_record

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ti64": ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8}),
    "s32": ("vit_small_patch16_224", {"img_size": 32, "patch_size": 4}),
    "ti": ("vit_tiny_patch16_224", {}),
    "s": ("vit_small_patch16_224", {}),
    "b": ("vit_base_patch16_224", {}),
    "l": ("vit_large_patch16_224", {}),
    "swin_t": ("swin_tiny_patch4_window7_224", {}),
}
ON_CPU = {"ti64": 64, "s32": 32, "ti": 16, "s": 16, "b": 16, "l": 4, "swin_t": 8}  # images a batch
ON_GPU = {name: 64 if name == "l" else 256 for name in MODELS}

Arm = Callable[[nn.Module], nn.Module]


class TransformersMoE(nn.Module):
    """A top-1 mixture whose experts run through transformers' experts interface.

    Args:
        ffn: timm's Mlp; every expert starts as its copy.
        num_experts: N.
        implementation: `batched_mm` or `grouped_mm`.
    """

    has_gate, has_bias, is_transposed = False, True, False
    has_post_expert_norm = _is_expert_parallel = False

    def __init__(self, ffn: nn.Module, num_experts: int, implementation: str) -> None:
        super().__init__()
        interface = importlib.import_module("transformers.integrations.moe")
        self.run: Callable[..., Tensor] = getattr(interface, f"{implementation}_experts_forward")
        self.num_experts = num_experts
        self.router = nn.Linear(ffn.fc1.in_features, num_experts, bias=False)

        def copies(parameter: Tensor) -> nn.Parameter:
            return nn.Parameter(parameter.detach().repeat(num_experts, *[1] * parameter.ndim))

        self.up_proj, self.up_proj_bias = copies(ffn.fc1.weight), copies(ffn.fc1.bias)
        self.down_proj, self.down_proj_bias = copies(ffn.fc2.weight), copies(ffn.fc2.bias)
        self.act_fn = ffn.act

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        rows = x.flatten(0, -2)
        weights, chosen = F.softmax(self.router(rows).float(), -1).max(-1, keepdim=True)
        return self.run(self, rows, chosen, weights.to(rows.dtype)).view_as(x)


def replace_ffns(model: nn.Module, num_experts: int, implementation: str) -> nn.Module:
    """Put a top-1 mixture in the place of every second FFN of a timm ViT, those that `ewa.expand` takes."""
    found = [ffn for ffn in ewa.find_ffns(model) if ffn.unit == "token"][::-1][::2]
    for ffn in found:
        parent, _, name = ffn.name.rpartition(".")
        setattr(model.get_submodule(parent), name, TransformersMoE(ffn.module, num_experts, implementation))
    return model


def installed() -> dict[str, bool]:
    """Which further makers' mixtures can be imported here; none of them runs without a GPU."""
    return {
        name: importlib.util.find_spec(name) is not None for name in ("scattermoe", "megablocks", "tutel")
    }


@torch.no_grad()
def check_against_a_loop(implementation: str) -> float:
    """Largest deviation of a mixture from a loop over its tokens: what is timed must be a top-1 mixture."""
    torch.manual_seed(0)
    ffn = nn.Module()
    ffn.fc1, ffn.act, ffn.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
    moe = TransformersMoE(ffn, 3, implementation)
    nn.init.normal_(moe.router.weight)
    for parameter in (moe.up_proj, moe.down_proj):
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 20, 16)
    expected = []
    for row in x.flatten(0, 1):
        weight, expert = F.softmax(moe.router(row), -1).max(-1)
        hidden = F.gelu(F.linear(row, moe.up_proj[expert], moe.up_proj_bias[expert]))
        expected.append(weight * F.linear(hidden, moe.down_proj[expert], moe.down_proj_bias[expert]))
    return float((moe(x).flatten(0, 1) - torch.stack(expected)).abs().max())


def with_baddbmm(model: nn.Module) -> nn.Module:
    """Stacked layers whose derivative is that of `baddbmm`: the weight's gradient then has to be copied."""

    def forward(layer: ExpertLinear, x: Tensor) -> Tensor:
        assert layer.bias is not None
        y = torch.baddbmm(layer.bias.unsqueeze(1), x.flatten(1, -2), layer.weight.mT)
        return y.view(*x.shape[:-1], -1)

    for layer in model.modules():
        if isinstance(layer, ExpertLinear):
            layer.forward = MethodType(forward, layer)
    return model


ARMS: dict[str, Arm] = {
    "dense": lambda model: model,
    "ewa-4": lambda model: ewa.expand(model, 4),
    "ewa-2": lambda model: ewa.expand(model, 2),
    "ewa-8": lambda model: ewa.expand(model, 8),
    "ewa-4-all": lambda model: ewa.expand(model, 4, select="all"),
    "ewa-4-baddbmm": lambda model: with_baddbmm(ewa.expand(model, 4)),
    "separate-4": lambda model: ewa.expand(model, 4, experts="separate"),
    "top1-batched_mm": lambda model: replace_ffns(model, 4, "batched_mm"),
    "top1-grouped_mm": lambda model: replace_ffns(model, 4, "grouped_mm"),
}


def trainee(model: str, arm: str, mode: str, device: str) -> Trainee:
    """A model on the device with its optimizer and averaging."""
    torch.manual_seed(0)
    name, settings = MODELS[model]
    made = ARMS[arm](timm.create_model(name, num_classes=100, **settings))
    if mode == "checkpointed":
        made.set_grad_checkpointing()
    made.to(device).train()
    optimizer = torch.optim.AdamW(ewa.param_groups(made, weight_decay=0.05), lr=1e-4, fused=True)
    return Trainee(made, optimizer, ewa.ExpertAveraging(made, 0.1) if moe_layers(made) else None)


def run(model: str, mode: str, arms: list[str], rounds: int, device: str) -> dict[str, Any]:
    """Measure the arms of one model and print a line each."""
    batch = (ON_GPU if device == "cuda" else ON_CPU)[model]
    size = MODELS[model][1].get("img_size", 224)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(100, (batch,), device=device)
    times = measure(
        {arm: trainee(model, arm, mode, device) for arm in arms},
        images,
        labels,
        rounds=rounds,
        amp_dtype=torch.bfloat16 if device == "cuda" else None,
        compile=mode == "compiled" or (mode == "checkpointed" and device == "cuda"),
    )
    rows: dict[str, Any] = {}
    for arm, measured in times.items():
        parts = ratios(measured, times["dense"])
        rows[arm] = {part: asdict(ratio) for part, ratio in parts.items()} | {
            "activation_bytes": measured.activation_bytes,
            "activation_ratio": measured.activation_bytes / times["dense"].activation_bytes,
            "peak_bytes": measured.peak_bytes,
            "first_step_s": measured.first_step,
        }
        step, averaging = parts["step"], parts["averaging"]
        print(
            f"{model:7} {mode:12} {arm:16} {step.ms:9.1f} ms  {step.ratio:.4f} "
            f"[{step.low:.4f}, {step.high:.4f}]  averaging {averaging.ratio:.2%}  "
            f"activations {rows[arm]['activation_ratio']:.4f}  first step {measured.first_step:.1f} s",
            flush=True,
        )
    return {"batch_size": batch, "importable": installed(), "arms": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--models", default=",".join(ON_GPU if device == "cuda" else ON_CPU))
    parser.add_argument("--modes", default="eager,compiled" + (",checkpointed" if device == "cuda" else ""))
    # batched_mm copies an expert's weights for every token: more than a CPU's memory at these sizes
    known = [arm for arm in ARMS if device == "cuda" or arm != "top1-batched_mm"]
    parser.add_argument("--arms", default=",".join(known))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for implementation in ("batched_mm", "grouped_mm"):
        if (deviation := check_against_a_loop(implementation)) > 1e-5:
            raise SystemExit(f"{implementation} deviates from a loop over tokens by {deviation:.1e}")

    for mode in args.modes.split(","):
        for model in args.models.split(","):
            arms = [arm for arm in args.arms.split(",") if not (model == "swin_t" and arm.startswith("top1"))]
            result = run(model, mode, arms, args.rounds, device)
            write_record(f"step_time-{device}-{model}-{mode}", vars(args), result)
            if device == "cuda":
                torch.cuda.empty_cache()
            torch.compiler.reset()


if __name__ == "__main__":
    main()
