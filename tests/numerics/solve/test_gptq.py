import logging

import pytest
import torch
from calibration_strategies import (
    FORMS,
    damped_error,
    fitted_inputs,
    input_rows,
    integers,
    levels_for,
    make_inputs,
    make_moments,
    moments,
    select,
    weights_for,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.numerics.levels.grids import round_scale
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve import gptq as gptq_module
from mpqdm_fx.numerics.solve.gptq import GPTQ_DAMPING, gptq
from mpqdm_fx.numerics.solve.gram import Gram

NARROW = gptq_module._NARROW


@pytest.fixture(scope="module", autouse=True)
def _dual_form_of_all_widths():
    """Without it, few of the small layers drawn here would be rounded in the dual form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq_module, "_NARROW", 0)
        yield


kinds = st.sampled_from(["uniform", "codebook"])
dampings = st.sampled_from([0.01, 0.1, 1.0])


def order_of(gram: Gram, act_order: bool) -> torch.Tensor:
    if act_order:
        return torch.argsort(gram.diagonal, descending=True, stable=True)
    return torch.arange(gram.width)


def textbook_gptq(W, levels, damped, order):
    """Algorithm 1 of arXiv 2210.17323, column by column, from the inverse's Cholesky factor."""
    inverse = torch.linalg.inv(damped[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    rest, codes = W.double()[:, order], torch.empty_like(W, dtype=torch.int8)
    for j in range(W.shape[1]):
        code = levels.snap(rest[:, j : j + 1])[:, 0]
        codes[:, order[j]] = code.to(torch.int8)
        error = (rest[:, j] - code * levels.scale.double()) / factor[j, j]
        rest[:, j:] -= error[:, None] * factor[j, j:]
    return codes


def naive_pivots(damped, order):
    """What each column's rounding costs once all later ones are free: Schur complements."""
    A = damped[order][:, order]
    pivots = []
    for j in range(len(A)):
        pivot, later = A[j, j], A[j + 1 :, j + 1 :]
        coupling = A[j, j + 1 :]
        pivots.append(pivot - coupling @ torch.linalg.solve(later, coupling))
    return torch.stack(pivots)


@given(moments(), dampings, st.booleans(), st.integers(1, 9), st.data())
def test_codes_are_those_of_the_textbook_in_both_orders_and_forms(
    drawn, damping, act_order, block_size, data
):
    W = data.draw(weights_for(drawn.gram.width))
    levels = data.draw(levels_for(W))
    codes = gptq(W, levels, drawn.gram, damping=damping, act_order=act_order, block_size=block_size)
    order = order_of(drawn.gram, act_order)
    expected = textbook_gptq(W, levels, drawn.damped(damping), order)
    assert codes.dtype == torch.int8
    assert torch.equal(codes, expected)


@given(input_rows(), st.booleans(), dampings, st.booleans(), st.data())
def test_both_forms_round_to_the_same_codes(rows, center, damping, act_order, data):
    W = data.draw(weights_for(rows.shape[1]))
    levels = data.draw(levels_for(W))
    fitted = fitted_inputs(rows, center=center)
    primal, dual = (
        gptq(W, levels, Gram.of(fitted, form=form), damping=damping, act_order=act_order)
        for form in FORMS
    )
    assert torch.equal(primal, dual)


@given(input_rows(), dampings, st.booleans(), st.data())
def test_rows_of_few_more_numbers_get_the_same_codes_from_their_matrix(
    rows, damping, act_order, data
):
    W = data.draw(weights_for(rows.shape[1]))
    levels = data.draw(levels_for(W))
    gram = Gram.of(rows, form="dual")
    dual = gptq(W, levels, gram, damping=damping, act_order=act_order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq_module, "_NARROW", NARROW)
        assert torch.equal(dual, gptq(W, levels, gram, damping=damping, act_order=act_order))


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_the_default_size_change_nothing(form):
    rows = make_inputs(40, 200, "coupled", 3)
    W = torch.randn(3, 200, generator=torch.Generator().manual_seed(4))
    levels = RowLevels.fit(W, torch.tensor([2, 3, 5]), "uniform")
    drawn = make_moments(rows, form=form)
    codes = gptq(W, levels, drawn.gram)
    assert torch.equal(codes, gptq(W, levels, drawn.gram, block_size=1000))
    order = order_of(drawn.gram, True)
    assert torch.equal(codes, textbook_gptq(W, levels, drawn.damped(GPTQ_DAMPING), order))


@given(moments(), kinds, st.data())
def test_rows_of_all_widths_at_once_are_the_runs_of_each_width_stacked(drawn, kind, data):
    W = data.draw(weights_for(drawn.gram.width, max_rows=8))
    bits = data.draw(st.lists(st.integers(1, 8), min_size=len(W), max_size=len(W)))
    bits = torch.tensor(bits)
    importance = drawn.gram.diagonal.float()
    codes = gptq(W, RowLevels.fit(W, bits, kind, importance), drawn.gram)
    for width in bits.unique().tolist():
        rows = bits == width
        uniform = RowLevels.fit(W, torch.full_like(bits, width), kind, importance)
        assert torch.equal(codes[rows], gptq(W, uniform, drawn.gram)[rows])
        alone = RowLevels.fit(W[rows], bits[rows], kind, importance)
        assert torch.equal(codes[rows], gptq(W[rows], alone, drawn.gram))


@given(moments(), dampings, st.booleans(), st.data())
def test_codes_are_levels_of_their_rows(drawn, damping, act_order, data):
    W = data.draw(weights_for(drawn.gram.width))
    levels = data.draw(levels_for(W))
    codes = gptq(W, levels, drawn.gram, damping=damping, act_order=act_order)
    values = codes.double() * levels.scale.double()[:, None]
    assert torch.equal(levels.snap(values), codes.double())


@given(moments(), st.data())
def test_weights_on_their_levels_keep_them(drawn, data):
    W = data.draw(weights_for(drawn.gram.width))
    levels = data.draw(levels_for(W))
    codes = levels.snap(W)
    assert torch.equal(gptq(codes * levels.scale[:, None], levels, drawn.gram).float(), codes)


@given(st.integers(1, 12), st.sampled_from(FORMS), st.booleans(), st.data())
def test_without_correlation_it_is_nearest_rounding(width, form, act_order, data):
    diagonal = integers(data.draw(st.integers(0, 99)), width, reach=7)
    rows = torch.cat([diagonal.diag(), -diagonal.diag()])  # each row moves one column
    gram = Gram.of(rows, form=form)
    W = data.draw(weights_for(width))
    levels = data.draw(levels_for(W))
    nearest = levels.snap(W.double()).to(torch.int8)
    assert torch.equal(gptq(W, levels, gram, act_order=act_order), nearest)


@given(moments(), dampings, st.integers(4, 8), st.booleans(), st.data())
def test_inside_the_range_the_damped_error_is_at_most_half_a_spacing_per_pivot(
    drawn, damping, bits, act_order, data
):
    W = data.draw(weights_for(drawn.gram.width))
    top = 127 if bits == 8 else 2**bits - 1
    scale = round_scale(3 * W.abs().amax(dim=1) / top)
    levels = RowLevels(bits=torch.full((len(W),), bits), scale=scale, tables=None)
    codes = gptq(W, levels, drawn.gram, damping=damping, act_order=act_order)
    inside = codes.abs().amax(dim=1) < top
    assume(bool(inside.any()))
    damped = drawn.damped(damping)
    pivots = naive_pivots(damped, order_of(drawn.gram, act_order)).sum()
    half = scale.double() * (0.5 if bits == 8 else 1)
    error = damped_error(W, codes, levels, damped)
    assert bool((error <= half.square() * pivots * (1 + 1e-9))[inside].all())


@pytest.mark.parametrize("bits", [5, 6])
@pytest.mark.parametrize("family", ["white", "coupled", "shared", "low_rank"])
@pytest.mark.parametrize("form", FORMS)
def test_pivots_turn_the_error_of_nearest_rounding_into_that_of_gptq(bits, family, form):
    drawn = make_moments(make_inputs(60, 40, family, bits), form=form)
    W = torch.randn(1000, 40, generator=torch.Generator().manual_seed(bits))
    scale = round_scale(1.5 * W.abs().amax(dim=1) / (2**bits - 1))  # no clipping
    levels = RowLevels(bits=torch.full((1000,), bits), scale=scale, tables=None)
    damped = drawn.damped(GPTQ_DAMPING)
    nearest = damped_error(W, levels.snap(W), levels, damped).sum()
    fed_back = damped_error(W, gptq(W, levels, drawn.gram), levels, damped).sum()
    # independent errors cost the trace without feedback, and the pivots with it
    gain = float(naive_pivots(damped, order_of(drawn.gram, True)).sum() / damped.trace())
    assert float(fed_back / nearest) == pytest.approx(gain, rel=0.1)
    # rounding errors are spread evenly over a spacing of two scales
    variance = scale.double().square().sum() / 3
    assert float(fed_back / (variance * damped.trace())) == pytest.approx(gain, rel=0.1)


@given(moments(), st.integers(-12, 12), st.data())
def test_units_of_inputs_and_weights_do_not_matter(drawn, exponent, data):
    assume(bool((drawn.gram.diagonal > 0).any()))
    W = data.draw(weights_for(drawn.gram.width))
    levels = data.draw(levels_for(W))
    form = "dual" if drawn.gram.matrix is None else "primal"
    scaled = Gram.of(drawn.rows * 2.0**exponent, form=form)
    codes = gptq(W, levels, drawn.gram)
    assert torch.equal(gptq(W, levels, scaled), codes)
    wider = levels.with_scale(levels.scale * 2.0**exponent)
    assert torch.equal(gptq(W * 2.0**exponent, wider, drawn.gram), codes)


@given(moments(), st.data())
def test_rows_follow_their_permutation(drawn, data):
    W = data.draw(weights_for(drawn.gram.width))
    levels = data.draw(levels_for(W))
    order = torch.tensor(data.draw(st.permutations(range(len(W)))))
    moved = gptq(W[order], select(levels, order), drawn.gram)
    assert torch.equal(moved, gptq(W, levels, drawn.gram)[order])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["low_rank", "dead_column", "shared"])
def test_singular_moments_are_damped_without_a_warning(form, family, caplog):
    rows = make_inputs(2, 12, family, 1)
    drawn = make_moments(rows, form=form)
    assert int(torch.linalg.matrix_rank(drawn.H)) < 12
    W = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    levels = RowLevels.fit(W, torch.tensor([2, 4, 8]), "uniform")
    with caplog.at_level(logging.WARNING):
        codes = gptq(W, levels, drawn.gram)
    assert not caplog.records
    expected = textbook_gptq(W, levels, drawn.damped(GPTQ_DAMPING), order_of(drawn.gram, True))
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_leave_nearest_rounding(form):
    gram = Gram.of(torch.zeros(4, 6), form=form)
    W = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    levels = RowLevels.fit(W, torch.tensor([2, 4, 8]), "codebook")
    assert torch.equal(gptq(W, levels, gram), levels.snap(W).to(torch.int8))


@pytest.mark.parametrize("form", FORMS)
def test_moments_that_are_not_finite_are_refused(form):
    huge = torch.full((4, 3), 1e30)  # finite, but its square is not in float32
    gram = Gram.of(huge, form=form)
    W = torch.ones(1, 3)
    levels = RowLevels.fit(W, torch.tensor([4]), "uniform")
    with pytest.raises(CalibrationError, match="degenerate or holds NaN"):
        gptq(W, levels, gram)
