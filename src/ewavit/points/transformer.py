"""The standard point transformer of Point-BERT and Point-MAE, for classification and part segmentation.

A cloud becomes G groups: farthest-point centres, each with its k nearest points. A mini-PointNet turns a
group into one token. Before every block of a plain transformer encoder an MLP of the centre is added.

The state-dict keys are those of the public code (Point-BERT, arXiv 2111.14819; Point-MAE, arXiv 2203.06604),
so that `load_point_checkpoint` loads its checkpoints:

    encoder.first_conv.{0,1,3}, encoder.second_conv.{0,1,3}      mini-PointNet: Conv1d, BatchNorm1d, Conv1d
    reduce_dim                                                   Point-BERT only
    pos_embed.{0,2}                                              MLP of the centres
    cls_token, cls_pos                                           classification only
    blocks.blocks.I.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}, norm
    cls_head_finetune.{0,1,4,5,8} or, Point-BERT, .{0,3}         head of a classifier
    label_conv.{0,1}, propagation_0.mlp_{convs,bns}.{0,1},
    convs{1,2,3}, bns{1,2}                                       head of part segmentation
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewavit.data.weight_files import check_finite, named_tensors, read_weights
from ewavit.errors import EwavitError, first_line
from ewavit.points.ops import farthest_point_sample, gather_points, interpolate, knn

NUM_CATEGORIES = 16  # of ShapeNetPart


class Encoder(nn.Module):
    """The mini-PointNet: one vector per group of points, the same for any order of the points.

    Args:
        channels: channels of the result.
        width: channels of the first layer; the next two have twice and four times as many.
        in_chans: channels of a point.
    """

    def __init__(self, channels: int, width: int = 128, in_chans: int = 3) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv1d(in_chans, width, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 2 * width, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(4 * width, 4 * width, 1), nn.BatchNorm1d(4 * width), nn.ReLU(),
            nn.Conv1d(4 * width, channels, 1),
        )  # fmt: skip

    def forward(self, groups: Tensor) -> Tensor:
        """Map groups (B, G, k, in_chans), relative to their centres, to vectors (B, G, channels)."""
        batch, count, size, in_chans = groups.shape
        first: Any = self.first_conv
        second: Any = self.second_conv
        narrow, norm, act, wide = first
        local = _pointwise(wide, act(norm(_pointwise(narrow, groups.reshape(-1, in_chans)))))
        whole = local.view(batch * count, size, -1).max(1)[0]  # (groups, 2 width)
        # The next layer takes [group, point]; its two halves are applied separately, per group and per point.
        narrow, norm, act, wide = second
        of_group, of_point = narrow.weight[:, :, 0].split(local.shape[1], 1)
        joined = F.linear(local, of_point).view(batch * count, size, -1)
        joined = joined + F.linear(whole, of_group, narrow.bias).unsqueeze(1)
        result = _pointwise(wide, act(norm(joined.flatten(0, 1))))
        return result.view(batch, count, size, -1).max(2)[0]


def _pointwise(conv: nn.Conv1d, rows: Tensor) -> Tensor:
    """A convolution of kernel size 1 on rows (points, channels); rows are faster than columns on a CPU."""
    return F.linear(rows, conv.weight[:, :, 0], conv.bias)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples and scales it up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Mlp(nn.Module):
    """The FFN of a block; (..., dim) to (..., dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.act(self.fc1(x)))
        return x


class Attention(nn.Module):
    """Multi-head self-attention, no bias in qkv; (B, tokens, dim) to the same."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.proj(x)
        return x


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class TransformerEncoder(nn.Module):
    """Transformer blocks; each adds the position to its input.

    Args:
        dim, depth, num_heads: settings of the blocks.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, drop_path_rate: float) -> None:
        super().__init__()
        rates = [drop_path_rate * block / max(depth - 1, 1) for block in range(depth)]
        self.blocks = nn.ModuleList([Block(dim, num_heads, rate) for rate in rates])

    def forward(self, x: Tensor, pos: Tensor) -> list[Tensor]:
        """Map tokens and positions (B, tokens, dim) to the output of every block, each (B, tokens, dim)."""
        outputs = []
        for block in self.blocks:
            x = block(x + pos)
            outputs.append(x)
        return outputs


class _Backbone(nn.Module):
    """The shared part of classification and segmentation: points to groups, tokens and blocks.

    Args:
        dim, depth, num_heads: settings of the transformer.
        num_group: number of groups, G.
        group_size: points per group, k.
        drop_path_rate: stochastic depth of the last block.
        encoder_width: channels of the mini-PointNet's first layer.
        encoder_dims: channels of the mini-PointNet, followed by a linear layer to `dim` (Point-BERT); None
            makes them `dim`.
        features: channels of a point beside x, y, z, such as its normal; only the mini-PointNet takes them.
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_group: int = 64,
        group_size: int = 32,
        drop_path_rate: float = 0.1,
        encoder_width: int = 128,
        encoder_dims: int | None = None,
        features: int = 0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise EwavitError(f"dim={dim} is not a multiple of num_heads={num_heads}: choose a multiple")
        self.num_group, self.group_size, self.features = num_group, group_size, features
        self.encoder = Encoder(encoder_dims or dim, encoder_width, 3 + features)
        self.reduce_dim = nn.Identity() if encoder_dims is None else nn.Linear(encoder_dims, dim)
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))
        self.blocks = TransformerEncoder(dim, depth, num_heads, drop_path_rate)
        self.norm = nn.LayerNorm(dim)

    def tokens(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map points (B, N, 3 + features) to tokens and positions (B, G, dim) and centres (B, G, 3)."""
        if points.ndim != 3 or points.shape[-1] != 3 + self.features:
            raise EwavitError(
                f"points have the shape {tuple(points.shape)}: give (clouds, points, {3 + self.features})"
            )
        needed = max(self.num_group, self.group_size)
        if points.shape[1] < needed:
            raise EwavitError(
                f"{points.shape[1]} points per cloud are too few for {self.num_group} groups of "
                f"{self.group_size} ({needed} needed): give more points, or a smaller num_group or group_size"
            )
        places = points[..., :3].contiguous() if self.features else points
        centres = gather_points(places, farthest_point_sample(places, self.num_group))
        groups = gather_points(points, knn(centres, places, self.group_size)[1])
        origin = F.pad(centres, (0, self.features)) if self.features else centres
        tokens = self.reduce_dim(self.encoder(groups - origin.unsqueeze(2)))
        return tokens, self.pos_embed(centres), centres


class PointTransformer(_Backbone):
    """Classifies point clouds (B, N, 3 + features) -> logits (B, classes).

    Args:
        num_classes: number of classes.
        head: "point_mae" (three layers with BatchNorm) or "point_bert" (two layers).
        settings: settings of the backbone.

    Raises:
        EwavitError: a setting does not work. Calling the model raises it for clouds with too few points.
    """

    def __init__(self, num_classes: int = 40, head: str = "point_mae", **settings: Any) -> None:
        super().__init__(**settings)
        dim = self.norm.normalized_shape[0]
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.cls_pos = nn.Parameter(torch.empty(1, 1, dim))
        if head == "point_mae":
            layers: list[nn.Module] = []
            for channels in (2 * dim, 256):
                layers += [nn.Linear(channels, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.5)]
        elif head == "point_bert":
            layers = [nn.Linear(2 * dim, 256), nn.ReLU(), nn.Dropout(0.5)]
        else:
            raise EwavitError(f"head={head!r} is unknown: choose point_mae or point_bert")
        self.cls_head_finetune = nn.Sequential(*layers, nn.Linear(256, num_classes))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.cls_pos, std=0.02)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay in timm's optimizers, in addition to vectors."""
        return {"cls_token", "cls_pos"}

    def forward(self, points: Tensor) -> Tensor:
        tokens, pos, _ = self.tokens(points)
        tokens = torch.cat([self.cls_token.expand(points.shape[0], -1, -1), tokens], 1)
        pos = torch.cat([self.cls_pos.expand(points.shape[0], -1, -1), pos], 1)
        x = self.norm(self.blocks(tokens, pos)[-1])
        logits: Tensor = self.cls_head_finetune(torch.cat([x[:, 0], x[:, 1:].max(1)[0]], -1))
        return logits


class PointNetFeaturePropagation(nn.Module):
    """Brings features from centres back to all points by interpolation and a pointwise MLP (PointNet++)."""

    def __init__(self, in_channel: int, mlp: tuple[int, ...]) -> None:
        super().__init__()
        channels = (in_channel, *mlp)
        self.mlp_convs = nn.ModuleList([nn.Conv1d(a, b, 1) for a, b in pairwise(channels)])
        self.mlp_bns = nn.ModuleList([nn.BatchNorm1d(channel) for channel in mlp])

    def forward(self, points: Tensor, centres: Tensor, features: Tensor) -> Tensor:
        """Map points (B, N, 3), centres (B, G, 3), their features (B, G, C) to features (B, N, mlp[-1])."""
        x = torch.cat([points, interpolate(points, centres, features)], -1).flatten(0, 1)
        for conv, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            x = F.relu(norm(_pointwise(conv, x)))  # type: ignore[arg-type]
        return x.view(*points.shape[:2], -1)


class PointTransformerSeg(_Backbone):
    """Segments clouds of known category into parts: points (B, N, 3 + features + 16) -> logits (B, parts, N).

    The category of the cloud, one of 16, follows the coordinates and features as a one-hot vector.

    Args:
        num_classes: number of parts in all categories together.
        fetch: indices of the blocks to take outputs from; None takes three evenly spaced blocks.
        settings: settings of the backbone; 128 groups unless given.

    Raises:
        EwavitError: a setting does not work. Calling the model raises it for points of the wrong shape.
    """

    def __init__(self, num_classes: int = 50, fetch: tuple[int, ...] | None = None, **settings: Any) -> None:
        super().__init__(**{"num_group": 128, **settings})
        dim, depth = self.norm.normalized_shape[0], len(self.blocks.blocks)
        self.fetch = fetch or tuple(depth * i // 3 - 1 for i in (1, 2, 3))
        if not all(0 <= block < depth for block in self.fetch):
            raise EwavitError(
                f"fetch={self.fetch} names blocks that a depth of {depth} lacks: choose from 0 to {depth - 1}"
            )
        features = len(self.fetch) * dim
        self.label_conv = nn.Sequential(
            nn.Conv1d(NUM_CATEGORIES, 64, 1, bias=False), nn.BatchNorm1d(64), nn.LeakyReLU(0.2)
        )
        self.propagation_0 = PointNetFeaturePropagation(features + 3, (4 * dim, 1024))
        self.convs1 = nn.Conv1d(1024 + 2 * features + 64, 512, 1)
        self.bns1 = nn.BatchNorm1d(512)
        self.dp1 = nn.Dropout(0.5)
        self.convs2 = nn.Conv1d(512, 256, 1)
        self.bns2 = nn.BatchNorm1d(256)
        self.convs3 = nn.Conv1d(256, num_classes, 1)
        self.apply(_init_weights)

    def forward(self, points: Tensor) -> Tensor:
        wanted = 3 + self.features + NUM_CATEGORIES
        if points.ndim != 3 or points.shape[-1] != wanted:
            raise EwavitError(
                f"points have the shape {tuple(points.shape)}: give (clouds, points, {wanted}), "
                "coordinates followed by the category as a one-hot vector"
            )
        points, category = points[..., :-NUM_CATEGORIES].contiguous(), points[:, 0, -NUM_CATEGORIES:]
        tokens, pos, centres = self.tokens(points)
        outputs = self.blocks(tokens, pos)
        features = torch.cat([self.norm(outputs[block]) for block in self.fetch], -1)  # (B, G, features)
        label = self.label_conv(category.unsqueeze(-1)).squeeze(-1)
        whole = torch.cat([features.max(1)[0], features.mean(1), label], -1)
        local = self.propagation_0(points[..., :3], centres, features)
        # One layer on [point, whole cloud]; its two halves are applied separately.
        of_point, of_whole = self.convs1.weight[:, :, 0].tensor_split([local.shape[-1]], 1)
        x = F.linear(local, of_point) + F.linear(whole, of_whole, self.convs1.bias).unsqueeze(1)
        x = self.dp1(F.relu(self.bns1(x.flatten(0, 1))))
        x = F.relu(self.bns2(_pointwise(self.convs2, x)))
        return _pointwise(self.convs3, x).view(*points.shape[:2], -1).transpose(1, 2)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_SMALL: dict[str, Any] = {
    "dim": 96, "depth": 6, "num_heads": 3, "num_group": 32, "group_size": 16, "encoder_width": 32
}  # fmt: skip
MODELS: dict[str, tuple[type[PointTransformer] | type[PointTransformerSeg], dict[str, Any]]] = {
    "point_transformer": (PointTransformer, {}),
    "point_transformer_s": (PointTransformer, _SMALL),
    "point_bert": (PointTransformer, {"encoder_dims": 256, "head": "point_bert"}),
    "point_transformer_seg": (PointTransformerSeg, {}),
    "point_transformer_seg_s": (PointTransformerSeg, _SMALL),
}


def create_point_model(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Create a point transformer by name, with fresh weights.

    Args:
        name: "point_transformer" (Point-MAE's: 384 wide, 12 deep, 6 heads), "point_transformer_s" (for CPUs),
            "point_bert" (its keys differ in `reduce_dim` and the head), "point_transformer_seg" (Point-MAE's)
            or "point_transformer_seg_s".
        num_classes: number of classes, or of parts.
        kwargs: settings of the model that differ from its defaults.

    Raises:
        EwavitError: a model or setting is unknown, or a setting does not work.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(MODELS)}"
        raise EwavitError(f"unknown point model {name!r}: {hint}")
    kind, defaults = MODELS[name]
    try:
        return kind(num_classes=num_classes, **{**defaults, **kwargs})
    except Exception as problem:  # whatever a setting that does not work makes the layers raise
        raise EwavitError(f"{name} cannot be built: {first_line(problem)}") from None


_HEADS = ("cls_head_finetune.", "label_conv.", "propagation_0.", "convs", "bns")
_FRESH = (*_HEADS, "cls_token", "cls_pos")  # a pretrained backbone may lack these
_PRETRAINING = ("cls_head.", "lm_head.", "mask_token")  # used in pretraining only
_CONTAINERS = ("base_model", "model_state_dict", "state_dict", "model")


def point_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Extract the weights of a point transformer from a published checkpoint, with the keys of this file.

    Looks into `base_model`, `model_state_dict`, `state_dict` or `model`, strips the prefixes `module.`,
    `base_model.`, `MAE_encoder.` and `transformer_q.`, and drops the parts that only pretraining uses
    (decoder, tokenizer, momentum encoder, contrastive head).
    """
    inner = next((state[key] for key in _CONTAINERS if isinstance(state.get(key), Mapping)), state)
    plain = {key.removeprefix("module."): value for key, value in inner.items() if isinstance(value, Tensor)}
    for prefix in ("MAE_encoder.", "transformer_q."):
        if any(key.startswith(prefix) for key in plain):
            plain = {
                key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)
            }
    plain = {key.removeprefix("base_model."): value for key, value in plain.items()}
    return {key: value for key, value in plain.items() if not key.startswith(_PRETRAINING)}


def load_point_checkpoint(model: nn.Module, file: str | Path) -> list[str]:
    """Load a published Point-MAE or Point-BERT checkpoint, pretrained or fine-tuned, or a safetensors file.

    Head layers are loaded if their shapes agree; the backbone must agree entirely.

    Args:
        model: a model from `create_point_model`; changed in place.
        file: see `ewavit.data.weight_files.read_weights`.

    Returns:
        The names of the parameters and buffers that keep their fresh values.

    Raises:
        EwavitError: the file cannot be read or holds another model.
    """
    return load_point_weights(model, read_weights(Path(file)), str(file))[0]


def load_point_weights(model: nn.Module, state: Mapping[str, Any], where: str) -> tuple[list[str], list[str]]:
    """Load weights that were read already, see `load_point_checkpoint`.

    Args:
        model: a model from `create_point_model`; changed in place.
        state: what the file holds.
        where: the file, for messages.

    Returns:
        The names of the parameters and buffers that keep their fresh values, and the keys of the file that
        were left over.

    Raises:
        EwavitError: the weights are those of another model, or not finite.
    """
    weights = point_state_dict(state)
    own = model.state_dict()
    other_head = {
        key for key, value in weights.items()
        if key.startswith(_HEADS) and (key not in own or own[key].shape != value.shape)
    }  # fmt: skip
    for key in other_head:
        weights.pop(key)
    misfits = [
        *(f"it lacks {key}" for key in own if key not in weights and not key.startswith(_FRESH)),
        *(f"the model lacks {key}" for key in weights if key not in own),
        *(
            f"{key} is {tuple(value.shape)}, the model's {tuple(own[key].shape)}"
            for key, value in weights.items() if key in own and own[key].shape != value.shape
        ),
    ]  # fmt: skip
    if misfits:
        raise EwavitError(
            f"{where} is the checkpoint of another model ({misfits[0]}; {len(misfits)} differences): "
            "choose the model and settings of the checkpoint"
        )
    check_finite(weights, own, where)
    model.load_state_dict(weights, strict=False)
    used = {id(value) for value in weights.values()}
    left_over = [key for key, value in named_tensors(state) if id(value) not in used]
    return [key for key in own if key not in weights], left_over
