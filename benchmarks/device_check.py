"""Correctness of the core on this machine's accelerator, or at reduced size on the CPU, before measuring.

    python benchmarks/device_check.py && python benchmarks/step_time.py && python benchmarks/memory.py

Prints each property with the deviation found and its tolerance, writes records/device_check-DEVICE.json, and
exits with status 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ewavit as ewa
from ewavit.core import moe_layers
from ewavit.core.averaging import average_experts_reference_
from records import write_record

Check = Callable[["Setting"], tuple[float, float]]  # -> deviation, tolerance


class Setting:
    """A ViT, images and labels on the device; small on a CPU."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        large = device == "cuda"
        self.device = device
        self.name = "vit_small_patch16_224" if large else "vit_tiny_patch16_224"
        self.settings = {"num_classes": 10} if large else {"num_classes": 10, "img_size": 64, "depth": 4}
        size, batch = (224, 32) if large else (64, 8)
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.labels = torch.randint(10, (batch,), device=device)

    def model(self, experts: int = 1, **options: str) -> nn.Module:
        torch.manual_seed(1)
        model = timm.create_model(self.name, **self.settings).to(self.device)
        return ewa.expand(model, experts, **options) if experts > 1 else model

    def loss(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.images), self.labels)

    def apart(self) -> nn.Module:
        """A model whose experts differ."""
        model = self.model(4)
        with torch.no_grad():
            for moe in moe_layers(model).values():
                for parameter in moe.experts.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        return model


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def identical_experts_equal_the_dense_model(at: Setting) -> tuple[float, float]:
    dense, ours = at.model(), at.model(4)
    at.loss(dense).backward()
    at.loss(ours).backward()
    name = "patch_embed.proj.weight"
    gradients = relative(ours.get_parameter(name).grad, dense.get_parameter(name).grad)
    return max(relative(ours(at.images), dense(at.images)), gradients), 1e-4


def eval_equals_collapse(at: Setting) -> tuple[float, float]:
    model = at.apart().eval()
    with torch.no_grad():
        expanded = model(at.images)
        return relative(ewa.collapse(model)(at.images), expanded), 1e-5


def averaging_equals_its_reference(at: Setting) -> tuple[float, float]:
    model = at.apart()
    other = copy.deepcopy(model)
    ewa.average_experts_(model, 0.3)
    average_experts_reference_(other, 0.3)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs), 1e-6


def checkpointed_gradients_equal_plain_ones(at: Setting) -> tuple[float, float]:
    gradients = []
    for checkpointing in (False, True):
        model = at.apart().train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        at.loss(model).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return relative(gradients[1], gradients[0]), 1e-5


def bfloat16_autocast_is_near_float32(at: Setting) -> tuple[float, float]:
    model = at.model(4).train()
    with torch.autocast(at.device, torch.bfloat16):
        found = model(at.images)
    return relative(found.float(), model(at.images)), 3e-2


def overflowed_fused_step_does_not_average(at: Setting) -> tuple[float, float]:
    model = at.apart()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    averaging = ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    scaler = torch.amp.GradScaler(at.device)
    scaler.scale(at.loss(model) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    skipped = averaging.steps_done
    optimizer.zero_grad()
    scaler.scale(at.loss(model)).backward()
    for parameter in model.parameters():
        parameter.grad.clamp_(-1e3, 1e3)
    scaler.step(optimizer)
    return abs(skipped) + abs(averaging.steps_done - 1), 0


def compiled_full_graph_equals_eager(at: Setting) -> tuple[float, float]:
    model = at.model(4).train()
    compiled = torch.compile(model, fullgraph=True)
    return relative(compiled(at.images), model(at.images)), 1e-3


CHECKS: tuple[Check, ...] = (
    identical_experts_equal_the_dense_model,
    eval_equals_collapse,
    averaging_equals_its_reference,
    checkpointed_gradients_equal_plain_ones,
    bfloat16_autocast_is_near_float32,
    overflowed_fused_step_does_not_average,
    compiled_full_graph_equals_eager,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    at = Setting(args.device)
    result = {}
    for check in CHECKS:
        deviation, tolerance = check(at)
        holds = deviation <= tolerance
        name = check.__name__.replace("_", " ")
        print(
            f"{'holds' if holds else 'FAILS'}  {name}: {deviation:.1e} (at most {tolerance:.0e})", flush=True
        )
        result[check.__name__] = {"deviation": deviation, "tolerance": tolerance, "holds": holds}
    write_record(f"device_check-{args.device}", vars(args), result)
    sys.exit(0 if all(found["holds"] for found in result.values()) else 1)


if __name__ == "__main__":
    main()
