"""Fitted levels of activations: never worse than evenly spaced codes, and the nearest is taken."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_strategies import make_rows

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.activations.codebook import fake_quantize_levels, fit_levels
from mpqdm_fx.numerics.activations.ranges import fake_quantize, search_range

FAMILIES = ("normal", "student_t", "outlier_element", "constant", "tiny", "small_integers")


@st.composite
def samples(draw):
    x = make_rows(
        1, draw(st.integers(1, 400)), draw(st.sampled_from(FAMILIES)), draw(st.integers(0, 2**16))
    ).flatten()
    return x.abs() if draw(st.booleans()) else x


def energy(error):
    return float(error.double().square().sum())


@given(samples(), st.integers(1, 4))
def test_fitted_levels_are_never_worse_than_evenly_spaced_codes(x, bits):
    even = search_range(x, float(x.min()), float(x.max()), bits)
    scale, levels = fit_levels(x, *even, bits)
    assert len(levels) <= 2**bits
    assert list(levels) == sorted({*levels})
    assert -127 <= levels[0] <= levels[-1] <= 127
    rounded = fake_quantize_levels(x, torch.tensor([scale]), torch.tensor([levels]).float())
    assert energy(x - rounded) <= energy(x - fake_quantize(x, *even, bits)) * (1 + 1e-6)


def test_fitted_levels_gain_a_decibel_on_a_bell():
    x = torch.randn(2**14, generator=torch.Generator().manual_seed(0))
    even = search_range(x, float(x.min()), float(x.max()), 4)
    scale, levels = fit_levels(x, *even, 4)
    rounded = fake_quantize_levels(x, torch.tensor([scale]), torch.tensor([levels]).float())
    # Max (1960): 20.22 dB at 16 levels, evenly spaced ones 19.38 dB
    assert 10 * torch.log10(x.square().sum() / (x - rounded).square().sum()) > 20.0


@given(
    seed=st.integers(0, 2**16),
    tables=st.lists(
        st.lists(st.integers(-127, 127), min_size=1, max_size=16, unique=True).map(sorted),
        min_size=1,
        max_size=3,
    ),
)
def test_the_nearest_level_of_a_rows_own_table_is_taken(seed, tables):
    x = 40 * torch.randn(len(tables), 7, generator=torch.Generator().manual_seed(seed))
    longest = max(map(len, tables))
    padded = torch.tensor([[*t, *[t[-1]] * (longest - len(t))] for t in tables]).float()
    scale = torch.arange(1, len(tables) + 1) / 2
    got = fake_quantize_levels(x, scale, padded)
    for row, table in enumerate(tables):
        values = torch.tensor(table).float() * scale[row]
        distance = (x[row, :, None] - values).abs()
        assert torch.isin(got[row], values).all()
        assert torch.allclose((x[row] - got[row]).abs(), distance.amin(1), atol=1e-4)


def test_halfway_between_two_levels_the_upper_one_is_taken():
    got = fake_quantize_levels(
        torch.tensor([[0.5, -0.5]]), torch.ones(1), torch.tensor([[-1.0, 0.0, 1.0]])
    )
    assert got.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("bits", [0, 5, 8])
def test_other_widths_are_refused(bits):
    with pytest.raises(ConfigError, match="1 to 4 bits"):
        fit_levels(torch.ones(3), 1.0, 0, bits)


def test_samples_that_are_not_finite_are_refused():
    with pytest.raises(CalibrationError, match="NaN"):
        fit_levels(torch.tensor([1.0, float("nan")]), 1.0, 0, 4)
