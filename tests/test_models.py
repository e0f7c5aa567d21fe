"""One suite over model families of timm, torchvision and transformers; what the search for FFNs refuses."""

import copy
import functools
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.layers import GatedMlp, Mlp
from timm.models.byobnet import ByobNet, ByoModelCfg
from timm.models.convnext import ConvNeXt
from timm.models.davit import DaVit
from timm.models.efficientformer import EfficientFormer
from timm.models.focalnet import FocalNet
from timm.models.gcvit import GlobalContextVit
from timm.models.inception_next import MetaNeXt
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.metaformer import MetaFormer, SepConv
from timm.models.mlp_mixer import MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.mobilevit import _inverted_residual_block, _mobilevit_block, _mobilevitv2_block
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.nest import Nest
from timm.models.vgg import VGG
from timm.models.volo import VOLO
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn
from torchvision.models import ConvNeXt as TorchvisionConvNeXt
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video.swin_transformer import SwinTransformer3d

import ewavit as ewa
from ewavit.core import MoE, SeparateExperts, moe_layers
from small_models import DIM, MlpNet, images, randomised, separated, tiny_vit

CLASSES = 5
BATCH = 4


@dataclass(frozen=True)
class Family:
    """How to build a small model of a family, and the names of its FFNs, `*` standing for every number."""

    build: Callable[[], nn.Module]
    ffns: dict[str, int]  # pattern -> how many modules have that name
    unit: str = "token"
    size: int = 32  # image height and width
    inputs: dict[str, Any] = field(default_factory=dict)  # beside the images
    split: bool = False  # each FFN is two layers of a block


def of_timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, num_classes=CLASSES, **settings)


def of_timm_class(cls: Callable[..., nn.Module], *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    return functools.partial(cls, *args, num_classes=CLASSES, **settings)


def of_transformers(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(num_labels=CLASSES, **settings))


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {
    **{"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    **{"window_size": 4, "drop_path_rate": 0.0},
}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}
METAFORMER = {"depths": (1, 2), "dims": (16, 32)}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24}
ATTENTION = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4))
MAXVIT = {"embed_dim": (16, 32), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 8}
MOBILEVIT = {"stem_chs": 16, "stem_type": "3x3", "stem_pool": "", "downsample": "", "act_layer": "silu"}
REDUCE = _inverted_residual_block(d=1, c=16, s=2, br=2.0)
HF = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    **{"image_size": 32, "patch_size": 8},
}
HF_SWIN = {
    **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    **{"window_size": 4, "drop_path_rate": 0.0},
}
DECODER = {f"decoder_{key}": HF[key] for key in HF if key not in ("image_size", "patch_size")}
HF_CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_scale_init_value": 1.0}
TV_SWIN = {
    **{"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    **{"window_size": [4, 4], "stochastic_depth_prob": 0.0},
}


class TorchViT(nn.Sequential):
    """A ViT of torch.nn's encoder layers."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        patches = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2))
        super().__init__(patches, Transposed(), encoder, nn.Flatten(1), nn.Linear(16 * 16, CLASSES))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


FAMILIES = {
    "vit": Family(of_timm("vit_tiny_patch16_224", **VIT), {"blocks.*.mlp": 2}),
    "vit by image": Family(of_timm("vit_tiny_patch16_224", **VIT), {"blocks.*.mlp": 2}, unit="image"),
    "deit distilled": Family(of_timm("deit_tiny_distilled_patch16_224", **VIT), {"blocks.*.mlp": 2}),
    "parallel vit": Family(of_timm("vit_small_patch16_18x2_224", **VIT), {"blocks.*.ffns.*.mlp": 4}),
    "dinov2 giant": Family(of_timm("vit_giant_patch14_dinov2", **VIT), {"blocks.*.mlp": 2}),
    "beit": Family(of_timm("beit_base_patch16_224", **VIT), {"blocks.*.mlp": 2}),
    "eva02 swiglu": Family(of_timm("eva02_base_patch14_224", **VIT), {"blocks.*.mlp": 2}),
    "eva02 glu": Family(of_timm("eva02_tiny_patch14_224", **VIT), {"blocks.*.mlp": 2}),
    "naflexvit": Family(
        of_timm_class(
            NaFlexVit,
            NaFlexVitCfg(patch_size=8, embed_dim=24, depth=2, num_heads=2, pos_embed_grid_size=(4, 4)),
        ),
        {"blocks.*.mlp": 2},
    ),
    "swin": Family(of_timm("swin_tiny_patch4_window7_224", **SWIN), {"layers.*.blocks.*.mlp": 4}),
    "swinv2": Family(of_timm("swinv2_tiny_window8_256", **SWIN), {"layers.*.blocks.*.mlp": 4}),
    "swinv2 cr": Family(of_timm("swinv2_cr_tiny_224", **SWIN), {"stages.*.blocks.*.mlp": 4}),
    "cait": Family(of_timm("cait_xxs24_224", **VIT), {"blocks.*.mlp": 2, "blocks_token_only.*.mlp": 2}),
    "xcit": Family(of_timm("xcit_nano_12_p16_224", **VIT), {"blocks.*.mlp": 2, "cls_attn_blocks.*.mlp": 2}),
    "volo": Family(
        of_timm_class(
            VOLO,
            (1, 1),
            **{"img_size": 32, "embed_dims": (16, 32), "num_heads": (2, 2), "patch_size": 4},
            **{"stem_hidden_dim": 8, "downsamples": (True, False), "outlook_attention": (True, False)},
        ),
        {"network.*.*.mlp": 2, "post_network.*.mlp": 2},
    ),
    "coat": Family(
        of_timm(
            "coat_tiny",
            **{"img_size": 32, "patch_size": 4, "embed_dims": (16, 16, 16, 16), "num_heads": 2},
            **{"serial_depths": (1, 1, 1, 1), "parallel_depth": 2, "crpe_window": {3: 1, 5: 1}},
        ),
        {"serial_blocks*.*.mlp": 4, "parallel_blocks.*.mlp*": 2},
    ),
    "crossvit": Family(
        of_timm(
            "crossvit_tiny_240",
            **{"img_size": 24, "patch_size": (6, 12), "img_scale": (1.0, 1.0), "embed_dim": (16, 24)},
            **{"depth": ((1, 1, 1),), "num_heads": (2, 2), "mlp_ratio": (2.0, 2.0, 1.0)},
        ),
        {"blocks.*.blocks.*.*.mlp": 2},
        size=24,
    ),
    "pit": Family(
        of_timm(
            "pit_ti_224", img_size=32, patch_size=8, stride=4, base_dims=(8, 8), depth=(1, 2), heads=(2, 4)
        ),
        {"transformers.*.blocks.*.mlp": 3},
    ),
    "twins": Family(
        of_timm(
            "twins_svt_small",
            **{"img_size": 32, "patch_size": 2, "embed_dims": (16, 32), "num_heads": (1, 2)},
            **{"mlp_ratios": (2, 2), "depths": (2, 2), "sr_ratios": (4, 2), "wss": (4, 4)},
        ),
        {"blocks.*.*.mlp": 4},
    ),
    "convit": Family(
        of_timm("convit_tiny", **{**VIT, "embed_dim": 16, "num_heads": 4}, local_up_to_layer=1),
        {"blocks.*.mlp": 2},
    ),
    "maxvit": Family(
        of_timm_class(MaxxVit, MaxxVitCfg(**MAXVIT, transformer_cfg=ATTENTION), img_size=32),
        {"stages.*.blocks.*.attn_block.mlp": 2, "stages.*.blocks.*.attn_grid.mlp": 2},
    ),
    "maxxvit": Family(
        of_timm_class(
            MaxxVit,
            MaxxVitCfg(**MAXVIT, transformer_cfg=ATTENTION, conv_cfg=MaxxVitConvCfg(block_type="convnext")),
            img_size=32,
        ),
        {f"stages.*.blocks.*.{part}.mlp": 2 for part in ("conv", "attn_block", "attn_grid")},
    ),
    "coatnet": Family(
        of_timm_class(
            MaxxVit,
            MaxxVitCfg(
                **{**MAXVIT, "depths": (1, 2), "block_type": ("C", "T")},
                transformer_cfg=MaxxVitTransformerCfg(dim_head=8, rel_pos_type="mlp", use_nchw_attn=True),
            ),
            img_size=32,
        ),
        {"stages.*.blocks.*.mlp": 2},
    ),
    "mobilevit": Family(
        of_timm_class(
            ByobNet,
            ByoModelCfg(
                blocks=(REDUCE, _mobilevit_block(d=1, c=16, s=2, transformer_dim=16, transformer_depth=2)),
                **MOBILEVIT,
            ),
        ),
        {"stages.*.*.transformer.*.mlp": 2},
    ),
    "mobilevitv2": Family(
        of_timm_class(
            ByobNet,
            ByoModelCfg(
                blocks=(REDUCE, _mobilevitv2_block(d=1, c=16, s=2, transformer_depth=2)), **MOBILEVIT
            ),
        ),
        {"stages.*.*.transformer.*.mlp": 2},
    ),
    "hiera": Family(
        of_timm(
            "hiera_tiny_224",
            **{"img_size": (32, 32), "embed_dim": 16, "num_heads": 1, "stages": (1, 2), "q_pool": 1},
            **{"mask_unit_size": (2, 2), "mask_unit_attn": (True, False), "patch_kernel": (3, 3)},
            **{"patch_padding": (1, 1)},
        ),
        {"blocks.*.mlp": 3},
    ),
    "mvitv2": Family(
        of_timm_class(
            MultiScaleVit,
            MultiScaleVitCfg(
                **{"depths": (1, 2), "embed_dim": 16, "stride_q": ((1, 1), (2, 2)), "patch_kernel": (3, 3)},
                **{"stride_kv_adaptive": (2, 2), "patch_padding": (1, 1)},
            ),
            img_size=32,
        ),
        {"stages.*.blocks.*.mlp": 3},
    ),
    "convnext nchw": Family(of_timm_class(ConvNeXt, **CONVNEXT, conv_mlp=True), {"stages.*.blocks.*.mlp": 4}),
    "convnext channels-last": Family(of_timm_class(ConvNeXt, **CONVNEXT), {"stages.*.blocks.*.mlp": 4}),
    "convnextv2 nchw": Family(
        of_timm_class(ConvNeXt, **CONVNEXT, use_grn=True, conv_mlp=True),
        {"stages.*.blocks.*.mlp": 4},
        unit="image",
    ),
    "convnextv2 channels-last": Family(
        of_timm_class(ConvNeXt, **CONVNEXT, use_grn=True), {"stages.*.blocks.*.mlp": 4}, unit="image"
    ),
    "inception next": Family(
        of_timm_class(MetaNeXt, **METAFORMER, mlp_ratios=(2, 2)), {"stages.*.blocks.*.mlp": 3}
    ),
    "pvt_v2": Family(
        of_timm(
            "pvt_v2_b0",
            **{"depths": (1, 2), "embed_dims": (16, 32), "num_heads": (1, 2), "sr_ratios": (2, 1)},
            **{"mlp_ratios": (2, 2)},
        ),
        {"stages.*.blocks.*.mlp": 3},
        unit="image",
    ),
    "poolformer": Family(
        of_timm_class(
            MetaFormer,
            **METAFORMER,
            **{"mlp_act": nn.GELU, "mlp_bias": True, "layer_scale_init_values": 1.0, "use_mlp_head": False},
        ),
        {"stages.*.blocks.*.mlp": 3},
    ),
    "metaformer": Family(
        of_timm_class(MetaFormer, **METAFORMER, token_mixers=SepConv), {"stages.*.blocks.*.mlp": 3}
    ),
    "mlp-mixer": Family(of_timm_class(MlpMixer, **MIXER), {"blocks.*.mlp_channels": 2}),
    "resmlp": Family(
        of_timm_class(MlpMixer, **MIXER, block_layer=ResBlock, mlp_ratio=4.0), {"blocks.*.mlp_channels": 2}
    ),
    "tnt": Family(
        of_timm(
            "tnt_s_patch16_224",
            **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "inner_dim": 8, "depth": 2},
            **{"num_heads_inner": 2, "num_heads_outer": 2},
        ),
        {"blocks.*.mlp_in": 2, "blocks.*.mlp": 2},
    ),
    "gcvit": Family(
        of_timm_class(
            GlobalContextVit,
            **{
                "img_size": 32,
                "embed_dim": 16,
                "depths": (1, 1),
                "num_heads": (1, 2),
                "window_ratio": (8, 8),
            },
        ),
        {"stages.*.blocks.*.mlp": 2},
    ),
    "davit": Family(
        of_timm_class(DaVit, depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), window_size=4),
        {"stages.*.blocks.*.*.mlp": 4},
    ),
    "nest": Family(
        of_timm_class(
            Nest,
            **{
                "img_size": 32,
                "num_levels": 2,
                "embed_dims": (16, 32),
                "num_heads": (1, 2),
                "depths": (1, 1),
            },
            drop_path_rate=0.0,
        ),
        {"levels.*.transformer_encoder.*.mlp": 2},
    ),
    "edgenext": Family(
        of_timm(
            "edgenext_xx_small",
            **{"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "heads": (2, 2, 2, 2)},
            global_block_counts=(0, 0, 1, 1),
        ),
        {"stages.*.blocks.*.mlp": 4},
    ),
    "focalnet": Family(
        of_timm_class(
            FocalNet,
            embed_dim=16,
            depths=(1, 1),
            focal_levels=(2, 2),
            focal_windows=(3, 3),
            drop_path_rate=0.0,
        ),
        {"layers.*.blocks.*.mlp": 2},
    ),
    "tiny_vit": Family(
        of_timm(
            "tiny_vit_5m_224",
            **{"embed_dims": (16, 16, 32), "depths": (1, 1, 1), "num_heads": (1, 2, 2)},
            **{"window_sizes": (4, 4, 4), "drop_path_rate": 0.0},
        ),
        {"stages.*.blocks.*.mlp": 2},
    ),
    "sequencer": Family(
        of_timm(
            "sequencer2d_s",
            **{"img_size": 32, "layers": (1, 1), "patch_sizes": (8, 1), "embed_dims": (16, 16)},
            **{"hidden_sizes": (4, 4), "mlp_ratios": (2.0, 2.0)},
        ),
        {"stages.*.blocks.*.mlp_channels": 2},
    ),
    "torchvision vit": Family(
        lambda: VisionTransformer(32, 8, 2, 2, hidden_dim=24, mlp_dim=48, num_classes=CLASSES),
        {"encoder.layers.encoder_layer_*.mlp": 2},
    ),
    "torchvision swin": Family(
        lambda: SwinTransformer(**TV_SWIN, num_classes=CLASSES), {"features.*.*.mlp": 4}
    ),
    "torchvision swin_v2": Family(
        lambda: SwinTransformer(
            **TV_SWIN, num_classes=CLASSES, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
        ),
        {"features.*.*.mlp": 4},
    ),
    "torchvision maxvit": Family(
        lambda: MaxVit((32, 32), 8, 4, [16, 32], [1, 1], 8, stochastic_depth_prob=0.0, num_classes=CLASSES),
        {f"blocks.*.layers.*.layers.{part}_attention.mlp_layer": 2 for part in ("window", "grid")},
    ),
    "transformers vit": Family(
        of_transformers("ViTForImageClassification", "ViTConfig", **HF), {"vit.layers.*.mlp": 2}
    ),
    "transformers deit": Family(
        of_transformers("DeiTForImageClassification", "DeiTConfig", **HF), {"deit.layers.*.mlp": 2}
    ),
    "transformers vit_mae": Family(
        of_transformers("ViTMAEForPreTraining", "ViTMAEConfig", **HF, **DECODER),
        {"vit.layers.*.mlp": 2, "decoder.decoder_layers.*.mlp": 2},
        inputs={"noise": torch.linspace(0, 1, 16).repeat(BATCH, 1)},  # which patches are masked
    ),
    "transformers beit": Family(
        of_transformers("BeitForImageClassification", "BeitConfig", **HF, drop_path_rate=0.0),
        {"beit.layers.*.mlp": 2},
    ),
    "transformers swin": Family(
        of_transformers("SwinForImageClassification", "SwinConfig", **HF_SWIN),
        {"swin.encoder.layers.*.blocks.*.mlp": 4},
    ),
    "transformers dinov2": Family(
        of_transformers("Dinov2ForImageClassification", "Dinov2Config", **HF),
        {"dinov*.encoder.layer.*.mlp": 2},
    ),
    "transformers dinov2 giant": Family(
        of_transformers("Dinov2ForImageClassification", "Dinov2Config", **HF, use_swiglu_ffn=True),
        {"dinov*.encoder.layer.*.mlp": 2},
    ),
    "transformers dinov3": Family(
        of_transformers("DINOv3ViTModel", "DINOv3ViTConfig", **HF, pos_embed_rescale=None),
        {"model.layer.*.mlp": 2},
    ),
    "transformers dinov3 gated": Family(
        of_transformers(
            "DINOv3ViTModel", "DINOv3ViTConfig", **HF, pos_embed_rescale=None, use_gated_mlp=True
        ),
        {"model.layer.*.mlp": 2},
    ),
    "transformers siglip": Family(
        of_transformers("SiglipVisionModel", "SiglipVisionConfig", **HF), {"encoder.layers.*.mlp": 2}
    ),
    "transformers clip": Family(
        of_transformers("CLIPVisionModel", "CLIPVisionConfig", **HF), {"encoder.layers.*.mlp": 2}
    ),
    "transformers swinv2": Family(
        of_transformers("Swinv2ForImageClassification", "Swinv2Config", **HF_SWIN),
        {"swinv*.encoder.layers.*.blocks.*": 4},
        split=True,
    ),
    "transformers yolos": Family(
        of_transformers(
            "YolosForObjectDetection", "YolosConfig", **{**HF, "image_size": [32, 32]}, num_detection_tokens=4
        ),
        {"vit.encoder.layer.*": 2},
        split=True,
    ),
    "transformers convnext": Family(
        of_transformers("ConvNextForImageClassification", "ConvNextConfig", **HF_CONVNEXT),
        {"convnext.encoder.stages.*.layers.*": 4},
        split=True,
    ),
    "transformers convnextv2": Family(
        of_transformers("ConvNextV2ForImageClassification", "ConvNextV2Config", **HF_CONVNEXT),
        {"convnextv*.encoder.stages.*.layers.*": 4},
        unit="image",
        split=True,
    ),
    "torchvision convnext": Family(
        lambda: TorchvisionConvNeXt(
            [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], layer_scale=1.0, num_classes=CLASSES
        ),
        {"features.*.*": 2},
        split=True,
    ),
    "torch.nn": Family(TorchViT, {"*.layers.*": 2}, split=True),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def outputs(model: nn.Module, family: Family) -> Tensor:
    """(BATCH, features): what the model makes of one fixed batch."""
    x = torch.randn(BATCH, 3, family.size, family.size, generator=torch.Generator().manual_seed(0))
    return as_tensor(model(x, **family.inputs))


def as_tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result.flatten(1)
    if type(result) is tuple:  # one entry per head of a distilled model
        return torch.cat([as_tensor(entry) for entry in result], dim=1)
    return next(result[key].flatten(1) for key in ("logits", "pooler_output") if result.get(key) is not None)


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch off what some families fix at 1/8 in the network that makes their position bias."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def patterns(names: list[str]) -> dict[str, int]:
    """Names with `*` for numbers, and how often each occurs."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\d+", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return counts


@every_family
def test_the_ffns_of_a_family_are_found(family: Family) -> None:
    found = [ffn for ffn in ewa.find_ffns(family.build()) if ffn.unit is not None]
    assert patterns([ffn.name for ffn in found]) == family.ffns
    if family.unit == "token":
        assert {ffn.unit for ffn in found} == {"token"}


@every_family
def test_identical_experts_equal_the_dense_model(family: Family) -> None:
    dense = without_dropout(randomised(family.build(), 0.1))
    model = ewa.expand(copy.deepcopy(dense), 3, select="all", unit=family.unit)
    assert len(moe_layers(model)) == (2 if family.split else 1) * sum(family.ffns.values())
    with torch.no_grad():
        assert_close(outputs(model.eval(), family), outputs(dense.eval(), family), 1e-5)
        expected = outputs(dense.train(), family)
        assert_close(outputs(model.train(), family), expected, 1e-4)
        assert (outputs(separated(model), family) - expected).norm() > 1e-3 * expected.norm()


@every_family
def test_training_lowers_the_loss_and_separates_the_experts(family: Family) -> None:
    model = ewa.expand(family.build(), 2, select="all", unit=family.unit).train()
    optimizer = torch.optim.AdamW(ewa.param_groups(model), lr=4e-3)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(outputs(model, family), torch.arange(BATCH))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for moe in moe_layers(model).values():
            assert all(parameter.grad is not None for parameter in moe.parameters())
        optimizer.step()
    assert losses[3] < losses[0]
    assert all(spread > 0 for spread in ewa.expert_spread(model).values())


@every_family
def test_collapse_gives_the_model_of_the_library_back(family: Family) -> None:
    dense = randomised(family.build(), 0.1)
    model = ewa.expand(copy.deepcopy(dense), 3, select="all", unit=family.unit)
    separated(model).eval()
    fresh = family.build().eval()
    with torch.no_grad():
        evaluated = outputs(model, family)
        state = ewa.dense_state_dict(model)
        collapsed = ewa.collapse(model)
        assert_close(outputs(collapsed, family), evaluated, 1e-5)
        fresh.load_state_dict(collapsed.state_dict(), strict=True)
        assert_close(outputs(fresh, family), evaluated, 1e-5)
    before, after = dense.state_dict(), collapsed.state_dict()
    assert list(after) == list(before) == list(state)
    assert after._metadata == before._metadata == state._metadata
    for key in after:
        assert torch.equal(state[key], after[key])
        assert after[key].is_contiguous() == before[key].is_contiguous()  # safetensors insists on it
    kinds = [[(name, type(m)) for name, m in each.named_modules()] for each in (dense, collapsed)]
    assert kinds[0] == kinds[1]
    assert set(vars(collapsed)) == set(vars(dense))


@pytest.mark.parametrize("name", ["pvt_v2", "convnextv2 nchw", "convnextv2 channels-last"])
def test_ffns_that_mix_tokens_are_dealt_by_image_only_when_asked(name: str) -> None:
    model = FAMILIES[name].build()
    with pytest.raises(ewa.EwavitError, match=r'mixes tokens.*unit="image"') as error:
        ewa.expand(model)
    first = str(error.value).partition("\n")[0]
    assert 'as in ewavit.expand(model, unit="image") or ewavit train --unit image' in first
    ewa.expand(model, unit="image")
    assert {layer.experts for layer in ewa.summary(model).layers} == {"separate"}


REFUSED = {
    "repvit": (of_timm("repvit_m0_9", embed_dim=(16, 32), depth=(1, 1)), ["channel_mixer", "BatchNorm2d"]),
    "levit": (
        of_timm("levit_128s", img_size=32, embed_dim=(16, 32), key_dim=8, depth=(1, 1), num_heads=(2, 2)),
        ["stages.0.blocks.0.mlp", "LevitMlp", "BatchNorm1d inside"],
    ),
    "efficientformer": (
        of_timm_class(EfficientFormer, depths=(1, 1), embed_dims=(16, 32)),
        ["stages.0.blocks.0.mlp", "BatchNorm2d inside"],
    ),
    "gmlp": (
        of_timm_class(MlpMixer, **MIXER, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=4.0),
        ["blocks.0.mlp_channels", "GatedMlp", "cannot be run on (2, 4, 24)"],
    ),
    "resnet": (
        of_timm("resnet18", channels=(8, 8, 8, 8)),
        ["no module looks like an FFN", "convolutions with BatchNorm are none"],
    ),
    "vgg": (of_timm_class(VGG, [8, "M", 8]), ["pre_logits", "part of the head"]),
    "vit with attention and FFN fused": (
        of_timm("vit_dpwee_patch16_reg1_gap_256", **VIT),
        ["blocks.0", "DiffParallelScalingBlock", "in_proj computes attention and FFN in one layer"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("unit", ["token", "image"])
def test_models_that_cannot_be_expanded_are_refused_with_reasons(name: str, unit: str) -> None:
    build, reasons = REFUSED[name]
    model = build()
    with pytest.raises(ewa.EwavitError) as error:
        ewa.expand(model, unit=unit)
    for reason in reasons:
        assert reason in str(error.value)
    assert not moe_layers(model)


def test_modules_that_only_look_like_ffns_are_refused_by_what_they_are() -> None:
    refused = {}
    for name in (
        "swinv2 cr",
        "coatnet",
        "naflexvit",
        "mlp-mixer",
        "transformers siglip",
        "davit",
        "metaformer",
    ):
        refused |= {f.name: f.reason for f in ewa.find_ffns(FAMILIES[name].build()) if f.unit is None}
    assert "part of attention" in refused["stages.0.blocks.0.attn.meta_mlp"]
    assert "part of attention" in refused["stages.1.blocks.0.attn.rel_pos.mlp"]
    assert "part of the head" in refused["attn_pool.mlp"]
    assert "mixes tokens" in refused["blocks.0.mlp_tokens"]
    assert "part of the head" in refused["head.mlp"]
    assert "part of the head" in refused["head"]
    assert "part of the head" in refused["head.fc"]


def test_an_ffn_shared_by_three_places_stays_shared() -> None:
    model = FAMILIES["coat"].build()
    shared = model.parallel_blocks[0]
    assert shared.mlp2 is shared.mlp3 is shared.mlp4
    ewa.expand(model, select="all")
    assert isinstance(shared.mlp2, MoE)
    assert shared.mlp2 is shared.mlp3 is shared.mlp4
    ewa.collapse(model)
    assert type(shared.mlp2) is Mlp
    assert shared.mlp2 is shared.mlp3 is shared.mlp4


@pytest.mark.parametrize("name", ["cait", "xcit", "volo"])
def test_class_token_ffns_work_with_fewer_tokens_than_experts(name: str) -> None:
    family = FAMILIES[name]
    model = ewa.expand(family.build(), BATCH + 3, select="all").train()
    outputs(model, family).square().sum().backward()
    assert all(
        parameter.grad is not None for moe in moe_layers(model).values() for parameter in moe.parameters()
    )


# Weight decay and layer decay, as timm assigns them.


def settings_of(model: nn.Module, groups: list[dict[str, Any]], *keys: str) -> dict[str, tuple[float, ...]]:
    """What each parameter's group says, under the parameter's dense name."""
    values = {id(p): tuple(group.get(key, 1.0) for key in keys) for group in groups for p in group["params"]}
    return {name.replace(".experts.ffn", ""): values[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["vit", "eva02 swiglu", "beit", "swin"])
def test_optimizer_groups_of_timm_are_those_of_the_dense_model(name: str) -> None:
    dense = FAMILIES[name].build()
    model = ewa.expand(copy.deepcopy(dense), select="all")
    for groups in (
        lambda m: create_optimizer_v2(m, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups,
        lambda m: ewa.param_groups(m, weight_decay=0.05),
    ):
        assert settings_of(model, groups(model), "weight_decay") == settings_of(
            dense, groups(dense), "weight_decay"
        )


def test_layer_decay_of_timm_is_that_of_the_dense_model() -> None:
    dense = FAMILIES["eva02 swiglu"].build()
    model = ewa.expand(copy.deepcopy(dense), select="all")
    result = [
        settings_of(
            m,
            param_groups_layer_decay(
                m, weight_decay=0.05, no_weight_decay_list=m.no_weight_decay(), layer_decay=0.7
            ),
            "weight_decay",
            "lr_scale",
        )
        for m in (dense, model)
    ]
    assert result[0] == result[1]
    assert len(set(result[0].values())) > 4


def test_an_expanded_model_can_be_copied_and_pickled() -> None:
    family = FAMILIES["eva02 swiglu"]
    model = separated(ewa.expand(family.build(), 3)).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, family), outputs(model, family))
        assert twin.no_weight_decay() == model.no_weight_decay()
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        assert type(ewa.collapse(twin).blocks[1].mlp) is type(model.blocks[0].mlp)


def test_the_state_of_an_expanded_model_loads_without_unpickling_code() -> None:
    model = separated(ewa.expand(tiny_vit(), 3)).eval()
    other = ewa.expand(tiny_vit(), 3).eval()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    x = images()
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("kind", ["stacked", "separate"])
def test_half_precision_models_expand_and_collapse(kind: str) -> None:
    dense = randomised(tiny_vit(), 0.05).bfloat16()
    model = ewa.expand(copy.deepcopy(dense), 3, experts=kind)
    x = images().bfloat16()
    assert_close(model.eval()(x), dense.eval()(x), 3e-2)
    model.train()(x).float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {p.dtype for p in ewa.collapse(model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["eva02 swiglu", "convnext nchw", "convnextv2 nchw", "metaformer"])
def test_autocast_computes_what_it_does_in_the_dense_model(name: str) -> None:
    family = FAMILIES[name]
    dense = family.build()
    model = ewa.expand(copy.deepcopy(dense), 3, unit=family.unit)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(dense, family)
        result = outputs(model, family)
    assert result.dtype == expected.dtype
    assert_close(result, expected, 1e-2)
    result.float().square().sum().backward()
    assert all(p.grad is not None for moe in moe_layers(model).values() for p in moe.parameters())


def test_a_collapsed_transformers_model_is_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    family = FAMILIES["transformers vit"]
    model = ewa.collapse(separated(ewa.expand(family.build(), 3))).eval()
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    assert torch.equal(outputs(loaded.eval(), family), outputs(model, family))


def test_the_search_leaves_the_model_and_the_generator_alone() -> None:
    model = tiny_vit(depth=4)
    model.blocks[1].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    ewa.find_ffns(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    ewa.expand(model, 3)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [block.mlp.training for block in model.blocks] == [True, False, True, True]


def test_the_search_reports_what_is_expanded_already() -> None:
    model = ewa.expand(tiny_vit(depth=2))
    assert [(ffn.name, ffn.reason) for ffn in ewa.find_ffns(model)] == [
        ("blocks.0.mlp", ""),
        ("blocks.1.mlp", "is already expanded"),
    ]


# FFNs written for the search alone.


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank update beside it, as PEFT wraps one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.mT @ self.up.mT


class DoubledLinear(nn.Linear):
    """Looks like a linear layer and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "wrap", [LowRank, nn.utils.parametrizations.weight_norm], ids=["low rank", "weight norm"]
)
def test_ffns_with_wrapped_layers_fall_back_to_separate_experts(wrap: Callable[..., nn.Module]) -> None:
    dense = MlpNet()
    for block in dense.blocks:
        block.mlp.fc1 = wrap(block.mlp.fc1)
    model = ewa.expand(copy.deepcopy(dense), 3)
    assert {layer.experts for layer in ewa.summary(model).layers} == {"separate"}
    x = torch.randn(4, 5, DIM)
    assert_close(model.train()(x), dense(x), 1e-5)
    separated(model).eval()
    expected = model(x)
    assert_close(ewa.collapse(model)(x), expected, 1e-5)
    with pytest.raises(ewa.EwavitError, match="cannot be stacked"):
        ewa.expand(dense, experts="stacked")


def test_a_linear_layer_with_a_forward_of_its_own_is_not_stacked() -> None:
    model = MlpNet()
    for block in model.blocks:
        block.mlp.fc2 = DoubledLinear(12, DIM)
    assert [ffn.stackable for ffn in ewa.find_ffns(model)] == [False] * 4


class ProbedFFN(nn.Module):
    """Norm, linear layer, something, linear layer."""

    def __init__(self, something: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(DIM), nn.Linear(DIM, 12), nn.Linear(12, DIM)
        self.something = something
        nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.something(self.fc1(self.norm(x))))


@pytest.mark.parametrize(
    ("something", "unit", "reason"),
    [
        (torch.tanh, "token", ""),
        (lambda x: x - x.mean(1, keepdim=True), "image", 'unit="image"'),
        (lambda x: x.cumsum(1), "image", 'unit="image"'),
        (lambda x: x * torch.arange(x.shape[1])[:, None], "image", 'unit="image"'),
        (lambda x: x - x.mean(0, keepdim=True), None, "mixes the images"),
        (lambda x: x[:, ::2], None, "one output per token"),
        (torch.zeros_like, None, "does not depend on its input"),
        (lambda x: x * float("nan"), None, ""),
        (lambda x: x[:, :16].view(2, 16), None, "cannot be run on (2, 4, 8)"),
    ],
    ids=[
        "nothing",
        "mean over tokens",
        "causal",
        "position",
        "mean over images",
        "fewer tokens",
        "constant",
        "nan",
        "an error",
    ],
)
def test_what_an_ffn_mixes_is_found_by_running_it(
    something: Callable[[Tensor], Tensor], unit: str | None, reason: str
) -> None:
    [ffn] = ewa.find_ffns(nn.ModuleDict({"mlp": ProbedFFN(something)}))
    assert ffn.unit == unit
    assert reason in ffn.reason


def test_what_cannot_be_averaged_or_copied_is_refused() -> None:
    def reason(change: Callable[[nn.Module], object]) -> str:
        model = MlpNet(1)
        change(model.blocks[0].mlp)
        [ffn] = ewa.find_ffns(model)
        assert ffn.unit is None
        return ffn.reason

    def quantise(mlp: nn.Module) -> None:
        mlp.fc1.weight = nn.Parameter(torch.zeros(12, DIM, dtype=torch.int8), requires_grad=False)

    def keep_a_result(mlp: nn.Module) -> None:
        mlp.cache = (number for number in range(3))

    assert "torch.int8: averaging needs floating point" in reason(quantise)
    assert "cannot be copied: TypeError" in reason(keep_a_result)
    assert "meta device" in reason(lambda mlp: mlp.to("meta"))
    assert "BatchNorm1d inside" in reason(lambda mlp: setattr(mlp, "norm", nn.BatchNorm1d(12)))
    assert "run the model once first" in reason(lambda mlp: setattr(mlp, "fc1", nn.LazyLinear(12)))


def test_alike_ffns_that_differ_in_an_attribute_are_examined_apart() -> None:
    class Switched(ProbedFFN):
        def __init__(self, mixes: bool) -> None:
            super().__init__(lambda x: x.cumsum(1) if mixes else x)
            self.mixes = mixes

    found = ewa.find_ffns(nn.ModuleDict({"mlp1": Switched(False), "mlp2": Switched(True)}))
    assert [ffn.unit for ffn in found] == ["token", "image"]


def test_a_named_module_is_examined_whatever_its_name() -> None:
    ffn = nn.Sequential(nn.Linear(DIM, 12), nn.ReLU(), nn.Linear(12, DIM))
    model = nn.ModuleDict({"surprise": ffn, "other": nn.Linear(DIM, DIM)})
    assert ewa.find_ffns(model) == []
    ewa.expand(model, select=["surprise", "other"])
    assert list(moe_layers(model)) == ["surprise", "other"]


def test_two_layers_beside_attention_in_a_list_are_an_ffn_without_a_name():
    def two_layers() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))

    attention = timm.layers.Attention(DIM, 2)
    layers = nn.ModuleList([nn.ModuleList([attention, two_layers()]), nn.ModuleList([two_layers()])])
    model = nn.ModuleDict({"layers": layers, "projection": two_layers()})
    assert [(ffn.name, ffn.unit) for ffn in ewa.find_ffns(model)] == [("layers.0.1", "token")]


@pytest.mark.parametrize("gated", [False, True])
def test_the_ffns_of_t5_are_found_in_encoder_and_decoder(gated: bool):
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 6, "num_heads": 2, "vocab_size": 20}
    config = transformers.T5Config(**size, feed_forward_proj="gated-gelu" if gated else "relu")
    model = ewa.expand(transformers.T5Model(config), 3, select="all")
    assert patterns(list(moe_layers(model))) == {
        "encoder.block.*.layer.*.DenseReluDense": 6,
        "decoder.block.*.layer.*.DenseReluDense": 6,
    }
    ids = torch.arange(6).view(2, 3)
    model(input_ids=ids, decoder_input_ids=ids).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for moe in moe_layers(model).values() for p in moe.parameters())


def test_a_projection_within_an_ffn_is_not_taken_for_the_ffn():
    class GEGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(DIM, 24)

        def forward(self, x: Tensor) -> Tensor:
            hidden, gate = self.proj(x).chunk(2, -1)
            return hidden * F.gelu(gate)

    model = nn.ModuleDict({"ff": nn.Sequential(GEGLU(), nn.Dropout(0.1), nn.Linear(12, DIM))})
    assert [(ffn.name, ffn.unit, ffn.stackable) for ffn in ewa.find_ffns(model)] == [("ff", "token", True)]


def test_ffn_that_drops_whole_images_is_dealt_by_image_alone():
    class Dropping(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(Mlp(DIM), timm.layers.DropPath(0.5))

    model = nn.ModuleDict({"mlp": Dropping()})
    with pytest.raises(ewa.EwavitError, match="DropPath"):
        ewa.expand(model, select=["mlp"])
    ewa.expand(model, select=["mlp"], unit="image")
    assert isinstance(model["mlp"].experts, SeparateExperts)


HF_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}


def test_an_object_detectors_heads_are_not_ffns_with_its_blocks_refused_or_not():
    config = transformers.YolosConfig(**HF_TINY, image_size=[32, 32], patch_size=8, num_detection_tokens=4)
    model = transformers.YolosForObjectDetection(config)
    assert [f.name for f in ewa.find_ffns(model) if f.unit] == ["vit.encoder.layer.0", "vit.encoder.layer.1"]
    for block in model.vit.encoder.layer:
        block.output.dense = nn.Sequential(nn.Linear(96, 8), nn.Linear(8, 48))
    with pytest.raises(ewa.EwavitError, match="no FFN works") as refused:
        ewa.expand(model)
    assert "bbox_predictor" in str(refused.value)
    assert "part of the head" in str(refused.value)


def test_an_ffn_beside_attention_is_kept_where_other_blocks_are_refused():
    model = nn.Module()
    model.backbone = nn.ModuleList([tiny_vit(1).blocks[0]])
    model.decoder = nn.TransformerDecoderLayer(16, 2, 32)
    model.decoder.linear1 = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32))  # no layer that can be dealt
    model.mlp = tiny_vit(1).blocks[0].mlp
    found = {ffn.name: ffn for ffn in ewa.find_ffns(model)}
    assert found["decoder"].unit is None
    assert "linear1 (Sequential) holds 2 linear layers" in found["decoder"].reason
    assert found["backbone.0.mlp"].unit == "token"
    assert "outside the blocks" in found["mlp"].reason


def test_a_classifiers_head_is_left_out_where_the_blocks_can_be_expanded():
    config = transformers.ASTConfig(
        **HF_TINY, patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=32
    )
    model = ewa.expand(transformers.ASTForAudioClassification(config), select="all")
    assert list(moe_layers(model)) == [f"audio_spectrogram_transformer.layers.{n}.mlp" for n in (0, 1)]


@pytest.mark.parametrize("place", ["head", "classifier", "bbox_predictor", "mask_embed"])
def test_a_head_is_refused_by_its_place(place):
    model, inner = nn.Module(), nn.Module()
    model.blocks = nn.ModuleList([tiny_vit(1).blocks[0]])
    inner.mlp = tiny_vit(1).blocks[0].mlp
    setattr(model, place, inner)
    found = {ffn.name: ffn for ffn in ewa.find_ffns(model)}
    assert found["blocks.0.mlp"].unit == "token"
    assert "part of the head" in found[f"{place}.mlp"].reason


def test_a_head_is_refused_by_its_class_and_by_its_width():
    class MlpHead(nn.Sequential):
        pass

    model = nn.Module()
    model.mlp1 = MlpHead(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    model.mlp2 = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5))
    model.mlp3 = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    found = {ffn.name: ffn for ffn in ewa.find_ffns(model)}
    assert found["mlp1"].unit is None
    assert "MlpHead" in found["mlp1"].reason
    assert "8 channels in, 5 out" in found["mlp2"].reason
    assert found["mlp3"].unit == "token"


def test_ffns_of_video_models_take_five_dimensions():
    dense = SwinTransformer3d([2, 4, 4], 24, [2], [3], [2, 4, 4], num_classes=CLASSES)
    model = ewa.expand(dense, 2, select="all")
    model.train()(torch.randn(1, 3, 4, 32, 32)).sum().backward()
    assert all(p.grad is not None for moe in moe_layers(model).values() for p in moe.parameters())
    x = torch.randn(1, 3, 4, 32, 32)
    expected = model.eval()(x)
    torch.testing.assert_close(ewa.collapse(model)(x), expected, atol=1e-5, rtol=1e-5)
