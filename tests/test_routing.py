"""Naive MoE: the router against its references, its losses and where they go, and what surrounds it."""

import copy
import csv
import json
import math
import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import ewavit as ewa
from ewavit.cli import main
from ewavit.compare.arms import arm_recipe, make_arms
from ewavit.core import MoE, SeparateExperts, StackedExperts, TopKRouter, moe_layers, set_step
from ewavit.core.draws import normal
from ewavit.core.routing import _Gather, routed_reference
from ewavit.distributed import expert_placement
from ewavit.training.building import expert_averaging
from ewavit.training.export import evaluate
from ewavit.training.loop import TrainingRun, resume, train
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import Recipe
from processes import in_processes
from runs import TINY, assert_same_end, recipe, stop_after
from small_models import DIM, MlpNet, ffn, images, randomised, separated, tiny_vit, tokens
from steps import assert_same, fresh_compiler, gradients, labels

KINDS = {"stacked": StackedExperts, "separate": SeparateExperts}
both_kinds = pytest.mark.parametrize("kind", KINDS)
SILENT = {"importance_loss": 0.0, "load_loss": 0.0}
ALL_LOSSES = ewa.TopK(k=2, importance_loss=0.3, load_loss=0.2, balance_loss=0.5, z_loss=0.1)
CONFIGS = {
    "top-1": ewa.TopK(**SILENT),
    "top-2, short of room": ewa.TopK(k=2, capacity_ratio=0.6, **SILENT),
    "top-3, room for all": ewa.TopK(k=3, capacity_ratio=4, **SILENT),
    "top-1, batch priority": ewa.TopK(capacity_ratio=0.5, batch_priority=True, **SILENT),
    "top-2, batch priority": ewa.TopK(k=2, capacity_ratio=0.7, batch_priority=True, **SILENT),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def routed(config: ewa.TopK, num_experts: int = 4, kind: str = "stacked", name: str = "mlp") -> MoE:
    experts = separated(KINDS[kind](ffn(name), num_experts))
    return MoE(experts, dispatcher=TopKRouter(config, num_experts, DIM))


def routed_net(config: ewa.TopK = ewa.TopK(), **options) -> MlpNet:  # noqa: B008
    return separated(ewa.expand(MlpNet(), 4, router=config, **options))


@torch.no_grad()
def set_equal(target: nn.Module, source: nn.Module) -> None:
    """Give the experts of one kind the weights of the other kind's."""
    for (_, ours), (_, theirs) in zip(
        target.values_by_parameter(), source.values_by_parameter(), strict=True
    ):
        for into, value in zip(ours, theirs, strict=True):
            into.copy_(value)


def only_router(model: nn.Module) -> TopKRouter:
    return next(module for module in model.modules() if isinstance(module, TopKRouter))


# ---------------------------------------------------------------- against the references


@both_kinds
@every_config
@pytest.mark.parametrize("name", ["mlp", "swiglu with norm"])
def test_routed_experts_equal_the_loop_over_tokens(config, kind, name):
    moe = routed(config, kind=kind, name=name).eval()
    separate = SeparateExperts(ffn(name), 4)
    set_equal(separate, moe.experts)
    router = copy.deepcopy(moe.dispatcher)
    inputs = [torch.randn(30, DIM).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    weights = torch.randn(30, DIM)
    outputs = [moe(inputs[0]), routed_reference(router, inputs[1], separate.copies)]
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moe.dispatcher.weight.grad, router.weight.grad, atol=1e-5, rtol=1e-5)
    ours = dict(moe.experts.values_by_parameter(lambda parameter: parameter.grad))
    for name, theirs in separate.values_by_parameter(
        lambda p: torch.zeros_like(p) if p.grad is None else p.grad
    ):
        for actual, expected in zip(ours[name], theirs, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("k", [1, 2])
def test_routed_experts_equal_those_of_transformers(k, implementation):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = (
                nn.Linear(a, b, bias=False) for a, b in ((8, 12), (8, 12), (12, 8))
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    config = transformers.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4)
    config._experts_implementation = implementation
    theirs = MixtralExperts(config).float()
    experts = StackedExperts(Gated(), 4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
        gate, up = theirs.gate_up_proj.chunk(2, dim=1)
        for layer, weight in (("gate", gate), ("up", up), ("down", theirs.down_proj)):
            getattr(experts.ffn, layer).weight.copy_(weight)
    moe = MoE(experts, dispatcher=TopKRouter(ewa.TopK(k=k, capacity_ratio=4), 4, 8)).eval()
    x = torch.randn(40, 8)
    scores, chosen = F.linear(x, moe.dispatcher.weight).softmax(-1).topk(k)
    ours, expected = moe(x), theirs(x, chosen, scores)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(x)
    wanted = torch.autograd.grad((expected * weights).sum(), list(theirs.parameters()))
    (ours * weights).sum().backward()
    made = [
        torch.cat([experts.ffn.gate.weight.grad, experts.ffn.up.weight.grad], 1),
        experts.ffn.down.weight.grad,
    ]
    for actual, gradient in zip(made, wanted, strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_moving_tokens_has_exact_first_and_second_derivatives(k):
    router = TopKRouter(ewa.TopK(k=k, capacity_ratio=0.7), 3, 2).double().eval()
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    _, state = router.dispatch(x.detach())
    there = (state.taken // k, state.slots)
    for index, inverse, rows in ((*there, 7), (*reversed(there), len(state.taken))):
        values = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
        move = lambda v, i=index, j=inverse: _Gather.apply(v, i, j) ** 3  # noqa: E731
        assert torch.autograd.gradcheck(move, (values,))
        assert torch.autograd.gradgradcheck(move, (values,))


# ---------------------------------------------------------------- room


@settings(deadline=None, max_examples=100)
@given(
    num_tokens=st.integers(0, 40),
    num_experts=st.integers(2, 6),
    k=st.integers(1, 6),
    ratio=st.sampled_from([0.25, 0.5, 1.0, 1.25, 6.0]),
    priority=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_choice_has_one_slot_or_was_dropped_for_want_of_room(
    num_tokens, num_experts, k, ratio, priority, seed
):
    torch.manual_seed(seed)
    k = min(k, num_experts)
    config = ewa.TopK(k=k, capacity_ratio=ratio, batch_priority=priority)
    router = TopKRouter(config, num_experts, 3)
    block, (taken, slots, gates) = router.dispatch(torch.randn(num_tokens, 3))
    capacity = min(num_tokens, math.ceil(k * num_tokens * ratio / num_experts))
    assert block.shape == (num_experts, capacity, 3)
    assert slots.shape == gates.shape == (num_tokens, k)
    kept = slots[slots >= 0]
    assert len(kept.unique()) == len(kept)
    assert torch.equal(taken.flatten()[kept], (slots >= 0).flatten().nonzero().flatten())
    assert int((taken >= 0).sum()) == len(kept)
    used = torch.bincount(kept // max(capacity, 1), minlength=num_experts)
    if (slots < 0).any():
        assert int(used.max()) == capacity  # nothing is dropped while all experts have room
    for token in range(num_tokens):
        of = (slots[token][slots[token] >= 0] // max(capacity, 1)).tolist()
        assert len(set(of)) == len(of)


def test_tokens_without_room_get_zero_and_those_served_first_come_first():
    moe = routed(ewa.TopK(capacity_ratio=0.5, **SILENT)).eval()
    x = torch.randn(1, DIM).expand(16, DIM)  # all tokens want the same expert, which has room for two
    y = moe(x)
    assert (y[:2].abs().sum(1) > 0.01).all()
    assert torch.equal(y[2:], torch.zeros(14, DIM))


def test_batch_priority_serves_the_tokens_that_are_surest():
    config = ewa.TopK(capacity_ratio=0.5, batch_priority=True, **SILENT)
    moe = routed(config).eval()
    x = torch.randn(1, DIM) * torch.arange(1, 17).view(-1, 1) / 8
    served = (moe(x).abs().sum(1) > 0).nonzero().flatten().tolist()
    assert served == [14, 15]


def test_a_residual_block_passes_dropped_tokens_on_unchanged():
    model = routed_net(ewa.TopK(capacity_ratio=0.25)).eval()
    x = tokens(1, 1).expand(1, 16, DIM)
    block = model.blocks[1]
    assert torch.equal(block(x)[0, 1:], x[0, 1:])
    assert not torch.equal(block(x)[0, 0], x[0, 0])


# ---------------------------------------------------------------- noise, eval, collapse


def test_noise_moves_the_training_alone_and_follows_the_step():
    moe = routed(ewa.TopK(capacity_ratio=4, noise=2.0))
    x = torch.randn(30, DIM)
    first = moe(x)
    set_step(moe, 1)
    assert not torch.equal(moe(x), first)
    set_step(moe, 0)
    assert torch.equal(moe(x), first)
    moe.eval()
    routed_without_noise = moe(x)
    set_step(moe, 1)
    assert torch.equal(moe(x), routed_without_noise)


def test_the_noise_has_the_standard_deviation_of_v_moe():
    router = TopKRouter(ewa.TopK(k=4, noise=2.0, capacity_ratio=1), 4, DIM)
    with torch.no_grad():
        router.weight.zero_()
    _, state = router.dispatch(torch.randn(4000, DIM))
    logits = state.gates.detach().log()
    noise = logits - logits.mean(1, keepdim=True)
    assert noise.var().item() * 4 / 3 == pytest.approx((2.0 / 4) ** 2, rel=0.05)


@both_kinds
def test_eval_routes_where_it_is_routed_and_takes_the_mean_expert_where_it_is_not(kind):
    x = tokens()
    random, router = (separated(ewa.expand(MlpNet(), 4, experts=kind, router=r)) for r in (None, ewa.TopK()))
    for model, same in ((random, True), (router, False)):
        output = model.eval()(x)
        with torch.no_grad():
            plain = ewa.collapse(copy.deepcopy(model))(x)
        assert torch.allclose(output, plain, atol=1e-5) is same


@both_kinds
def test_collapse_of_a_routed_model_is_the_plain_model_with_the_mean_expert(kind):
    model = MlpNet()
    keys = list(model.state_dict())
    separated(ewa.expand(model, 4, router=ewa.TopK(), experts=kind))
    layer = model.blocks[1].mlp
    means = {name: torch.stack(values).mean(0) for name, values in layer.experts.values_by_parameter()}
    dense = ewa.dense_state_dict(model)
    assert list(ewa.collapse(model).state_dict()) == list(dense) == keys
    for name, mean in means.items():
        torch.testing.assert_close(model.blocks[1].mlp.get_parameter(name), mean)


def test_a_dense_state_dict_loads_into_every_routed_expert():
    dense, model = randomised(MlpNet()), routed_net()
    ewa.load_dense_state_dict(model, dense.state_dict())
    assert all(spread < 1e-6 for spread in ewa.expert_spread(model).values())
    assert torch.allclose(ewa.collapse(model)(x := tokens()), dense(x), atol=1e-6)


def test_the_collapse_gap_of_a_routed_model_compares_with_what_eval_computes():
    model, x = routed_net(), tokens()
    plain = ewa.collapse(copy.deepcopy(model))(x)
    expected = (model.eval()(x) - plain).norm() / plain.norm()
    assert ewa.collapse_gap(model.train(), x).output == pytest.approx(expected.item(), rel=1e-5)


def test_the_summary_counts_the_router():
    model = ewa.expand(MlpNet(), 4, router=ewa.TopK(k=2))
    dense = sum(p.numel() for p in MlpNet().parameters())
    found = ewa.summary(model)
    assert found.dense_parameters == dense
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert "4 x Mlp (stacked, by top-2 router)" in str(found)


def test_channels_first_and_channels_last_inputs_are_routed_alike():
    conv = nn.Sequential(nn.Conv2d(DIM, 12, 1), nn.GELU(), nn.Conv2d(12, DIM, 1))
    moe = MoE(
        separated(StackedExperts(conv, 4)),
        channels_first=True,
        dispatcher=TopKRouter(ewa.TopK(), 4, DIM),
    ).eval()
    x = torch.randn(2, DIM, 3, 3)
    flat = x.movedim(1, -1).reshape(-1, DIM)
    separate = SeparateExperts(conv, 4)
    set_equal(separate, moe.experts)
    experts = [lambda token, conv=conv: conv(token.view(DIM, 1, 1)).flatten() for conv in separate.copies]
    expected = routed_reference(moe.dispatcher, flat, experts)
    torch.testing.assert_close(moe(x).movedim(1, -1).reshape(-1, DIM), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- auxiliary losses


def losses_by_hand(router: TopKRouter, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
    n, k, std = router.num_experts, router.config.k, router.config.noise / router.num_experts
    clean = x @ router.weight.T
    noisy = clean + std * noise
    probabilities = noisy.softmax(1)
    importance = sum(clean.softmax(1))
    chosen = [set(row.topk(k).indices.tolist()) for row in noisy]
    normal = torch.distributions.Normal(0, 1)
    load = sum(
        1 - normal.cdf((row.topk(k).values[-1] - mean) / std) for row, mean in zip(noisy, clean, strict=True)
    )
    share = torch.tensor([sum(e in row for row in chosen) / (k * len(x)) for e in range(n)])
    return {
        "importance_loss": (importance.std(correction=0) / importance.mean()) ** 2,
        "load_loss": (load.std(correction=0) / load.mean()) ** 2,
        "balance_loss": n * sum(share * probabilities.mean(0)),
        "z_loss": (clean.exp().sum(1).log() ** 2).mean(),
    }


@pytest.mark.parametrize("term", ["importance_loss", "load_loss", "balance_loss", "z_loss"])
@pytest.mark.parametrize("k", [1, 2])
def test_each_loss_and_its_gradient_are_those_of_the_formula(k, term):
    router = TopKRouter(ewa.TopK(k=k, **{**SILENT, term: 0.7}), 4, DIM)
    x = torch.randn(30, DIM)
    noise = normal(router.key, torch.empty(30, 4))
    _, state = router.dispatch(x)
    (state.gates * 0).sum().backward()  # nothing but the auxiliary loss is left
    expected = 0.7 * losses_by_hand(router, x, noise)[term]
    (gradient,) = torch.autograd.grad(expected, router.weight)
    assert ewa.auxiliary_loss(router).item() == pytest.approx(expected.item(), rel=1e-4)
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(router.weight.grad, gradient, atol=1e-6, rtol=1e-4)


def test_balanced_routing_has_no_importance_loss_and_the_least_balance_loss():
    router = TopKRouter(ewa.TopK(noise=0.0, importance_loss=1.0, load_loss=0.0, balance_loss=1.0), 4, 4)
    with torch.no_grad():
        router.weight.copy_(5 * torch.eye(4))
    router.dispatch(torch.eye(4).repeat(3, 1))
    assert ewa.auxiliary_loss(router).item() == pytest.approx(1.0, abs=1e-5)


def as_one_loss(model: nn.Module, x: Tensor, add: bool) -> dict[str, Tensor]:
    """Gradients of the training loss; with `add` of one that contains the auxiliary losses openly."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    open_losses = []
    for router in routers:
        router.scale_loss = (lambda loss: open_losses.append(loss) or loss * 0) if add else None
    torch.manual_seed(2)
    loss = F.cross_entropy(model(x), labels(len(x)))
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss + sum(open_losses), list(named.values())), strict=True))


def test_the_losses_reach_the_gradients_as_if_they_were_added_to_the_training_loss():
    model, x = routed_net(ALL_LOSSES, select="all"), tokens()
    assert_same(as_one_loss(model, x, add=False), as_one_loss(model, x, add=True), 1e-6)


def test_without_weights_there_is_no_auxiliary_loss():
    with_losses, without = (routed_net(ewa.TopK(**weights)) for weights in ({}, SILENT))
    without.load_state_dict(with_losses.state_dict())
    x = tokens()
    ours, theirs = as_one_loss(with_losses, x, add=False), as_one_loss(without, x, add=False)
    assert float(ewa.auxiliary_loss(without)) == 0.0
    assert float(ewa.auxiliary_loss(with_losses)) > 0.0
    name = "blocks.3.mlp.dispatcher.weight"
    assert (ours[name] - theirs[name]).abs().max() > 1e-5


@pytest.mark.parametrize("batches", [1, 3])
def test_a_grad_scaler_and_accumulation_scale_the_auxiliary_losses_alike(batches):
    model, x = routed_net(ALL_LOSSES), tokens()
    expected = gradients(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ewa.scale_auxiliary_loss(model, lambda loss: scaler.scale(loss / batches))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.zero_grad()
    for _ in range(batches):
        torch.manual_seed(3)
        scaler.scale(F.cross_entropy(model(x), labels(3)) / batches).backward()
    scaler.unscale_(optimizer)
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same(actual, expected, 1e-5)
    assert float(ewa.auxiliary_loss(model)) < 10  # the value that is read is not scaled


def test_float16_without_a_known_scale_is_warned_of():
    model = routed_net()
    with torch.autocast("cpu", torch.float16), pytest.warns(UserWarning, match="scale_auxiliary_loss"):
        model(tokens())
    with torch.autocast("cpu", torch.float16), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.eval()(tokens()).isfinite().all()  # evaluation has no loss to scale
    model.train()
    ewa.scale_auxiliary_loss(model, lambda loss: loss * 1024)
    with torch.autocast("cpu", torch.float16):
        assert model(tokens()).isfinite().all()


# ---------------------------------------------------------------- what surrounds it


class Checkpointed(nn.Module):
    def __init__(self, model: MlpNet, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.model.head(x.mean(-2))


@both_kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient_of_a_routed_model(kind, reentrant):
    model, x = routed_net(ALL_LOSSES, select="all", experts=kind), tokens()
    expected = gradients(model, x)
    found = gradients(Checkpointed(model, reentrant), x)
    assert_same({key.removeprefix("model."): g for key, g in found.items()}, expected, 1e-6)
    set_step(model, 1)
    other = gradients(model, x)
    assert any((value - expected[key]).abs().max() > 1e-4 for key, value in other.items())


def test_compiling_as_a_whole_changes_nothing_at_any_batch_size_or_scale_of_the_loss():
    model = routed_net(ALL_LOSSES)
    factor = torch.ones(())
    ewa.scale_auxiliary_loss(model, lambda loss: loss * factor)
    norms = []
    with fresh_compiler():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for batch, scale in ((3, 8.0), (5, 8.0), (5, 800.0)):
            factor.fill_(scale)
            x = tokens(batch)
            expected, found = gradients(model, x), gradients(compiled, x)
            assert_same({key.removeprefix("_orig_mod."): g for key, g in found.items()}, expected, 1e-5)
            norms.append(float(expected["blocks.1.mlp.dispatcher.weight"].norm()))
        torch.testing.assert_close(compiled.eval()(x), model(x), atol=1e-5, rtol=1e-5)
    assert norms[2] > 10 * norms[1]  # the scale of the latest step counts, not that of the first


@pytest.mark.slow
def test_compiling_a_routed_model_with_inductor_changes_nothing():
    # Inductor draws other normal numbers than eager mode does, so there is no noise.
    router = ewa.TopK(k=2, noise=0.0, importance_loss=0.3, balance_loss=0.5, z_loss=0.1)
    model, x = separated(ewa.expand(MlpNet(1), 4, router=router)), tokens()
    expected = gradients(model, x)
    with fresh_compiler():
        found = gradients(torch.compile(model, fullgraph=True), x)
    assert_same({key.removeprefix("_orig_mod."): g for key, g in found.items()}, expected, 1e-5)


def test_under_autocast_the_router_stays_in_float32_and_the_output_in_the_experts_precision():
    moe = routed(ewa.TopK(k=2, noise=0.0))
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
        _, state = moe.dispatcher.dispatch(x.flatten(0, 1))
    assert state.gates.dtype is torch.float32
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), moe(x), atol=3e-2, rtol=3e-2)
    y.float().sum().backward()
    assert moe.dispatcher.weight.grad.dtype is torch.float32


def test_a_routed_model_in_bfloat16_computes():
    moe = routed(ewa.TopK()).to(torch.bfloat16)
    moe(tokens().bfloat16()).sum().backward()
    assert moe.dispatcher.weight.grad.isfinite().all()


@both_kinds
def test_experts_that_get_no_token_have_zero_gradients(kind):
    moe = routed(ewa.TopK(capacity_ratio=4, noise=0.0, **SILENT), kind=kind)
    moe(torch.randn(1, DIM).expand(6, DIM)).sum().backward()
    loads = torch.zeros(4)
    for _, values in moe.experts.values_by_parameter(lambda parameter: parameter.grad):
        loads += torch.stack([value.abs().sum() for value in values])
    assert all(parameter.grad is not None for parameter in moe.parameters())
    assert sorted((loads > 0).tolist()) == [False, False, False, True]


def check_gradients_are_the_processes_mean(wrap):
    """Every process routes its own batch; a parameter without gradient would stop DDP's second pass."""
    torch.manual_seed(1)
    model = routed_net(ALL_LOSSES)
    batches = [tokens(), tokens()]
    alone = [gradients(model, x) for x in batches]
    wrapped = wrap(copy.deepcopy(model))
    for _ in range(2):
        found = gradients(wrapped, batches[dist.get_rank()])
    for name, gradient in found.items():
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        expected = torch.stack([of_process[name.removeprefix("module.")] for of_process in alone]).mean(0)
        torch.testing.assert_close(whole, expected, atol=1e-6, rtol=1e-5)


def sharded(model):
    return fully_shard(model, shard_placement_fn=expert_placement(model))


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, sharded])
def test_gradients_of_a_routed_model_are_the_mean_over_the_processes(wrap):
    in_processes(2, check_gradients_are_the_processes_mean, wrap)


def test_early_averaging_keeps_routed_experts_together_until_they_may_specialise():
    model = routed_net(ewa.TopK(k=2))
    routers = only_router(model).weight.detach().clone()
    optimizer = torch.optim.SGD(ewa.param_groups(model), lr=0.1)
    ewa.ExpertAveraging(model, ewa.Early(ewa.Constant(0.75), until=2)).attach(optimizer)
    spreads = []
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens()), labels(3)).backward()
        optimizer.step()
        spreads.append(max(ewa.expert_spread(model).values()))
    assert max(spreads[:2]) < 1e-6 < 1e-4 < min(spreads[2:])
    assert not torch.equal(only_router(model).weight, routers)


def test_averaging_changes_experts_and_no_router():
    model = routed_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ewa.average_experts_(model, 0.3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".experts." in name for name in changed)


# ---------------------------------------------------------------- diagnostics and refusals


def test_statistics_are_those_of_the_latest_batch_in_training():
    model = ewa.expand(MlpNet(), 4, select=["blocks.3.mlp"], router=ewa.TopK(noise=0.0, capacity_ratio=1.0))
    router = only_router(model)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([0.0, 0.0, 9.0, 0.0])
        router.weight[:, 1] = torch.tensor([9.0, 0.0, 0.0, 0.0])
    x = torch.eye(DIM)[[0, 0, 0, 1, 2, 2, 2, 2]]  # three want the third expert, one the first; two fit
    router.dispatch(x)
    found = ewa.routing_statistics(model)["blocks.3.mlp"]
    clear, undecided = (torch.tensor(row).softmax(0) for row in ([9.0, 0, 0, 0], [0.0, 0, 0, 0]))
    entropy = [-(p * p.log()).sum().item() for p in (clear, undecided)]
    assert found.entropy == pytest.approx((entropy[0] + entropy[1]) / 2, rel=1e-5)
    assert sum(found.load) == pytest.approx(1.0)
    assert found.load[2] >= 3 / 8
    _, state = router.dispatch(x)
    assert found.dropped == pytest.approx((state.slots < 0).float().mean().item())
    assert found.dropped > 0
    model.eval()(tokens())
    assert ewa.routing_statistics(model)["blocks.3.mlp"] == found
    assert ewa.routing_statistics(MlpNet()) == ewa.routing_statistics(ewa.expand(MlpNet(), 4)) == {}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 1.5}, "k=1.5"),
        ({"capacity_ratio": 0.0}, "capacity_ratio=0.0"),
        ({"capacity_ratio": math.nan}, "capacity_ratio=nan"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"z_loss": math.inf}, "z_loss=inf"),
    ],
)
def test_a_wrong_setting_of_the_router_is_named(settings, named):
    with pytest.raises(ewa.EwavitError, match=re.escape(named)):
        ewa.TopK(**settings)


def test_what_cannot_be_routed_is_refused_and_leaves_the_model_dense():
    model = MlpNet()
    for options, said in (
        ({"num_experts": 1}, "num_experts=2 or more"),
        ({"num_experts": 4, "router": ewa.TopK(k=5)}, "top-5 router"),
        ({"unit": "image"}, 'unit="image"'),
    ):
        with pytest.raises(ewa.EwavitError, match=said):
            ewa.expand(model, **{"router": ewa.TopK(), **options})
        assert not moe_layers(model)


@pytest.mark.parametrize("call", [ewa.auxiliary_loss, lambda model: ewa.scale_auxiliary_loss(model, None)])
def test_a_model_without_router_has_no_auxiliary_loss(call):
    with pytest.raises(ewa.EwavitError, match="no router"):
        call(ewa.expand(MlpNet(), 4))


def test_no_parameter_is_named_token_and_the_router_decays_like_a_matrix():
    model = ewa.expand(tiny_vit(), 4, router=ewa.TopK())
    assert not [name for name, _ in model.named_parameters() if "token" in name and "cls" not in name]
    no_decay, decay = ewa.param_groups(model)
    router = only_router(model).weight
    assert any(parameter is router for parameter in decay["params"])
    assert not any(parameter is router for parameter in no_decay["params"])
    assert model(images()).shape == (2, 3)


# ---------------------------------------------------------------- runs


ROUTED = {"router": "topk", "k": 2, "experts": 3}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One finished run whose experts were kept, for tests that only look at it."""
    return train(Recipe(**{**TINY, **ROUTED}, output=str(tmp_path_factory.mktemp("runs")), name="kept"))


def test_a_routed_run_leaves_one_file_that_loads_as_the_mixture_it_trained(kept):
    model = ewa.load(kept.run)
    (layer,) = moe_layers(model).values()
    assert layer.routed
    assert not model.training
    assert (layer.num_experts, layer.dispatcher.config) == (3, ewa.TopK(k=2))
    x = torch.randn(4, 1, 28, 28)
    expected = model(x)
    for source in (kept.model_file, str(kept.run / "checkpoint")):
        assert torch.equal(ewa.load(source)(x), expected)
    assert evaluate(kept.run, batch_size=32)["top1"] == pytest.approx(kept.row["eval_top1"], abs=0.01)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ewa.EwavitError, match="missing"):
        ewa.load(tmp_path / "missing")


def test_the_routers_statistics_are_in_the_summary(kept):
    rows = list(csv.DictReader((kept.run / "summary.csv").open()))
    for row in rows:
        load = [float(row[f"load/blocks.1.mlp/{expert}"]) for expert in range(3)]
        assert sum(load) == pytest.approx(1.0, abs=1e-5)
        assert 0 <= float(row["dropped"]) == float(row["dropped/blocks.1.mlp"]) < 1
        assert 0 < float(row["router_entropy/blocks.1.mlp"]) < math.log(3) + 1e-6
        assert float(row["auxiliary_loss"]) > 0
        assert "predicted_spread" not in row


def test_only_the_mean_expert_of_a_routed_run_is_exported_and_only_when_asked_for(kept, tmp_path, capsys):
    file = tmp_path / "plain.safetensors"
    words = ["export", str(kept.run), "--to", str(file)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--collapse" in said
    assert not file.exists()
    assert main([*words, "--collapse"]) == 0
    assert f"the run had {kept.row['eval_top1']:.2f} %" in capsys.readouterr().out
    expected, found = ewa.collapse(ewa.load(kept.run)), ewa.load(file)
    x = torch.randn(2, 1, 28, 28)
    assert not moe_layers(found)
    assert torch.equal(found(x), expected(x))


def test_a_collapsed_routed_run_is_evaluated_and_left_as_the_plain_model(tmp_path):
    result = train(
        recipe(tmp_path, "collapsed", **ROUTED, collapse=True, model_ema=True, model_ema_decay=0.9)
    )
    plain = ewa.load(result.run)
    assert not moe_layers(plain)
    assert evaluate(result.run)["top1"] == pytest.approx(result.row["eval_top1"], abs=0.01)
    average = evaluate(result.run / "model-average.safetensors")["top1"]
    assert average == pytest.approx(result.row["average_top1"], abs=0.01)
    assert not moe_layers(ewa.load(result.run / "checkpoint"))


@pytest.mark.parametrize("updates", [3, 4], ids=["mid-epoch", "epoch end"])
def test_a_routed_run_resumes_exactly(tmp_path, monkeypatch, updates):
    settings = {**ROUTED, "early": 0.6, "grad_accum_steps": 2, "model_ema": True, "model_ema_decay": 0.9}
    whole = train(recipe(tmp_path, "whole", **settings)).run
    with monkeypatch.context() as patch:
        stop_after(patch, updates)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **settings))
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")


def test_the_loop_scales_the_auxiliary_losses_like_its_own(tmp_path):
    settings = {**ROUTED, "grad_accum_steps": 4}
    run = TrainingRun(recipe(tmp_path, "scaled", **settings), tmp_path / "scaled", Accelerator(cpu=True))
    one = torch.ones(())
    assert float(only_router(run.state.model).scale_loss(one)) == 0.25
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run._forward_backward(run.training_batches(0))
    assert float(only_router(run.state.model).scale_loss(one)) == 2.0


def test_early_averaging_ends_after_its_share_of_the_training_and_ramps_within_it():
    settings = Recipe(early=0.3, ramp=0.5, share_rate=0.4, epochs=10)
    averaging = expert_averaging(ewa.expand(MlpNet(), 4), settings, updates_per_epoch=10)
    assert [averaging.schedule(step) for step in (0, 15, 30, 31, 100)] == [0.0, 0.4, 0.4, 0.0, 0.0]


def test_the_arms_with_a_router_differ_in_it_and_in_the_averaging():
    names = ["dense", "moe", "moe+ewa", "moe+early-ewa", "moe-collapsed"]
    arms = make_arms(names, Recipe(unit="image"))
    recipes = {arm.name: arm_recipe(Recipe(unit="image"), arm) for arm in arms}
    assert [arm.role for arm in arms] == ["control", *["method"] * 4]
    assert recipes["dense"].top_k is None
    assert all(recipes[name].top_k == ewa.TopK() for name in names[1:])
    assert [recipes[name].share_rate for name in names[1:]] == [0.0, 0.3, 0.3, 0.0]
    assert [recipes[name].early for name in names[1:]] == [None, None, 0.3, None]
    assert [recipes[name].keeps_experts for name in names] == [False, True, True, True, False]
    with pytest.raises(ewa.EwavitError, match="leave it out of the recipe"):
        make_arms(["dense", "ewa"], Recipe(router="topk"))


def test_plan_counts_the_routers_and_the_spare_room_of_their_experts(capsys):
    words = ["plan", "--model", TINY["model"], "--model-kwargs", TINY["model_kwargs"], "--img-size", "28"]
    assert main([*words, "--router", "topk", "--capacity-ratio", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["router_parameters"] == 4 * 32
    tokens, room = 17, 4 * math.ceil(17 * 2 / 4)
    extra = 2 * (room - tokens) * 2 * 32 * 128 + 2 * tokens * 4 * 32
    assert found["routed_flops_per_image"] - found["forward_flops_per_image"] == extra
    assert main(words) == 0
    assert "router" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--k", "5"], "--k 5"),
        (["--k", "0"], "--k 0"),
        (["--capacity-ratio", "0"], "--capacity-ratio 0.0"),
        (["--capacity-ratio", "inf"], "inf"),
        (["--unit", "image"], "--unit image"),
        (["--early", "1.5"], "--early 1.5"),
    ],
)
def test_wrong_settings_of_a_routed_run_are_named_in_one_line(capsys, tmp_path, words, said):
    assert main(["train", "--router", "topk", "--output", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
