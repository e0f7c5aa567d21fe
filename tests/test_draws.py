"""Partitions as a function of (seed, layer, step): recomputed, resumed, compiled and copied exactly."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ewavit as ewa
from ewavit.core import moe_layers, set_step
from ewavit.core.draws import permutation
from small_models import perturbed, tiny_vit

KINDS = {
    "stacked": {"experts": "stacked"},
    "separate": {"experts": "separate"},
    "image": {"unit": "image"},
    "router": {"router": ewa.TopK(noise=4.0)},
}


def expanded(kind="stacked", seed=0, **kwargs):
    torch.manual_seed(seed)
    return perturbed(ewa.expand(tiny_vit(), 4, select="all", **KINDS[kind], **kwargs), 0.3).train()


def positions(model, units=20):
    return [moe.dispatcher.draw(units).positions.tolist() for moe in moe_layers(model).values()]


def gradients(model, x, **kwargs):
    model.zero_grad()
    h = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        h = checkpoint(block, h, **kwargs) if kwargs else block(h)
    model.forward_head(model.norm(h)).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients_with_and_without_the_generators_state(
    kind, preserve, reentrant, attached
):
    model, x = expanded(kind), torch.randn(8, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if attached:
        ewa.ExpertAveraging(model).attach(optimizer)
    for _ in range(2):
        plain = gradients(model, x)
        again = gradients(model, x, use_reentrant=reentrant, preserve_rng_state=preserve)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        optimizer.step()


def test_two_passes_that_wait_for_one_backward_pass_are_recomputed_exactly():
    model, x = expanded(), torch.randn(8, 3, 16, 16)

    def loss(run):
        return run(model, x).square().mean() + run(model, 2 * x).square().mean()

    kept = {}
    for name, run in {
        "plain": lambda m, x: m(x),
        "recomputed": partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
    }.items():
        model.zero_grad()
        loss(run).backward()
        kept[name] = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*kept.values(), strict=True))


def step(model, optimizers, x):
    model(x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_every_step_has_partitions_of_its_own_in_every_layer(attached, several):
    model, x = expanded(), torch.randn(8, 3, 16, 16)
    parameters = list(model.parameters())
    parts = [parameters[::2], parameters[1::2]] if several else [parameters]
    optimizers = [torch.optim.SGD(part, lr=0.01) for part in parts]
    if attached:
        ewa.ExpertAveraging(model).attach(*optimizers)
    seen = []
    for _ in range(4):
        assert positions(model) == positions(model)
        seen += positions(model)
        step(model, optimizers, x)
    assert len({tuple(each) for each in seen}) == 4 * len(moe_layers(model))


def test_partitions_do_not_follow_the_optimizer_of_another_model():
    model, other = expanded(), nn.Linear(3, 3)
    before = positions(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert positions(model) == before


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: torch.load(saved(model), weights_only=False)])
def test_copies_draw_the_same_and_go_on_by_themselves(make):
    model, x = expanded(), torch.randn(8, 3, 16, 16)
    step(model, [torch.optim.SGD(model.parameters(), lr=0.01)], x)
    twin = make(model)
    before = positions(model)
    assert positions(twin) == before
    step(twin, [torch.optim.SGD(twin.parameters(), lr=0.01)], x)
    assert positions(twin) != before
    assert positions(model) == before


def saved(what):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attach_first", [True, False])
def test_a_run_resumes_exactly_from_model_and_optimizer_alone(kind, attach_first):
    def fresh():
        model = expanded(kind)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def attach(model, optimizer):
        return ewa.ExpertAveraging(model, share_rate=0.2, ramp_steps=5).attach(optimizer)

    x = torch.randn(5, 8, 3, 16, 16)
    model, optimizer = fresh()
    attach(model, optimizer)
    for number in range(3):
        step(model, [optimizer], x[number])
    file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    for number in range(3, 5):
        step(model, [optimizer], x[number])

    resumed, optimizer = fresh()
    if attach_first:
        attach(resumed, optimizer)
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if not attach_first:
        attach(resumed, optimizer)
    for number in range(3, 5):
        step(resumed, [optimizer], x[number])
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["stacked", "image", "router"])
def test_a_compiled_model_is_one_graph_that_draws_anew_at_every_step(kind):
    model, x = expanded(kind), torch.randn(8, 3, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(3):
            set_step(model, number)
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], model(x))
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


def test_every_seed_has_partitions_of_its_own_also_negative_ones():
    drawn = [positions(expanded(seed=seed))[0] for seed in (0, 1, 2, 3, -1, -2)]
    assert len({tuple(each) for each in drawn}) == 6
    assert positions(expanded(seed=-2))[0] == drawn[5]


def test_a_cuda_graph_that_would_repeat_one_partition_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    key = expanded().blocks[0].mlp.dispatcher.key
    assert sorted(permutation(key, 0, 5, torch.device("cpu")).tolist()) == list(range(5))
    with pytest.raises(ewa.EwavitError, match="CUDA graph would repeat one partition"):
        permutation(key, 0, 5, torch.device("cuda"))


def test_the_key_is_neither_saved_nor_moved():
    model = expanded()
    assert not any("key" in name for name in model.state_dict())
    assert not list(model.buffers())
    assert {moe.dispatcher.key.device.type for moe in moe_layers(model.to("meta")).values()} == {"cpu"}
