"""Averages of a run's weights: their formulas, their way back into the model, their resumption."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ewavit as ewa
from ewavit.training.checkpoint import load_checkpoint, save_checkpoint
from ewavit.training.recipe import Recipe
from ewavit.training.weight_average import (
    MovingAverage,
    StochasticWeightAverage,
    TrainableWeightAverage,
    weight_average,
)
from runs import facts
from small_models import images, randomised, separated, tiny_vit

EPOCHS = 6
MAKERS = {
    "ema": lambda model: MovingAverage(model, 0.9),
    "ema with warm-up": lambda model: MovingAverage(model, 0.9, warmup=True),
    "switch ema": lambda model: MovingAverage(model, 0.9, switch=True),
    "swa": lambda model: StochasticWeightAverage(model, EPOCHS, 0.5),
    "twa": lambda model: TrainableWeightAverage(model, 2, 3),
}
each_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Toy(nn.Module):
    """A linear model with a frozen parameter and a BatchNorm, if wanted."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.head(self.norm(x)) + self.shift


def cross_entropy(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets)


def toy_batches(epoch, count=4, size=32):
    """Noisy labels of a linear teacher: the loss has a finite minimum."""
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(epoch)
    for _ in range(count):
        inputs = torch.randn(size, 6, generator=draw)
        yield inputs, (inputs @ teacher + torch.randn(size, 3, generator=draw)).argmax(1)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).double()


def wander(average, model, first, last, steps=2):
    """Epochs of random steps, the same from the same epoch on; returns the weights after each step."""
    path = []
    for epoch in range(first, last):
        for step in range(epoch * steps, (epoch + 1) * steps):
            torch.manual_seed(step)
            randomised(model, 0.1)
            average.after_step(step + 1)
            path.append(weights(model))
        average.after_epoch(epoch + 1)
    return path


def expanded_vit():
    return separated(ewa.expand(tiny_vit(), 4, select="all"))


def test_moving_average_follows_its_formula():
    model = Toy()
    average = MovingAverage(model, 0.9)
    path = wander(average, model, 0, 3)
    expected = path[0]  # timm's first step takes the weights as they are
    for value in path[1:]:
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(weights(average.module), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        weights(model), path[-1], atol=0, rtol=0
    )  # without the switch it is left alone


def test_switch_ema_puts_the_average_into_the_model_after_the_epoch_only():
    model = Toy(norm=True)
    average = MovingAverage(model, 0.9, switch=True)
    parameters = list(model.parameters())
    for epoch in range(1, 3):
        for step in (2 * epoch, 2 * epoch + 1):
            model(torch.randn(8, 6))  # moves the running statistics
            randomised(model, 0.1)
            average.after_step(step)
        assert not torch.equal(weights(model), weights(average.module))
        average.after_epoch(epoch)
        for key, value in average.module.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


def test_swa_is_the_plain_mean_of_the_last_epoch_ends_and_holds_the_learning_rate_there():
    model = Toy()
    average = StochasticWeightAverage(model, EPOCHS, 0.5)
    ends = []
    for epoch in range(EPOCHS):
        assert average.holds_learning_rate(epoch) == (epoch >= 3)
        ends.append(wander(average, model, epoch, epoch + 1)[-1])
        assert average.ready == (epoch >= 3)
    expected = torch.stack(ends[3:]).mean(0)
    torch.testing.assert_close(weights(average.module), expected, atol=1e-6, rtol=1e-6)
    assert average.finish(toy_batches, cross_entropy) == 0  # no BatchNorm, no images


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_swa_averages_at_least_one_and_at_most_all_epochs(share):
    average = StochasticWeightAverage(Toy(), EPOCHS, share)
    held = sum(average.holds_learning_rate(epoch) for epoch in range(EPOCHS))
    assert held == (1 if share < 1 else EPOCHS)


@pytest.mark.parametrize("make", [MAKERS["swa"], MAKERS["twa"]], ids=["swa", "twa"])
def test_batch_norm_statistics_become_those_of_the_averaged_weights(make):
    model = nn.Sequential(nn.Linear(6, 6), Toy(norm=True))
    average = make(model)
    wander(average, model, 0, EPOCHS)
    used = average.finish(toy_batches, cross_entropy)
    assert used == (128 if isinstance(average, StochasticWeightAverage) else (2 + 2 + 1) * 128)
    with torch.no_grad():
        entering = torch.stack([average.module[0](inputs).mean(0) for inputs, _ in toy_batches(0)])
    torch.testing.assert_close(average.module[1].norm.running_mean, entering.mean(0), atol=1e-6, rtol=1e-6)
    assert not any(module.training for module in average.module.modules())


@each_kind
def test_collapsing_the_average_equals_averaging_the_collapsed(make):
    model = expanded_vit()
    average, dense_average = make(model), make(dense := ewa.collapse(copy.deepcopy(model)))
    for epoch in range(EPOCHS):
        separated(model, 0.05)
        randomised(model, 0.05)
        dense.load_state_dict(ewa.dense_state_dict(model))
        for one in (average, dense_average):
            one.after_step(epoch + 1)
            one.after_epoch(epoch + 1)
    expected = dense_average.module.state_dict()
    for key, value in ewa.dense_state_dict(average.module).items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-6)


def twa_on_a_convex_problem(checkpoints=8, epochs=20):
    """Checkpoints around an optimum that their span, as wide as the weights, holds or nearly holds."""
    model = Toy()
    average = TrainableWeightAverage(model, epochs, checkpoints)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for epoch in range(checkpoints):
        for inputs, targets in toy_batches(epoch):
            optimizer.zero_grad()
            cross_entropy(model, inputs, targets).backward()
            optimizer.step()
        average.after_epoch(epoch + 1)
    return average


def mean_loss(model, epochs=range(1)):
    with torch.no_grad():
        losses = [cross_entropy(model, *batch) for epoch in epochs for batch in toy_batches(epoch)]
    return float(torch.stack(losses).mean())


def test_twa_learns_weights_within_the_span_that_have_a_lower_training_loss_than_the_mean():
    average = twa_on_a_convex_problem()
    span = torch.stack(tuple(average.checkpoints)).double()
    start = weights(average.module)
    torch.testing.assert_close(start, span.mean(0), atol=1e-6, rtol=1e-6)
    at_mean = mean_loss(average.module, range(20))
    assert average.finish(toy_batches, cross_entropy) == (20 + 2) * 128
    learned = weights(average.module)
    assert mean_loss(average.module, range(20)) < at_mean - 1e-3
    projected = span.T @ torch.linalg.lstsq(span.T, learned).solution
    assert (learned - projected).norm() / learned.norm() < 1e-5
    assert (learned - start).norm() > 1e-2
    assert torch.equal(average.module.shift, torch.ones(3))  # frozen weights stay


def test_twa_finds_a_known_optimum_within_the_span():
    model = nn.Linear(5, 1, bias=False)
    optimum = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0])
    inputs = torch.randn(64, 5)
    average = TrainableWeightAverage(model, 200, 4)
    deviations = torch.randn(3, 5)
    for epoch, shift in enumerate([*deviations, 2 * deviations.sum(0)]):
        with torch.no_grad():
            model.weight.copy_((optimum + shift)[None])  # the optimum is an affine combination of these
        average.after_epoch(epoch + 1)
    data = [(inputs, inputs @ optimum[:, None])]
    average.finish(lambda epoch: iter(data), lambda m, x, y: F.mse_loss(m(x), y))
    torch.testing.assert_close(average.module.weight[0], optimum, atol=1e-3, rtol=0)


def test_twa_keeps_the_mean_when_learning_did_not_lower_the_loss():
    average = twa_on_a_convex_problem(epochs=1)
    start = average.module.state_dict()["head.weight"].clone()

    def uphill(model, inputs, targets):  # learns in one direction, is measured in the other
        loss = cross_entropy(model, inputs, targets)
        return -loss if torch.is_grad_enabled() else loss

    assert average.finish(toy_batches, uphill) == 3 * 128
    assert torch.equal(average.module.head.weight, start)


def test_twa_of_equal_checkpoints_is_that_checkpoint():
    model = Toy()
    average = TrainableWeightAverage(model, 2, 3)
    assert not average.ready
    for epoch in range(3):
        average.after_epoch(epoch + 1)
        assert average.ready
    average.finish(toy_batches, cross_entropy)
    torch.testing.assert_close(weights(average.module), weights(model), atol=1e-6, rtol=0)
    single = TrainableWeightAverage(model, 2, 3)
    single.after_epoch(1)
    assert single.finish(toy_batches, cross_entropy) == 0
    assert torch.equal(weights(single.module), weights(model))


def test_twa_learns_on_an_expanded_vit_and_starts_again_with_the_same_result():
    model = expanded_vit()
    average = TrainableWeightAverage(model, 2, 3)
    wander(average, model, 0, 4)
    start = weights(average.module)

    def batches(epoch):
        for batch in range(3):
            torch.manual_seed(10 * epoch + batch)  # of the images and of the partition
            yield images(6), torch.randint(3, (6,))

    results = []
    for _ in range(2):
        assert average.finish(batches, cross_entropy) == (2 + 2) * 18
        results.append(weights(average.module))
    assert torch.equal(*results)
    assert not torch.equal(results[0], start)
    assert all(parameter.grad is None for parameter in average.module.parameters())
    assert average.module(images()).shape == (2, 3)


@each_kind
@pytest.mark.parametrize("stop", [1, 4])
def test_an_average_goes_on_bit_for_bit_from_a_checkpoint(make, stop, tmp_path):
    model = expanded_vit()
    average = make(model)
    wander(average, model, 0, stop)
    save_checkpoint(tmp_path, model.state_dict(), {"average": average.state_dict()}, facts())
    resumed_model = expanded_vit()
    resumed = make(resumed_model)
    saved = load_checkpoint(tmp_path)
    resumed_model.load_state_dict(saved.model)
    resumed.load_state_dict(saved.training["average"])
    assert resumed.ready == average.ready
    for one, of in ((average, model), (resumed, resumed_model)):
        wander(one, of, stop, EPOCHS)
    assert torch.equal(weights(resumed_model), weights(model))
    expected = average.module.state_dict()
    for key, value in resumed.module.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, type(None)),
        ({"model_ema": True}, MovingAverage),
        ({"swa": 0.25}, StochasticWeightAverage),
        ({"twa": 5}, TrainableWeightAverage),
    ],
)
def test_recipe_names_the_average(settings, kind):
    assert type(weight_average(Recipe(**settings), Toy())) is kind


def test_recipe_switches_the_moving_average():
    average = weight_average(Recipe(model_ema=True, model_ema_switch=True, model_ema_decay=0.5), Toy())
    assert (average.switch, average.ema.decay) == (True, 0.5)
