"""What hangs on an FFN survives expand and collapse or is refused: hooks, attributes, classes, ties."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import ewavit as ewa
from ewavit.core import SeparateExperts, StackedExperts, moe_layers
from ewavit.core.averaging import average_experts_, average_experts_reference_
from small_models import images, tiny_vit

both_layouts = pytest.mark.parametrize("experts", ["auto", "separate"])


class DropConnect(nn.Linear):
    """A linear layer that drops weights in training."""

    calls = 0

    def forward(self, x):
        type(self).calls += self.training
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class Recorder:
    """Owns a bound-method hook."""

    def __init__(self):
        self.seen = []

    def hook(self, module, inputs, output):
        self.seen.append(output.shape)


def clear_gradient(parameter):
    parameter.grad.zero_()


def step(model, lr=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.train()(images(4)).square().mean().backward()
    optimizer.step()


def kinds(model):
    return {type(moe.experts) for moe in moe_layers(model).values()}


def trained_apart(model):
    """A few steps that make the experts differ, each on its own tokens."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(images(4)).square().mean().backward()
        optimizer.step()
    return model


# ---------------------------------------------------------------- hooks


@both_layouts
def test_a_hook_of_the_ffn_fires_once_a_call_before_and_after_collapse(experts):
    model, recorder = tiny_vit(2), Recorder()
    model.blocks[1].mlp.register_forward_hook(recorder.hook)
    ewa.expand(model, 4, experts=experts)
    model.train()(images(4))
    assert len(recorder.seen) == 1
    assert len(recorder.seen[0]) == 3
    model.eval()(images(4))
    ewa.collapse(model)(images(4))
    assert len(recorder.seen) == 3


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_every_kind_of_hook_inside_survives(kind):
    model, calls = tiny_vit(2), []
    register = getattr(model.blocks[1].mlp.fc1, f"register_{kind}_hook")
    handle = register(lambda *args: calls.append(1))
    with pytest.warns(UserWarning, match=r"the hooks of blocks\.1\.mlp\.fc1 fire once for each expert"):
        ewa.expand(model, 4)
    step(model)
    assert calls
    ewa.collapse(model)
    calls.clear()
    step(model)
    assert len(calls) == 1
    handle.remove()
    step(model)
    assert len(calls) == 1


def test_a_bound_method_hook_inside_keeps_its_owner():
    model, recorder = tiny_vit(2), Recorder()
    model.blocks[1].mlp.fc2.register_forward_hook(recorder.hook)
    with pytest.warns(UserWarning, match="fire once for each expert"):
        ewa.expand(model, 4)
    model.train()(images(4))
    ewa.collapse(model)(images(4))
    assert len(recorder.seen) == 4 + 1  # one call of each expert's own copy, one of the plain layer


@both_layouts
@pytest.mark.parametrize("where", ["mlp", "mlp.fc1"])
@pytest.mark.parametrize("kind", ["load_state_dict_pre", "load_state_dict_post", "state_dict_pre"])
def test_hooks_of_state_dicts_survive_on_the_module_that_is_there(kind, where, experts):
    model, seen = tiny_vit(2), []
    for block in model.blocks:
        getattr(block.get_submodule(where), f"register_{kind}_hook")(lambda module, *_: seen.append(module))
    ewa.expand(model, 3, experts=experts)
    model.load_state_dict(model.state_dict())
    ewa.load_dense_state_dict(model, ewa.dense_state_dict(model))
    ewa.collapse(model)
    seen.clear()
    model.load_state_dict(model.state_dict())
    assert {id(module) for module in seen} == {id(block.get_submodule(where)) for block in model.blocks}


@pytest.mark.parametrize("how", ["method", "closure", "partial"])
def test_a_hook_that_refers_to_its_own_ffn_is_refused_by_name(how):
    class Watching(Mlp):
        def watch(self, *args):
            self.calls = getattr(self, "calls", 0) + 1

    model = tiny_vit(2)
    for block in model.blocks:
        mlp = block.mlp = Watching(16, 32)
        hook = {
            "method": mlp.watch,
            "closure": (lambda ffn: lambda *args: ffn.watch())(mlp),
            "partial": functools.partial(Watching.watch, mlp),
        }[how]
        mlp.fc1.register_forward_hook(hook)
    with pytest.raises(ewa.EwavitError, match=r"mlp has a hook \(fc1\._forward_hooks\).*after expand"):
        ewa.expand(model, 4)


def test_layers_with_hooks_become_separate_copies_and_others_stay_stacked():
    model = tiny_vit(2)
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *args: None)
    ewa.expand(model, 4, select="all")
    layers = moe_layers(model)
    assert isinstance(layers["blocks.0.mlp"].experts, SeparateExperts)
    assert isinstance(layers["blocks.1.mlp"].experts, StackedExperts)


@pytest.mark.parametrize("kind", ["gradient", "after accumulation"])
def test_gradient_hooks_of_parameters_survive(kind):
    model = tiny_vit(2)
    weight = model.blocks[1].mlp.fc1.weight
    if kind == "gradient":
        weight.register_hook(lambda grad: grad * 0)
    else:
        weight.register_post_accumulate_grad_hook(clear_gradient)
    before = weight.detach().clone()
    ewa.expand(model, 4)
    step(model)
    ewa.collapse(model)
    step(model)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, before)


# ---------------------------------------------------------------- attributes and requires_grad


@both_layouts
def test_attributes_of_parameters_survive(experts):
    model = tiny_vit(2)
    model.blocks[1].mlp.fc1.weight._no_weight_decay = True
    ewa.expand(model, 4, experts=experts)
    marked = [name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)]
    assert len(marked) == (4 if experts == "separate" else 1)
    assert all("blocks.1.mlp" in name and "fc1.weight" in name for name in marked)
    ewa.collapse(model)
    assert model.blocks[1].mlp.fc1.weight._no_weight_decay


@both_layouts
def test_requires_grad_survives_and_a_later_change_too(experts):
    model = tiny_vit(2)
    model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    ewa.expand(model, 4, experts=experts)
    for name, parameter in model.named_parameters():
        if "experts" in name and "fc2.bias" in name:
            parameter.requires_grad_(False)
    ewa.collapse(model)
    mlp = model.blocks[1].mlp
    assert [p.requires_grad for p in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)] == [
        False, True, True, False,
    ]  # fmt: skip


def test_a_frozen_ffn_is_said():
    model = tiny_vit(2).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"blocks\.1\.mlp is frozen .*never differ"):
        ewa.expand(model, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ewa.expand(tiny_vit(2), 4)


# ---------------------------------------------------------------- classes and replaced forwards


def test_a_subclass_with_a_forward_of_its_own_becomes_separate_copies():
    model = tiny_vit(2)
    for block in model.blocks:
        block.mlp.fc1.__class__ = DropConnect
    ewa.expand(model, 4, select="all")
    assert kinds(model) == {SeparateExperts}
    DropConnect.calls = 0
    model.train()(images(4))
    assert DropConnect.calls == 2 * 4


def test_a_norm_that_does_otherwise_in_training_becomes_separate_copies():
    class NoisyNorm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * (2.0 if self.training else 1.0)

    model = tiny_vit(2)
    model.blocks[1].mlp.norm = NoisyNorm(model.blocks[1].mlp.fc2.in_features)
    ewa.expand(model, 4)
    assert kinds(model) == {SeparateExperts}


class NoisyMlp(Mlp):
    """Does something of its own in training."""

    def forward(self, x):
        return super().forward(x + self.training)


class CountingLinear(nn.Linear):
    """Overrides the call, not the forward."""

    def __call__(self, x):
        return super().__call__(x) * 2


class LowRankMlp(Mlp):
    """Computes with weights of its layers, not with the layers."""

    def __init__(self, *args):
        super().__init__(*args)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x):
        return super().forward(x) + x @ (self.up.weight @ self.down.weight).mT


class ScaledMlp(Mlp):
    """Stacked weights fit its forward in training, but not in eval, where they are not averaged."""

    def forward(self, x):
        return super().forward(x) * (1 + self.fc1.weight.square().mean((-2, -1))[..., None, None, None])


@pytest.mark.parametrize("kind", ["training", "call", "weights", "scale"])
def test_what_stacking_would_change_becomes_separate_copies(kind):
    model = tiny_vit(2)
    for block in model.blocks:
        if kind == "call":
            block.mlp.fc1.__class__ = CountingLinear
        else:
            classes = {"training": NoisyMlp, "weights": LowRankMlp, "scale": ScaledMlp}
            block.mlp = classes[kind](16, 32)
    dense, x = copy.deepcopy(model), images(4)
    ewa.expand(model, 4, select="all")
    assert kinds(model) == {SeparateExperts}
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), dense.train(mode)(x), atol=1e-5, rtol=1e-4)
    output = trained_apart(model).eval()(x)
    torch.testing.assert_close(ewa.collapse(model)(x), output)


def test_channels_dropped_for_a_whole_image_are_dealt_by_image_alone():
    model = tiny_vit(2)
    for block in model.blocks:
        block.mlp.drop1 = nn.Dropout1d(0.5)
    with pytest.raises(ewa.EwavitError, match="drops whole channels"):
        ewa.expand(model, 4)
    assert kinds(ewa.expand(model, 4, unit="image")) == {SeparateExperts}


class Parametrizing(nn.Module):
    """Parametrizes its layer for each call, as peft does for target_parameters."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(16, 2, bias=False), nn.Linear(2, 64, bias=False)

    def forward(self, x):
        delta = self.up.weight @ self.down.weight
        add = type("Add", (nn.Module,), {"forward": lambda _, weight: weight + delta})()
        parametrize.register_parametrization(self.layer, "weight", add)
        y = self.layer(x)
        parametrize.remove_parametrizations(self.layer, "weight", leave_parametrized=False)
        return y


def test_an_ffn_that_cannot_compute_with_its_mean_weights_is_refused():
    model = tiny_vit(2)
    for block in model.blocks:
        block.mlp.fc1 = Parametrizing(block.mlp.fc1)
    with pytest.raises(ewa.EwavitError, match=r"does not compute with its mean weights: merge adapters"):
        ewa.expand(model, 4)


@pytest.mark.parametrize("where", ["mlp", "mlp.fc1"])
@pytest.mark.parametrize("how", ["compiled", "closure"])
def test_a_replaced_forward_is_refused_by_name(where, how):
    model = tiny_vit(2)
    for block in model.blocks:
        module = block.get_submodule(where)
        original = module.forward
        module.forward = (
            torch.compile(original, backend="eager") if how == "compiled" else lambda x, f=original: f(x)
        )
    place = "its forward" if where == "mlp" else r"fc1\.forward"
    with pytest.raises(ewa.EwavitError, match=rf"{place} was replaced .*after expand"):
        ewa.expand(model, 4)


def test_experts_without_any_gradient_after_the_first_step_are_an_error():
    model = ewa.expand(tiny_vit(2), 4)
    plain = tiny_vit(2).blocks[1].mlp
    optimizer = torch.optim.SGD([*model.parameters(), *plain.parameters()], lr=0.1)
    ewa.ExpertAveraging(model).attach(optimizer)
    model.blocks[1].mlp.forward = plain.forward  # what a wrapper that kept the old FFN does
    model.train()(images(4)).square().mean().backward()
    with pytest.raises(ewa.EwavitError, match=r"no expert of blocks\.1\.mlp got a gradient"):
        optimizer.step()


# ---------------------------------------------------------------- parametrizations, pruning, ties


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_after_expand_the_mean_of_the_effective_weights_is_deployed(name):
    model = trained_apart(ewa.expand(tiny_vit(2), 4))
    layer = model.blocks[1].mlp.experts.ffn.fc1
    getattr(parametrizations, name)(layer, "weight")
    trained_apart(model).eval()
    expected = layer.weight.mean(0)
    plain = ewa.dense_state_dict(model)["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(plain, expected, atol=1e-6, rtol=1e-5)
    x = images(4)
    output = model(x)
    torch.testing.assert_close(ewa.collapse(model)(x), output, atol=1e-5, rtol=1e-5)


def test_pruned_after_expand_the_mean_of_the_effective_weights_is_deployed():
    model = trained_apart(ewa.expand(tiny_vit(2), 4))
    layer = model.blocks[1].mlp.experts.ffn.fc1
    prune.l1_unstructured(layer, "weight", 0.5)
    trained_apart(model)
    expected = (layer.weight_orig * layer.weight_mask).mean(0)  # the optimizer moved weight_orig since
    torch.testing.assert_close(ewa.dense_state_dict(model)["blocks.1.mlp.fc1.weight"], expected)
    x = images(4)
    output = model.eval()(x)
    torch.testing.assert_close(ewa.collapse(model)(x), output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["pruned", "weight norm of old"])
def test_weights_that_a_hook_computes_can_be_expanded_trained_and_collapsed(how):
    model = tiny_vit(2)
    for block in model.blocks:
        if how == "pruned":
            prune.l1_unstructured(block.mlp.fc1, "weight", 0.5)
        else:
            torch.nn.utils.weight_norm(block.mlp.fc1)
    x = images(4)
    with torch.no_grad():
        before = model.eval()(x)
    trained_apart(ewa.expand(model, 4))
    assert kinds(model) == {SeparateExperts}
    ewa.dense_state_dict(model)
    output = model.eval()(x)
    torch.testing.assert_close(ewa.collapse(model).eval()(x), output, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output, before)


def test_copies_that_were_parametrized_one_by_one_are_one_clear_error():
    model = ewa.expand(tiny_vit(2), 4, experts="separate")
    prune.l1_unstructured(model.blocks[1].mlp.experts.copies[0].fc1, "weight", 0.5)
    with pytest.raises(ewa.EwavitError, match="parametrize every copy"):
        ewa.dense_state_dict(model)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        torch.nn.utils.weight_norm,
    ],
    ids=["weight norm", "spectral norm", "pruning", "weight norm of old"],
)
def test_changed_copies_deploy_the_mean_of_the_effective_weights(change):
    model = trained_apart(ewa.expand(tiny_vit(2), 3, experts="separate"))
    copies = model.blocks[1].mlp.experts.copies
    for ffn in copies:
        change(ffn.fc1)
    trained_apart(model).eval()
    x = images(4)
    with torch.no_grad():
        output = model(x)
        for ffn in copies:  # what a hook computes is there after a call
            ffn(torch.randn(2, 16))
        mean = torch.stack([ffn.fc1.weight for ffn in copies]).mean(0)
    torch.testing.assert_close(ewa.dense_state_dict(model)["blocks.1.mlp.fc1.weight"], mean)
    plain = tiny_vit(2).eval()
    plain.load_state_dict(ewa.collapse(model).state_dict())
    torch.testing.assert_close(plain(x), output)
    torch.testing.assert_close(model(x), output)
    assert type(model.blocks[1].mlp.fc1) is nn.Linear


class LowRank(nn.Module):
    """What LoRA puts in the place of a layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight = base_layer.weight
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 64, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@both_layouts
def test_a_layer_wrapped_after_expand_is_one_clear_error_until_it_is_merged(experts):
    model = ewa.expand(tiny_vit(2), 3, experts=experts)
    ffns = model.blocks[1].mlp.experts.ffns()
    for ffn in ffns:
        ffn.fc1 = LowRank(ffn.fc1)
    attempts = [lambda: ewa.dense_state_dict(model), lambda: ewa.collapse(model)]
    if experts == "separate":
        model.train()(images(2))
        attempts.append(lambda: model.eval()(images(2)))
    for attempt in attempts:
        with pytest.raises(ewa.EwavitError, match=r"fc1.* since ewavit\.expand.*merge"):
            attempt()
    for ffn in ffns:
        ffn.fc1 = ffn.fc1.base_layer
    assert ewa.dense_state_dict(model).keys() == tiny_vit(2).state_dict().keys()


@pytest.mark.parametrize("then", ["pruned again", "made permanent"])
def test_copies_pruned_before_and_changed_after_expand_are_one_clear_error(then):
    model = tiny_vit(2)
    prune.l1_unstructured(model.blocks[1].mlp.fc1, "weight", 0.3)
    trained_apart(ewa.expand(model, 3))
    for ffn in model.blocks[1].mlp.experts.copies:
        if then == "pruned again":
            prune.l1_unstructured(ffn.fc1, "weight", 0.3)
        else:
            prune.remove(ffn.fc1, "weight")
    for attempt in (lambda: model.eval()(images(2)), lambda: ewa.dense_state_dict(model)):
        with pytest.raises(
            ewa.EwavitError, match="pruned before" if then == "pruned again" else "weight_orig"
        ):
            attempt()


def test_weights_are_loaded_before_the_experts_are_parametrized():
    model, plain = ewa.expand(tiny_vit(2), 3), tiny_vit(2).state_dict()
    parametrizations.weight_norm(model.blocks[1].mlp.experts.ffn.fc1)
    with pytest.raises(ewa.EwavitError, match="load weights before"):
        ewa.load_dense_state_dict(model, plain)


def test_a_parameter_without_a_value_for_each_stacked_expert_is_named():
    model = ewa.expand(tiny_vit(2), 3)
    parametrizations.weight_norm(model.blocks[1].mlp.experts.ffn.fc1, dim=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewa.ExpertAveraging(model).attach(optimizer)
    model.train()(images(2)).square().mean().backward()
    with pytest.raises(ewa.EwavitError, match=r"original0 \(\) has no value for each of 3 stacked experts"):
        optimizer.step()


def tied(what):
    """Three blocks; the first and the last share weights of their FFN, or a layer."""
    model = tiny_vit(3)
    first, last = model.blocks[0].mlp, model.blocks[2].mlp
    if what == "weights":
        last.fc1.weight, last.fc2.weight = first.fc1.weight, first.fc2.weight
    else:
        last.fc1 = first.fc1
    return model


@both_layouts
@pytest.mark.parametrize("what", ["weights", "layer"])
def test_tied_ffn_weights_stay_tied_through_expand_and_collapse(experts, what):
    model, x = tied(what), images(4)
    count = sum(p.numel() for p in model.parameters())
    trained_apart(ewa.expand(model, 4, select="all", experts=experts))
    for one, other in zip(
        model.blocks[0].mlp.experts.ffns(), model.blocks[2].mlp.experts.ffns(), strict=True
    ):
        assert one.fc1.weight is other.fc1.weight
        assert one.fc2.bias is not other.fc2.bias
    assert ewa.summary(model).dense_parameters == count
    loaded = ewa.expand(tied(what), 4, select="all", experts=experts)
    loaded.load_state_dict(model.state_dict())
    output = model.eval()(x)
    torch.testing.assert_close(loaded.eval()(x), output)
    dense = ewa.dense_state_dict(model)
    ewa.collapse(model)
    assert model.blocks[0].mlp.fc1.weight is model.blocks[2].mlp.fc1.weight
    assert sum(p.numel() for p in model.parameters()) == count
    torch.testing.assert_close(model(x), output)
    for key, value in model.state_dict().items():
        assert torch.equal(dense[key], value)


@both_layouts
def test_tied_experts_are_averaged_once(experts):
    model = trained_apart(ewa.expand(tied("weights"), 4, select="all", experts=experts))
    expected = [
        (value, value + 0.4 * (torch.stack(values).mean(0) - value))  # Eq. 6: D = 0.3 * 4 / 3
        for moe in moe_layers(model).values()
        for _, values in moe.experts.values_by_parameter()
        for value in values
    ]
    for average in (average_experts_, average_experts_reference_):
        averaged = copy.deepcopy(model)
        average(averaged, 0.3)
        values = [
            value
            for moe in moe_layers(averaged).values()
            for _, values in moe.experts.values_by_parameter()
            for value in values
        ]
        for value, (_, right) in zip(values, expected, strict=True):
            torch.testing.assert_close(value, right, atol=1e-6, rtol=1e-5)


def test_parameters_tied_to_what_is_not_expanded_are_refused_by_name():
    model = tiny_vit(3)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    message = r"blocks\.0\.mlp\.fc1\.weight and blocks\.1\.mlp\.fc1\.weight are one tied .*choose both"
    with pytest.raises(ewa.EwavitError, match=message):
        ewa.expand(model, 4)
    model = tiny_vit(3)
    model.blocks[1].mlp.fc1 = model.blocks[0].mlp.fc1  # a layer that both have
    with pytest.raises(ewa.EwavitError, match="one tied parameter"):
        ewa.expand(model, 4)
    model = tied("weights")
    model.blocks[2].mlp.fc1.register_forward_hook(lambda *args: None)
    with pytest.raises(ewa.EwavitError, match='only one of the FFNs can be stacked: use experts="separate"'):
        ewa.expand(model, 4, select="all")
    ewa.expand(model, 4, select="all", experts="separate")


def test_one_ffn_in_several_blocks_stays_one():
    model = tiny_vit(3)
    model.blocks[2].mlp = model.blocks[0].mlp
    count = sum(p.numel() for p in model.parameters())
    ewa.collapse(trained_apart(ewa.expand(model, 4, select="all")))
    assert model.blocks[2].mlp is model.blocks[0].mlp
    assert sum(p.numel() for p in model.parameters()) == count


# ---------------------------------------------------------------- looked at from outside


@both_layouts
def test_a_mixture_answers_attributes_of_its_ffn(experts):
    model = ewa.expand(tiny_vit(2), 4, select="all", experts=experts)
    mlp = model.blocks[0].mlp
    assert mlp.fc1.weight.dtype == torch.float32
    assert mlp.fc1.in_features == 16 if experts == "separate" else True
    assert isinstance(mlp.act, nn.Module)
    assert not hasattr(mlp, "no_such_thing")
    with pytest.raises(AttributeError, match="_private"):
        mlp._private  # noqa: B018 (the lookup is what is tested)


@both_layouts
def test_a_layer_set_on_a_mixture_is_refused_where_no_expert_would_have_it(experts):
    model = ewa.expand(tiny_vit(2), 4, experts=experts)
    mlp = model.blocks[1].mlp
    for name, value in (("act", nn.ReLU()), ("fc1", nn.Linear(16, 64))):
        with pytest.raises(ewa.EwavitError, match=rf"{name} belongs to the FFN.*before ewavit\.expand"):
            setattr(mlp, name, value)
    mlp.note = "any attribute"
    mlp.adapter = nn.Linear(2, 2)
    for ffn in mlp.experts.ffns():
        ffn.act = nn.ReLU()
    assert isinstance(ewa.collapse(model).blocks[1].mlp.act, nn.ReLU)


@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 3, 4), (2, 2, 3, 4), (1, 2, 2, 3, 4)])
@both_layouts
def test_an_ffn_takes_tokens_of_any_rank(lead, experts):
    model = nn.ModuleDict({"mlp": tiny_vit(2).blocks[0].mlp})
    dense = model["mlp"]
    x = torch.randn(*lead, 16)
    expected = dense(x)
    ewa.expand(model, 2, select="all", experts=experts)
    torch.testing.assert_close(model.train()["mlp"](x), expected, atol=1e-6, rtol=1e-5)
