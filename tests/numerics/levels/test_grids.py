import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numerics_strategies import importances, make_rows, weight_rows, weights_and_bits

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.levels.grids import (
    MAX_BITS,
    MIN_SCALE,
    dequantize,
    max_scale,
    round_scale,
    scales_around,
    snap,
    uniform_levels,
)
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.numerics.solve import rows as rows_module
from mpqdm_fx.numerics.solve.scales import quantize_uniform

BITS = range(1, MAX_BITS + 1)
TINY = torch.finfo(torch.float32).tiny


def top_of(bits: int) -> int:
    return 127 if bits == 8 else 2**bits - 1


def full(W, bits):
    return torch.full((len(W),), bits)


def error(W, codes, scale, importance=None):
    squared = (W.double() - dequantize(codes, scale).double()).square()
    return (squared if importance is None else squared * importance.double()).sum(dim=1)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_balanced_distinct_and_as_many_as_the_bits_hold(bits):
    levels = uniform_levels(bits)
    assert levels.dtype == torch.int8
    assert torch.equal(levels, -levels.flip(0))
    assert len(levels.unique()) == len(levels) == (2**bits if bits < 8 else 255)
    assert levels.int().diff().unique().numel() <= 1
    assert int(levels[-1]) == top_of(bits)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_widths_outside_one_to_eight_are_refused(bits):
    with pytest.raises(ConfigError, match="1 to 8"):
        uniform_levels(bits)
    with pytest.raises(ConfigError, match="1 to 8"):
        quantize_uniform(torch.ones(1, 2), torch.tensor([bits]))


@given(st.floats(0, 2.0**127, width=32))
def test_rounded_scales_are_bfloat16_and_the_nearest_ones(value):
    scale = round_scale(torch.tensor([value]))
    assert scale.dtype == torch.float32
    assert torch.equal(scale.bfloat16().float(), scale)
    assert scale.item() >= MIN_SCALE
    if value >= MIN_SCALE:
        assert abs(scale.item() - value) <= value * 2**-8


@given(st.floats(-30, 30), st.integers(-20, 0), st.integers(0, 140))
def test_scales_around_are_consecutive_bfloat16_values(log_scale, first, last):
    scale = torch.tensor([10.0**log_scale])
    around = scales_around(scale, first, last)[0].float()
    assert torch.equal(around.bfloat16().float(), around)
    assert torch.equal(around[-first : 1 - first], round_scale(scale))
    assert bool((around.bfloat16().view(torch.int16).diff() == 1).all())
    if last >= 128:
        assert float(around[128 - first]) == 2 * float(round_scale(scale))


@pytest.mark.parametrize("top", [1, 3, 7, 15, 31, 63, 127])
def test_the_largest_scale_keeps_the_top_level_finite_and_the_next_one_does_not(top):
    scale = torch.tensor(max_scale(top))
    assert torch.equal(scale.bfloat16().float(), scale)
    assert math.isfinite((scale * top).item())
    following = (scale.bfloat16().view(torch.int16) + 1).view(torch.bfloat16).float()
    assert not math.isfinite((following * top).item())


@given(weights_and_bits(), st.floats(-3, 3))
def test_snap_is_within_half_a_spacing_inside_the_range_and_clamps_outside(drawn, log_ratio):
    W, bits = drawn
    tops = torch.tensor([top_of(int(b)) for b in bits])
    scale = round_scale(W.abs().amax(dim=1) / tops * 10.0**log_ratio)
    codes = snap(W, scale, bits).double()
    half = torch.where(bits == 8, 0.5, 1.0).double()[:, None]
    x = W.double() / scale.double()[:, None]
    inside = x.abs() <= tops[:, None] + half
    slack = half * (1 + 1e-6) + x.abs() * 2**-23  # x itself is rounded to float32
    assert bool((((x - codes).abs() <= slack) | ~inside).all())
    assert bool(((codes == x.sign() * tops[:, None]) | inside).all())
    for row, width in zip(codes, bits.tolist(), strict=True):
        assert set(row.tolist()) <= set(uniform_levels(width).tolist())


@given(weights_and_bits(), st.data())
def test_snap_is_monotone(drawn, data):
    W, bits = drawn
    scale = round_scale(W.abs().amax(dim=1) * data.draw(st.floats(0.01, 2)))
    codes = snap(W.sort(dim=1).values, scale, bits)
    assert bool((codes.int().diff(dim=1) >= 0).all())


@given(
    npst.arrays("float32", st.tuples(st.just(1), st.integers(1, 12)), elements=st.floats(width=32)),
    st.integers(1, 8),
)
def test_any_finite_float32_gives_legal_codes_and_finite_values(array, bits):
    W = torch.from_numpy(array)
    if not bool(torch.isfinite(W).all()):
        with pytest.raises(CalibrationError, match="channel 0"):
            quantize_uniform(W, full(W, bits))
        return
    codes, scale = quantize_uniform(W, full(W, bits))
    assert set(codes.flatten().tolist()) <= set(uniform_levels(bits).tolist())
    assert bool(torch.isfinite(dequantize(codes, scale)).all())
    assert bool((scale >= MIN_SCALE).all())


@given(st.data())
def test_codes_are_the_nearest_levels_of_the_stored_bfloat16_scale(data):
    W, bits = data.draw(weights_and_bits())
    codes, scale = quantize_uniform(W, bits, data.draw(importances(W.shape)))
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(codes, snap(W, scale, bits))


@given(weights_and_bits())
def test_dequantized_values_are_exact_and_divide_back_to_their_codes(drawn):
    codes, scale = quantize_uniform(*drawn)
    W = dequantize(codes, scale)
    assert torch.equal(W.double(), codes.double() * scale.double()[:, None])
    assert torch.equal((W / scale[:, None]).round().to(torch.int8), codes)


@given(weights_and_bits(), st.integers(0, 2**16))
def test_every_legal_code_survives_dequantize_and_snap(drawn, seed):
    W, bits = drawn
    generator = torch.Generator().manual_seed(seed)
    codes = torch.empty(W.shape, dtype=torch.int8)
    for row, width in enumerate(bits.tolist()):
        levels = uniform_levels(width)
        codes[row] = levels[torch.randint(len(levels), codes[row].shape, generator=generator)]
    scale = round_scale(torch.rand(len(W), generator=generator) * 10.0 ** (seed % 60 - 30))
    assert torch.equal(snap(dequantize(codes, scale), scale, bits), codes)


@given(weights_and_bits(), st.data())
def test_rows_on_a_grid_that_reach_its_end_come_back_bit_for_bit(drawn, data):
    W, bits = drawn
    tops = torch.tensor([top_of(int(b)) for b in bits])
    scale = round_scale(W.abs().amax(dim=1).clamp_min(1e-30) / tops * data.draw(st.floats(0.1, 1)))
    codes = snap(W, scale, bits)
    codes[:, 0] = tops.to(torch.int8)
    again, scale_again = quantize_uniform(dequantize(codes, scale), bits)
    assert torch.equal(again, codes)
    assert torch.equal(scale_again, scale)


@given(weights_and_bits(), st.data())
def test_quantizing_a_quantized_row_changes_no_value(drawn, data):
    W, bits = drawn
    once = dequantize(*quantize_uniform(W, bits))
    again = dequantize(*quantize_uniform(once, bits, data.draw(importances(W.shape))))
    assert torch.equal(once, again)


@given(weights_and_bits(), st.data())
def test_powers_of_two_scale_the_scale_and_leave_the_codes(drawn, data):
    W, bits = drawn
    W = W[W.abs().amax(dim=1) > 0]
    if not len(W):
        return
    bits, importance = bits[: len(W)], data.draw(importances(W.shape))
    exponent = data.draw(st.integers(-40, 60))
    codes, scale = quantize_uniform(W, bits, importance)
    moved = torch.ldexp(W.double(), torch.tensor(exponent)).float()
    exact = bool((torch.ldexp(moved.double(), torch.tensor(-exponent)) == W).all())
    if not exact or scale.min().item() * 2.0**exponent < TINY:
        return
    codes_moved, scale_moved = quantize_uniform(moved, bits, importance)
    assert torch.equal(codes_moved, codes)
    assert torch.equal(scale_moved.double(), scale.double() * 2.0**exponent)


@given(st.data())
def test_rows_do_not_influence_each_other(data):
    W, bits = data.draw(weights_and_bits())
    importance = data.draw(importances(W.shape))
    order = torch.tensor(data.draw(st.permutations(range(len(W)))))
    h = importance if importance is None or importance.ndim == 1 else importance[order]
    codes, scale = quantize_uniform(W, bits, importance)
    moved_codes, moved_scale = quantize_uniform(W[order], bits[order], h)
    assert torch.equal(moved_codes, codes[order])
    assert torch.equal(moved_scale, scale[order])


@given(st.data())
def test_mixed_widths_are_the_rows_of_single_widths(data):
    W, bits = data.draw(weights_and_bits())
    importance = data.draw(importances(W.shape))
    codes, scale = quantize_uniform(W, bits, importance)
    for width in bits.unique().tolist():
        single_codes, single_scale = quantize_uniform(W, full(W, width), importance)
        assert torch.equal(codes[bits == width], single_codes[bits == width])
        assert torch.equal(scale[bits == width], single_scale[bits == width])


@given(st.data())
def test_chunks_change_nothing(data):
    W, bits = data.draw(weights_and_bits())
    importance = data.draw(importances(W.shape))
    whole = quantize_uniform(W, bits, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "MAX_CHUNK", 1)
        chunked = quantize_uniform(W, bits, importance)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


@given(st.data())
def test_one_bit_is_the_weighted_mean_magnitude(data):
    W = data.draw(weight_rows()) + 0.01
    importance = data.draw(importances(W.shape))
    h = torch.ones_like(W) if importance is None else importance.expand_as(W)
    h = torch.where((h > 0).any(dim=1, keepdim=True), h, torch.ones_like(h)).double()
    _, scale = quantize_uniform(W, full(W, 1), importance)
    optimum = (h * W.double().abs()).sum(dim=1) / h.sum(dim=1)
    optimum = optimum.clamp_min(MIN_SCALE)
    assert bool(((scale.double() - optimum).abs() <= optimum * 2**-8).all())


def scanned_error(W, bits, h, points=200):
    """Least error over a blind scan of scales."""
    reach = (W.abs() * (h > 0)).amax(dim=1)
    best = torch.full((len(W),), math.inf, dtype=torch.float64)
    for ratio in torch.logspace(-2, math.log10(2), points):
        scale = round_scale(reach / top_of(bits) * ratio)
        best = torch.minimum(best, error(W, snap(W, scale, bits), scale, h))
    return best


@settings(max_examples=15)
@given(weight_rows(max_rows=3, max_width=12), st.integers(2, 4), st.data())
def test_no_scale_of_a_blind_scan_is_much_better(W, bits, data):
    importance = data.draw(importances(W.shape))
    h = torch.ones_like(W) if importance is None else importance.expand_as(W)
    h = torch.where((h * W != 0).any(dim=1, keepdim=True), h, torch.ones_like(h))
    mine = error(W, *quantize_uniform(W, full(W, bits), importance), h)
    # A share of 2^-2b of the row's energy, what a width should cost: on a few weights the error
    # has many narrow valleys.
    energy = (h.double() * W.double().square()).sum(dim=1)
    allowance = energy * 2.0 ** (-2 * bits) * 0.1 + 1e-300
    assert bool((mine <= scanned_error(W, bits, h) * 1.02 + allowance).all())


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
@pytest.mark.parametrize("columns", [36, 600])
def test_wide_levels_come_close_to_a_blind_scan(bits, columns):
    # Rows of 36 weights are evaluated weight by weight, rows of 600 through running sums.
    W = make_rows(20, columns, "normal", bits)
    mine = error(W, *quantize_uniform(W, full(W, bits)))
    assert float(mine.sum()) <= 1.02 * float(scanned_error(W, bits, torch.ones_like(W)).sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [3.4e38, 2.0**127, 1e-38, 1e-45])
def test_the_ends_of_float32_give_usable_scales(bits, value):
    W = torch.tensor([[value, -value, value / 3, 0.0]])
    codes, scale = quantize_uniform(W, full(W, bits))
    assert float(scale) <= max_scale(top_of(bits))
    assert bool(torch.isfinite(dequantize(codes, scale)).all())
    assert float(error(W, codes, scale)) <= float(W.double().square().sum()) + 4 * MIN_SCALE**2


@given(weight_rows(), st.integers(1, 8))
def test_a_weight_without_importance_does_not_move_the_scale(W, bits):
    W = W[(W != 0).any(dim=1)]  # a row that is zero where it matters is fitted with equal weights
    if not len(W):
        return
    h = torch.ones(W.shape[1] + 1)
    h[0] = 0
    disturbed = torch.cat([torch.full((len(W), 1), 1e35), W], dim=1)
    _, scale = quantize_uniform(disturbed, full(W, bits), h)
    _, expected = quantize_uniform(W, full(W, bits))
    error_there = error(W, snap(W, scale, bits), scale)
    error_alone = error(W, snap(W, expected, bits), expected)
    energy = W.double().square().sum(dim=1)
    assert bool((error_there <= 2 * error_alone + energy * 2.0 ** (-2 * bits) + 1e-60).all())


def test_two_bits_on_three_weights_reach_the_optimum_over_all_code_vectors():
    # Brute force over every code vector with its own least-squares scale: the true optimum.
    generator = torch.Generator().manual_seed(7)
    W = torch.randn(40, 3, generator=generator)
    codes = torch.tensor(list(itertools.product([-3, -1, 1, 3], repeat=3)), dtype=torch.float64)
    fitted = (W.double() @ codes.T) / codes.square().sum(dim=1)  # [40, 64]
    best = (W.double()[:, None] - fitted[:, :, None] * codes).square().sum(dim=2).amin(dim=1)
    mine = error(W, *quantize_uniform(W, full(W, 2)))
    rounding = W.double().square().sum(dim=1) * 2.0**-16  # of the scale, to bfloat16
    assert bool((mine <= best + rounding).all())


# J. Max, "Quantizing for Minimum Distortion" (1960), table II: uniform quantizer, unit normal.
@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154), (5, 0.003495)]
)
def test_gaussian_rows_reach_the_optimum_uniform_quantizer(bits, distortion):
    W = torch.randn(40, 20000, generator=torch.Generator().manual_seed(bits))
    codes, scale = quantize_uniform(W, full(W, bits))
    measured = sqnr_db(W, dequantize(codes, scale))
    assert measured == pytest.approx(-10 * math.log10(distortion), abs=0.06)


def test_importance_moves_the_error_to_where_it_counts_less():
    W = torch.randn(16, 200, generator=torch.Generator().manual_seed(0))
    W[:, 0] = 100
    h = torch.ones(200)
    h[0] = 0
    plain = quantize_uniform(W, full(W, 3))
    weighted = quantize_uniform(W, full(W, 3), h)
    assert bool((error(W, *weighted, h) < error(W, *plain, h)).all())


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_row_is_zero_in_effect(bits):
    codes, scale = quantize_uniform(torch.zeros(2, 5), full(torch.zeros(2, 5), bits))
    assert scale.tolist() == [MIN_SCALE] * 2
    assert float(dequantize(codes, scale).abs().max()) <= MIN_SCALE


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3), "matrix"),
        (torch.zeros(0, 3), "matrix"),
        (torch.ones(2, 2, dtype=torch.int32), "matrix"),
        (torch.tensor([[1.0, 2.0], [math.nan, 1.0]]), "channel 1"),
        (torch.tensor([[1e39]], dtype=torch.float64), "channel 0"),
    ],
)
def test_bad_weights_are_refused(bad, message):
    with pytest.raises((ConfigError, CalibrationError), match=message):
        quantize_uniform(bad, torch.full((len(bad),), 2))


@pytest.mark.parametrize(
    "bad", [torch.ones(3), torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.inf])]
)
def test_bad_importance_is_refused(bad):
    with pytest.raises((ConfigError, CalibrationError), match="importance"):
        quantize_uniform(torch.ones(2, 2), torch.tensor([2, 2]), bad)


def test_bits_must_be_one_integer_per_row():
    for bits in (torch.tensor([2]), torch.tensor([2.0, 2.0])):
        with pytest.raises(ConfigError, match="one width per output channel"):
            quantize_uniform(torch.ones(2, 2), bits)


def test_dequantize_wants_one_scale_per_row():
    with pytest.raises(ConfigError, match="2 rows"):
        dequantize(torch.ones(2, 2, dtype=torch.int8), torch.ones(3))
