import itertools

import pytest
import torch
from calibration_strategies import (
    FORMS,
    INPUT_FAMILIES,
    damped_error,
    fitted_inputs,
    levels_for,
    make_inputs,
    moments,
    select,
    weights_for,
)
from hypothesis import given
from hypothesis import strategies as st
from numerics_strategies import make_rows

from mpqdm_fx.numerics.levels.grids import dequantize, scales_around, uniform_levels
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.gptq import gptq
from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.refine import _Moments, _State, refine

dampings = st.sampled_from([0.01, 0.1, 1.0])
NOISE = 1e-6  # of float32 sums, relative to what the weights themselves would cost


def noise(W, levels, damped):
    return NOISE * damped_error(W, torch.zeros_like(W), levels, damped) + 1e-30


@st.composite
def rounded(draw, max_width: int = 16):
    """Draw moments, weights, level sets and codes: nearest or with error feedback."""
    drawn = draw(moments(max_width=max_width))
    W = draw(weights_for(drawn.gram.width))
    levels = draw(levels_for(W))
    feedback = draw(st.booleans())
    codes = gptq(W, levels, drawn.gram) if feedback else levels.snap(W).to(torch.int8)
    return drawn, W, levels, codes


def level_set(levels, row):
    if levels.tables is not None and levels.bits[row] <= 4:
        return levels.tables[row].unique().double()
    return uniform_levels(int(levels.bits[row])).double()


@given(rounded(), st.integers(1, 4), dampings)
def test_no_row_is_worse_than_it_was(drawn, passes, damping):
    known, W, levels, codes = drawn
    damped = known.damped(damping)
    refined, moved = refine(W, codes, levels, known.gram, passes=passes, damping=damping)
    before = damped_error(W, codes, levels, damped)
    after = damped_error(W, refined, moved, damped)
    assert bool((after <= before + noise(W, levels, damped)).all())
    untouched = (refined == codes).all(dim=1) & (moved.scale == levels.scale)
    assert bool(((after < before + noise(W, levels, damped)) | untouched).all())


@given(rounded(), st.integers(1, 3))
def test_codes_stay_on_their_levels_and_only_scales_move(drawn, passes):
    known, W, levels, codes = drawn
    refined, moved = refine(W, codes, levels, known.gram, passes=passes)
    assert refined.dtype == torch.int8
    assert moved.bits is levels.bits
    assert moved.tables is levels.tables
    assert torch.equal(moved.scale.bfloat16().float(), moved.scale)
    for row, row_codes in enumerate(refined.double()):
        assert set(row_codes.tolist()) <= set(level_set(levels, row).tolist())


@given(rounded(max_width=8), dampings)
def test_in_the_end_no_other_code_and_no_other_scale_is_better(drawn, damping):
    known, W, levels, codes = drawn
    codes, levels = refine(W, codes, levels, known.gram, passes=100, damping=damping)
    damped = known.damped(damping)
    best = damped_error(W, codes, levels, damped) - noise(W, levels, damped)
    for row, column in itertools.product(range(len(W)), range(W.shape[1])):
        row_levels = level_set(levels, row)
        tried = codes[row].double().expand(len(row_levels), -1).clone()
        tried[:, column] = row_levels
        many = select(levels, [row] * len(row_levels))
        errors = damped_error(W[row].expand(len(row_levels), -1), tried, many, damped)
        assert bool((errors >= best[row]).all())
    for scale in scales_around(levels.scale, -2, 2).float().T:
        moved = levels.with_scale(scale)
        assert bool((damped_error(W, codes, moved, damped) >= best).all())


@given(rounded())
def test_no_passes_change_nothing(drawn):
    known, W, levels, codes = drawn
    refined, moved = refine(W, codes, levels, known.gram, passes=0)
    assert torch.equal(refined, codes)
    assert torch.equal(moved.scale, levels.scale)


@given(rounded(), st.integers(1, 3))
def test_rows_of_all_widths_at_once_are_the_runs_of_each_row_stacked(drawn, passes):
    known, W, levels, codes = drawn
    refined, moved = refine(W, codes, levels, known.gram, passes=passes)
    for row in range(len(W)):
        index = slice(row, row + 1)
        alone, row_levels = refine(
            W[index], codes[index], select(levels, [row]), known.gram, passes=passes
        )
        assert torch.equal(alone, refined[index])
        assert torch.equal(row_levels.scale, moved.scale[index])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", INPUT_FAMILIES)
def test_both_forms_refine_to_the_same_codes_and_scales(family, seed):
    rows = fitted_inputs(make_inputs(5, 12, family, seed, offset=3), center=True)
    W = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
    levels = RowLevels.fit(W, torch.tensor([1, 2, 3, 4, 5, 8]), "codebook")
    refined = []
    for form in FORMS:
        gram = Gram.of(rows, form=form)
        refined.append(refine(W, levels.snap(W).to(torch.int8), levels, gram, passes=2))
    (primal, primal_levels), (dual, dual_levels) = refined
    assert torch.equal(primal, dual)
    assert torch.equal(primal_levels.scale, dual_levels.scale)


@pytest.mark.parametrize("form", FORMS)
def test_more_columns_than_a_block_are_refined_as_well(form):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 300, generator=generator).cumsum(dim=1)
    W = torch.randn(4, 300, generator=generator)
    levels = RowLevels.fit(W, torch.tensor([1, 2, 4, 8]), "codebook")
    gram = Gram.of(x, form=form)
    codes = levels.snap(W).to(torch.int8)
    refined, moved = refine(W, codes, levels, gram, passes=2)
    H = x.double().T @ x.double() / 64
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(300, dtype=torch.float64)
    before = damped_error(W, codes, levels, damped)
    after = damped_error(W, refined, moved, damped)
    assert bool((after < 0.8 * before).all())


@given(moments(max_width=12), st.sampled_from([1e-30, 1e30, 1e38]), st.integers(1, 8))
def test_extreme_weights_stay_finite(known, unit, bits):
    W = make_rows(3, known.gram.width, "normal", 1) / 8 * unit
    W[0] = 0
    levels = RowLevels.fit(W, torch.full((3,), bits), "uniform")
    codes = levels.snap(W).to(torch.int8)
    refined, moved = refine(W, codes, levels, known.gram, passes=2)
    assert bool(torch.isfinite(dequantize(refined, moved.scale)).all())
    assert bool((moved.scale > 0).all())


@given(rounded(), st.integers(1, 3), dampings)
def test_products_that_are_carried_along_stay_those_of_the_errors(drawn, passes, damping):
    known, W, levels, codes = drawn
    moments = _Moments(known.gram, damping)
    target = W.to(moments.dtype)
    state = _State.of(target, codes.to(moments.dtype), levels, moments)
    for _ in range(passes):
        state = state.refitted(target, moments.image(target))
        state.descend()
    again = _State.of(target, state.codes, state.levels, moments)
    scale = float(moments.image(target / again._scale).abs().max()) + 1e-30
    assert float((state.image - again.image).abs().max()) <= 1e-6 * scale
    torch.testing.assert_close(state.errors, again.errors, rtol=1e-6, atol=1e-6)
