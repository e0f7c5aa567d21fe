"""expand, collapse and what goes with them: selection, initialisation, state dicts, parameter groups."""

import copy
import re

import pytest
import timm.optim
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ewavit as ewa
from ewavit.core import SeparateExperts, StackedExperts, moe_layers
from ewavit.core.draws import LAYER
from ewavit.distributed import expert_placement
from small_models import DIM, MlpNet, images, perturbed, randomised, separated, tiny_vit, tokens

KINDS = ["stacked", "separate"]
both_kinds = pytest.mark.parametrize("kind", KINDS)


def expanded(num_experts: int = 4, **options: object) -> MlpNet:
    return ewa.expand(MlpNet(), num_experts, **options)


def names(model: nn.Module) -> list[str]:
    return list(moe_layers(model))


# ---------------------------------------------------------------- select


@pytest.mark.parametrize(
    ("depth", "select", "chosen"),
    [
        (4, "alternate", [1, 3]),
        (3, "alternate", [0, 2]),
        (1, "alternate", [0]),
        (4, "all", [0, 1, 2, 3]),
        (4, "last_half", [2, 3]),
        (3, "last_half", [1, 2]),
        (4, ["blocks.2.mlp", "blocks.0.mlp"], [0, 2]),
        (4, ("blocks.2.mlp",), [2]),
        (4, "blocks.1.mlp", [1]),
        (4, r"blocks\.[02]\.", [0, 2]),
        (4, lambda name, module: "3" in name and hasattr(module, "fc1"), [3]),
    ],
)
def test_select_takes_these_ffns(depth, select, chosen):
    model = MlpNet(depth)
    assert ewa.expand(model, 2, select=select) is model
    assert names(model) == [f"blocks.{i}.mlp" for i in chosen]


@pytest.mark.parametrize("select", ["alternate", "all", "last_half"])
def test_layers_draw_by_numbers_that_rise_with_their_depth(select):
    model = ewa.expand(MlpNet(depth=5), 2, select=select)
    numbers = [int(moe.dispatcher.key[LAYER]) for moe in moe_layers(model).values()]
    assert numbers == list(range(len(numbers)))


@both_kinds
def test_one_expert_is_allowed_and_is_the_ffn(kind):
    model, x = MlpNet(), tokens()
    before = model(x)
    ewa.expand(model, 1, experts=kind)
    assert torch.allclose(model(x), before, atol=1e-6)
    assert torch.equal(model.eval()(x), before)


@both_kinds
def test_an_ffn_of_images_with_channels_first_is_dealt_by_pixel(kind):
    block = nn.ModuleDict({"mlp": nn.Sequential(nn.Conv2d(6, 12, 1), nn.GELU(), nn.Conv2d(12, 6, 1))})
    moe = ewa.expand(block, 2, select="all", experts=kind)["mlp"]
    separated(block, 0.5)
    x = torch.randn(2, 6, 4, 4)
    assert moe.channels_first
    each = (
        torch.stack([copy.deepcopy(part)(x) for part in moe.experts.ffns()]) if kind == "separate" else None
    )
    output = moe(x)
    if each is not None:
        near = (each - output).abs().amax(2) < 1e-5  # (experts, images, height, width)
        assert near.any(0).all()
        assert near.sum((1, 2, 3)).tolist() == [16, 16]
    assert torch.allclose(moe.eval()(x), moe.collapse()(x), atol=1e-5)


def test_an_ffn_and_a_part_of_it_are_not_both_expanded():
    model = nn.ModuleDict({"ffn": nn.Sequential(MlpNet(1).blocks[0].mlp)})
    with pytest.raises(ewa.EwavitError, match=r"ffn\.0 is a part of ffn: leave one"):
        ewa.expand(model, 2, select=["ffn", "ffn.0"])


@pytest.mark.parametrize(
    "select", ["blocks.9.mlp", ["blocks.1.mlp", "blocks.9.mlp"], [], "", lambda name, module: False]
)
def test_a_selection_that_matches_nothing_lists_the_candidates(select):
    model = MlpNet()
    with pytest.raises(ewa.EwavitError) as error:
        ewa.expand(model, select=select)
    for i in range(4):
        assert re.search(rf"blocks\.{i}\.mlp +Mlp +token", str(error.value))
    assert names(model) == []


def test_an_unknown_name_in_a_list_is_named():
    with pytest.raises(ewa.EwavitError, match=r"no module 'blocks\.9\.mlp'"):
        ewa.expand(MlpNet(), select=["blocks.1.mlp", "blocks.9.mlp"])


def test_a_broken_regular_expression_is_named():
    with pytest.raises(ewa.EwavitError, match=r"select='blocks\.\('"):
        ewa.expand(MlpNet(), select="blocks.(")


def test_a_model_without_ffns_is_refused():
    with pytest.raises(ewa.EwavitError, match=r'no FFN works with unit="token".*name yours in select'):
        ewa.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts": 2.5}, "num_experts=2.5"),
        ({"unit": "batch"}, "unit='batch'"),
        ({"experts": "many"}, "experts='many'"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options, named):
    with pytest.raises(ewa.EwavitError, match=re.escape(named)):
        ewa.expand(MlpNet(), **options)


class Gated(nn.Module):
    """Has a parameter of its own, so that it cannot be stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)
        self.gate = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * self.fc(x).tanh()


def test_auto_takes_separate_experts_where_stacking_does_not_work():
    model = MlpNet()
    model.blocks[3].mlp = Gated()
    ewa.expand(model, select=["blocks.2.mlp", "blocks.3.mlp"])
    kinds = [type(moe.experts) for moe in moe_layers(model).values()]
    assert kinds == [StackedExperts, SeparateExperts]


def test_forced_stacking_that_does_not_work_leaves_the_model_dense():
    model = MlpNet()
    model.blocks[3].mlp = Gated()
    with pytest.raises(ewa.EwavitError, match=r"blocks\.3\.mlp \(Gated\) cannot be stacked"):
        ewa.expand(model, select=["blocks.2.mlp", "blocks.3.mlp"], experts="stacked")
    assert names(model) == []


# ---------------------------------------------------------------- expand and collapse


@both_kinds
def test_expand_and_collapse_give_back_classes_keys_order_and_values(kind):
    model = randomised(MlpNet(kind="swiglu with norm"))
    classes = [(name, type(module)) for name, module in model.named_modules()]
    state = copy.deepcopy(model.state_dict())
    ewa.expand(model, 4, select="all", experts=kind)
    assert len(names(model)) == 4
    assert ewa.collapse(model) is model
    assert [(name, type(module)) for name, module in model.named_modules()] == classes
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-6, rtol=1e-6)


@both_kinds
def test_collapse_takes_the_mean_of_the_experts(kind):
    model = separated(expanded(3, experts=kind))
    layer = moe_layers(model)["blocks.3.mlp"]
    means = {name: torch.stack(values).mean(0) for name, values in layer.experts.values_by_parameter()}
    ewa.collapse(model)
    for name, value in model.blocks[3].mlp.named_parameters():
        torch.testing.assert_close(value, means[name], atol=1e-6, rtol=1e-6)


def test_expanding_twice_is_refused():
    model = expanded()
    with pytest.raises(ewa.EwavitError, match=r"expanded already.*collapse"):
        ewa.expand(model)
    assert names(model) == ["blocks.1.mlp", "blocks.3.mlp"]
    ewa.expand(ewa.collapse(model))
    assert names(model) == ["blocks.1.mlp", "blocks.3.mlp"]


def test_collapsing_what_is_not_expanded_is_refused():
    with pytest.raises(ewa.EwavitError, match=r"no MoE layer: call ewavit\.expand"):
        ewa.collapse(MlpNet())


def test_a_single_moe_cannot_replace_itself():
    with pytest.raises(ewa.EwavitError, match=r"collapse\(\) method"):
        ewa.collapse(expanded().blocks[1].mlp)


def test_expand_under_torch_compile_is_refused():
    with pytest.raises(ewa.EwavitError, match=r"OptimizedModule: call torch\.compile after"):
        ewa.expand(torch.compile(MlpNet()))
    model = MlpNet()
    model.compile()
    with pytest.raises(ewa.EwavitError, match=r"call model\.compile\(\) after"):
        ewa.expand(model)
    model = MlpNet()
    model.blocks[0].compile()
    with pytest.raises(ewa.EwavitError, match="compiled"):
        ewa.expand(model)


@pytest.mark.parametrize("wrapper", ["DataParallel", "FullyShardedDataParallel", "FSDPModule"])
def test_expand_under_a_wrapper_is_refused(wrapper):
    stand_in = type(wrapper, (nn.Module,), {})
    wrapped = type("Sharded", (stand_in, MlpNet), {})()
    with pytest.raises(ewa.EwavitError, match=rf"wrapped in {wrapper}: .* after ewavit.expand"):
        ewa.expand(wrapped)
    assert names(wrapped) == []


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_expand_under_ddp_is_refused():
    with pytest.raises(ewa.EwavitError, match="DistributedDataParallel: wrap the model after"):
        ewa.expand(nn.parallel.DistributedDataParallel(MlpNet()))


@both_kinds
@pytest.mark.usefixtures("one_process_group")
def test_ddp_after_expand_waits_for_no_parameter_and_saves_plain_keys(kind):
    model = expanded(4, experts=kind)
    keys = list(MlpNet().state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    averaging = ewa.ExpertAveraging(wrapped, 0.3).attach(optimizer)
    for _ in range(2):  # a parameter without gradient is an error of the second forward pass
        optimizer.zero_grad()
        wrapped(tokens(1, 3)).sum().backward()  # three tokens for four experts
        optimizer.step()
    assert averaging.steps_done == 2
    assert list(ewa.dense_state_dict(wrapped)) == keys


@both_kinds
def test_a_router_fits_the_ffns_in_width_number_and_dtype(kind):
    model = ewa.expand(MlpNet().double(), 3, router=ewa.TopK(), experts=kind)
    routers = [moe.dispatcher for moe in moe_layers(model).values()]
    assert [sorted(p.shape for p in router.parameters()) for router in routers] == [[(3, DIM)]] * 2
    assert {p.dtype for router in routers for p in router.parameters()} == {torch.float64}
    assert model(tokens().double()).isfinite().all()


@pytest.mark.usefixtures("one_process_group")
def test_one_process_with_replicas_has_one_expert_dealt_by_image():
    model, x = MlpNet(), tokens()
    before = model(x)
    ewa.expand(model, placement="replicas")
    layers = ewa.summary(model).layers
    assert {(layer.experts, layer.num_experts, layer.unit) for layer in layers} == {("replica", 1, "image")}
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_experts": 2}, "num_experts=2, but 1 processes"),
        ({"experts": "separate"}, 'leave out experts="separate"'),
        ({"router": ewa.TopK()}, "leave out router"),
    ],
)
@pytest.mark.usefixtures("one_process_group")
def test_what_replicas_cannot_have_is_named_and_the_model_stays_dense(options, named):
    model = MlpNet()
    with pytest.raises(ewa.EwavitError, match=re.escape(named)):
        ewa.expand(model, placement="replicas", **options)
    assert names(model) == []


@both_kinds
@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_model_has_the_dense_state_of_the_plain_one_and_does_not_collapse(kind):
    model = separated(expanded(4, experts=kind))
    expected = ewa.dense_state_dict(model)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh, shard_placement_fn=expert_placement(model, mesh))
    dense = ewa.dense_state_dict(model)
    assert list(dense) == list(expected)
    for name, value in dense.items():
        assert type(value) is Tensor
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6)
    with pytest.raises(ewa.EwavitError, match=r"sharded: call ewavit\.dense_state_dict"):
        ewa.collapse(model)
    assert len(names(model)) == 2


@both_kinds
def test_one_ffn_in_two_places_becomes_one_moe_in_two_places(kind):
    model = MlpNet()
    model.blocks[3].mlp = model.blocks[1].mlp
    keys = list(model.state_dict())
    ewa.expand(model, 3, select="all", experts=kind)
    assert model.blocks[3].mlp is model.blocks[1].mlp
    assert names(model) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    assert list(ewa.dense_state_dict(model)) == keys
    assert model.blocks[3].mlp is model.blocks[1].mlp
    ewa.collapse(model)
    assert model.blocks[3].mlp is model.blocks[1].mlp
    assert isinstance(model.blocks[3].mlp, type(MlpNet().blocks[0].mlp))
    assert list(model.state_dict()) == keys


@both_kinds
def test_requires_grad_survives_expand_and_collapse(kind):
    model = MlpNet()
    frozen = ["blocks.1.mlp.fc1.weight", "blocks.3.mlp.fc2.bias", "head.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    ewa.expand(model, experts=kind)
    model(tokens()).sum().backward()
    first = dict(model.blocks[1].mlp.experts.values_by_parameter())
    assert not first["fc1.weight"][0].requires_grad
    assert first["fc2.weight"][0].requires_grad
    ewa.collapse(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen


@both_kinds
def test_training_and_eval_modes_survive_expand_and_collapse(kind):
    model = MlpNet()
    model.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    ewa.expand(model, select="all", experts=kind)
    assert not any(module.training for module in model.blocks[1].modules())
    assert all(module.training for module in model.blocks[2].modules())
    ewa.collapse(model)
    assert {name: module.training for name, module in model.named_modules()} == before


@both_kinds
def test_dtype_survives_expand_and_collapse(kind):
    model = MlpNet().double()
    ewa.expand(model, experts=kind)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    ewa.collapse(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@both_kinds
def test_a_deep_copy_of_an_expanded_model_is_independent(kind):
    model = separated(expanded(experts=kind))
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    separated(twin)
    ewa.collapse(twin)
    assert len(names(model)) == 2
    assert names(twin) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert callable(model.no_weight_decay)


@both_kinds
def test_the_expanded_state_dict_loads_into_another_expanded_model(kind):
    model, other = (separated(expanded(experts=kind)) for _ in range(2))
    other.load_state_dict(model.state_dict(), strict=True)
    x = tokens()
    assert torch.equal(model.eval()(x), other.eval()(x))


# ---------------------------------------------------------------- how experts start


def experts_of(model: nn.Module, name: str = "fc1.weight") -> Tensor:
    return torch.stack(dict(moe_layers(model)["blocks.3.mlp"].experts.values_by_parameter())[name]).detach()


def wide() -> nn.Module:
    torch.manual_seed(5)
    return tiny_vit(4, embed_dim=64)


@both_kinds
def test_copies_are_equal_to_the_ffn(kind):
    model = ewa.expand(wide(), experts=kind)
    original = wide()
    for name, parameter in original.blocks[3].mlp.named_parameters():
        assert all(torch.equal(expert, parameter) for expert in experts_of(model, name))


# ---------------------------------------------------------------- state dicts


@both_kinds
def test_dense_state_dict_is_that_of_the_collapsed_model_and_leaves_the_model_expanded(kind):
    model = separated(expanded(experts=kind))
    layers = moe_layers(model)
    before = copy.deepcopy(model.state_dict())
    dense = ewa.dense_state_dict(model)
    assert moe_layers(model) == layers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(dense) == list(MlpNet().state_dict())
    collapsed = ewa.collapse(model).state_dict()
    assert all(torch.equal(value, collapsed[name]) for name, value in dense.items())
    MlpNet().load_state_dict(dense, strict=True)


def test_dense_state_dict_strips_the_prefix_of_torch_compile():
    assert list(ewa.dense_state_dict(torch.compile(expanded()))) == list(MlpNet().state_dict())


@both_kinds
def test_loading_a_dense_state_dict_fills_every_expert(kind):
    model, source = separated(expanded(experts=kind)), randomised(MlpNet())
    result = ewa.load_dense_state_dict(model, source.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    for name, moe in moe_layers(model).items():
        for parameter, values in moe.experts.values_by_parameter():
            expected = source.get_parameter(f"{name}.{parameter}")
            assert all(torch.equal(value, expected) for value in values)
    x = tokens()
    torch.testing.assert_close(model(x), source(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.head.weight, source.head.weight)


@both_kinds
def test_a_dense_state_dict_survives_loading_and_taking(kind):
    source = randomised(MlpNet()).state_dict()
    model = expanded(experts=kind)
    ewa.load_dense_state_dict(model, source)
    for name, value in ewa.dense_state_dict(model).items():
        torch.testing.assert_close(value, source[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("key", ["head.bias", "blocks.3.mlp.fc1.weight"])
def test_a_failed_strict_load_leaves_the_model_expanded_and_its_experts_as_they_were(key):
    model = separated(expanded())
    layers = moe_layers(model)
    inside = {name: value.clone() for name, value in model.state_dict().items() if "experts" in name}
    state = randomised(MlpNet()).state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=re.escape(key)):
        ewa.load_dense_state_dict(model, state)
    assert moe_layers(model) == layers
    assert all(torch.equal(model.state_dict()[name], value) for name, value in inside.items())


@both_kinds
def test_a_partial_load_leaves_experts_without_a_key_as_they_were(kind):
    model = separated(expanded(experts=kind))
    moe = moe_layers(model)["blocks.3.mlp"]
    before = {name: torch.stack(values).clone() for name, values in moe.experts.values_by_parameter()}
    source = randomised(MlpNet()).state_dict()
    given = {name: source[name] for name in ("head.weight", "blocks.3.mlp.fc1.weight")}
    result = ewa.load_dense_state_dict(model, given, strict=False)
    assert "blocks.3.mlp.fc2.weight" in result.missing_keys
    for name, values in moe.experts.values_by_parameter():
        if name == "fc1.weight":
            assert all(torch.equal(value, given["blocks.3.mlp.fc1.weight"]) for value in values)
        else:
            assert torch.equal(torch.stack(values), before[name])
    assert torch.equal(model.head.weight, given["head.weight"])


# ---------------------------------------------------------------- parameter groups and summary


def undecayed(groups: list[dict], model: nn.Module) -> set[str]:
    bare = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in bare}


@both_kinds
@pytest.mark.parametrize("name", ["mlp", "swiglu with norm", "mlp with rms norm", "mlp with layer scale"])
def test_parameter_groups_do_not_decay_the_vectors_of_experts(name, kind):
    model = MlpNet(kind=name)
    expected = {key for key, p in model.named_parameters() if p.ndim <= 1}
    ewa.expand(model, 4, experts=kind, select="all")
    groups = ewa.param_groups(model, weight_decay=0.05)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.05]
    plain = {re.sub(r"experts\.(ffn|copies\.\d)\.", "", key) for key in undecayed(groups, model)}
    assert plain == expected
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_parameter_groups_of_a_dense_model_follow_timms_rule():
    model = tiny_vit()
    ours = undecayed(ewa.param_groups(model), model)
    theirs = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert ours == undecayed(theirs, model)
    assert "pos_embed" in ours


@both_kinds
def test_timms_own_groups_of_an_expanded_model_are_ours(kind):
    model = ewa.expand(tiny_vit(mlp_layer=timm.layers.SwiGLU, norm_layer=nn.LayerNorm), experts=kind)
    ours = undecayed(ewa.param_groups(model, 0.05), model)
    theirs = timm.optim.create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05)
    assert ours == undecayed(theirs.param_groups, model)


def test_parameter_groups_leave_out_frozen_parameters_and_take_further_names():
    model = expanded()
    model.head.weight.requires_grad_(False)
    groups = ewa.param_groups(model, 0.1, no_weight_decay=["blocks.0.mlp.fc1.weight"])
    held = {id(p) for group in groups for p in group["params"]}
    assert id(model.head.weight) not in held
    assert "blocks.0.mlp.fc1.weight" in undecayed(groups, model)


def test_the_vectors_of_experts_are_known_inside_a_larger_model():
    model = MlpNet(kind="swiglu with norm")
    vectors = {f"0.{name}" for name, p in model.named_parameters() if p.ndim <= 1}
    larger = nn.Sequential(ewa.expand(model, 4, select="all"))
    bare = undecayed(ewa.param_groups(larger), larger)
    assert {name.replace("experts.ffn.", "") for name in bare} == vectors


def test_the_parameters_of_a_model_that_is_wrapped_decay_as_those_within():
    model = ewa.expand(tiny_vit())
    expected = ewa.param_groups(model)
    found = ewa.param_groups(torch.compile(nn.DataParallel(model)))
    for one, other in zip(found, expected, strict=True):
        assert list(map(id, one["params"])) == list(map(id, other["params"]))


def test_names_without_decay_may_have_wildcards():
    model = expanded()
    model.no_weight_decay = lambda: {"blocks.0.*"}  # as timm's XCiT has
    expected = {name for name, _ in model.named_parameters() if name.startswith("blocks.0.")}
    bare = undecayed(ewa.param_groups(model, 0.1, no_weight_decay=["he?d.weight"]), model)
    assert expected | {"head.weight"} <= bare
    assert "blocks.1.mlp.experts.ffn.fc1.weight" not in bare


def test_no_weight_decay_is_the_models_own_after_collapse():
    model, plain = tiny_vit(), MlpNet()
    own = model.no_weight_decay()
    ewa.expand(model)
    assert model.no_weight_decay() > own
    ewa.expand(plain)
    ewa.collapse(plain)
    assert not hasattr(plain, "no_weight_decay")
    assert ewa.collapse(model).no_weight_decay() == own


@both_kinds
def test_summary_counts_layers_experts_and_parameters(kind):
    model = MlpNet()
    dense = sum(p.numel() for p in model.parameters())
    each = sum(p.numel() for p in model.blocks[1].mlp.parameters())
    result = ewa.summary(ewa.expand(model, 3, experts=kind))
    assert [layer.name for layer in result.layers] == ["blocks.1.mlp", "blocks.3.mlp"]
    for layer in result.layers:
        assert (layer.ffn, layer.experts, layer.unit) == ("Mlp", kind, "token")
        assert (layer.num_experts, layer.dense_parameters) == (3, each)
    assert result.dense_parameters == dense
    assert result.parameters == dense + 2 * 2 * each == sum(p.numel() for p in model.parameters())
    assert f"blocks.3.mlp: 3 x Mlp ({kind}, by token), {each:,} parameters each" in str(result)
    assert f"{dense:,} after collapse" in str(result)


def test_a_summary_counts_one_mixture_in_the_singular():
    assert str(ewa.summary(ewa.expand(MlpNet(1)))).startswith("1 mixture of experts\n")
    assert str(ewa.summary(expanded())).startswith("2 mixtures of experts\n")


def test_summary_of_a_dense_model_has_no_layers():
    result = ewa.summary(MlpNet())
    assert result.layers == ()
    assert result.parameters == result.dense_parameters > 0


def test_a_vit_is_expanded_trained_and_collapsed():
    model = tiny_vit()
    perturbed(ewa.expand(model, 4), 0.1)
    optimizer = torch.optim.AdamW(ewa.param_groups(model, 0.05), lr=1e-2)
    ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    x, y = images(6), torch.arange(6) % 3
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    expected = model(x)
    ewa.collapse(model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    fresh = tiny_vit().eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("averaged", [torch.optim.swa_utils.AveragedModel, timm.utils.ModelEmaV3])
def test_dense_state_dict_of_a_moving_average_has_the_original_keys(averaged):
    model = tiny_vit()
    keys = list(model.state_dict())
    ewa.expand(model, 2)
    assert list(ewa.dense_state_dict(averaged(model))) == keys
