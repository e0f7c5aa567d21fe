"""Naive top-1 mixtures of other makers in the place of a timm ViT's FFN, at equal shapes: what to beat.

Only what each needs is here: a linear router, softmax, the chosen expert's output times its probability. None
has balancing losses, which would cost it more.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ewavit as ewa


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
