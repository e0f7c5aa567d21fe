"""The random uniform partition: who goes where, how often, and back."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ewavit.core import RandomPartition, set_step
from ewavit.core.partition import dispatch_reference

UNITS = st.integers(0, 40)
EXPERTS = st.integers(1, 9)
SEEDS = st.integers(0, 2**31)


def draw(units: int, experts: int, seed: int):
    torch.manual_seed(seed)
    return RandomPartition(experts).draw(units)


def draws(units: int, experts: int, number: int):
    """The partitions of so many steps."""
    partition = RandomPartition(experts)
    for step in range(number):
        set_step(partition, step)
        yield partition.draw(units)


def expert_of(state, experts: int) -> Tensor:
    capacity = len(state.slots) // experts
    return state.positions // capacity if capacity else state.positions


def p_value(counts: Tensor) -> Tensor:
    """Chi-square test that the rows of counts are draws from the uniform distribution."""
    counts = counts.double()
    expected = counts.mean(-1, keepdim=True)
    statistic = ((counts - expected) ** 2 / expected).sum(-1)
    freedom = torch.full_like(statistic, counts.shape[-1] - 1)
    return torch.special.gammaincc(freedom / 2, statistic / 2)


@settings(deadline=None, max_examples=150)
@given(units=UNITS, experts=EXPERTS, seed=SEEDS)
def test_every_unit_is_in_exactly_one_slot(units, experts, seed):
    state = draw(units, experts, seed)
    taken = state.slots if state.padding is None else state.slots[~state.padding]
    assert sorted(taken.tolist()) == list(range(units))
    assert torch.equal(state.slots[state.positions], torch.arange(units))
    assert state.padding is None or not state.padding[state.positions].any()


@settings(deadline=None, max_examples=150)
@given(units=UNITS, experts=EXPERTS, seed=SEEDS)
def test_group_sizes_differ_by_at_most_one(units, experts, seed):
    state = draw(units, experts, seed)
    sizes = torch.bincount(expert_of(state, experts), minlength=experts)
    assert len(sizes) == experts
    assert sizes.sum() == units
    assert sizes.max() - sizes.min() <= 1


@settings(deadline=None, max_examples=100)
@given(units=UNITS, experts=EXPERTS, seed=SEEDS)
def test_shapes_depend_on_the_number_of_units_alone(units, experts, seed):
    state = draw(units, experts, seed)
    capacity = -(-units // experts)
    assert state.slots.shape == (experts * capacity,)
    assert state.positions.shape == (units,)
    if units % experts == 0:
        assert state.padding is None
    else:
        assert state.padding.shape == (experts * capacity,)
        assert int(state.padding.sum()) == experts * capacity - units < experts


@settings(deadline=None, max_examples=100)
@given(units=UNITS, experts=EXPERTS, seed=SEEDS, trailing=st.sampled_from([(3,), (2, 3), (2, 2, 3), ()]))
def test_dispatch_equals_its_reference_and_combine_undoes_it(units, experts, seed, trailing):
    torch.manual_seed(seed)
    partition = RandomPartition(experts)
    x = torch.randn(units, *trailing)
    block, state = partition.dispatch(x)
    assert block.shape == (experts, -(-units // experts), *trailing)
    assert torch.equal(block, dispatch_reference(x, state, experts))
    assert torch.equal(partition.combine(block, state), x)


@pytest.mark.parametrize(("units", "experts"), [(8, 4), (10, 4), (7, 3), (3, 4), (1, 4), (2, 3), (9, 2)])
def test_each_unit_meets_each_expert_with_probability_one_nth(units, experts):
    counts = torch.zeros(units, experts)
    for state in draws(units, experts, 3000):
        counts[torch.arange(units), expert_of(state, experts)] += 1
    assert p_value(counts).min() > 1e-3


@pytest.mark.parametrize(("units", "experts"), [(10, 4), (3, 4), (7, 3)])
def test_each_expert_is_short_of_a_unit_equally_often(units, experts):
    short = torch.zeros(experts)
    for state in draws(units, experts, 3000):
        # Every draw leaves out the same number of experts; one of them, at random, keeps draws independent.
        sizes = torch.bincount(expert_of(state, experts), minlength=experts)
        lacking = (sizes == sizes.min()).nonzero().flatten()
        short[lacking[torch.randint(len(lacking), ())]] += 1
    assert p_value(short) > 1e-3


def test_all_groupings_are_equally_likely():
    # 4 units over 2 experts: 6 ways to choose who goes to expert 0.
    seen = Counter(tuple(expert_of(state, 2).tolist()) for state in draws(4, 2, 3000))
    assert len(seen) == 6
    assert p_value(torch.tensor(list(seen.values()))) > 1e-3


@pytest.mark.parametrize("changed", range(3))
def test_the_draw_is_a_function_of_seed_layer_and_step(changed):
    first, other = RandomPartition(3), RandomPartition(3)
    drawn = first.draw(20)
    torch.rand(5)  # the generators' positions do not count
    other.key.copy_(first.key)
    assert torch.equal(other.draw(20).positions, drawn.positions)
    other.key[changed] += 1
    assert not torch.equal(other.draw(20).positions, drawn.positions)


def test_the_seed_is_that_of_manual_seed_and_drawing_leaves_the_generator_alone():
    first, again, other = draw(20, 3, seed=1), draw(20, 3, seed=1), draw(20, 3, seed=2)
    assert torch.equal(first.positions, again.positions)
    assert not torch.equal(first.positions, other.positions)
    before = torch.get_rng_state()
    draw_without_seed = RandomPartition(3).draw(20)
    assert len(draw_without_seed.positions) == 20
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("units", "experts"), [(6, 3), (7, 3), (2, 4), (0, 2)])
def test_dispatch_has_exact_first_and_second_derivatives(units, experts):
    def dispatch(x):
        torch.manual_seed(7)
        return RandomPartition(experts).dispatch(x)[0] ** 3

    x = torch.randn(units, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dispatch, (x,))
    assert torch.autograd.gradgradcheck(dispatch, (x,))


@pytest.mark.parametrize(("units", "experts"), [(6, 3), (7, 3), (2, 4), (0, 2)])
def test_combine_has_exact_first_and_second_derivatives(units, experts):
    partition = RandomPartition(experts)
    state = partition.draw(units)

    def combine(block):
        return partition.combine(block, state) ** 3

    block = torch.randn(experts, -(-units // experts), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(combine, (block,))
    assert torch.autograd.gradgradcheck(combine, (block,))


def test_slots_without_a_unit_get_no_gradient():
    partition = RandomPartition(4)
    state = partition.draw(6)
    block = torch.randn(4, 2, 3, requires_grad=True)
    partition.combine(block, state).sum().backward()
    assert torch.equal(block.grad.flatten(0, 1)[:, 0], (~state.padding).float())


@pytest.mark.parametrize("units", [6, 7])
def test_dispatch_and_combine_can_be_mapped_over_a_new_dimension(units):
    partition = RandomPartition(3)
    x = torch.randn(4, units, 2)

    def there(x):
        return partition.dispatch(x)[0]

    torch.manual_seed(3)
    mapped = torch.func.vmap(there, randomness="same")(x)
    torch.manual_seed(3)
    _, state = partition.dispatch(x[0])
    assert torch.equal(mapped, torch.stack([dispatch_reference(row, state, 3) for row in x]))
    assert torch.equal(torch.func.vmap(lambda block: partition.combine(block, state))(mapped), x)
