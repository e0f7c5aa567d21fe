"""Averaging the experts, its schedules, and the hook on the optimizer."""

import copy
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ewavit as ewa
from ewavit.core import MoE, SeparateExperts, StackedExperts, full_share_rate, moe_layers
from ewavit.core.averaging import average_experts_reference_, check_share_rate, looks_at_whole_tensors
from ewavit.core.draws import STEP
from ewavit.core.steps import STEPS_KEY
from small_models import MlpNet, ffn, separated, tokens

KINDS = ["stacked", "separate"]
both_kinds = pytest.mark.parametrize("kind", KINDS)


def expanded(num_experts: int = 4, kind: str = "stacked", apart: float = 0.1) -> MlpNet:
    model = ewa.expand(MlpNet(), num_experts, experts=kind)
    return separated(model, apart)


def mixed(kind: str = "stacked", sizes: tuple[int, ...] = (2, 3, 4)) -> nn.Module:
    """Layers with different numbers of experts and differently shaped FFNs."""
    make = {"stacked": StackedExperts, "separate": SeparateExperts}[kind]
    names = ["mlp", "swiglu with norm", "glu"]
    moes = [MoE(make(ffn(name), n)) for name, n in zip(names, sizes, strict=True)]
    return separated(nn.Sequential(*moes))


def families(model: nn.Module) -> list[Tensor]:
    """Every expert parameter as (experts, ...), detached copies."""
    return [
        torch.stack([value.detach().clone() for value in values])
        for moe in moe_layers(model).values()
        for _, values in moe.experts.values_by_parameter()
    ]


def deviation(model: nn.Module) -> float:
    return sum(float((f - f.mean(0)).square().sum()) for f in families(model)) ** 0.5


def sgd(model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(ewa.param_groups(model, weight_decay=0.0), lr=0.01, **settings)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(tokens()).square().mean().backward()
    optimizer.step()


# ---------------------------------------------------------------- average_experts_


@both_kinds
@settings(deadline=None, max_examples=25)
@given(sizes=st.tuples(*[st.integers(1, 6)] * 3), part=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_averaging_leaves_the_mean_unchanged_and_equals_the_explicit_sum(kind, sizes, part, seed):
    torch.manual_seed(seed)
    model = mixed(kind, sizes).double()
    share_rate = part * min([full_share_rate(n) for n in sizes if n > 1], default=1.0)
    twin, before = copy.deepcopy(model), families(model)
    ewa.average_experts_(model, share_rate)
    average_experts_reference_(twin, share_rate)
    for old, new, reference in zip(before, families(model), families(twin), strict=True):
        torch.testing.assert_close(new.mean(0), old.mean(0), atol=1e-12, rtol=0)
        torch.testing.assert_close(new, reference, atol=1e-12, rtol=0)
        pull = share_rate * len(old) / max(1, len(old) - 1)
        expected = old if len(old) == 1 else old - pull * (old - old.mean(0))
        torch.testing.assert_close(new, expected, atol=1e-12, rtol=0)


@both_kinds
def test_full_averaging_makes_all_experts_exactly_equal(kind):
    model = expanded(4, kind)
    means = [family.mean(0) for family in families(model)]
    ewa.average_experts_(model, full_share_rate(4))
    for family, mean in zip(families(model), means, strict=True):
        assert all(torch.equal(expert, family[0]) for expert in family)
        torch.testing.assert_close(family[0], mean, atol=1e-6, rtol=1e-6)


@both_kinds
def test_share_rate_zero_changes_nothing(kind):
    model = expanded(4, kind)
    before = families(model)
    ewa.average_experts_(model, 0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, families(model), strict=True))


@both_kinds
def test_only_expert_parameters_are_averaged(kind):
    model = expanded(4, kind)
    inside = {id(p) for moe in moe_layers(model).values() for p in moe.parameters()}
    others = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in inside}
    assert others
    ewa.average_experts_(model, 0.3)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in others.items())


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaging_is_in_place_and_never_replaces_a_parameter(kind, dtype):
    model = expanded(4, kind).to(dtype)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    old = families(model)
    ewa.average_experts_(model, 0.3)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(old, families(model), strict=True))


@both_kinds
def test_gradients_survive_averaging(kind):
    model = expanded(4, kind)
    model(tokens()).sum().backward()
    before = {name: (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()}
    ewa.average_experts_(model, 0.3)
    for name, parameter in model.named_parameters():
        assert id(parameter.grad) == before[name][0]
        assert torch.equal(parameter.grad, before[name][1])


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_averaged_in_float32(kind, dtype):
    model = expanded(3, kind).to(dtype)
    expected = [
        (f.float() + 0.3 * 1.5 * (f.float().mean(0) - f.float())).to(dtype).float() for f in families(model)
    ]
    ewa.average_experts_(model, 0.3)
    wrong = 0
    for actual, value in zip(families(model), expected, strict=True):
        assert actual.dtype is dtype
        # At most the last bit may differ, where float32 rounds to the other side of a tie.
        torch.testing.assert_close(actual.float(), value, atol=0, rtol=2 * torch.finfo(dtype).eps)
        wrong += int((actual.float() != value).sum())
    assert wrong <= 2


def test_a_model_in_two_dtypes_is_averaged_as_a_whole():
    model = mixed()
    model[1].to(torch.bfloat16)
    before = deviation(model)
    ewa.average_experts_(model, 0.25)
    pulls = {2: 0.5, 3: 1 - 0.25 * 1.5, 4: 1 - 0.25 * 4 / 3}
    assert deviation(model) < max(pulls.values()) * before * 1.01
    assert all(deviation(layer) > 0 for layer in model)


@pytest.mark.parametrize(
    ("num_experts", "share_rate"), [(2, 0.51), (4, 0.76), (4, -0.01), (4, 1.0), (4, float("nan"))]
)
def test_a_share_rate_out_of_range_is_named_and_nothing_is_averaged(num_experts, share_rate):
    model = expanded(num_experts)
    before = families(model)
    with pytest.raises(ewa.EwavitError, match=rf"share rate {share_rate} is out of range for {num_experts}"):
        ewa.average_experts_(model, share_rate)
    with pytest.raises(ewa.EwavitError, match=str(share_rate)):
        ewa.ExpertAveraging(model, share_rate)
    assert all(torch.equal(old, new) for old, new in zip(before, families(model), strict=True))


def test_a_share_rate_too_high_for_one_layer_averages_no_layer():
    model = mixed(sizes=(4, 3, 2))
    before = families(model)
    with pytest.raises(ewa.EwavitError, match="for 2 experts"):
        ewa.average_experts_(model, 0.6)
    assert all(torch.equal(old, new) for old, new in zip(before, families(model), strict=True))


@settings(max_examples=100)
@given(num_experts=st.integers(2, 64), part=st.floats(0, 1))
def test_every_share_rate_up_to_full_averaging_is_accepted(num_experts, part):
    rate = part * (num_experts - 1) / num_experts
    assert check_share_rate(rate, num_experts) == rate
    with pytest.raises(ewa.EwavitError):
        check_share_rate((num_experts - 1) / num_experts + 1e-6, num_experts)


def test_a_single_expert_accepts_any_averaging_and_does_not_change():
    model = expanded(1)
    optimizer = sgd(model)
    averaging = ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    before = families(model)
    averaging.step()
    ewa.average_experts_(model, 0.3)
    assert all(torch.equal(old, new) for old, new in zip(before, families(model), strict=True))
    assert averaging.steps_done == 1


def test_a_model_that_is_not_expanded_is_refused():
    with pytest.raises(ewa.EwavitError, match="expand"):
        ewa.average_experts_(MlpNet(), 0.3)
    with pytest.raises(ewa.EwavitError, match="expand"):
        ewa.ExpertAveraging(MlpNet())


# ---------------------------------------------------------------- schedules

RATES = st.floats(0, 1)
STEPS = st.integers(0, 1000)


@given(rate=RATES, ramp=STEPS, until=STEPS, step=STEPS)
def test_schedules_stay_between_zero_and_the_rate(rate, ramp, until, step):
    linear, cosine = ewa.LinearRamp(rate, ramp), ewa.CosineRamp(rate, ramp)
    for schedule in (ewa.Constant(rate), linear, cosine, ewa.Early(linear, until), ewa.Early(cosine, until)):
        assert 0 <= schedule(step) <= rate


@given(rate=RATES, ramp=STEPS, step=STEPS)
def test_ramps_never_fall_and_end_at_the_rate(rate, ramp, step):
    for schedule in (ewa.LinearRamp(rate, ramp), ewa.CosineRamp(rate, ramp)):
        assert schedule(step) <= schedule(step + 1)
        assert schedule(ramp) == schedule(ramp + step) == rate
        assert schedule(0) == (0 if ramp else rate)


def test_schedules_have_their_shapes():
    assert [ewa.Constant(0.3)(step) for step in (0, 1, 99)] == [0.3, 0.3, 0.3]
    assert [ewa.LinearRamp(0.4, 4)(step) for step in range(6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    quarter = 0.4 * (1 - 2**-0.5) / 2
    expected = [0, quarter, 0.2, 0.4 - quarter, 0.4, 0.4]
    assert [ewa.CosineRamp(0.4, 4)(step) for step in range(6)] == pytest.approx(expected)


@given(rate=st.floats(0.01, 1), ramp=STEPS, until=STEPS, step=STEPS)
def test_early_follows_its_schedule_until_the_last_step_and_is_zero_after(rate, ramp, until, step):
    inner = ewa.LinearRamp(rate, ramp)
    assert ewa.Early(inner, until)(step) == (inner(step) if step <= until else 0)


# ---------------------------------------------------------------- ExpertAveraging


def rates_used(averaging: ewa.ExpertAveraging, steps: int) -> list[float]:
    """The shrinkage 1 - D of each step, read off the weights, as share rates."""
    used = []
    for _ in range(steps):
        before = deviation(averaging.model)
        averaging.step()
        n = next(iter(moe_layers(averaging.model).values())).num_experts
        used.append((1 - deviation(averaging.model) / before) * (n - 1) / n)
    return used


def test_a_ramp_rises_to_the_share_rate_over_the_steps():
    averaging = ewa.ExpertAveraging(expanded().double(), 0.2, ramp_steps=4)
    assert rates_used(averaging, 6) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2], abs=1e-9)
    assert averaging.share_rate == 0.2


def test_a_schedule_is_called_with_the_number_of_steps_done():
    averaging = ewa.ExpertAveraging(expanded().double(), ewa.Early(ewa.Constant(0.2), until=2))
    assert rates_used(averaging, 4) == pytest.approx([0.2, 0.2, 0, 0], abs=1e-9)


def test_every_k_averages_only_each_kth_step():
    averaging = ewa.ExpertAveraging(expanded().double(), 0.2, every=3)
    together = (1 - (1 - 0.2 * 4 / 3) ** 3) * 3 / 4
    assert rates_used(averaging, 7) == pytest.approx([0, 0, together, 0, 0, together, 0], abs=1e-9)
    assert averaging.steps_done == 7


@pytest.mark.parametrize("num_experts", [2, 4])
@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize(
    "share_rate",
    [0.1, ewa.LinearRamp(0.3, 6), ewa.Early(ewa.Constant(0.2), 3), ewa.Constant(0.5)],
    ids=["constant", "ramp", "early", "full averaging of two"],
)
def test_averaging_every_k_steps_decays_deviations_as_fast_as_every_step(num_experts, k, share_rate):
    often, seldom = (expanded(num_experts).double() for _ in range(2))
    seldom.load_state_dict(often.state_dict())
    first = ewa.ExpertAveraging(often, share_rate)
    second = ewa.ExpertAveraging(seldom, share_rate, every=k)
    for _ in range(2 * k):
        first.step()
        second.step()
    for one, other in zip(families(often), families(seldom), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@both_kinds
def test_attached_averaging_equals_averaging_by_hand_after_every_step(kind):
    model = expanded(4, kind)
    twin = copy.deepcopy(model)
    optimizer, by_hand = sgd(model, momentum=0.9), sgd(twin, momentum=0.9)
    averaging = ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    for step in range(3):
        torch.manual_seed(step)
        train_step(model, optimizer)
        torch.manual_seed(step)
        train_step(twin, by_hand)
        ewa.average_experts_(twin, 0.3)
    assert averaging.steps_done == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name))


def test_attach_returns_the_averaging_and_runs_once_per_optimizer_step():
    model = expanded()
    optimizer = sgd(model)
    averaging = ewa.ExpertAveraging(model)
    assert averaging.attach(optimizer) is averaging
    for steps in (1, 2, 3):
        train_step(model, optimizer)
        assert averaging.steps_done == steps


def test_gradient_accumulation_averages_once_per_real_step():
    model = expanded()
    optimizer = sgd(model)
    averaging = ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    for _ in range(3):
        model(tokens()).sum().backward()
    assert averaging.steps_done == 0
    optimizer.step()
    assert averaging.steps_done == 1


def test_forward_and_backward_passes_change_no_counter():
    model = expanded()
    averaging = ewa.ExpertAveraging(model).attach(sgd(model))
    before = copy.deepcopy(model.state_dict())
    model(tokens()).sum().backward()
    assert averaging.steps_done == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_detach_stops_the_averaging_and_allows_another_attach():
    model = expanded()
    optimizer = sgd(model)
    averaging = ewa.ExpertAveraging(model).attach(optimizer)
    averaging.detach()
    averaging.detach()
    train_step(model, optimizer)
    assert averaging.steps_done == 0
    averaging.attach(optimizer)
    train_step(model, optimizer)
    assert averaging.steps_done == 1


def test_another_averaging_of_the_same_optimizer_starts_its_own_count():
    model = expanded()
    optimizer = sgd(model)
    first = ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    train_step(model, optimizer)
    first.detach()
    second = ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    assert (first.steps_done, second.steps_done) == (1, 0)


def test_detaching_what_is_not_attached_changes_nothing():
    averaging = ewa.ExpertAveraging(expanded())
    averaging.step()
    averaging.detach()
    assert averaging.steps_done == 1
    assert "not attached" in repr(averaging)


def test_an_optimizer_without_experts_is_not_waited_for():
    model, head = expanded(), nn.Linear(2, 2)
    experts, other = sgd(model), torch.optim.SGD(head.parameters(), lr=0.1)
    averaging = ewa.ExpertAveraging(model).attach(other, experts)
    for _ in range(3):
        train_step(model, experts)
    assert averaging.steps_done == 3
    head(torch.ones(1, 2)).sum().backward()
    other.step()
    assert averaging.steps_done == 3


def test_a_state_that_lost_its_count_counts_from_where_the_averaging_was():
    model = expanded()
    optimizer = sgd(model)
    averaging = ewa.ExpertAveraging(model).attach(optimizer)
    for group in optimizer.param_groups:
        group.pop(STEPS_KEY, None)
    assert averaging.steps_done == 0
    train_step(model, optimizer)
    assert averaging.steps_done == 1


@both_kinds
def test_weights_that_two_mixtures_share_are_averaged_once(kind):
    shared, model = ffn(), MlpNet(depth=2)
    model.blocks[0].mlp, model.blocks[1].mlp = shared, copy.deepcopy(shared)
    model.blocks[1].mlp.fc1.weight = shared.fc1.weight
    separated(ewa.expand(model, 3, select="all", experts=kind))
    before = families(model)
    ewa.average_experts_(model, 0.3)
    for was, now in zip(before, families(model), strict=True):
        assert torch.allclose(now - now.mean(0), 0.55 * (was - was.mean(0)), atol=1e-6)


def test_processes_are_compared_in_the_first_two_steps_and_then_every_hundredth(monkeypatch):
    compared = []
    monkeypatch.setattr(
        "ewavit.core.averaging.check_peers", lambda model: compared.append(averaging.steps_done)
    )
    averaging = ewa.ExpertAveraging(expanded(), every=1000)
    for _ in range(301):
        averaging.step()
    assert compared == [1, 2, 100, 200, 300]


def test_a_loop_without_optimizer_hooks_draws_anew_at_every_step():
    model = expanded()
    averaging = ewa.ExpertAveraging(model)
    for steps in (1, 2, 3):
        averaging.step()
        assert {int(moe.dispatcher.key[STEP]) for moe in moe_layers(model).values()} == {steps}
    averaging.load_state_dict({"steps_done": 9})
    assert {int(moe.dispatcher.key[STEP]) for moe in moe_layers(model).values()} == {9}


def test_attaching_twice_is_refused():
    model = expanded()
    optimizer = sgd(model)
    averaging = ewa.ExpertAveraging(model).attach(optimizer)
    with pytest.raises(ewa.EwavitError, match="detach"):
        averaging.attach(optimizer)
    train_step(model, optimizer)
    assert averaging.steps_done == 1


@both_kinds
def test_an_optimizer_built_before_expand_is_refused(kind):
    model = MlpNet()
    optimizer = sgd(model)
    ewa.expand(model, experts=kind)
    averaging = ewa.ExpertAveraging(model)
    with pytest.raises(ewa.EwavitError, match=r"blocks\.1\.mlp\.experts.*build the optimizer after"):
        averaging.attach(optimizer)
    averaging.attach(sgd(model))  # the refusal left nothing attached


def test_frozen_experts_need_not_be_in_the_optimizer():
    model = expanded()
    for moe in moe_layers(model).values():
        moe.requires_grad_(False)
    optimizer = sgd(model)
    averaging = ewa.ExpertAveraging(model).attach(optimizer)
    train_step(model, optimizer)
    assert averaging.steps_done == 1


@both_kinds
def test_weights_of_bfloat16_are_warned_of(kind):
    model = expanded(4, kind).to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"blocks\.\d\.mlp has torch\.bfloat16 weights") as caught:
        ewa.ExpertAveraging(model).attach(sgd(model))
    assert len(caught) == len(moe_layers(model)) == 2


def test_weights_of_float32_are_not_warned_of():
    model = expanded()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ewa.ExpertAveraging(model).attach(sgd(model))


@pytest.mark.parametrize(("found", "steps"), [(1.0, 0), (0.0, 1)])
def test_a_step_skipped_for_overflow_is_neither_averaged_nor_counted(found, steps):
    model = expanded()
    optimizer = sgd(model, fused=True)  # the kind that is stepped even then
    averaging = ewa.ExpertAveraging(model).attach(optimizer)
    before = deviation(model)
    optimizer.found_inf = torch.tensor(found)
    optimizer.step()  # without gradients: the weights move by averaging only
    assert averaging.steps_done == steps
    assert (deviation(model) < before) == bool(steps)


@pytest.mark.parametrize("fused", [True, False])
def test_a_grad_scaler_that_skips_a_step_skips_the_averaging(fused):
    model = expanded()
    optimizer = sgd(model, fused=fused)
    averaging = ewa.ExpertAveraging(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, steps in ((float("inf"), 0), (1.0, 1), (float("inf"), 1), (1.0, 2)):
        before = families(model)
        optimizer.zero_grad()
        scaler.scale(model(tokens()).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert averaging.steps_done == steps
        unchanged = all(torch.equal(a, b) for a, b in zip(before, families(model), strict=True))
        assert unchanged == (factor != 1.0)


def test_the_optimizer_inside_accelerates_wrapper_is_found():
    from accelerate import Accelerator

    model = expanded()
    accelerator = Accelerator(cpu=True)
    inner = sgd(model)
    optimizer = accelerator.prepare(inner)
    assert optimizer is not inner
    averaging = ewa.ExpertAveraging(model).attach(optimizer)
    train_step(model, optimizer)
    assert averaging.steps_done == 1
    train_step(model, inner)
    assert averaging.steps_done == 2


def test_the_state_dict_goes_on_where_it_stopped():
    model = expanded().double()
    averaging = ewa.ExpertAveraging(model, 0.2, ramp_steps=4)
    for _ in range(2):
        averaging.step()
    resumed = ewa.ExpertAveraging(model, 0.2, ramp_steps=4)
    resumed.load_state_dict(averaging.state_dict())
    assert resumed.state_dict() == {"steps_done": 2}
    assert resumed.share_rate == averaging.share_rate == 0.1
    assert rates_used(resumed, 2) == pytest.approx([0.15, 0.2], abs=1e-9)


def test_every_below_one_and_a_second_ramp_are_refused():
    model = expanded()
    with pytest.raises(ewa.EwavitError, match="every=0"):
        ewa.ExpertAveraging(model, every=0)
    with pytest.raises(ewa.EwavitError, match="ramp_steps"):
        ewa.ExpertAveraging(model, ewa.Constant(0.3), ramp_steps=5)


@both_kinds
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_averaging_leaves_the_optimizers_moments_alone(kind, optimizer_class):
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizers = []
    for share_rate in (0.0, full_share_rate(4)):
        torch.manual_seed(0)
        model = expanded(kind=kind)
        optimizer = optimizer_class(model.parameters(), lr=0.1, **options)
        ewa.ExpertAveraging(model, share_rate).attach(optimizer)
        model(tokens()).square().mean().backward()
        optimizer.step()
        optimizers.append(optimizer)
    before, after = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert before
    assert before.keys() == after.keys()
    for index, state in before.items():
        assert state.keys() == after[index].keys()
        assert all(torch.equal(value, after[index][name]) for name, value in state.items())


# ---------------------------------------------------------------- other people's optimizers and steps


class TwoStepSAM(torch.optim.Optimizer):
    """The usual form: the loop calls `first_step` and `second_step`, and only the base optimizer steps."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)
        self.param_groups = self.base_optimizer.param_groups

    def first_step(self):
        self.zero_grad()

    def second_step(self):
        self.base_optimizer.step()
        self.zero_grad()


def backward(model: nn.Module) -> None:
    model(tokens()).square().mean().backward()


def test_a_two_step_sam_averages_once_per_real_step():
    model = expanded()
    optimizer = TwoStepSAM(model.parameters())
    averaging = ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    for _ in range(3):
        for half in (optimizer.first_step, optimizer.second_step):
            backward(model)
            half()
    assert averaging.steps_done == 3
    assert deviation(model) == pytest.approx(0, abs=1e-6)


def test_lookahead_averages_from_its_first_step_on():
    from timm.optim import Lookahead

    model = expanded()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.01), k=6)
    averaging = ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    train_step(model, optimizer)
    assert averaging.steps_done == 1
    assert deviation(model) == pytest.approx(0, abs=1e-6)


def test_closures_of_lbfgs_count_one_step():
    model = expanded()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    averaging = ewa.ExpertAveraging(model, 0.75).attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model(tokens()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert averaging.steps_done == 1


def test_two_optimizers_over_one_model_average_once_when_both_have_stepped():
    model = expanded(kind="separate")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01)]
    averaging = ewa.ExpertAveraging(model, 0.75).attach(*optimizers)
    for steps in (1, 2):
        backward(model)
        optimizers[0].step()
        assert averaging.steps_done == steps - 1
        optimizers[1].step()
        assert averaging.steps_done == steps
        assert deviation(model) == pytest.approx(0, abs=1e-6)


def test_optimizers_that_step_within_the_backward_pass_average_once_per_pass():
    model = expanded()
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
    averaging = ewa.ExpertAveraging(model, 0.75).attach(*optimizers.values())

    def follow(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(follow)
    for steps in (1, 2, 3):
        backward(model)
        assert averaging.steps_done == steps
        assert deviation(model) == pytest.approx(0, abs=1e-6)


def test_the_step_at_learning_rate_zero_that_makes_an_optimizers_state_moves_nothing():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = expanded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    train_step(model, optimizer)
    optimizer.zero_grad()
    saved, weights = get_optimizer_state_dict(model, optimizer), copy.deepcopy(model.state_dict())
    other = expanded(apart=0.2)
    other.load_state_dict(weights)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-3)
    averaging = ewa.ExpertAveraging(other, 0.3).attach(fresh)
    set_optimizer_state_dict(other, fresh, saved)
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    assert averaging.steps_done == 1


class WithoutRate(torch.optim.Optimizer):
    """Has no learning rate among its settings."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.01)


@pytest.mark.parametrize(
    "make",
    [WithoutRate, partial(torch.optim.SGD, lr=0.0)],  # a warm-up may begin at 0
    ids=["no learning rate", "learning rate 0"],
)
def test_a_step_with_gradients_counts_whatever_the_learning_rate(make):
    model = expanded()
    optimizer = make(model.parameters())
    averaging = ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    train_step(model, optimizer)
    assert averaging.steps_done == 1
    assert deviation(model) == pytest.approx(0, abs=1e-6)


def test_a_step_without_any_gradient_counts_where_the_learning_rate_is_not_zero():
    model = expanded()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averaging = ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    optimizer.step()
    assert averaging.steps_done == 1


def test_the_count_travels_with_the_optimizers_state_dict():
    model = expanded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averaging = ewa.ExpertAveraging(model, 0.3, ramp_steps=10).attach(optimizer)
    for _ in range(4):
        train_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averaging.detach()
    resumed = ewa.ExpertAveraging(model, 0.3, ramp_steps=10).attach(fresh)
    fresh.load_state_dict(saved)
    assert resumed.steps_done == 4
    train_step(model, fresh)
    assert resumed.share_rate == pytest.approx(0.15)


def test_a_loaded_count_that_contradicts_the_optimizers_is_said():
    model = expanded()
    optimizer = sgd(model)
    averaging = ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    train_step(model, optimizer)
    averaging.load_state_dict({"steps_done": 1})
    with pytest.warns(UserWarning, match="saved after 7 steps, the optimizer's state counts 1"):
        averaging.load_state_dict({"steps_done": 7})
    assert averaging.steps_done == 7


@pytest.mark.parametrize(
    ("leave_out", "why"),
    [
        ("experts", "parameter groups leave the experts out"),
        ("model", "build the optimizer after ewavit.expand"),
    ],
)
def test_attach_names_the_true_cause(leave_out, why):
    model = expanded()
    others = [p for name, p in model.named_parameters() if "experts" not in name]
    parameters = others if leave_out == "experts" else MlpNet().parameters()
    with pytest.raises(ewa.EwavitError, match=why):
        ewa.ExpertAveraging(model).attach(torch.optim.SGD(parameters, lr=0.1))


def test_optimizers_are_known_by_name_however_it_is_written():
    for name in ("Lamb", "LAMB8bit", "Ada_Factor", "Ada-Mp", "SGD_P"):
        assert looks_at_whole_tensors(name, {})
    for name in ("AdamW", "SGD", "Lion", "Sgd_Adamw"):
        assert not looks_at_whole_tensors(name, {"caution": False})
    assert looks_at_whole_tensors("AdamW", {"caution": True})


@pytest.mark.parametrize(
    "name",
    [
        *("muon", "lamb", "lars", "adafactor", "adafactorbv", "novograd", "adamp", "sgdp", "mars"),
        *("cadamw", "clion", "csgdw"),  # cautious: they use the mean of a mask over the tensor
    ],
)
def test_optimizers_that_use_whole_tensors_are_refused_for_stacked_experts_only(name):
    from timm.optim import create_optimizer_v2

    for num_experts in (2, 4):
        model = expanded(num_experts)
        optimizer = create_optimizer_v2(model, opt=name, lr=1e-3)
        with pytest.raises(ewa.EwavitError, match='experts="separate"'):
            ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    alone = ewa.expand(MlpNet(), 1)  # one expert is the FFN itself
    ewa.ExpertAveraging(alone).attach(create_optimizer_v2(alone, opt=name, lr=1e-3))
    model = expanded(kind="separate")
    optimizer = create_optimizer_v2(model, opt=name, lr=1e-3)
    averaging = ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    train_step(model, optimizer)
    assert averaging.steps_done == 1


@pytest.mark.parametrize(
    "name", ["adamw", "sgd", "lion", "nadamw", "rmsprop", "adabelief", "radam", "madgrad", "adan"]
)
def test_elementwise_optimizers_train_both_layouts_alike(name):
    from timm.optim import create_optimizer_v2

    ends = []
    for kind in KINDS:
        torch.manual_seed(1)
        model = ewa.expand(MlpNet(), 4, experts=kind)
        optimizer = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05)
        ewa.ExpertAveraging(model, 0.3).attach(optimizer)
        torch.manual_seed(2)
        for _ in range(3):
            train_step(model, optimizer)
        ends.append(ewa.dense_state_dict(model))
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], atol=1e-6, rtol=1e-5)


def test_schedule_frees_second_set_of_weights_is_averaged_with_the_first():
    class AdamWScheduleFree(torch.optim.SGD):
        """Keeps z beside the weights y, as schedule_free does; `eval` moves the weights towards z."""

        def step(self, closure=None):
            for parameter in (p for group in self.param_groups for p in group["params"]):
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                z.sub_(parameter.grad, alpha=0.1)
                parameter.data.lerp_(z, 0.5)

        def eval(self):
            for parameter in (p for group in self.param_groups for p in group["params"]):
                parameter.data.lerp_(self.state[parameter]["z"], -0.1)

    model = expanded()
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.1)
    averaging = ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    averaging.step()  # before the optimizer has any state
    for _ in range(3):
        train_step(model, optimizer)
    optimizer.eval()
    assert deviation(model) == pytest.approx(0, abs=1e-6)
