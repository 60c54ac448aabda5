import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_strategies import importances, weight_rows

from mpqdm_fx.numerics.solve.rows import (
    SortedRows,
    exponents,
    powers_of_two,
    row_chunks,
    unit_importance,
)


@given(st.integers(-1022, 1023))
def test_powers_of_two_are_exact(exponent):
    assert powers_of_two(torch.tensor([exponent])).item() == 2.0**exponent


@given(st.floats(1e-300, 1e300))
def test_exponents_bring_a_value_into_half_to_one(value):
    exponent = exponents(torch.tensor([value], dtype=torch.float64))
    assert 0.5 <= value * powers_of_two(-exponent).item() < 1


def test_zero_has_exponent_zero():
    assert exponents(torch.zeros(1)).item() == 0


@given(st.integers(0, 50), st.integers(1, 10**8))
def test_chunks_cover_all_rows_once_in_order(rows, width):
    covered = [index for part in row_chunks(rows, width) for index in range(rows)[part]]
    assert covered == list(range(rows))


@given(st.data())
def test_importance_keeps_its_ratios_and_idle_rows_become_equal(data):
    magnitude = data.draw(weight_rows()).abs()
    importance = data.draw(importances(magnitude.shape))
    unit = unit_importance(importance, magnitude)
    if importance is None:
        assert unit is None
        return
    h = importance.expand_as(magnitude)
    idle = ~((h > 0) & (magnitude > 0)).any(dim=1)
    assert bool((unit[idle] == 1).all())
    peak = h.amax(dim=1, keepdim=True)[~idle]
    scale = unit[~idle].amax(dim=1, keepdim=True)
    assert bool(((scale >= 0.5) & (scale < 1)).all())
    assert torch.equal(unit[~idle] * (peak / scale), h[~idle])


@given(st.data())
def test_errors_from_running_sums_equal_errors_weight_by_weight(data):
    W = data.draw(weight_rows())
    W = W / W.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    h = unit_importance(data.draw(importances(W.shape)), W.abs())
    levels = torch.linspace(-1, 1, data.draw(st.integers(2, 9)), dtype=torch.float64)
    levels = levels * data.draw(st.floats(0.1, 2))
    measured = SortedRows.of(W, h).error(levels.expand(len(W), 1, -1))[:, 0]
    nearest = (W.double()[:, :, None] - levels).abs().amin(dim=2).square()
    expected = (nearest if h is None else nearest * h.double()).sum(dim=1)
    assert torch.allclose(measured, expected, rtol=1e-9, atol=1e-6)


def test_the_sums_below_a_threshold_leave_out_the_values_on_it():
    rows = SortedRows.of(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1.0, 10.0, 100.0]]))
    mass, total = rows.below(torch.tensor([[1.0, 2.0, 2.5, 9.0]], dtype=torch.float64))
    assert mass.tolist() == [[0.0, 10.0, 110.0, 111.0]]
    assert total.tolist() == [[0.0, 10.0, 210.0, 213.0]]


@pytest.mark.parametrize("h", [None, torch.ones(1, 3)])
def test_no_importance_is_the_importance_of_ones(h):
    rows = SortedRows.of(torch.tensor([[0.5, -1.0, 0.25]]), h)
    mass, total = rows.all()
    assert mass.tolist() == [3.0]
    assert total.tolist() == [-0.25]
    assert rows.energy.tolist() == [1.3125]


@given(weight_rows(), st.booleans(), st.booleans())
def test_rows_are_sorted_as_torch_sorts_them(W, coarse, negative):
    values = (W / W.abs().amax().clamp_min(1e-30) * 3).round() if coarse else W  # ties, and -0
    values = values if negative else values.abs()
    want = torch.sort(values, dim=1, stable=True)
    h = torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    weighted, plain = SortedRows.of(values, h), SortedRows.of(values, None)
    assert torch.equal(weighted.values, want.values)
    assert torch.equal(plain.values, want.values)
    exact = h.gather(1, want.indices).double().cumsum(dim=1)
    assert torch.equal(weighted.count[:, 1:], exact)
    assert bool((weighted.count[:, 0] == 0).all())


@given(weight_rows(), st.data())
def test_some_rows_are_those_sorted_alone(W, data):
    h = data.draw(importances(W.shape))
    h = None if h is None else h.float().expand_as(W).contiguous()
    picked = torch.tensor(data.draw(st.lists(st.integers(0, len(W) - 1), min_size=1, max_size=4)))
    taken = SortedRows.of(W, h).take(picked)
    alone = SortedRows.of(W[picked], None if h is None else h[picked])
    assert torch.equal(taken.values, alone.values)
    assert torch.equal(taken.total, alone.total)
    assert torch.equal(taken.energy, alone.energy)
    assert (taken.count is None) == (h is None)
