"""The closed forms of `ewavit.study.theory` against training: expand, torch optimizers, the hook."""

import copy
import math

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ewavit as ewa
from ewavit.core import MoE, SeparateExperts, StackedExperts, full_share_rate, moe_layers
from ewavit.study import theory
from ewavit.training.prediction import DeviationMoments, SpreadPrediction, StepSettings
from small_models import MlpNet, images, separated, tiny_vit, tokens

KINDS = {"stacked": StackedExperts, "separate": SeparateExperts}
both_kinds = pytest.mark.parametrize("kind", KINDS)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8, nesterov=True, weight_decay=0.1),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0.5),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.99), fused=True),
    "adam with L2": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1),
}


def stacked(experts: StackedExperts | SeparateExperts) -> list[Tensor]:
    """A copy of every parameter of the FFN, (experts, ...)."""
    return [torch.stack([value.detach() for value in values]) for _, values in experts.values_by_parameter()]


def gradients(experts: StackedExperts | SeparateExperts) -> list[Tensor]:
    """The gradient of every parameter of the FFN, (experts, ...)."""
    if isinstance(experts, StackedExperts):
        return [parameter.grad for parameter in experts.parameters()]
    return [
        torch.stack([p.grad for p in f]) for f in zip(*map(nn.Module.parameters, experts.copies), strict=True)
    ]


def noisy_layer(kind: str = "stacked", size: int = 16, num_experts: int = 4) -> MoE:
    return MoE(KINDS[kind](nn.Linear(size, size), num_experts))


def noise_backward(moe: MoE, units: int = 64) -> None:
    """A real backward pass whose gradients are white noise, whatever the weights are."""
    x = torch.randn(units, next(moe.parameters()).shape[-1])
    (moe(x) * torch.randn(units, x.shape[1])).sum().backward()


# ---------------------------------------------------------------- decay


@both_kinds
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("share_rate", [0.0, 0.1, 0.6, 0.75])
def test_averaging_alone_leaves_the_closed_form_of_a_deviation(share_rate, every, kind):
    model = separated(ewa.expand(MlpNet().double(), 4, experts=kind))
    experts = [moe.experts for moe in moe_layers(model).values()]
    start = [w - w.mean(0) for e in experts for w in stacked(e)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ewa.ExpertAveraging(model, share_rate, every=every).attach(optimizer)
    for step in range(1, 8):
        F.cross_entropy(model(tokens().double()), torch.arange(3)).backward()
        optimizer.step()
        left = theory.deviation_decay(share_rate, 4, step, every)
        for before, w in zip(start, (w for e in experts for w in stacked(e)), strict=True):
            torch.testing.assert_close(w - w.mean(0), left * before, atol=1e-12, rtol=0)


def test_averaging_now_and_then_decays_as_fast_as_every_step():
    results = []
    for every in (1, 4):
        torch.manual_seed(0)
        moe = separated(noisy_layer().double())
        optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
        ewa.ExpertAveraging(moe, 0.1, every=every).attach(optimizer)
        for _ in range(8):
            moe(torch.randn(8, 16).double()).sum().backward()
            optimizer.step()
        results.append(stacked(moe.experts))
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


# ---------------------------------------------------------------- the mean


@both_kinds
@pytest.mark.parametrize("share_rate", [0.0, 0.3, 0.75])
def test_the_mean_of_the_experts_follows_sgd_on_their_mean_gradient(share_rate, kind):
    model = separated(ewa.expand(MlpNet().double(), 4, experts=kind))
    moe = next(iter(moe_layers(model).values()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    ewa.ExpertAveraging(model, share_rate).attach(optimizer)
    shadow = [nn.Parameter(w.mean(0)) for w in stacked(moe.experts)]
    single = torch.optim.SGD(shadow, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens().double()), torch.arange(3)).backward()
        for parameter, gradient in zip(shadow, gradients(moe.experts), strict=True):
            parameter.grad = gradient.mean(0)
        optimizer.step()
        single.step()
        for parameter, w in zip(shadow, stacked(moe.experts), strict=True):
            torch.testing.assert_close(w.mean(0), parameter.data, atol=1e-12, rtol=0)


def test_full_averaging_with_the_matched_settings_is_dense_sgd():
    # tests/test_invariants.py holds this on a ViT for both kinds; here the settings come from the theory.
    dense = MlpNet().double()
    model = ewa.expand(copy.deepcopy(dense), 3)
    inside = [p for moe in moe_layers(model).values() for p in moe.parameters()]
    known = {id(p) for p in inside}
    settings = {"lr": 0.05, "weight_decay": 0.02}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in known]},
        {"params": inside, **theory.matched_sgd(**settings, num_experts=3)},
    ]
    optimizers = [torch.optim.SGD(p, momentum=0.9, **settings) for p in (dense.parameters(), groups)]
    ewa.ExpertAveraging(model, full_share_rate(3)).attach(optimizers[1])
    for _ in range(4):
        x = tokens().double()
        for m, optimizer in zip((dense, model), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(m(x), torch.arange(3)).backward()
            optimizer.step()
    for name, value in ewa.dense_state_dict(model).items():
        torch.testing.assert_close(value, dense.state_dict()[name], atol=1e-10, rtol=0)


# ---------------------------------------------------------------- history


@pytest.mark.parametrize(
    "schedule",
    [ewa.Constant(0.05), ewa.LinearRamp(0.5, 6), ewa.Early(ewa.Constant(0.2), 4), ewa.Constant(2 / 3)],
    ids=["constant", "ramp", "early", "full"],
)
def test_history_weights_rebuild_the_final_experts_from_their_updates(schedule):
    n, steps = 3, 9
    model = separated(ewa.expand(MlpNet().double(), n))
    experts = next(iter(moe_layers(model).values())).experts
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start, updates, before = stacked(experts), [], []
    optimizer.register_step_pre_hook(lambda *_: before.append(stacked(experts)))
    optimizer.register_step_post_hook(
        lambda *_: updates.append([w - old for w, old in zip(stacked(experts), before[-1], strict=True)])
    )  # before the averaging, whose hook comes later
    ewa.ExpertAveraging(model, schedule).attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens().double()), torch.arange(3)).backward()
        optimizer.step()
    own, other = theory.history_weights([schedule(step) for step in range(1, steps + 1)], n)
    torch.testing.assert_close(own + (n - 1) * other, torch.ones(steps).double())
    for index, final in enumerate(stacked(experts)):
        expected = (own[0] - other[0]) * start[index] + other[0] * start[index].sum(0)
        for step, update in enumerate(updates):
            u = update[index]
            expected = expected + (own[step] - other[step]) * u + other[step] * u.sum(0)
        torch.testing.assert_close(final, expected, atol=1e-12, rtol=0)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("name", ["sgd", "momentum", "dampened", "adam"])
@pytest.mark.parametrize("share_rate", [0.05, 0.3])
def test_deviations_under_noise_have_the_stationary_variance(share_rate, name):
    moe = noisy_layer(size=16)
    optimizer = OPTIMIZERS[name](moe.parameters())
    ewa.ExpertAveraging(moe, share_rate).attach(optimizer)
    units, measured = 64, []
    for step in range(300):
        optimizer.zero_grad()
        noise_backward(moe, units)
        optimizer.step()
        if step >= 100:
            w = stacked(moe.experts)[0]
            measured.append(float((w - w.mean(0)).square().mean()))
    group = optimizer.param_groups[0]
    if name == "adam":  # divides by the standard deviation of the noise
        noise, momentum, dampening = 1.0, group["betas"][0], group["betas"][0]
    else:
        noise, momentum, dampening = units / 4, group["momentum"], group["dampening"]
    expected = theory.stationary_variance(share_rate, 4, group["lr"], noise, momentum, dampening)
    assert sum(measured) / len(measured) == pytest.approx(expected, rel=0.06)


def test_the_stationary_variance_of_plain_sgd_is_the_known_formula_and_the_limit_of_the_recursion():
    rate, n, lr = 0.1, 4, 0.2
    r = 1 - theory.lerp_weight(rate, n)
    assert theory.stationary_variance(rate, n, lr, 3.0) == pytest.approx(
        (n - 1) / n * r**2 / (1 - r**2) * lr**2 * 3.0
    )
    moments, settings = DeviationMoments(), StepSettings(lr, momentum=0.9, gain=0.4)
    for _ in range(500):
        moments = moments.advance(3.0 * (n - 1) / n, settings, 1 - r)
    assert moments.d_d == pytest.approx(theory.stationary_variance(rate, n, lr, 3.0, 0.9, 0.6), rel=1e-9)


def test_without_averaging_there_is_no_stationary_variance():
    with pytest.raises(ewa.EwavitError, match="choose share rate > 0"):
        theory.stationary_variance(0.0, 4, 0.1, 1.0)
    with pytest.raises(ewa.EwavitError, match=r"0\.9 is out of range for 4 experts"):
        theory.stationary_variance(0.9, 4, 0.1, 1.0)


# ---------------------------------------------------------------- prediction


@both_kinds
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_spread_of_a_training_on_noise_is_predicted_at_every_step(name, kind):
    moe = noisy_layer(kind)
    optimizer = OPTIMIZERS[name](moe.parameters())
    averaging = ewa.ExpertAveraging(moe, 0.3, ramp_steps=40, every=2).attach(optimizer)
    prediction = SpreadPrediction(moe, optimizer, averaging)
    assert prediction.relative() == {"": 0.0}
    ratios = []
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 60))
        optimizer.zero_grad()
        noise_backward(moe)
        if step % 4 == 0:
            prediction.observe()
        optimizer.step()
        prediction.step()
        ratios.append(ewa.expert_spread(moe)[""] / prediction.relative()[""])
    assert max(ratios) < 1.15
    assert min(ratios) > 0.85
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("share_rate", [0.03, 0.3])
def test_the_spread_of_a_vit_in_training_is_predicted(share_rate):
    model = ewa.expand(tiny_vit(embed_dim=32), 4, select="all")
    optimizer = torch.optim.AdamW(ewa.param_groups(model), lr=1e-3)
    averaging = ewa.ExpertAveraging(model, share_rate).attach(optimizer)
    prediction = SpreadPrediction(model, optimizer, averaging)
    ratios = []
    for step in range(60):
        x = images(16)
        optimizer.zero_grad()
        F.cross_entropy(model(x), x.mean((2, 3)).argmax(1)).backward()
        if step % 5 == 0:
            prediction.observe()
        optimizer.step()
        prediction.step()
        predicted = prediction.relative()
        ratios += [spread / predicted[layer] for layer, spread in ewa.expert_spread(model).items()]
    logs = torch.tensor(ratios).log()
    assert logs.mean().abs() < math.log(1.5)
    assert logs.abs().max() < math.log(3)


def test_a_resumed_prediction_goes_on_with_the_same_numbers():
    def build(seed):
        torch.manual_seed(seed)
        model = MlpNet()
        torch.manual_seed(0)  # the partitions go by it
        ewa.expand(model, 3)
        optimizer = torch.optim.AdamW(ewa.param_groups(model), lr=1e-2)
        averaging = ewa.ExpertAveraging(model, 0.2, ramp_steps=10).attach(optimizer)
        return model, optimizer, averaging, SpreadPrediction(model, optimizer, averaging)

    def train(model, optimizer, averaging, prediction, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(model(tokens()), torch.arange(3)).backward()
            if step % 3 == 0:
                prediction.observe()
            optimizer.step()
            prediction.step()

    whole = build(0)
    train(*whole, 0, 12)
    first = build(0)
    train(*first, 0, 7)
    second = build(1)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert second[3].relative() == first[3].relative()
    train(*second, 7, 12)
    assert second[3].relative() == whole[3].relative()
    assert all(spread > 0 for spread in whole[3].relative().values())
    with pytest.raises(ewa.EwavitError, match="load the state of the same model"):
        second[3].load_state_dict({"steps": 1, "observations": 1, "parts": []})


def test_full_averaging_is_predicted_to_leave_no_spread_and_scaled_gradients_change_nothing():
    results = []
    for share_rate, scale in ((0.75, 1.0), (0.2, 1.0), (0.2, 1024.0)):
        torch.manual_seed(0)
        moe = noisy_layer()
        optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
        averaging = ewa.ExpertAveraging(moe, share_rate).attach(optimizer)
        prediction = SpreadPrediction(moe, optimizer, averaging)
        noise_backward(moe)
        for parameter in moe.parameters():
            parameter.grad *= scale
        prediction.observe(scale)
        optimizer.step()
        prediction.step()
        results.append(prediction.relative()[""])
    assert results[0] == 0
    assert results[1] > 0
    assert results[2] == pytest.approx(results[1], rel=1e-6)


def test_a_skipped_step_and_gradients_that_overflowed_are_not_counted():
    moe = noisy_layer()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    averaging = ewa.ExpertAveraging(moe, 0.2).attach(optimizer)
    prediction = SpreadPrediction(moe, optimizer, averaging)
    noise_backward(moe)
    prediction.observe()
    optimizer.step()
    prediction.step()
    before = prediction.state_dict()
    moe.experts.ffn.weight.grad[0, 0, 0] = math.inf
    prediction.observe()
    prediction.step()  # without optimizer.step(), as a GradScaler does
    assert prediction.state_dict() == before


@both_kinds
def test_frozen_parameters_and_such_without_gradient_keep_the_deviation_they_start_with(kind):
    model = separated(ewa.expand(MlpNet(), 4, experts=kind))
    layers = moe_layers(model)
    for name, parameter in model.named_parameters():
        if "fc1" in name:
            parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    averaging = ewa.ExpertAveraging(model, 0.1).attach(optimizer)
    prediction = SpreadPrediction(model, optimizer, averaging)
    assert prediction.relative() == pytest.approx(ewa.expert_spread(model), rel=1e-5)
    for _ in range(3):  # no backward: no parameter has a gradient
        prediction.observe()
        optimizer.step()
        prediction.step()
    assert prediction.relative() == pytest.approx(ewa.expert_spread(model), rel=1e-5)
    assert len(layers) == len(prediction.relative())


def test_wrapped_and_timm_optimizers_are_looked_through_and_others_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = ewa.expand(tiny_vit(), 2)
    averaging = ewa.ExpertAveraging(model, 0.1)
    for opt in ("sgd", "momentum", "adam", "adamw"):
        optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=0.1, weight_decay=0.05, layer_decay=0.7)
        assert SpreadPrediction.supports(Wrapper(optimizer))
        parts = SpreadPrediction(model, Wrapper(optimizer), averaging).state_dict()["parts"]
        assert len(parts) == 2  # one mixture, with and without weight decay
    for optimizer in (
        torch.optim.RMSprop(model.parameters()),
        torch.optim.AdamW(model.parameters(), amsgrad=True),
        timm.optim.create_optimizer_v2(model, opt="lamb", lr=0.1),
    ):
        assert not SpreadPrediction.supports(optimizer)
        with pytest.raises(ewa.EwavitError, match="leave the prediction out"):
            SpreadPrediction(model, optimizer, averaging)


# ---------------------------------------------------------------- flatness


@both_kinds
@pytest.mark.parametrize("unit", ["token", "image"])
def test_on_a_quadratic_the_flatness_penalty_is_what_deviations_add_to_the_loss(unit, kind):
    # Equal units over three experts: whoever gets which, the loss in training is the mean of theirs.
    moe = MoE(KINDS[kind](nn.Linear(8, 4), 3), unit=unit).double()
    separated(moe, 0.5)
    x = torch.randn(5, 8).double().expand(6, -1, -1) if unit == "image" else torch.randn(8).double()
    x = x if unit == "image" else x.expand(6, -1)
    target = torch.randn(4).double()
    in_training = (moe(x) - target).square().mean()
    deployed = (moe.eval()(x) - target).square().mean()
    penalty = theory.flatness_penalty(moe, deployed)
    assert penalty > 0.01
    assert (in_training - deployed).item() == pytest.approx(penalty, abs=1e-10)


@both_kinds
def test_on_a_vit_the_flatness_penalty_is_what_small_deviations_add_to_the_loss(kind):
    # Two experts swapped on the same partition: first and third order cancel.
    model = ewa.expand(tiny_vit(depth=1), 2, select="all", unit="image", experts=kind).double()
    separated(model, 1e-4)
    x, y = images(6).double(), torch.arange(6) % 3
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(F.cross_entropy(model.train()(x), y).item())
        with torch.no_grad():
            for _, (one, two) in moe_layers(model)["blocks.0.mlp"].experts.values_by_parameter():
                kept = one.clone()
                one.copy_(two)
                two.copy_(kept)
    deployed = F.cross_entropy(model.eval()(x), y)
    penalty = theory.flatness_penalty(model, deployed)
    assert abs(penalty) > 1e-10
    assert sum(losses) / 2 - deployed.item() == pytest.approx(penalty, rel=1e-3)


def test_deviations_of_different_layers_do_not_meet_in_the_flatness_penalty():
    model = separated(ewa.expand(MlpNet(depth=2).double(), 3, select="all"), 0.05).eval()
    x = tokens().double()

    def penalty(m: nn.Module) -> float:
        return theory.flatness_penalty(m, F.cross_entropy(m(x), torch.arange(3)))

    alone = []
    for layer in moe_layers(model):
        other = copy.deepcopy(model)
        for name, moe in moe_layers(other).items():
            if name != layer:
                moe.experts.fill_(moe.experts.collapse())
        alone.append(penalty(other))
    assert sum(alone) == pytest.approx(penalty(model), rel=1e-9)
    assert all(value != 0 for value in alone)
    with pytest.raises(ewa.EwavitError, match=r"call ewavit\.expand"):
        penalty(MlpNet().double())


def test_hutchinson_finds_the_trace_of_a_known_hessian():
    matrix = torch.randn(12, 12).double()
    hessian = matrix @ matrix.T
    w = [torch.randn(4).double().requires_grad_(), torch.randn(8).double().requires_grad_()]
    whole = torch.cat(w)
    trace = theory.hessian_trace(0.5 * whole @ hessian @ whole + whole.sum(), w, samples=500)
    assert trace == pytest.approx(float(hessian.trace()), rel=0.1)
    diagonal = theory.hessian_trace((w[0] ** 2).sum(), w, samples=1)  # exact, and w[1] takes no part
    assert diagonal == pytest.approx(8.0, rel=1e-12)


def test_hutchinson_on_a_vit_agrees_with_the_exact_trace():
    model = tiny_vit(depth=1, embed_dim=8).double().eval()
    x, y = images(4).double(), torch.arange(4) % 3
    weights = [model.blocks[0].attn.proj.weight, model.head.weight]
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(model(x), y)
    entries = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
    rows = [torch.autograd.grad(entry, weights, retain_graph=True) for entry in entries]
    hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    off_diagonal = hessian - hessian.diag().diag()
    deviation = (2 * off_diagonal.square().sum() / 100).sqrt().item()  # of the mean of 100 samples
    exact = hessian.trace().item()
    assert exact > 8 * deviation
    assert theory.hessian_trace(loss, weights, samples=100) == pytest.approx(exact, abs=4 * deviation)
