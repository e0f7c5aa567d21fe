"""Stacked and separate experts, and the MoE that deals units to them."""

import copy

import pytest
import torch
from timm.layers import ConvMlp, Mlp
from torch import Tensor, nn
from torch.func import functional_call

from ewavit.core import Dispatcher, MoE, RandomPartition, SeparateExperts, StackedExperts, moe_layers
from ewavit.core.experts import ExpertLinear, Experts
from ewavit.core.moe import dispatching
from ewavit.core.steps import set_step
from ewavit.core.surgery import summary
from small_models import DIM, FFNS, LayerScale, ffn, randomised, separated, tokens

KINDS = {"stacked": StackedExperts, "separate": SeparateExperts}
both_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_ffn = pytest.mark.parametrize("name", FFNS)


class Recording(RandomPartition):
    """A random partition that remembers what it drew."""

    def dispatch(self, x: Tensor):
        block, self.state = super().dispatch(x)
        return block, self.state


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def copy_experts_(target: Experts, source: Experts) -> None:
    with torch.no_grad():
        for (name, into), (same, values) in zip(
            target.values_by_parameter(), source.values_by_parameter(), strict=True
        ):
            assert name == same
            for to, value in zip(into, values, strict=True):
                to.copy_(value)


def stacked_and_separate(module: nn.Module, num_experts: int) -> tuple[Experts, Experts]:
    """The same N different experts, both ways."""
    separate = separated(SeparateExperts(module, num_experts))
    stacked = StackedExperts(module, num_experts)
    copy_experts_(stacked, separate)
    return stacked, separate


def family_gradients(experts: Experts) -> dict[str, Tensor]:
    """For each parameter name the gradient of every expert, (experts, ...)."""
    if isinstance(experts, StackedExperts):
        return {name: p.grad for name, p in experts.ffn.named_parameters()}
    each = [dict(ffn.named_parameters()) for ffn in experts.copies]
    return {name: torch.stack([of_expert[name].grad for of_expert in each]) for name in each[0]}


def slow_moe(moe: MoE, dense: nn.Module, units: Tensor) -> Tensor:
    """One unit after the other through the expert that the latest partition gave it."""
    positions = moe.dispatcher.state.positions.tolist()
    capacity = -(-len(units) // moe.num_experts)
    families = dict(moe.experts.values_by_parameter())
    outputs = []
    for unit, position in zip(units, positions, strict=True):
        weights = {name: values[position // capacity] for name, values in families.items()}
        outputs.append(functional_call(dense, weights, (unit.unsqueeze(0),)).squeeze(0))
    return torch.stack(outputs)


# ---------------------------------------------------------------- experts alone


@pytest.mark.parametrize("num_experts", [1, 2, 3])
@every_ffn
def test_stacked_experts_compute_what_separate_experts_do(name, num_experts):
    stacked, separate = stacked_and_separate(ffn(name), num_experts)
    x = torch.randn(num_experts, 2, 5, DIM)
    if num_experts == 1:  # one expert is the FFN itself, without an expert dimension
        assert_close(stacked(x[0]), separate(x)[0], 1e-5)
    else:
        assert_close(stacked(x), separate(x), 1e-5)
        assert not torch.allclose(stacked(x)[0], stacked(x.roll(1, 0))[1])


@every_ffn
def test_stacked_experts_have_the_gradients_of_separate_experts(name):
    stacked, separate = stacked_and_separate(ffn(name), 3)
    x = torch.randn(3, 1, 5, DIM)
    inputs = {}
    for experts in (stacked, separate):
        inputs[experts] = x.clone().requires_grad_()
        experts(inputs[experts]).square().sum().backward()
    assert_close(inputs[stacked].grad, inputs[separate].grad, 1e-5)
    expected = family_gradients(separate)
    for parameter, gradient in family_gradients(stacked).items():
        assert_close(gradient, expected[parameter], 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_stacked_linear_layers_have_exact_first_and_second_derivatives(bias):
    layer = ExpertLinear(nn.Linear(3, 2, bias=bias), 2).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values))


def test_stacked_linear_layers_have_gradients_per_sample_by_vmap():
    layer = ExpertLinear(nn.Linear(3, 2), 2)
    samples = torch.randn(5, 2, 4, 3)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for name, gradients in per_sample.items():
        each = [torch.func.grad(loss)(parameters, x)[name] for x in samples]
        assert_close(gradients, torch.stack(each), 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_stacked_linear_layers_are_laid_out_as_their_weights(autocast):
    layer = ExpertLinear(nn.Linear(6, 4), 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = layer(torch.randn(3, 5, 6)).float().sum()
    for parameter, gradient in zip(
        layer.parameters(), torch.autograd.grad(loss, list(layer.parameters())), strict=True
    ):
        assert gradient.stride() == parameter.stride()  # else autograd copies it for the optimizer
        assert gradient.dtype == parameter.dtype


def test_shapes_can_be_asked_for_without_values():
    moe = MoE(StackedExperts(ffn(), 4)).to("meta")
    assert moe(torch.empty(2, 5, DIM, device="meta")).shape == (2, 5, DIM)


def test_frozen_stacked_weights_get_no_gradient_and_pass_it_on():
    layer = ExpertLinear(nn.Linear(6, 4), 3).requires_grad_(False)
    x = torch.randn(3, 5, 6, requires_grad=True)
    layer(x).sum().backward()
    assert_close(x.grad, layer.weight.sum(1, keepdim=True).expand_as(x), 1e-6)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_stacked_pointwise_convolutions_compute_what_separate_ones_do():
    module = randomised(ConvMlp(DIM, 12))
    stacked, separate = stacked_and_separate(module, 3)
    x = torch.randn(3, 2, DIM, 4, 2)
    assert_close(stacked(x), separate(x), 1e-5)
    stacked.eval()
    separate.eval()
    assert_close(stacked.merged(x[0]), separate.merged(x[0]), 1e-5)


@both_kinds
@every_ffn
def test_merged_experts_compute_what_their_collapse_does(name, kind):
    experts = separated(kind(ffn(name), 3)).eval()
    x = tokens()
    assert_close(experts.merged(x), experts.collapse()(x), 1e-6)


@both_kinds
@every_ffn
def test_collapse_has_the_original_class_keys_and_the_mean_parameters(name, kind):
    module = ffn(name)
    experts = separated(kind(module, 3))
    merged = experts.collapse()
    assert type(merged) is type(module)
    assert [type(m) for m in merged.modules()] == [type(m) for m in module.modules()]
    assert list(merged.state_dict()) == list(module.state_dict())
    means = {name: torch.stack(values).mean(0) for name, values in experts.values_by_parameter()}
    for parameter, value in merged.named_parameters():
        assert_close(value, means[parameter], 1e-6)
        assert isinstance(value, nn.Parameter)


@both_kinds
def test_families_are_named_like_the_ffns_parameters_and_write_through(kind):
    module = ffn("swiglu with norm")
    experts = kind(module, 2)
    assert [name for name, _ in experts.values_by_parameter()] == [
        name for name, _ in module.named_parameters()
    ]
    with torch.no_grad():
        for _, values in experts.values_by_parameter():
            assert len(values) == 2
            values[1].zero_()
    for (_, values), parameter in zip(experts.values_by_parameter(), module.parameters(), strict=True):
        assert torch.equal(values[0], parameter)
        assert not values[1].any()


@both_kinds
def test_making_experts_leaves_the_ffn_untouched_and_shares_nothing_with_it(kind):
    module = ffn()
    before = copy.deepcopy(module.state_dict())
    separated(kind(module, 2))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


@both_kinds
def test_collapse_shares_no_memory_with_the_experts(kind):
    experts = kind(ffn(), 2)
    with torch.no_grad():
        for parameter in experts.collapse().parameters():
            parameter.zero_()
    assert all(value.any() for _, values in experts.values_by_parameter() for value in values)


@both_kinds
def test_collapse_keeps_dtype_and_requires_grad(kind):
    module = ffn().double()
    module.fc1.weight.requires_grad_(False)
    experts = kind(module, 2)
    merged = experts.collapse()
    assert {name: p.requires_grad for name, p in merged.named_parameters()} == {
        name: p.requires_grad for name, p in module.named_parameters()
    }
    assert not dict(experts.values_by_parameter())["fc1.weight"][0].requires_grad
    assert all(parameter.dtype is torch.float64 for parameter in merged.parameters())


class Shifted(nn.Module):
    """An FFN with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)
        self.register_buffer("shift", torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.shift


@both_kinds
def test_filling_gives_every_expert_the_parameters_and_buffers_of_an_ffn(kind):
    experts = separated(kind(Shifted(), 3))
    other = Shifted()
    experts.fill_(other)
    for name, values in experts.values_by_parameter():
        assert all(torch.equal(value, other.get_parameter(name)) for value in values)
    x = torch.randn(3, 4, DIM)
    assert_close(experts(x), other(x), 1e-6)


@both_kinds
def test_an_ffn_can_be_a_single_layer(kind):
    module = nn.Linear(DIM, 5)
    experts = separated(kind(module, 2))
    x = torch.randn(2, 4, DIM)
    assert experts(x).shape == (2, 4, 5)
    merged = experts.collapse()
    assert type(merged) is nn.Linear
    assert_close(merged.weight, torch.stack(dict(experts.values_by_parameter())["weight"]).mean(0), 1e-6)


class WithParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))


class OtherRmsNorm(nn.Module):
    """Keeps its epsilon under another name than torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))
        self.variance_epsilon = 1e-6


@pytest.mark.parametrize(
    "layer",
    [
        nn.PReLU(),
        WithParameter(),
        OtherRmsNorm(),
        nn.Conv2d(DIM, DIM, 3),
        nn.Conv2d(DIM, DIM, 1, padding=1),
        nn.Conv2d(DIM, DIM, 1, groups=2),
        nn.LayerNorm((2, DIM)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_without_a_stacked_version_is_refused_by_name(layer):
    with pytest.raises(TypeError, match=rf"1 \({type(layer).__name__}\) has no stacked version"):
        StackedExperts(nn.Sequential(nn.Linear(DIM, DIM), layer), 2)


@both_kinds
def test_a_deep_copy_of_experts_is_independent(kind):
    experts = separated(kind(ffn(), 2))
    twin = copy.deepcopy(experts)
    x = torch.randn(2, 4, DIM)
    before = experts(x).detach()
    assert torch.equal(twin(x), before)
    separated(twin)
    assert torch.equal(experts(x), before)
    assert not torch.equal(twin(x), before)


# ---------------------------------------------------------------- MoE

SHAPES = {  # 7, 21, 24 and 27 tokens over 4 experts: 24 divides, the others do not
    "2-D": (7, DIM),
    "3-D": (3, 7, DIM),
    "3-D even": (4, 6, DIM),
    "4-D": (3, 3, 3, DIM),
}


@both_kinds
@pytest.mark.parametrize("name", ["mlp", "swiglu with norm"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_moe_equals_a_slow_loop_over_tokens_and_so_do_its_gradients(shape, name, kind):
    module = ffn(name)
    moe = MoE(separated(kind(module, 4)), dispatcher=Recording(4))
    x = torch.randn(shape, requires_grad=True)
    weights = torch.randn(shape)
    y = moe(x)
    (y * weights).sum().backward()
    gradients, input_gradient = family_gradients(moe.experts), x.grad
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    moe.zero_grad(set_to_none=True)
    x.grad = None
    expected = slow_moe(moe, module, x.flatten(0, -2)).view(shape)
    (expected * weights).sum().backward()
    assert_close(y, expected, 1e-5)
    assert_close(input_gradient, x.grad, 1e-5)
    for parameter, gradient in family_gradients(moe.experts).items():
        assert_close(gradients[parameter], gradient, 1e-5)


@both_kinds
def test_moe_takes_channels_first_images(kind):
    module = randomised(ConvMlp(DIM, 12))
    moe = MoE(separated(kind(module, 4)), channels_first=True, dispatcher=Recording(4))
    x = torch.randn(2, DIM, 3, 3)
    y = moe(x)
    rows = x.permute(0, 2, 3, 1).reshape(-1, DIM, 1, 1)
    expected = slow_moe(moe, module, rows).view(2, 3, 3, DIM).permute(0, 3, 1, 2)
    assert y.shape == x.shape
    assert y.is_contiguous()
    assert_close(y, expected, 1e-5)
    moe.eval()
    assert_close(moe(x), moe.collapse()(x), 1e-5)


def test_moe_may_change_the_number_of_channels():
    module = Mlp(DIM, 12, 5)
    moe = MoE(StackedExperts(module, 2))
    x = tokens()
    assert_close(moe(x), module(x), 1e-6)
    conv = ConvMlp(DIM, 12, 5)
    moe = MoE(StackedExperts(conv, 2), channels_first=True)
    x = torch.randn(2, DIM, 3, 3)
    assert_close(moe(x), conv(x), 1e-6)


class Mixing(nn.Module):
    """An FFN that mixes the tokens of an image, as a depthwise convolution does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.fc(x - x.mean(1, keepdim=True)).tanh()


class InOrder(Dispatcher[int]):
    """The first tokens to the first expert, the next ones to the second, in eval mode too."""

    routed = True

    def dispatch(self, x_TD):
        return x_TD.view(2, -1, x_TD.shape[-1]), len(x_TD)

    def combine(self, block_ECD, state):
        return block_ECD.flatten(0, 1)[:state]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS.values())
def test_a_moe_takes_any_dispatcher(kind, training):
    moe = MoE(separated(kind(ffn(), 2)), dispatcher=InOrder()).train(training)
    x = torch.randn(6, DIM)
    values = dict(moe.experts.values_by_parameter())
    parts = [
        functional_call(ffn(), {name: of_expert[i] for name, of_expert in values.items()}, rows)
        for i, rows in enumerate(x.chunk(2))
    ]
    assert_close(moe(x), torch.cat(parts), 1e-5)
    assert moe.routed
    assert "by token" in str(summary(nn.Sequential(moe)))


@pytest.mark.parametrize(("kind", "make"), [(SeparateExperts, Mixing), (StackedExperts, ffn)])
@pytest.mark.parametrize("batch", [1, 2, 5, 6])
def test_moe_by_image_sends_whole_images_to_one_expert(batch, kind, make):
    module = make()
    moe = MoE(separated(kind(module, 2)), unit="image", dispatcher=Recording(2))
    x = tokens(batch)
    assert_close(moe(x), slow_moe(moe, module, x), 1e-5)


def test_further_arguments_reach_the_ffn():
    moe = MoE(SeparateExperts(Mixing(), 2), unit="image")
    x = tokens()
    for mode in (True, False):
        moe.train(mode)
        assert_close(moe(x, 3.0), 3 * moe(x), 1e-5)
        assert_close(moe(x, scale=3.0), 3 * moe(x), 1e-5)


def test_arguments_that_an_ffn_does_not_take_are_refused_by_both_kinds():
    for kind in (StackedExperts, SeparateExperts):
        moe = MoE(kind(ffn(), 2))
        for mode in (True, False):
            with pytest.raises(TypeError, match="nonsense"):
                moe.train(mode)(tokens(), nonsense=1)


@both_kinds
def test_another_number_of_inputs_than_experts_is_an_error(kind):
    with pytest.raises((ValueError, RuntimeError)):
        kind(ffn(), 2).train()(torch.randn(3, 5, DIM))


@both_kinds
@pytest.mark.parametrize("shape", [(0, DIM), (0, 5, DIM), (2, 0, DIM), (2, 0, 3, DIM)])
def test_no_tokens_give_no_output_and_zero_gradients(shape, kind):
    moe = MoE(kind(ffn(), 3))
    x = torch.randn(shape, requires_grad=True)
    y = moe(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    for parameter in moe.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@both_kinds
@pytest.mark.parametrize("name", ["mlp", "swiglu with norm", "mlp with rms norm"])
def test_experts_without_a_token_have_gradients_of_zero(name, kind):
    module = ffn(name)
    moe = MoE(kind(module, 4), dispatcher=Recording(4))
    x = torch.randn(2, DIM)
    moe(x).square().sum().backward()
    used = set(moe.dispatcher.state.positions.tolist())
    assert len(used) == 2
    for gradient in family_gradients(moe.experts).values():
        assert [bool(of_expert.any()) for of_expert in gradient] == [e in used for e in range(4)]


@both_kinds
def test_the_partition_changes_from_step_to_step(kind):
    moe = MoE(separated(kind(ffn(), 4)))
    x = tokens()
    first = moe(x)
    assert torch.equal(moe(x), first)
    set_step(moe, 1)
    assert not torch.allclose(moe(x), first)


@both_kinds
@every_ffn
def test_eval_of_a_moe_equals_its_collapse(name, kind):
    moe = MoE(separated(kind(ffn(name), 4))).eval()
    x = tokens()
    assert_close(moe(x), moe.collapse()(x), 1e-5)
    assert torch.equal(moe(x), moe(x))


@both_kinds
def test_eval_draws_no_random_numbers(kind):
    moe = MoE(kind(ffn(), 4)).eval()
    x = tokens()
    before = torch.get_rng_state()
    moe(x)
    assert torch.equal(torch.get_rng_state(), before)


@both_kinds
def test_collapse_keeps_the_mode(kind):
    for mode in (True, False):
        moe = MoE(kind(ffn("swiglu with norm"), 2)).train(mode)
        for merged in (moe.collapse(), moe.experts.collapse()):
            assert {m.training for m in merged.modules()} == {mode}


@both_kinds
def test_dispatching_deals_in_eval_mode_without_dropout_and_restores_the_mode(kind):
    module = randomised(Mlp(DIM, 12, drop=0.5))
    moe = MoE(separated(kind(module, 4)), dispatcher=Recording(4)).eval()
    x = tokens()
    with dispatching(moe):
        y = moe(x)
    assert_close(y.flatten(0, -2), slow_moe(moe, module.eval(), x.flatten(0, -2)), 1e-5)
    assert not any(part.training for part in moe.modules())
    assert_close(moe(x), moe.collapse()(x), 1e-5)


@both_kinds
@pytest.mark.parametrize("name", ["mlp", "swiglu with norm", "mlp with rms norm"])
def test_autocast_to_bfloat16_works_in_training_and_eval(name, kind):
    moe = MoE(separated(kind(ffn(name), 4), scale=0.01))
    x = tokens()
    for mode in (True, False):
        moe.train(mode)
        torch.manual_seed(1)
        full = moe(x)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            half = moe(x)
        assert half.dtype is torch.bfloat16
        torch.testing.assert_close(half.float(), full, atol=5e-2, rtol=2e-2)
    moe.train()
    with torch.autocast("cpu", torch.bfloat16):
        moe(x).sum().backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in moe.parameters())


@both_kinds
def test_half_precision_weights_work(kind):
    module = ffn("swiglu with norm")
    moe = MoE(kind(module, 4)).to(torch.bfloat16)
    x = tokens()
    torch.testing.assert_close(moe(x.bfloat16()).float(), module(x), atol=5e-2, rtol=5e-2)
    assert all(parameter.dtype is torch.bfloat16 for parameter in moe.collapse().parameters())


def test_layer_scale_of_the_tests_is_stacked_like_those_of_the_libraries():
    experts = StackedExperts(LayerScale(DIM), 3)
    assert [(name, tuple(p.shape)) for name, p in experts.named_parameters()] == [("ffn.gamma", (3, DIM))]


def test_moe_layers_lists_a_shared_layer_once():
    moe = MoE(StackedExperts(ffn(), 2))
    assert list(moe_layers(nn.ModuleList([moe, nn.Linear(2, 2), moe]))) == ["0"]
