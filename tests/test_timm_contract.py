"""What timm promises of its models holds for expanded ones; timm's own tests: tools/timm_model_tests.py."""

import copy

import pytest
import timm
import torch
from timm.layers import set_scriptable
from timm.models._manipulate import group_parameters
from torchvision.models.feature_extraction import create_feature_extractor

import ewavit as ewa
from ewavit.core import MoE
from small_models import separated

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
MODELS = {
    "vit_tiny_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,  # SwiGLU
    "swin_tiny_patch4_window7_224": SWIN,  # channels last
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},  # channels first
}
each_model = pytest.mark.parametrize("name", MODELS)
both_layouts = pytest.mark.parametrize("experts", ["auto", "separate"])


def plain(name, **settings):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **MODELS[name], **settings)


def expanded(name, experts="auto", **settings):
    return separated(ewa.expand(plain(name, **settings), 3, select="all", experts=experts), scale=0.05)


def pictures(count=2):
    return torch.randn(count, 3, 32, 32)


@both_layouts
@each_model
def test_every_parameter_gets_a_gradient_with_and_without_checkpointing(name, experts):
    model, x = expanded(name, experts), pictures()
    output = model.eval()(x)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.testing.assert_close(model.eval()(x), output)
        model.zero_grad()
        model.train()(x).square().mean().backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@both_layouts
@each_model
def test_intermediate_features_are_those_of_the_collapsed_model(name, experts):
    model, x = expanded(name, experts).eval(), pictures()
    final, features = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    dense_final, dense_features = ewa.collapse(copy.deepcopy(model)).forward_intermediates(x)
    torch.testing.assert_close(final, dense_final)
    assert len(features) == len(dense_features) > 1
    for feature, dense in zip(features, dense_features, strict=True):
        torch.testing.assert_close(feature, dense)
    model.prune_intermediate_layers([0])
    torch.testing.assert_close(model.forward_intermediates(x, indices=[0])[1][0], features[0])


@pytest.mark.parametrize("kind", ["list", "getter"])
def test_a_backbone_for_features_is_expanded_as_any_model(kind):
    settings = {"features_only": True} | ({"feature_cls": "getter"} if kind == "getter" else {})
    name = "vit_tiny_patch16_224" if kind == "getter" else "convnext_atto"
    model, x = expanded(name, **settings).eval(), pictures()
    features = model(x)
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    for feature, dense in zip(features, ewa.collapse(model)(x), strict=True):
        torch.testing.assert_close(feature, dense)


@each_model
def test_the_head_and_the_configuration_stay_timms(name):
    model, reference, x = expanded(name).eval(), plain(name), pictures()
    assert model.default_cfg == reference.default_cfg
    assert model.num_features == reference.num_features
    assert model.get_classifier().weight.shape == reference.get_classifier().weight.shape
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert ewa.collapse(model)(x).shape == (2, 7)


@both_layouts
@each_model
def test_experts_are_in_the_layer_group_of_their_ffn(name, experts):
    model, reference = expanded(name, experts), plain(name)
    mixtures = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    expected = group_parameters(reference, reference.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for key, group in groups.items():
        mixture = next((each for each in mixtures if key.startswith(f"{each}.")), None)
        ffn = {expected[other] for other in expected if mixture and other.startswith(f"{mixture}.")}
        assert {group} == (ffn or {expected.get(key)}), key


@both_layouts
@each_model
def test_a_state_dict_goes_round(name, experts):
    model, other, x = expanded(name, experts).eval(), expanded(name, experts).eval(), pictures()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    dense = plain(name).eval()
    dense.load_state_dict(ewa.dense_state_dict(model))
    torch.testing.assert_close(dense(x), model(x))


TOOLS = {
    "torch.fx": torch.fx.symbolic_trace,
    "features by torch.fx": lambda model: create_feature_extractor(model, {"head": "head"}),
    "TorchScript": torch.jit.script,
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("name", "experts"), [(name, "auto") for name in MODELS] + [(next(iter(MODELS)), "separate")]
)
def test_tools_that_compile_refuse_an_expanded_model_by_one_error_and_take_a_collapsed_one(
    name, experts, tool
):
    with set_scriptable(True):
        model, x = expanded(name, experts).eval(), pictures()
    for mode in (True, False):
        with pytest.raises(
            ewa.EwavitError, match=r"cannot .* expanded model: .*ewavit\.collapse\(copy"
        ) as refused:
            TOOLS[tool](model.train(mode))
        assert "\n" not in str(refused.value)
    output = model.eval()(x)  # torchvision left another mode behind
    compiled = TOOLS[tool](ewa.collapse(model))(x)
    torch.testing.assert_close(compiled["head"] if isinstance(compiled, dict) else compiled, output)


@both_layouts
def test_tracing_by_torchscript_is_refused_or_right(experts):
    model, x = expanded("vit_tiny_patch16_224", experts), pictures()
    with pytest.raises(
        ewa.EwavitError, match=r"TorchScript cannot trace an expanded model: .*ewavit\.collapse"
    ):
        torch.jit.trace(model.train(), x)
    output = model.eval()(x)
    if experts == "separate":
        with pytest.raises(ewa.EwavitError, match="TorchScript cannot trace"):
            torch.jit.trace(model, x)
    else:
        torch.testing.assert_close(torch.jit.trace(model, x)(x), output)
    torch.testing.assert_close(torch.jit.trace(ewa.collapse(model), x)(x), output)
