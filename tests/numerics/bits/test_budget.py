"""Allocation under a budget: never above it, optimal where it can be, and no step left untaken."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.bits.budget import (
    LayerChoice,
    LayerCosts,
    allocate_budget,
    total_bits,
    total_cost,
)
from mpqdm_fx.numerics.levels.packing import storage_bits


@st.composite
def layer_costs(draw, max_channels=3, widths=(8, 16, 40), codebooks=True):
    """A layer with costs of any shape: decaying, flat, rising, zero, equal among channels."""
    channels = draw(st.integers(1, max_channels))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    decay = draw(st.sampled_from([4.0, 1.5, 1.0, 0.8]))
    costs = (
        torch.rand(channels, 8, generator=generator).double()
        * draw(st.sampled_from([0.0, 0.1, 1.0]))
        + torch.rand(channels, 1, generator=generator).double() ** 3
    )
    costs = costs * decay ** -torch.arange(8.0).double()
    if draw(st.booleans()):
        costs[:] = costs[:1]
    codebook = None
    if codebooks and draw(st.booleans()):
        codebook = costs[:, :4] * draw(st.sampled_from([0.1, 0.7, 1.0, 1.2]))
    return LayerCosts(
        name=f"layer{channels}",
        channels=channels,
        width=draw(st.sampled_from(widths)),
        uniform=costs,
        codebook=codebook,
    )


def _all_choices(layer, columns=range(1, 9)):
    """(bits, cost, choice) of every assignment of one layer."""
    result = []
    for levels in ("uniform", "codebook") if layer.codebook is not None else ("uniform",):
        for bits in itertools.product(columns, repeat=layer.channels):
            choice = LayerChoice(bits=torch.tensor(bits), levels=levels)
            result.append((total_bits([layer], [choice]), total_cost([layer], [choice]), choice))
    return result


def _pareto(points):
    """Pareto points (size, cost), ascending in size."""
    kept = []
    for size, cost in sorted(points):
        if not kept or cost < kept[-1][1]:
            kept.append((size, cost))
    return kept


def _joint_pareto(layers):
    front = [(0, 0.0)]
    for layer in layers:
        points = _pareto([(size, cost) for size, cost, _ in _all_choices(layer)])
        front = _pareto([(a + c, b + d) for a, b in front for c, d in points])
    return front


def _lower_hull(points):
    """Corners of the lower hull; a point on a line (to rounding) between two others is none."""
    hull = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0) - 1e-9 * abs(y0) * (x - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _draw_budget(data, layers):
    least = min_bits(layers)
    most = sum(max(size for size, _, _ in _all_choices(layer)) for layer in layers)
    return data.draw(st.integers(least, most + 10))


def min_bits(layers):
    return sum(
        storage_bits(
            (layer.channels, layer.width),
            torch.full((layer.channels,), layer.fixed or 1),
            "uniform",
        ).total
        for layer in layers
    )


def _solve(layers, budget, **settings):
    choices = allocate_budget(layers, budget, **settings)
    return total_bits(layers, choices), total_cost(layers, choices), choices


small_models = st.lists(layer_costs(), min_size=1, max_size=2)


@given(
    st.lists(layer_costs(max_channels=9, widths=(1, 3, 24, 50)), min_size=1, max_size=4),
    st.integers(0, 10**4),
    st.sampled_from([1, 2, 4]),
)
def test_the_budget_is_never_exceeded_and_every_channel_has_a_width(layers, extra, align):
    budget = min_bits(layers) + extra
    size, _, choices = _solve(layers, budget, align=align)
    assert size <= budget
    for layer, choice in zip(layers, choices, strict=True):
        assert choice.bits.shape == (layer.channels,)
        assert choice.bits.dtype == torch.int64
        assert choice.levels == "uniform" or layer.codebook is not None


@given(small_models, st.data())
def test_the_cost_lies_between_the_optimum_and_the_best_single_price(layers, data):
    budget = _draw_budget(data, layers)
    front = _joint_pareto(layers)
    _, cost, _ = _solve(layers, budget)
    optimum = min(c for size, c in front if size <= budget)
    single_price = min(c for size, c in _lower_hull(front) if size <= budget)
    assert optimum <= cost * (1 + 1e-9) + 1e-12
    assert cost <= single_price * (1 + 1e-9) + 1e-12


@given(small_models)
def test_a_budget_on_a_breakpoint_gives_the_optimum(layers):
    for size, cost in _lower_hull(_joint_pareto(layers)):
        assert _solve(layers, size)[1] == pytest.approx(cost, rel=1e-9, abs=1e-12)


@given(small_models, st.data())
def test_no_single_step_that_fits_lowers_the_cost(layers, data):
    budget = _draw_budget(data, layers)
    _, cost, choices = _solve(layers, budget)
    for index, (layer, choice) in enumerate(zip(layers, choices, strict=True)):
        steps = (
            [LayerChoice(bits=choice.bits, levels="codebook")] if layer.codebook is not None else []
        )
        steps.append(LayerChoice(bits=choice.bits, levels="uniform"))
        for channel in range(layer.channels):
            for bits in range(1, 9):
                stepped = choice.bits.clone()
                stepped[channel] = bits
                steps.append(LayerChoice(bits=stepped, levels=choice.levels))
        for step in steps:
            changed = [*choices[:index], step, *choices[index + 1 :]]
            if total_bits(layers, changed) <= budget:
                assert total_cost(layers, changed) >= cost * (1 - 1e-9) - 1e-12


@given(
    st.lists(layer_costs(max_channels=8), min_size=1, max_size=3),
    st.integers(0, 3000),
    st.integers(0, 500),
)
def test_a_larger_budget_never_costs_more(layers, first, more):
    budget = min_bits(layers) + first
    assert _solve(layers, budget + more)[1] <= _solve(layers, budget)[1] * (1 + 1e-9) + 1e-12


@given(layer_costs(max_channels=19), st.integers(2, 5), st.integers(0, 2000))
def test_aligned_widths_come_in_whole_blocks_but_for_one(layer, align, extra):
    _, _, (choice,) = _solve([layer], min_bits([layer]) + extra, align=align)
    counts = torch.bincount(choice.bits)
    short = [int(count) for count in counts if count % align]
    assert len(short) <= 1
    assert all(count % align == layer.channels % align for count in short)


@given(st.lists(layer_costs(max_channels=6), min_size=1, max_size=3), st.integers(0, 2000))
def test_equal_input_gives_equal_output(layers, extra):
    first, again = (_solve(layers, min_bits(layers) + extra)[2] for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.bits, b.bits)
        assert a.levels == b.levels


def _layer(channels, width=16, decay=4.0, **settings):
    costs = (decay ** -torch.arange(8.0).double()).repeat(channels, 1)
    return LayerCosts(name="conv", channels=channels, width=width, uniform=costs, **settings)


def test_of_equal_channels_the_earlier_is_widened_first():
    layer = _layer(8, width=64)
    tags = 24
    budget = min_bits([layer]) + tags + 3 * 64
    assert _solve([layer], budget)[2][0].bits.tolist() == [2, 2, 2, 1, 1, 1, 1, 1]


def test_equal_widths_save_their_tags():
    layer = _layer(64, width=8)
    exactly_two_bits = storage_bits((64, 8), torch.full((64,), 2), "uniform")
    assert exactly_two_bits.widths == 0
    size, _, (choice,) = _solve([layer], exactly_two_bits.total)
    assert choice.bits.tolist() == [2] * 64
    assert size == exactly_two_bits.total


def test_a_fixed_layer_keeps_its_width_and_counts():
    layers = [_layer(4, fixed=8), _layer(4)]
    least = min_bits(layers)
    _, _, choices = _solve(layers, least)
    assert choices[0].bits.tolist() == [8] * 4
    assert choices[1].bits.tolist() == [1] * 4
    assert total_bits(layers, choices) == least


def test_costs_that_rise_with_the_width_are_not_bought():
    layer = _layer(4, decay=0.5)
    assert _solve([layer], 10**6)[2][0].bits.tolist() == [1] * 4


def test_a_codebook_pays_where_its_table_is_small_beside_the_codes():
    cheap = 0.5 * _layer(4).uniform[:, :4]
    wide, narrow = _layer(4, width=4096, codebook=cheap), _layer(4, width=8, codebook=cheap)
    budget = 3 * 4 * (4096 + 8)
    _, _, choices = _solve([wide, narrow], budget)
    assert [choice.levels for choice in choices] == ["codebook", "uniform"]


def test_too_small_a_budget_names_the_smallest():
    layers = [_layer(3, width=5), _layer(4, fixed=8)]
    least = min_bits(layers)
    with pytest.raises(ConfigError, match=rf"smallest that can is {least} bits"):
        allocate_budget(layers, least - 1)
    assert total_bits(layers, allocate_budget(layers, least)) == least


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 100.0, True, "100", None])
def test_what_is_no_whole_number_is_refused_and_not_searched_for(bad):
    layer = LayerCosts(name="a", channels=2, width=8, uniform=torch.ones(2, 8).double())
    with pytest.raises(ConfigError, match="budget_bits="):
        allocate_budget([layer], bad)
    with pytest.raises(ConfigError, match="align="):
        allocate_budget([layer], 1000, align=bad)
    if bad is not None:  # it stands for "not fixed"
        with pytest.raises(ConfigError, match="a: fixed="):
            LayerCosts(name="a", channels=2, width=8, uniform=layer.uniform, fixed=bad)
    with pytest.raises(ConfigError, match="a: costs"):
        LayerCosts(name="a", channels=bad, width=8, uniform=layer.uniform)


def test_costs_that_are_no_numbers_are_refused_with_the_layer():
    with pytest.raises(CalibrationError, match="conv: a cost is negative, NaN"):
        LayerCosts(name="conv", channels=2, width=3, uniform=torch.full((2, 8), float("nan")))
    with pytest.raises(ConfigError, match=r"conv: costs of shape \(2, 7\)"):
        LayerCosts(name="conv", channels=2, width=3, uniform=torch.ones(2, 7))
    with pytest.raises(ConfigError, match="align=0"):
        allocate_budget([_layer(2)], 10**6, align=0)


def test_large_layers_of_equal_channels_are_solved_too():
    layers = [_layer(640, width=width) for width in (320, 2880)] * 4
    budget = int(2.5 * sum(layer.channels * layer.width for layer in layers))
    size, cost, _ = _solve(layers, budget)
    assert 0.999 * budget < size <= budget
    two, three = (sum(float(layer.uniform[:, bits].sum()) for layer in layers) for bits in (1, 2))
    assert cost <= (two + three) / 2 * 1.02
