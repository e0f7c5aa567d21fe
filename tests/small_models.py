"""Small FFNs and models that the core tests share."""

import torch
from timm.layers import GluMlp, Mlp, RmsNorm, SwiGLU
from timm.models import VisionTransformer
from torch import Tensor, nn

from ewavit.core import moe_layers

DIM = 8


def randomised(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move every parameter away from its initial value: ones and zeros would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return module


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


# Each takes (..., DIM) and gives (..., DIM), token by token.
FFNS = {
    "mlp": lambda: Mlp(DIM, 12),
    "mlp without bias": lambda: Mlp(DIM, 12, bias=False),
    "glu": lambda: GluMlp(DIM, 12),
    "swiglu": lambda: SwiGLU(DIM, 12),
    "swiglu with norm": lambda: SwiGLU(DIM, 12, norm_layer=nn.LayerNorm),
    "mlp with rms norm": lambda: Mlp(DIM, 12, norm_layer=RmsNorm),
    "mlp with layer scale": lambda: nn.Sequential(Mlp(DIM, 12), LayerScale(DIM)),
}


def ffn(kind: str = "mlp") -> nn.Module:
    return randomised(FFNS[kind]())


def separated(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """Give every expert of every MoE within (or of one Experts) its own weights."""
    found = (
        [module]
        if hasattr(module, "values_by_parameter")
        else [m.experts for m in moe_layers(module).values()]
    )
    with torch.no_grad():
        for experts in found:
            for _, values in experts.values_by_parameter():
                for value in values:
                    value.add_(torch.randn_like(value), alpha=scale)
    return module


@torch.no_grad()
def perturbed(model: nn.Module, noise: float) -> nn.Module:
    """Move every expert by noise relative to the root mean square of each of its parameters."""
    for moe in moe_layers(model).values():
        for _, values in moe.experts.values_by_parameter():
            for value in values:
                value.add_(torch.randn_like(value) * value.square().mean().sqrt(), alpha=noise)
    return model


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.mlp = FFNS[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class MlpNet(nn.Module):
    """Residual FFN blocks on (batch, tokens, DIM), then a mean and a head of 3 classes."""

    def __init__(self, depth: int = 4, kind: str = "mlp") -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(kind) for _ in range(depth)])
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(-2))


def tokens(batch: int = 3, count: int = 5) -> Tensor:
    return torch.randn(batch, count, DIM)


def tiny_vit(depth: int = 2, **kwargs: object) -> VisionTransformer:
    """17 tokens an image, with class token; not a multiple of 2, 3 or 4."""
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**{**settings, "depth": depth, **kwargs})


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16)
