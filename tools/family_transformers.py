"""Small models of transformers with random weights, for `tools/families.py`: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from family import Family, floats, images, text
from torch import nn


def configured(model: str, config: str, **settings: Any) -> nn.Module:
    """A transformers model of a configuration."""
    library = import_module("transformers")
    built: nn.Module = getattr(library, model)(getattr(library, config)(**settings))
    return built


TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = {**TEXT, "vocab_size": 32}
SIDE = {"image_size": 32, "patch_size": 8}
VIT = {**TEXT, **SIDE}
HALVES = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
}
BART = {**HALVES, "d_model": 32, "vocab_size": 32, "max_position_embeddings": 32}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
LLAMA = {**WORDS, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]}
WAVE = {
    **WORDS,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}

TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", WORDS),
    "RoBERTa": ("Roberta", {**WORDS, "pad_token_id": 1}),
    "XLM-RoBERTa": ("XLMRoberta", {**WORDS, "pad_token_id": 1}),
    "ELECTRA": ("Electra", {**WORDS, "embedding_size": 16}),
    "ALBERT": ("Albert", {**WORDS, "embedding_size": 16}),
    "DistilBERT": (
        "DistilBert",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 32},
    ),
    "DeBERTa v2": ("DebertaV2", WORDS),
    "MPNet": ("MPNet", WORDS),
    "BigBird": ("BigBird", {**WORDS, "attention_type": "original_full"}),
    "ConvBERT": ("ConvBert", {**WORDS, "embedding_size": 32}),
    "FNet": ("FNet", {**TEXT, "vocab_size": 32}),
    "Funnel": (
        "Funnel",
        {"vocab_size": 32, "block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64},
    ),
    "ModernBERT": ("ModernBert", {**WORDS, "pad_token_id": 0, "attn_implementation": "eager"}),
    "Nystromformer": ("Nystromformer", {**WORDS, "segment_means_seq_len": 8, "num_landmarks": 4}),
    "SqueezeBERT": ("SqueezeBert", {**WORDS, "embedding_size": 32}),
    "MobileBERT": ("MobileBert", {**WORDS, "embedding_size": 16, "intra_bottleneck_size": 16}),
    "LayoutLM": ("LayoutLM", WORDS),
    "ESM": ("Esm", {**WORDS, "pad_token_id": 1, "position_embedding_type": "rotary"}),
    "RemBERT": ("RemBert", {**WORDS, "input_embedding_size": 16, "output_embedding_size": 16}),
    "RoFormer": ("RoFormer", {**WORDS, "embedding_size": 32}),
    "Splinter": ("Splinter", WORDS),
    "I-BERT": ("IBert", {**WORDS, "pad_token_id": 1}),
    "XLNet": ("XLNet", {"vocab_size": 32, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
    "XLM": ("XLM", {"vocab_size": 32, "emb_dim": 32, "n_layers": 2, "n_heads": 2}),
    "GPT-2": ("GPT2", {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "GPT-NeoX": ("GPTNeoX", WORDS),
    "GPT-J": ("GPTJ", {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}),
    "OPT": ("OPT", {**WORDS, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BLOOM": ("Bloom", {"vocab_size": 32, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "Falcon": (
        "Falcon",
        {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "Llama": ("Llama", LLAMA),
    "Mistral": ("Mistral", LLAMA),
    "Mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 2}),
    "Gemma 2": ("Gemma2", LLAMA),
    "Qwen 2": ("Qwen2", {**LLAMA}),
    "Phi": ("Phi", {**WORDS}),
    "XGLM": ("XGLM", {"vocab_size": 32, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2}),
}
SEQUENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("T5", T5),
    "UMT5": ("UMT5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "Switch Transformers": ("SwitchTransformers", {**T5, "num_experts": 2}),
    "LongT5": ("LongT5", T5),
    "BART": ("Bart", BART),
    "mBART": ("MBart", BART),
    "Pegasus": ("Pegasus", BART),
    "Marian": ("Marian", {**BART, "pad_token_id": 0, "decoder_start_token_id": 0}),
    "M2M-100": ("M2M100", BART),
    "Blenderbot": ("Blenderbot", BART),
    "LED": (
        "LED",
        {
            **BART,
            "attention_window": 4,
            "max_encoder_position_embeddings": 32,
            "max_decoder_position_embeddings": 32,
        },
    ),
    "ProphetNet": (
        "ProphetNet",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 32,
        },
    ),
}
PIXELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT-MSN": ("ViTMSN", VIT, 32),
    "DINOv2 with registers": ("Dinov2WithRegisters", VIT, 32),
    "DPT": ("DPT", VIT, 32),
    "YOLOS": ("Yolos", {**TEXT, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 4}, 32),
    "VitDet": ("VitDet", {**TEXT, **SIDE}, 32),
    "Data2Vec vision": ("Data2VecVision", VIT, 32),
    "I-JEPA": ("IJepa", VIT, 32),
    "Hiera": (
        "Hiera",
        {
            "embed_dim": 16,
            "image_size": [32, 32],
            "patch_size": [3, 3],
            "patch_stride": [4, 4],
            "patch_padding": [1, 1],
            "depths": [1, 1],
            "num_heads": [1, 2],
            "mlp_ratio": 2.0,
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "masked_unit_size": [2, 2],
            "masked_unit_attention": [True, False],
        },
        32,
    ),
    "Swin 2": ("Swinv2", SWIN, 32),
    "Donut Swin": ("DonutSwin", SWIN, 32),
    "MaskFormer Swin": ("MaskFormerSwin", SWIN, 32),
    "Swin2SR": (
        "Swin2SR",
        {"image_size": 32, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4},
        32,
    ),
    "SegFormer": ("Segformer", {**PYRAMID, "decoder_hidden_size": 16}, 64),
    "GLPN": ("GLPN", {**PYRAMID, "decoder_hidden_size": 16}, 64),
    "PVT": ("Pvt", {**PYRAMID, "image_size": 64, "sequence_reduction_ratios": [4, 2, 1, 1]}, 64),
    "PVTv2": ("PvtV2", {**PYRAMID, "image_size": 64}, 64),
    "CvT": (
        "Cvt",
        {
            "embed_dim": [16, 16, 32],
            "num_heads": [1, 2, 2],
            "depth": [1, 2, 3],
            "cls_token": [False, False, True],
        },
        32,
    ),
    "LeViT": (
        "Levit",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        64,
    ),
    "MobileViT": (
        "MobileViT",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 64],
            "num_attention_heads": 2,
        },
        64,
    ),
    "MobileViT 2": ("MobileViTV2", {"width_multiplier": 0.25}, 64),
    "PoolFormer": ("PoolFormer", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 64),
    "SwiftFormer": ("SwiftFormer", {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 64),
    "FocalNet": (
        "FocalNet",
        {
            "image_size": 32,
            "embed_dim": 16,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        32,
    ),
    "ConvNeXt 2": ("ConvNextV2", {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}, 32),
    "DINOv3 ConvNeXt": ("DINOv3ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}, 32),
    "BiT": ("Bit", {"embedding_size": 32, "hidden_sizes": [128, 128], "depths": [1, 1]}, 32),
    "ResNet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}, 32),
    "RegNet": (
        "RegNet",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8},
        32,
    ),
    "MobileNet 1": ("MobileNetV1", {"depth_multiplier": 0.25}, 64),
    "MobileNet 2": ("MobileNetV2", {"depth_multiplier": 0.35}, 64),
    "EfficientNet": ("EfficientNet", {"width_coefficient": 0.25, "hidden_dim": 320}, 64),
    "AIMv2": ("Aimv2Vision", VIT, 32),
    "CLIP vision": ("CLIPVision", VIT, 32),
    "SigLIP vision": ("SiglipVision", VIT, 32),
    "BLIP vision": ("BlipVision", VIT, 32),
    "SAM vision": (
        "SamVision",
        {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_dim": 64,
            **SIDE,
            "window_size": 2,
            "global_attn_indexes": [1],
        },
        32,
    ),
}


def _whisper() -> dict[str, Any]:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return {**BART, **special, "num_mel_bins": 8, "max_source_positions": 8}


def _detr(kind: str) -> nn.Module:
    library = import_module("transformers")
    backbone = library.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"] if kind != "Detr" else ["stage4"],
    )
    config = getattr(library, f"{kind}Config")
    more = {"num_feature_levels": 3} if kind == "DeformableDetr" else {}
    return getattr(library, f"{kind}Model")(
        config(
            backbone_config=backbone,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            d_model=32,
            num_queries=4,
            **HALVES,
            **more,
        )
    )


def _mask2former() -> nn.Module:
    library = import_module("transformers")
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    backbone = library.SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages
    )
    return configured(
        "Mask2FormerModel",
        "Mask2FormerConfig",
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=64,
        num_queries=4,
    )


def of_transformers() -> Iterator[Family]:
    family = partial(Family, "transformers")
    for name, (kind, settings) in TEXTS.items():
        yield family(name, partial(configured, f"{kind}Model", f"{kind}Config", **settings), text)
    both = partial(text, "input_ids", "decoder_input_ids")
    for name, (kind, settings) in SEQUENCES.items():
        yield family(name, partial(configured, f"{kind}Model", f"{kind}Config", **settings), both)
    for name, (kind, settings, size) in PIXELS.items():
        build = partial(configured, f"{kind}Model", f"{kind}Config", **settings)
        yield family(name, build, partial(images, size, key="pixel_values"))
    for name in ("VideoMAE", "Timesformer"):
        build = partial(configured, f"{name}Model", f"{name}Config", **VIT, num_frames=2)
        yield family(name, build, partial(floats, "pixel_values", 2, 2, 3, 32, 32))
    vivit = partial(
        configured, "VivitModel", "VivitConfig", **TEXT, image_size=32, num_frames=2, tubelet_size=[2, 8, 8]
    )
    yield family("ViViT", vivit, partial(floats, "pixel_values", 2, 2, 3, 32, 32))
    for name, kind in (
        ("wav2vec 2", "Wav2Vec2"),
        ("HuBERT", "Hubert"),
        ("WavLM", "WavLM"),
        ("UniSpeech", "UniSpeech"),
        ("wav2vec 2 conformer", "Wav2Vec2Conformer"),
        ("Data2Vec audio", "Data2VecAudio"),
    ):
        build = partial(configured, f"{kind}Model", f"{kind}Config", **WAVE)
        yield family(name, build, partial(floats, "input_values", 2, 800))
    yield family(
        "Whisper",
        lambda: configured("WhisperModel", "WhisperConfig", **_whisper()),
        lambda: text("decoder_input_ids", input_features=torch.randn(2, 8, 16)),
    )
    yield family(
        "Speech2Text",
        lambda: configured(
            "Speech2TextModel",
            "Speech2TextConfig",
            **BART,
            input_feat_per_channel=8,
            conv_channels=16,
            num_conv_layers=1,
            conv_kernel_sizes=[3],
            pad_token_id=1,
        ),
        lambda: text("decoder_input_ids", input_features=torch.randn(2, 16, 8)),
    )
    spectrogram = {
        "patch_size": 8,
        "frequency_stride": 8,
        "time_stride": 8,
        "max_length": 32,
        "num_mel_bins": 32,
    }
    yield family(
        "AST",
        partial(configured, "ASTModel", "ASTConfig", **TEXT, **spectrogram),
        partial(floats, "input_values", 2, 32, 32),
    )
    yield family("DETR", partial(_detr, "Detr"), partial(images, 64, key="pixel_values"))
    yield family("Deformable DETR", partial(_detr, "DeformableDetr"), partial(images, 64, key="pixel_values"))
    yield family(
        "Conditional DETR", partial(_detr, "ConditionalDetr"), partial(images, 64, key="pixel_values")
    )
    yield family("Mask2Former", _mask2former, partial(images, 32, key="pixel_values"))
    layout = {"coordinate_size": 4, "shape_size": 8, "input_size": 32}
    yield family(
        "LayoutLMv3",
        partial(configured, "LayoutLMv3Model", "LayoutLMv3Config", **WORDS, **layout),
        lambda: text(bbox=torch.zeros(2, 8, 4, dtype=torch.long)),
    )
    yield family(
        "ViLT",
        partial(configured, "ViltModel", "ViltConfig", **WORDS, **SIDE),
        lambda: text(pixel_values=torch.randn(2, 3, 32, 32)),
    )
    yield family(
        "VisualBERT",
        partial(configured, "VisualBertModel", "VisualBertConfig", **WORDS, visual_embedding_dim=16),
        lambda: text(visual_embeds=torch.randn(2, 3, 16)),
    )
    yield family(
        "LXMERT",
        partial(
            configured,
            "LxmertModel",
            "LxmertConfig",
            **WORDS,
            l_layers=1,
            x_layers=1,
            r_layers=1,
            visual_feat_dim=16,
        ),
        lambda: text(visual_feats=torch.randn(2, 3, 16), visual_pos=torch.rand(2, 3, 4)),
    )
