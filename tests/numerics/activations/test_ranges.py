import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numerics_strategies import make_rows
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.activations import ranges
from mpqdm_fx.numerics.activations.ranges import affine_qparams, fake_quantize, search_range
from mpqdm_fx.numerics.solve.rows import SortedRows

BITS = st.integers(1, 8)
finite = st.floats(-1e30, 1e30)
FAMILIES = ("normal", "student_t", "outlier_element", "constant", "tiny", "huge", "small_integers")


def limits(bits):
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def loss(x, qparams, bits):
    return float((x.double() - fake_quantize(x, *qparams, bits).double()).square().sum())


@st.composite
def samples(draw):
    x = make_rows(
        1, draw(st.integers(1, 400)), draw(st.sampled_from(FAMILIES)), draw(st.integers(0, 2**16))
    )
    return {"both": x, "positive": x.abs(), "negative": -x.abs()}[
        draw(st.sampled_from(["both", "positive", "negative"]))
    ].flatten()


@given(finite, finite, BITS)
def test_parameters_are_legal_and_zero_is_exact(a, b, bits):
    scale, zero_point = affine_qparams(min(a, b), max(a, b), bits)
    quant_min, quant_max = limits(bits)
    assert isinstance(scale, float)
    assert isinstance(zero_point, int)
    assert math.isfinite(scale)
    assert scale > 0
    assert scale == float(torch.tensor(scale, dtype=torch.float32))
    assert quant_min <= zero_point <= quant_max
    assert fake_quantize(torch.zeros(1), scale, zero_point, bits).item() == 0


@given(finite, finite, st.integers(2, 8))
def test_the_levels_cover_the_range_to_half_a_step(a, b, bits):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    scale, zero_point = affine_qparams(min(a, b), max(a, b), bits)
    quant_min, quant_max = limits(bits)
    half = scale * 0.5 * (1 + 1e-5)
    assert (quant_min - zero_point) * scale <= low + half
    assert (quant_max - zero_point) * scale >= high - half


@given(
    npst.arrays("float32", st.integers(1, 30), elements=st.floats(-1, 1, width=32)),
    st.floats(-10, 10),
    st.floats(0.01, 30),
    BITS,
)
def test_fake_quantize_is_torch_decomposed_bit_for_bit(array, log_scale, reach, bits):
    scale, zero_point = affine_qparams(-(10.0**log_scale), 10.0**log_scale * reach, bits)
    x = torch.from_numpy(array) * 10.0**log_scale * (reach + 1)
    half_steps = torch.arange(-300, 300) * 0.5 * scale  # ties
    x = torch.cat([x, half_steps.float(), torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    ops = torch.ops.quantized_decomposed
    arguments = (scale, zero_point, *limits(bits), torch.int8)
    expected = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *arguments), *arguments)
    ours = fake_quantize(x, scale, zero_point, bits)
    assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))


@given(samples(), BITS)
def test_fake_quantize_is_idempotent_and_monotone(x, bits):
    qparams = affine_qparams(float(x.min()), float(x.max()), bits)
    once = fake_quantize(x.sort().values, *qparams, bits)
    assert torch.equal(fake_quantize(once, *qparams, bits), once)
    assert bool((once.diff() >= 0).all())
    assert len(once.unique()) <= 2**bits


@given(samples(), st.integers(2, 8))
def test_inside_the_range_the_error_is_at_most_half_a_step(x, bits):
    scale, zero_point = affine_qparams(float(x.min()), float(x.max()), bits)
    quant_min, quant_max = limits(bits)
    low, high = (quant_min - zero_point) * scale, (quant_max - zero_point) * scale
    inside = (x >= low) & (x <= high)
    error = (x - fake_quantize(x, scale, zero_point, bits)).abs()[inside]
    assert bool((error <= scale * 0.5 * (1 + 1e-4)).all())


@given(samples(), st.integers(2, 8), st.integers(2, 12))
def test_the_search_is_never_worse_than_the_whole_range(x, bits, steps):
    low, high = float(x.min()), float(x.max())
    qparams = search_range(x, low, high, bits, steps=steps)
    assert loss(x, qparams, bits) <= loss(x, affine_qparams(low, high, bits), bits)
    assert limits(bits)[0] <= qparams[1] <= limits(bits)[1]
    assert qparams[0] == float(torch.tensor(qparams[0], dtype=torch.float32))


def test_a_search_that_fails_falls_back_to_the_whole_range(monkeypatch):
    monkeypatch.setattr(ranges, "_best_shrink", lambda *_: (0.02, 0.02))
    assert search_range(torch.linspace(-1, 2, 50), -1.0, 2.0, 8) == affine_qparams(-1.0, 2.0, 8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("family", ["normal", "student_t"])
def test_the_search_comes_close_to_a_blind_scan_of_both_ends(bits, family):
    x = make_rows(1, 3000, family, 5).flatten()
    low, high = float(x.min()), float(x.max())
    ratios = torch.logspace(-1.8, 0, 60).tolist()
    best = min(
        loss(x, affine_qparams(a * low, b * high, bits), bits) for a in ratios for b in ratios
    )
    assert loss(x, search_range(x, low, high, bits), bits) <= 1.01 * best


def test_an_outlier_is_clipped_when_the_bulk_pays_for_it():
    x = torch.cat(
        [torch.randn(5000, generator=torch.Generator().manual_seed(0)), torch.ones(1) * 60]
    )
    scale, _ = search_range(x, float(x.min()), 60.0, 4)
    assert scale < 0.5 * affine_qparams(float(x.min()), 60.0, 4)[0]


def test_extremes_outside_the_samples_are_allowed_and_clipped_only_if_it_pays():
    x = torch.linspace(-1, 1, 1000)
    scale, _ = search_range(x, -100.0, 100.0, 8)
    assert scale < affine_qparams(-100.0, 100.0, 8)[0] / 20


@pytest.mark.parametrize("value", [0.0, 3.5, -3.5, 1e-38, -3e38])
def test_constant_tensors_get_a_usable_range(value):
    x = torch.full((10,), value)
    scale, zero_point = search_range(x, value, value, 8)
    error = (x - fake_quantize(x, scale, zero_point, 8)).abs().max().item()
    assert error <= abs(value) * 1e-3 + 2.0**-120


def test_no_samples_give_the_whole_range():
    assert search_range(torch.empty(0), -1.0, 2.0, 8) == affine_qparams(-1.0, 2.0, 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused(bad):
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        search_range(torch.tensor([0.0, bad]), 0.0, 1.0, 8)
    with pytest.raises(CalibrationError, match="not finite"):
        affine_qparams(min(bad, 0.0) if bad == bad else bad, max(bad, 0.0), 8)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="1 to 8"):
        affine_qparams(0, 1, 9)
    with pytest.raises(ConfigError, match="1 to 8"):
        fake_quantize(torch.ones(1), 1.0, 0, 0)
    with pytest.raises(ConfigError, match="larger end"):
        affine_qparams(1.0, -1.0, 8)
    with pytest.raises(ConfigError, match="2 steps"):
        search_range(torch.ones(3), 0.0, 1.0, 8, steps=1)


def exhaustive(x, low, high, bits, steps=24):
    """The search with the error of every pair, level by level."""
    unit = max(high, -low)
    rows = SortedRows.of((x.double() / unit).float()[None], None)
    quant_min, quant_max = limits(bits)

    def best(lower, upper):
        pairs = torch.cartesian_prod(
            lower if low < 0 else lower[:1], upper if high > 0 else upper[:1]
        )
        scale, zero_point = ranges._qparams(
            low / unit * pairs[:, 0], high / unit * pairs[:, 1], bits
        )
        codes = torch.arange(quant_min, quant_max + 1, dtype=torch.float64)
        levels = (codes - zero_point[:, None]) * scale[:, None]
        return pairs[int(rows.error(levels[None])[0].argmin())].tolist()

    ratio = 64.0 ** -torch.linspace(0, 1, steps, dtype=torch.float64)
    coarse = best(ratio, ratio)
    fine = 64.0 ** (torch.linspace(-1, 1, steps, dtype=torch.float64) / (steps - 1))
    a, b = best(*((fine * shrink).clamp_max(1.0) for shrink in coarse))
    clipped, whole = affine_qparams(low * a, high * b, bits), affine_qparams(low, high, bits)
    return clipped if loss(x, clipped, bits) < loss(x, whole, bits) else whole


@given(samples(), BITS, st.floats(1, 3))
@settings(max_examples=40)
def test_pairs_that_are_left_out_are_never_the_best(x, bits, reach):
    low, high = min(float(x.min()) * reach, 0.0), max(float(x.max()) * reach, 0.0)
    qparams = search_range(x, low, high, bits)
    if low < high:
        expected = exhaustive(x, low, high, bits)
        # of pairs whose errors differ by the rounding of sums alone, either may come
        tie = math.isclose(
            loss(x, qparams, bits), loss(x, expected, bits), rel_tol=1e-9, abs_tol=1e-300
        )
        assert qparams == expected or tie
