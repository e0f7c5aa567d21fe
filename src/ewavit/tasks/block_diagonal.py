"""Block-diagonal FFNs, as in SCHEME (arXiv 2312.00412): groups of channels, wider at equal FLOPs."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ewavit.errors import EwavitError


class BlockDiagonal(nn.Linear):
    """A linear layer in which each of `groups` slices of the output sees one slice of the input.

    The weight is (out, in / groups), as in a grouped convolution.
    """

    def __init__(self, in_features: int, out_features: int, groups: int, like: nn.Linear) -> None:
        super().__init__(in_features, out_features, like.bias is not None, device="meta")
        self.groups = groups
        weight = torch.empty(out_features, in_features // groups, device=like.weight.device)
        self.weight = nn.Parameter(weight)
        if like.bias is not None:
            self.bias = nn.Parameter(torch.zeros(out_features, device=weight.device))
        if not weight.is_meta:
            nn.init.trunc_normal_(self.weight, std=float(like.weight.detach().std()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        parts = x.view(*x.shape[:-1], self.groups, -1)
        weight = self.weight.view(self.groups, -1, parts.shape[-1])
        y = torch.einsum("...gi,goi->...go", parts, weight)
        return y.flatten(-2) if self.bias is None else y.flatten(-2) + self.bias


def group_ffns(model: nn.Module, groups: int) -> nn.Module:
    """Make the FFNs of a fresh timm model block-diagonal, in place, and return the model.

    The hidden width grows by the factor `groups`, so a forward pass has the FLOPs of the dense model.

    Args:
        model: a timm model whose FFNs are plain `Mlp`s.
        groups: number of blocks; it must divide the channels. 1 leaves the model as it is.

    Raises:
        EwavitError: an FFN is of another kind or its channels do not divide.
    """
    if groups == 1:
        return model
    found = [(name, part) for name, part in model.named_modules() if type(part) is Mlp]
    if not found:
        raise EwavitError(f"--ffn-groups {groups} needs a model with timm's Mlp: choose another --model")
    for name, mlp in found:
        fc1, fc2 = mlp.fc1, mlp.fc2
        if not isinstance(fc1, nn.Linear) or not isinstance(mlp.norm, nn.Identity):
            raise EwavitError(
                f"--ffn-groups {groups} does not fit {name}: it has convolutions or a norm inside"
            )
        if any(width % groups for width in (fc1.in_features, fc2.out_features)):
            raise EwavitError(
                f"--ffn-groups {groups} does not divide the {fc1.in_features} channels of {name}: "
                "choose another"
            )
        wide = fc1.out_features * groups
        mlp.fc1 = BlockDiagonal(fc1.in_features, wide, groups, fc1)
        mlp.fc2 = BlockDiagonal(wide, fc2.out_features, groups, fc2)
    return model
