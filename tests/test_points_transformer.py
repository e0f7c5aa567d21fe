"""Properties of the point transformer: symmetries, its published layout, and mixtures in its FFNs."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ewavit as ewa
from ewavit import EwavitError
from ewavit.points.transformer import Encoder, create_point_model, load_point_checkpoint

TINY = {"dim": 16, "depth": 3, "num_heads": 2, "num_group": 6, "group_size": 4, "encoder_width": 4}


def model(name: str = "point_transformer", num_classes: int = 5, **kwargs: object) -> nn.Module:
    return create_point_model(name, num_classes, **{**TINY, **kwargs})


def points(batch: int = 3, count: int = 20) -> Tensor:
    return torch.randn(batch, count, 3)


def with_category(clouds: Tensor, category: int = 2) -> Tensor:
    one_hot = nn.functional.one_hot(torch.tensor(category), 16)
    return torch.cat([clouds, one_hot.expand(*clouds.shape[:2], 16)], -1)


def encoder_reference(encoder: Encoder, groups: Tensor) -> Tensor:
    """The mini-PointNet as the papers write it: convolutions, each point joined to its group's maximum."""
    x = groups.flatten(0, 1).transpose(1, 2)
    local = encoder.first_conv(x)
    whole = local.max(2, keepdim=True)[0].expand_as(local)
    return encoder.second_conv(torch.cat([whole, local], 1)).max(2)[0].view(*groups.shape[:2], -1)


def test_the_mini_pointnet_equals_its_reference_forward_and_backward():
    encoder, groups = Encoder(8, width=4).double(), torch.randn(2, 3, 5, 3, dtype=torch.float64)
    results = []
    for call in (encoder, lambda x: encoder_reference(encoder, x)):
        encoder.zero_grad()
        output = call(groups)
        (output * torch.arange(8)).sum().backward()
        results.append([output, *(parameter.grad.clone() for parameter in encoder.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_order_of_points_does_not_matter_but_for_the_first():
    net, clouds = model().eval().double(), points().double()
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(clouds.shape[1] - 1)])
    torch.testing.assert_close(net(clouds), net(clouds[:, order]), rtol=1e-9, atol=1e-9)


def test_each_cloud_of_a_batch_is_classified_by_itself():
    net, clouds = model().eval(), points()
    torch.testing.assert_close(net(clouds)[1:2], net(clouds[1:2]), rtol=1e-5, atol=1e-6)


def test_published_sizes():
    """22.1 million parameters for 40 classes and 27.1 for 50 parts, as the literature gives them."""
    for name, classes, millions in (("point_transformer", 40, 22.1), ("point_transformer_seg", 50, 27.1)):
        with torch.device("meta"):
            net = create_point_model(name, classes)
        assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 1) == millions


def test_parts_are_predicted_for_every_point_and_follow_the_category():
    net, clouds = model("point_transformer_seg", 7).eval(), points()
    logits = net(with_category(clouds))
    assert logits.shape == (3, 7, 20)
    assert not torch.allclose(logits, net(with_category(clouds, 3)))
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(19)])
    torch.testing.assert_close(
        logits[:, :, order], net(with_category(clouds[:, order])), rtol=1e-4, atol=1e-5
    )


def test_all_and_only_the_ffns_of_the_blocks_are_found():
    for name in ("point_transformer", "point_transformer_s", "point_bert", "point_transformer_seg"):
        found = ewa.find_ffns(model(name))
        assert [(ffn.name, ffn.unit, ffn.stackable) for ffn in found] == [
            (f"blocks.blocks.{block}.mlp", "token", True) for block in range(3)
        ]


def test_expanding_and_collapsing_gives_the_same_model_back():
    net, clouds = model().eval(), points()
    before, keys = net(clouds), list(net.state_dict())
    ewa.expand(net, 3, select="all")
    torch.testing.assert_close(net(clouds), before, rtol=1e-5, atol=1e-6)
    ewa.collapse(net)
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(net(clouds), before, rtol=1e-5, atol=1e-6)


# --- checkpoints in the published layouts ---


def published_keys(blocks: int, head: tuple[str, ...]) -> list[str]:
    """The state-dict keys of Point-MAE's fine-tuning model, written out."""
    affine = ("weight", "bias")
    norm = (*affine, "running_mean", "running_var", "num_batches_tracked")
    keys = [f"encoder.{conv}.{i}.{p}" for conv in ("first_conv", "second_conv")
            for i, ps in ((0, affine), (1, norm), (3, affine)) for p in ps]  # fmt: skip
    keys += [f"pos_embed.{i}.{p}" for i in (0, 2) for p in affine]
    for block in range(blocks):
        parts = [
            f"{layer}.{p}" for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2", "attn.proj") for p in affine
        ]
        keys += [f"blocks.blocks.{block}.{part}" for part in [*parts, "attn.qkv.weight"]]
    return [*keys, *(f"norm.{p}" for p in affine), *head]


def numbered_head(*layers: int, norms: tuple[int, ...] = ()) -> tuple[str, ...]:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return (
        "cls_token", "cls_pos",
        *(f"cls_head_finetune.{i}.{p}" for i in layers for p in ("weight", "bias")),
        *(f"cls_head_finetune.{i}.{p}" for i in norms for p in norm),
    )  # fmt: skip


def test_keys_are_those_of_the_published_code():
    mae = published_keys(3, numbered_head(0, 4, 8, norms=(1, 5)))
    assert set(model().state_dict()) == set(mae)
    bert = [*published_keys(3, numbered_head(0, 3)), "reduce_dim.weight", "reduce_dim.bias"]
    assert set(model("point_bert").state_dict()) == set(bert)
    head = [f"convs{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    head += [f"{bn}.{p}" for bn in ("bns1", "bns2", "label_conv.1", "propagation_0.mlp_bns.0",
                                    "propagation_0.mlp_bns.1") for p in norm]  # fmt: skip
    head += [f"propagation_0.mlp_convs.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")]
    segmentation = published_keys(3, (*head, "label_conv.0.weight"))
    assert set(model("point_transformer_seg").state_dict()) == set(segmentation)


def trained(name: str = "point_transformer", num_classes: int = 5) -> dict[str, Tensor]:
    """Weights that no fresh model has."""
    return {
        key: value + 1 if value.is_floating_point() else value + 7
        for key, value in model(name, num_classes).state_dict().items()
    }


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def equal(net: nn.Module, weights: dict[str, Tensor], without: tuple[str, ...] = ()) -> bool:
    own = net.state_dict()
    return all(torch.equal(own[key], value) for key, value in weights.items() if not key.startswith(without))


def test_a_fine_tuned_checkpoint_loads_whole(tmp_path):
    weights = trained()
    # as Point-MAE's runner saves it after training with DataParallel; the accuracy may be a numpy number
    torch.save(
        {"base_model": prefixed(weights, "module."), "epoch": 3, "metrics": {"acc": np.float64(93.8)},
         "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}},
        tmp_path / "ckpt-best.pth",
    )  # fmt: skip
    net = model()
    assert load_point_checkpoint(net, tmp_path / "ckpt-best.pth") == []
    assert equal(net, weights)


def test_a_segmentation_checkpoint_loads_whole(tmp_path):
    weights = trained("point_transformer_seg")
    torch.save({"model_state_dict": weights, "test_acc": 0.94}, tmp_path / "best_model.pth")
    net = model("point_transformer_seg")
    assert load_point_checkpoint(net, tmp_path / "best_model.pth") == []
    assert equal(net, weights)


def test_a_safetensors_file_loads_whole(tmp_path):
    weights = trained()
    save_file(weights, tmp_path / "model.safetensors")
    net = model()
    assert load_point_checkpoint(net, tmp_path / "model.safetensors") == []
    assert equal(net, weights)


def test_a_pretrained_point_mae_fills_the_backbone(tmp_path):
    weights = trained()
    backbone = {k: v for k, v in weights.items() if not k.startswith("cls_")}
    rest = {"mask_token": torch.ones(1, 1, 16), "MAE_decoder.blocks.0.norm1.weight": torch.ones(16),
            "decoder_pos_embed.0.bias": torch.ones(128), "increase_dim.0.bias": torch.ones(96)}  # fmt: skip
    torch.save(
        {"base_model": prefixed({**prefixed(backbone, "MAE_encoder."), **rest}, "module.")},
        tmp_path / "pre.pth",
    )
    for name in ("point_transformer", "point_transformer_seg"):
        net = model(name)
        fresh = load_point_checkpoint(net, tmp_path / "pre.pth")
        assert equal(net, backbone)
        assert set(fresh) == set(net.state_dict()) - set(backbone)


def test_a_pretrained_point_bert_fills_the_backbone_but_the_head(tmp_path):
    weights = {k: v for k, v in trained("point_bert").items() if not k.startswith("cls_head_finetune")}
    own = {
        **weights,
        "mask_token": torch.ones(1),
        "lm_head.weight": torch.ones(4, 16),
        "cls_head.0.weight": torch.ones(2),
    }
    rest = {"dvae.encoder.first_conv.0.bias": torch.ones(4), "queue": torch.ones(2, 2)}
    every = {**prefixed(own, "transformer_q."), **prefixed(own, "transformer_k."), **rest}
    torch.save({"base_model": prefixed(every, "module.")}, tmp_path / "Point-BERT.pth")
    net = model("point_bert")
    fresh = load_point_checkpoint(net, tmp_path / "Point-BERT.pth")
    assert equal(net, weights)
    assert fresh
    assert all(key.startswith("cls_head_finetune") for key in fresh)


def test_a_head_for_other_classes_stays_fresh_in_its_last_layer(tmp_path):
    weights = trained(num_classes=9)
    torch.save({"base_model": prefixed(weights, "module.base_model.")}, tmp_path / "nine.pth")
    net = model()
    assert load_point_checkpoint(net, tmp_path / "nine.pth") == [
        "cls_head_finetune.8.weight", "cls_head_finetune.8.bias"
    ]  # fmt: skip
    assert equal(net, weights, without=("cls_head_finetune.8",))


def test_foreign_and_damaged_checkpoints_are_named(tmp_path):
    for file, content, message in (
        ("other.pth", {"base_model": {"conv.weight": torch.ones(1)}}, "another model .it lacks encoder"),
        (
            "deeper.pth",
            {**trained(), "blocks.blocks.3.norm1.weight": torch.ones(16)},
            "the model lacks blocks.blocks.3.norm1.weight",
        ),
        ("wider.pth", {**trained(), "norm.weight": torch.ones(17)}, r"norm.weight is \(17,\)"),
        ("list.pth", [torch.ones(1)], "holds a list"),
    ):
        torch.save(content, tmp_path / file)
        with pytest.raises(EwavitError, match=message):
            load_point_checkpoint(model(), tmp_path / file)
    (tmp_path / "damaged.pth").write_bytes(b"no checkpoint")
    with pytest.raises(EwavitError, match="cannot be read as weights"):
        load_point_checkpoint(model(), tmp_path / "damaged.pth")
    with pytest.raises(EwavitError, match="no file"):
        load_point_checkpoint(model(), tmp_path / "none.pth")


class Harmful:
    def __reduce__(self):
        return print, ("this must not be printed",)


def test_nothing_but_tensors_and_numbers_is_unpickled(tmp_path, capsys):
    torch.save({"base_model": trained(), "metrics": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(EwavitError, match="cannot be read as weights"):
        load_point_checkpoint(model(), tmp_path / "harmful.pth")
    assert "printed" not in capsys.readouterr().out


# --- wrong input ---


def test_wrong_names_settings_and_shapes_are_named():
    for call, message in (
        (lambda: create_point_model("point_transfomer", 3), "did you mean point_transformer"),
        (lambda: create_point_model("resnet50", 3), "choose one of point_transformer"),
        (lambda: model(dims=3), "unexpected keyword argument 'dims'"),
        (lambda: model(num_heads=3), "dim=16 is not a multiple of num_heads=3"),
        (lambda: model(head="linear"), "head='linear' is unknown"),
        (lambda: model("point_transformer_seg", fetch=(0, 3)), "names blocks that a depth of 3 lacks"),
        (lambda: model()(torch.randn(2, 5, 3)), "5 points per cloud are too few for 6 groups"),
        (lambda: model()(torch.randn(2, 3, 20)), r"points have the shape \(2, 3, 20\)"),
        (lambda: model("point_transformer_seg")(points()), "the category as a one-hot vector"),
    ):
        with pytest.raises(EwavitError, match=message):
            call()
