"""The invariants of the method, each at the tolerance that the project's method note states."""

import copy

import pytest
import timm.utils
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ewavit as ewa
from ewavit.core import MoE, SeparateExperts, StackedExperts, full_share_rate, moe_layers, set_step
from small_models import DIM, FFNS, MlpNet, ffn, images, randomised, separated, tiny_vit, tokens
from steps import assert_same, fresh_compiler, gradients, labels

KINDS = {"stacked": StackedExperts, "separate": SeparateExperts}
both_kinds = pytest.mark.parametrize("kind", KINDS)


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    groups = ewa.param_groups(model, weight_decay=0.05)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=1e-2)


# ---------------------------------------------------------------- N = 1


@both_kinds
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kwargs", [{}, {"proj_drop_rate": 0.3, "drop_path_rate": 0.2}], ids=["", "dropout"])
def test_one_expert_trains_exactly_like_the_dense_model(kwargs, optimizer, kind):
    dense = randomised(tiny_vit(**kwargs), 0.05)
    model = ewa.expand(copy.deepcopy(dense), 1, select="all", experts=kind)
    optimizers = [optimizer_of(m, optimizer) for m in (dense, model)]
    ewa.ExpertAveraging(model).attach(optimizers[1])
    for step in range(3):
        x, y = images(4), labels(4)
        results = []
        for m, steps in zip((dense, model), optimizers, strict=True):
            torch.manual_seed(step)
            inputs = x.clone().requires_grad_()
            steps.zero_grad()
            output = m(inputs)
            F.cross_entropy(output, y).backward()
            steps.step()
            results.append((output, inputs.grad, torch.get_rng_state()))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
    ewa.collapse(model)
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@both_kinds
@pytest.mark.parametrize("name", FFNS)
def test_one_expert_has_exactly_the_output_and_gradients_of_the_ffn(name, kind):
    dense = ffn(name)
    moe = MoE(KINDS[kind](dense, 1))
    x = tokens()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(i) for module, i in zip((dense, moe), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for parameter, expert in zip(dense.parameters(), moe.experts.parameters(), strict=True):
        assert torch.equal(parameter.grad, expert.grad.view_as(parameter))


# ---------------------------------------------------------------- identical experts


@both_kinds
@pytest.mark.parametrize("name", FFNS)
@pytest.mark.parametrize("num_experts", [2, 4, 7])
def test_identical_experts_equal_the_ffn_and_their_gradients_sum_to_its_own(num_experts, name, kind):
    dense = ffn(name)
    moe = MoE(KINDS[kind](dense, num_experts))
    x, weights = tokens(), tokens() / 15  # a mean over tokens, so that gradients are of order one
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, i in zip((dense, moe), inputs, strict=True):
        (module(i) * weights).sum().backward()
    torch.testing.assert_close(moe(x), dense(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-6, rtol=1e-6)
    if kind == "stacked":
        sums = [p.grad.sum(0) for p in moe.experts.parameters()]
    else:
        experts = [list(expert.parameters()) for expert in moe.experts.copies]
        sums = [torch.stack([p.grad for p in family]).sum(0) for family in zip(*experts, strict=True)]
    for parameter, total in zip(dense.parameters(), sums, strict=True):
        torch.testing.assert_close(total, parameter.grad, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    num_experts=st.integers(1, 9),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_identical_experts_equal_the_ffn_for_any_partition(num_experts, shape, seed):
    torch.manual_seed(seed)
    dense = ffn().double()
    moe = MoE(StackedExperts(dense, num_experts))
    x = torch.randn(*shape, DIM, dtype=torch.float64)
    torch.testing.assert_close(moe(x), dense(x), atol=1e-12, rtol=1e-12)


@both_kinds
@pytest.mark.parametrize("unit", ["token", "image"])
def test_a_vit_with_identical_experts_equals_the_dense_vit_in_training(unit, kind):
    dense = tiny_vit()
    model = ewa.expand(copy.deepcopy(dense), 4, select="all", experts=kind, unit=unit)
    x = images(3)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for m, i in zip((dense, model), inputs, strict=True):
        F.cross_entropy(m(i), labels(3)).backward()
    torch.testing.assert_close(model(x), dense(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-6, rtol=1e-6)
    for name in ("head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"):
        ours, theirs = model.get_parameter(name).grad, dense.get_parameter(name).grad
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- averaging


@both_kinds
@pytest.mark.parametrize("num_experts", [2, 4])
@pytest.mark.parametrize("nesterov", [False, True])
def test_full_averaging_with_matched_rates_is_dense_sgd(nesterov, num_experts, kind):
    dense = randomised(tiny_vit(), 0.05).double()
    model = ewa.expand(copy.deepcopy(dense), num_experts, select="all", experts=kind)
    inside = [p for moe in moe_layers(model).values() for p in moe.parameters()]
    known = {id(p) for p in inside}
    rate, decay = 0.05, 0.01
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in known]},
        {"params": inside, "lr": rate * num_experts, "weight_decay": decay / num_experts},
    ]
    settings = {"lr": rate, "weight_decay": decay, "momentum": 0.9, "nesterov": nesterov}
    plain, optimizer = torch.optim.SGD(dense.parameters(), **settings), torch.optim.SGD(groups, **settings)
    ewa.ExpertAveraging(model, full_share_rate(num_experts)).attach(optimizer)
    start = copy.deepcopy(dense.state_dict())
    for _ in range(6):
        x, y = images(3).double(), labels(3)
        for m, steps in ((dense, plain), (model, optimizer)):
            steps.zero_grad()
            F.cross_entropy(m(x), y).backward()
            steps.step()
        averaged = ewa.dense_state_dict(model)
        for name, value in dense.state_dict().items():
            torch.testing.assert_close(averaged[name], value, atol=1e-10, rtol=0)
    assert (dense.state_dict()["blocks.0.mlp.fc1.weight"] - start["blocks.0.mlp.fc1.weight"]).norm() > 1e-2


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("share_rate", [0.0, 0.1, 0.5, 2 / 3])
def test_deviations_on_a_quadratic_loss_follow_the_closed_form(share_rate, every):
    # Six equal images over three experts: whoever gets which, the loss of expert i is 1/3 of the quadratic
    # |W_i X - Y|^2 / 2, so that d_i <- (1 - D) (d_i - eta (g_i - gm)) has g_i - gm = d_i H / 3.
    n, eta, steps = 3, 0.4, 12
    x, y = torch.randn(5, DIM).double() / 2, torch.randn(5, 4).double()
    hessian, target = x.T @ x, y.T @ x
    moe = MoE(StackedExperts(nn.Linear(DIM, 4, bias=False), n), unit="image").double()
    weight = separated(moe, 1.0).experts.ffn.weight
    start = weight.detach().clone()
    optimizer = torch.optim.SGD(moe.parameters(), lr=eta)
    ewa.ExpertAveraging(moe, share_rate, every=every).attach(optimizer)
    pull = share_rate * n / (n - 1)
    mean, deviations = start.mean(0), start - start.mean(0)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (0.5 * (moe(x.expand(6, -1, -1)) - y).square().sum() / 6).backward()
        optimizer.step()
        mean = mean - eta / n * (mean @ hessian - target)
        shrink = torch.linalg.matrix_power(torch.eye(DIM).double() - eta / n * hessian, step)
        expected = (1 - pull) ** (step - step % every) * deviations @ shrink
        actual = weight.detach()
        torch.testing.assert_close(actual.mean(0), mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(actual - actual.mean(0), expected, atol=1e-10, rtol=0)


@both_kinds
def test_collapse_of_the_ema_is_the_ema_of_the_collapse(kind):
    dense = tiny_vit()
    model = ewa.expand(copy.deepcopy(dense), 4, experts=kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ewa.ExpertAveraging(model, 0.2).attach(optimizer)
    of_model = timm.utils.ModelEmaV3(model, decay=0.8)
    of_collapse = timm.utils.ModelEmaV3(dense, decay=0.8)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(images(3)), labels(3)).backward()
        optimizer.step()
        of_model.update(model)
        dense.load_state_dict(ewa.dense_state_dict(model))
        of_collapse.update(dense)
    assert max(ewa.expert_spread(model).values()) > 1e-3
    averaged = ewa.collapse(of_model.module).state_dict()
    assert list(averaged) == list(of_collapse.module.state_dict())
    for name, value in of_collapse.module.state_dict().items():
        torch.testing.assert_close(averaged[name], value, atol=1e-6, rtol=1e-6)
        if name.endswith("mlp.fc1.weight"):
            assert (value - dense.state_dict()[name]).norm() > 1e-3


# ---------------------------------------------------------------- checkpointing, eval, compile, autocast


class Checkpointed(nn.Module):
    def __init__(self, model: MlpNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.model.head(x.mean(-2))


@both_kinds
@pytest.mark.parametrize("name", ["mlp", "swiglu with norm"])
def test_activation_checkpointing_does_not_change_gradients(name, kind):
    model = separated(ewa.expand(MlpNet(kind=name), 4, select="all", experts=kind))
    x = tokens()
    expected = gradients(model, x)
    actual = {key.removeprefix("model."): g for key, g in gradients(Checkpointed(model), x).items()}
    assert_same(actual, expected, 1e-6)
    set_step(model, 1)
    other = gradients(model, x)  # another partition has other gradients, so the above says something
    assert any((value - expected[key]).abs().max() > 1e-4 for key, value in other.items())


@both_kinds
def test_timms_activation_checkpointing_does_not_change_gradients(kind):
    model = separated(ewa.expand(tiny_vit(proj_drop_rate=0.2), 4, select="all", experts=kind))
    x = images(3)
    expected = gradients(model, x)
    model.set_grad_checkpointing(True)
    assert_same(gradients(model, x), expected, 1e-6)


@both_kinds
@pytest.mark.parametrize("name", FFNS)
def test_eval_of_the_expanded_model_equals_the_collapsed_model(name, kind):
    model = separated(ewa.expand(MlpNet(kind=name), 4, select="all", experts=kind)).eval()
    x = tokens()
    expected = model(x)
    torch.testing.assert_close(ewa.collapse(model)(x), expected, atol=1e-5, rtol=1e-5)


@both_kinds
def test_eval_of_an_expanded_vit_equals_the_collapsed_vit(kind):
    model = separated(ewa.expand(tiny_vit(), 4, select="all", experts=kind)).eval()
    x = images(3)
    expected = model(x)
    torch.testing.assert_close(ewa.collapse(model)(x), expected, atol=1e-5, rtol=1e-5)


def check_compiled(backend: str, kind: str, depth: int = 2) -> None:
    """Without a graph break, the gradients of eager mode under the same seed, and its outputs in eval."""
    model = separated(ewa.expand(tiny_vit(depth), 4, select="all", experts=kind))
    x = images(3)
    with fresh_compiler():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        expected = gradients(model, x)
        actual = {key.removeprefix("_orig_mod."): g for key, g in gradients(compiled, x).items()}
        assert_same(actual, expected, 1e-5)
        model.eval()
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@both_kinds
def test_compiling_the_graph_as_a_whole_changes_nothing(kind):
    check_compiled("aot_eager", kind)


@pytest.mark.slow
def test_compiling_with_inductor_changes_nothing():
    check_compiled("inductor", "stacked", depth=1)


@both_kinds
def test_training_under_autocast_in_bfloat16_follows_float32(kind):
    model = separated(ewa.expand(tiny_vit(), 4, select="all", experts=kind), 0.02)
    x, y = images(6), labels(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    averaging = ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        set_step(model, 0)  # one partition throughout, so that losses compare
        full = F.cross_entropy(model(x), y).item()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        assert loss.item() == pytest.approx(full, abs=3e-2)
        loss.backward()
        optimizer.step()
        losses.append(full)
    assert averaging.steps_done == 4
    assert losses[-1] < losses[0]
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
