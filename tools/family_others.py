"""Small models of other libraries with random weights, for `tools/families.py`: nothing is downloaded.

The families of `tests/test_models.py` are used as they are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from family import Family, floats, images, made, text
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


SQUARE = {"image_size": 32, "num_classes": 5}
DEEP = {**SQUARE, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
STAGES = {"num_classes": 5, "dim": (16, 32, 48, 64), "depth": (1, 1, 1, 1)}
VIT_PYTORCH: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "ViT": ("vit", "ViT", DEEP, 32),
    "SimpleViT": ("simple_vit", "SimpleViT", DEEP, 32),
    "SimpleViT with registers": ("simple_vit_with_register_tokens", "SimpleViT", DEEP, 32),
    "SimpleViT with QK norm": ("simple_vit_with_qk_norm", "SimpleViT", DEEP, 32),
    "ViT with patch dropout": ("vit_with_patch_dropout", "ViT", DEEP, 32),
    "ViT with patch merger": ("vit_with_patch_merger", "ViT", {**DEEP, "patch_merge_layer": 1}, 32),
    "ViT for small datasets": ("vit_for_small_dataset", "ViT", DEEP, 32),
    "Parallel ViT": ("parallel_vit", "ViT", DEEP, 32),
    "DeepViT": ("deepvit", "DeepViT", DEEP, 32),
    "CaiT": ("cait", "CaiT", {**DEEP, "cls_depth": 1}, 32),
    "PiT": ("pit", "PiT", {**DEEP, "depth": (1, 1)}, 32),
    "T2T-ViT": (
        "t2t",
        "T2TViT",
        {
            "image_size": 32,
            "num_classes": 5,
            "dim": 32,
            "depth": 2,
            "heads": 2,
            "mlp_dim": 64,
            "t2t_layers": ((7, 4), (3, 2)),
        },
        32,
    ),
    "CCT": (
        "cct",
        "CCT",
        {
            "img_size": 32,
            "num_classes": 5,
            "embedding_dim": 32,
            "n_conv_layers": 1,
            "kernel_size": 7,
            "stride": 2,
            "padding": 3,
            "num_layers": 2,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
        32,
    ),
    "CrossViT": (
        "cross_vit",
        "CrossViT",
        {
            "image_size": 32,
            "num_classes": 5,
            "depth": 1,
            "sm_dim": 16,
            "sm_patch_size": 4,
            "sm_enc_depth": 1,
            "sm_enc_heads": 2,
            "sm_enc_mlp_dim": 32,
            "lg_dim": 32,
            "lg_patch_size": 8,
            "lg_enc_depth": 1,
            "lg_enc_heads": 2,
            "lg_enc_mlp_dim": 64,
            "cross_attn_depth": 1,
            "cross_attn_heads": 2,
        },
        32,
    ),
    "RvT": ("rvt", "RvT", DEEP, 32),
    "Look ViT": (
        "look_vit",
        "LookViT",
        {
            "image_size": 64,
            "num_classes": 5,
            "dim": 32,
            "depth": 1,
            "heads": 2,
            "patch_size": 16,
            "highres_patch_size": 8,
        },
        64,
    ),
    "NesT": (
        "nest",
        "NesT",
        {**SQUARE, "patch_size": 4, "dim": 16, "heads": 2, "num_hierarchies": 2, "block_repeats": (1, 1)},
        32,
    ),
    "CrossFormer": (
        "crossformer",
        "CrossFormer",
        {**STAGES, "dim": (32, 32, 64, 64), "global_window_size": (4, 2, 1, 1), "local_window_size": 1},
        32,
    ),
    "CvT": (
        "cvt",
        "CvT",
        {
            "num_classes": 5,
            **{f"s{n}_{k}": v for n in (1, 2, 3) for k, v in (("emb_dim", 16), ("heads", 1), ("depth", 1))},
        },
        32,
    ),
    "Twins-SVT": (
        "twins_svt",
        "TwinsSVT",
        {
            "num_classes": 5,
            **{
                f"s{n}_{k}": v
                for n in (1, 2, 3, 4)
                for k, v in (
                    ("emb_dim", 16),
                    ("depth", 1),
                    ("patch_size", 2),
                    ("local_patch_size", 1),
                    ("global_k", 1),
                )
            },
        },
        32,
    ),
    "RegionViT": ("regionvit", "RegionViT", {**STAGES, "window_size": 1}, 32),
    "ScalableViT": (
        "scalable_vit",
        "ScalableViT",
        {
            "num_classes": 5,
            "dim": 16,
            "heads": (1, 1, 2, 2),
            "depth": (1, 1, 1, 1),
            "ssa_dim_key": (8, 8, 8, 8),
            "reduction_factor": (2, 2, 1, 1),
            "window_size": (4, 2, 1, 1),
        },
        32,
    ),
    "SepViT": (
        "sep_vit",
        "SepViT",
        {"num_classes": 5, "dim": 16, "dim_head": 8, "heads": (1, 2), "depth": (1, 1), "window_size": 7},
        56,
    ),
    "MaxViT": (
        "max_vit",
        "MaxViT",
        {"num_classes": 5, "dim_conv_stem": 16, "dim": 16, "dim_head": 8, "depth": (1, 1), "window_size": 4},
        32,
    ),
    "MobileViT": (
        "mobile_vit",
        "MobileViT",
        {
            "image_size": (64, 64),
            "dims": [16, 24, 32],
            "num_classes": 5,
            "channels": [8, 8, 16, 16, 24, 24, 32, 32, 48, 48, 64],
        },
        64,
    ),
    "XCiT": ("xcit", "XCiT", {**DEEP, "cls_depth": 1}, 32),
    "LeViT": (
        "levit",
        "LeViT",
        {**SQUARE, "stages": 2, "dim": (16, 32), "depth": 1, "heads": 2, "mlp_mult": 2},
        32,
    ),
    "Learnable memory ViT": ("learnable_memory_vit", "ViT", DEEP, 32),
    "Normalized ViT": ("normalized_vit", "nViT", DEEP, 32),
}


def of_vit_pytorch() -> Iterator[Family]:
    family = partial(Family, "vit-pytorch")
    for name, (file, kind, settings, size) in VIT_PYTORCH.items():
        build = partial(made, f"vit_pytorch.{file}", kind, **settings)
        yield family(name, build, partial(images, size, batch=4))
    frames = {"image_patch_size": 8, "frames": 4, "frame_patch_size": 2}
    settings = {key: value for key, value in DEEP.items() if key not in ("patch_size", "depth")}
    vivit = partial(
        made, "vit_pytorch.vivit", "ViViT", **settings, **frames, spatial_depth=1, temporal_depth=1
    )
    yield family("ViViT", vivit, lambda: ((torch.randn(2, 3, 4, 32, 32),), {}))
    yield family("NaViT", partial(made, "vit_pytorch.na_vit", "NaViT", **DEEP), navit_inputs)
    line = {
        "seq_len": 32,
        "patch_size": 8,
        "num_classes": 5,
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "mlp_dim": 64,
    }
    yield family(
        "ViT 1d", partial(made, "vit_pytorch.vit_1d", "ViT", **line), lambda: ((torch.randn(4, 3, 32),), {})
    )


def navit_inputs() -> Any:
    """Two sequences with images of several sizes."""
    return (([[torch.randn(3, 32, 16), torch.randn(3, 16, 16)], [torch.randn(3, 32, 32)]],), {})


def of_open_clip() -> Iterator[Family]:
    family = partial(Family, "open_clip")
    tower = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    words = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 2}
    both: Callable[[], Any] = lambda: ((torch.randn(2, 3, 32, 32), text()[1]["input_ids"]), {})  # noqa: E731
    clip = {"embed_dim": 16, "vision_cfg": tower, "text_cfg": words}
    yield family("CLIP", partial(made, "open_clip.model", "CLIP", **clip), both)
    scaled = {**clip, "vision_cfg": {**tower, "ls_init_value": 0.1}}
    yield family("CLIP with LayerScale", partial(made, "open_clip.model", "CLIP", **scaled), both)
    resnet = {
        **clip,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    }
    yield family("CLIP with a ResNet", partial(made, "open_clip.model", "CLIP", **resnet), both)
    coca = {
        "embed_dim": 32,
        "multimodal_cfg": {**words, "layers": 2, "attn_pooler_heads": 2},
        "vision_cfg": {**tower, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**words, "embed_cls": True, "output_tokens": True},
    }
    yield family("CoCa", partial(made, "open_clip.coca_model", "CoCa", **coca), both)


def of_diffusers() -> Iterator[Family]:
    family = partial(Family, "diffusers")
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    plane = {"patch_size": 2, "in_channels": 4, "out_channels": 4}
    when, latents = torch.tensor([1, 2]), (2, 4, 8, 8)
    yield family(
        "DiT",
        partial(made, "diffusers", "DiTTransformer2DModel", **heads, **plane, num_embeds_ada_norm=10),
        lambda: floats("hidden_states", *latents, timestep=when, class_labels=when),
    )
    yield family(
        "PixArt",
        partial(
            made,
            "diffusers",
            "PixArtTransformer2DModel",
            **heads,
            **plane,
            cross_attention_dim=32,
            caption_channels=16,
        ),
        lambda: floats(
            "hidden_states",
            *latents,
            timestep=when,
            encoder_hidden_states=torch.randn(2, 3, 16),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    )
    yield family(
        "Stable Diffusion 3",
        partial(
            made,
            "diffusers",
            "SD3Transformer2DModel",
            **{**heads, **plane},
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
        ),
        lambda: floats(
            "hidden_states",
            *latents,
            timestep=when,
            encoder_hidden_states=torch.randn(2, 3, 16),
            pooled_projections=torch.randn(2, 16),
        ),
    )
    yield family(
        "Flux",
        partial(
            made,
            "diffusers",
            "FluxTransformer2DModel",
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda: floats(
            "hidden_states",
            2,
            16,
            4,
            timestep=when.float(),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(3, 3),
            encoder_hidden_states=torch.randn(2, 3, 16),
            pooled_projections=torch.randn(2, 16),
        ),
    )
    yield family(
        "UNet of Stable Diffusion",
        partial(
            made,
            "diffusers",
            "UNet2DConditionModel",
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        lambda: floats("sample", *latents, timestep=when, encoder_hidden_states=torch.randn(2, 3, 16)),
    )
    yield family(
        "Sana",
        partial(
            made,
            "diffusers",
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
        ),
        lambda: floats("hidden_states", *latents, timestep=when, encoder_hidden_states=torch.randn(2, 3, 16)),
    )


def of_segmentation() -> Iterator[Family]:
    family = partial(Family, "segmentation_models_pytorch")
    plain = {"encoder_weights": None, "classes": 3}
    for kind, encoder in (
        ("Segformer", "mit_b0"),
        ("FPN", "mit_b0"),
        ("UPerNet", "mit_b0"),
        ("Unet", "resnet18"),
        ("Unet", "mobilenet_v2"),
        ("UPerNet", "tu-convnext_atto"),
        ("UPerNet", "tu-pvt_v2_b0"),
        ("DeepLabV3", "resnet18"),
    ):
        build = partial(made, "segmentation_models_pytorch", kind, encoder, **plain)
        yield family(f"{kind} with {encoder}", build, partial(images, 64, batch=2))


def of_torchvision() -> Iterator[Family]:
    family = partial(Family, "torchvision")
    for name in ("resnet18", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5"):
        yield family(name, partial(made, "torchvision.models", name, num_classes=5), partial(images, 64))
    video = {
        "patch_size": [2, 4, 4],
        "embed_dim": 24,
        "depths": [2],
        "num_heads": [3],
        "window_size": [2, 4, 4],
    }
    yield family(
        "swin3d",
        partial(
            made, "torchvision.models.video.swin_transformer", "SwinTransformer3d", **video, num_classes=5
        ),
        lambda: ((torch.randn(2, 3, 4, 32, 32),), {}),
    )
    yield family("mvit v2 (video)", _mvit, lambda: ((torch.randn(2, 3, 4, 32, 32),), {}))


def _mvit() -> nn.Module:
    parts = import_module("torchvision.models.video.mvit")
    block = parts.MSBlockConfig(
        num_heads=2,
        input_channels=16,
        output_channels=16,
        kernel_q=[3, 3, 3],
        kernel_kv=[3, 3, 3],
        stride_q=[1, 1, 1],
        stride_kv=[1, 2, 2],
    )
    built: nn.Module = parts.MViT(
        (32, 32),
        4,
        [block, block],
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=5,
    )
    return built


def of_torch() -> Iterator[Family]:
    family = partial(Family, "torch")
    layer = {"d_model": 32, "nhead": 2, "dim_feedforward": 64, "batch_first": True}

    def sequence() -> Tensor:
        return torch.randn(2, 8, 32)

    yield family(
        "nn.TransformerEncoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2),
        lambda: ((sequence(),), {}),
    )
    yield family(
        "nn.Transformer",
        lambda: nn.Transformer(num_encoder_layers=2, num_decoder_layers=2, **layer),
        lambda: ((sequence(), sequence()), {}),
    )


def of_tests() -> Iterator[Family]:
    """The families of the test suite, the refused ones too."""
    suite = import_module("test_models")
    for name, found in suite.FAMILIES.items():
        library, _, rest = name.partition(" ")
        known = library in ("torchvision", "transformers")
        if name in (
            "torch.nn",
            "vit by image",
            "transformers swinv2",
            "transformers yolos",
            "transformers convnextv2",
        ):
            continue  # listed with their library
        inputs = partial(images, found.size, suite.BATCH, **found.inputs)
        yield Family(library if known else "timm", rest if known else name, found.build, inputs)
    for name, (build, _) in suite.REFUSED.items():
        yield Family("timm", name, build, partial(images, 32))
