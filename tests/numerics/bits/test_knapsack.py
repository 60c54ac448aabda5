"""`choose_options` against every combination, on small instances."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.bits.knapsack import choose_options

_options = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20)), min_size=0, max_size=2).map(
    lambda extra: [(50, 0), *extra]
)


@given(items=st.lists(_options, min_size=1, max_size=5), budget=st.integers(0, 60))
def test_no_combination_within_the_budget_is_cheaper(items: list[list[tuple[int, int]]], budget):
    costs = [[float(cost) for cost, _ in item] for item in items]
    uses = [[float(use) for _, use in item] for item in items]
    chosen = choose_options(costs, uses, float(budget))
    taken = sum(row[index] for row, index in zip(uses, chosen, strict=True))
    assert taken <= budget
    # uses are rounded up to 1/20,000 of the budget each: what fits with that margin is not missed
    margin = budget * (1 - len(items) / 20_000) if budget else 0
    best = min(
        sum(cost for cost, _ in combination)
        for combination in itertools.product(*items)
        if sum(use for _, use in combination) <= margin
    )
    assert sum(row[index] for row, index in zip(costs, chosen, strict=True)) <= best


def test_one_item_of_half_the_cost_and_nearly_all_the_budget_beats_many_of_better_ratio():
    costs = [[50.0, 0.0], *[[5.0, 0.0]] * 4]
    uses = [[0.0, 9.0], *[[0.0, 0.8]] * 4]
    chosen = choose_options(costs, uses, 10.0)
    assert (chosen[0], sum(chosen)) == (1, 2)


@pytest.mark.parametrize(
    ("costs", "uses", "budget"),
    [
        ([[1.0]], [[0.0, 1.0]], 1.0),
        ([[1.0]], [[0.5]], 1.0),
        ([[float("nan")]], [[0.0]], 1.0),
        ([[-1.0]], [[0.0]], 1.0),
        ([[1.0]], [[0.0]], float("inf")),
    ],
)
def test_what_is_no_instance_is_refused(costs, uses, budget):
    with pytest.raises(ConfigError):
        choose_options(costs, uses, budget)
