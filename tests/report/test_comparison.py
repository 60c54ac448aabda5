import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import SIGMAS, TinyDenoiser, TinyEDM, denoiser_calls, edm_calls

import mpqdm_fx
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.report.comparison import compare, compare_all
from mpqdm_fx.report.metrics import epsilon_sqnr
from mpqdm_fx.report.noise_levels import row_powers, sqnr_by_noise_level


class Off:
    """A denoiser whose output is off by a share."""

    def __init__(self, model, share):
        self.model, self.share = model, share

    def __call__(self, **call):
        return self.model(**call) * (1 + self.share)


def test_one_number_and_one_by_noise_level_as_the_functions_of_each_say():
    model, calls = TinyEDM(), edm_calls()
    changed = TinyEDM(seed=1)
    comparison = compare(model, changed, calls)
    assert comparison.sqnr_db == pytest.approx(epsilon_sqnr(model, changed, calls), abs=1e-9)
    apart = sqnr_by_noise_level(model, changed, calls)
    assert {point.level: point.sqnr_db for point in comparison.levels} == pytest.approx(
        apart, abs=1e-9
    )
    assert [point.level for point in comparison.levels] == pytest.approx(SIGMAS)
    assert (comparison.noise_argument, comparison.calls, comparison.samples) == ("sigma", 5, 10)


def test_it_reads_as_a_line_for_all_and_one_for_each_level():
    comparison = mpqdm_fx.compare(TinyEDM(), Off(TinyEDM(), 0.01), edm_calls())
    first, *levels = str(comparison).splitlines()
    assert first == "output SQNR 40.0 dB (as float), 10 samples in 5 calls"
    assert levels[0] == "  at sigma  80    40.0 dB  (2 samples)"
    assert len(levels) == len(SIGMAS)


def test_equal_models_are_exact_and_one_without_noise_levels_has_no_levels():
    layer = torch.nn.Conv2d(2, 2, 1)

    def model(x):
        return layer(x)

    comparison = compare(model, model, [{"x": torch.ones(2, 2, 3, 3)}])
    assert math.isinf(comparison.sqnr_db)
    assert comparison.levels == ()
    assert comparison.noise_argument is None


def test_several_models_are_compared_with_one_run_of_the_reference():
    runs = []
    model = TinyDenoiser()

    def counted(**call):
        runs.append(call)
        return model(**call)

    comparisons = compare_all(
        counted, {"a": Off(model, 0.1), "b": Off(model, 0.01)}, denoiser_calls()
    )
    assert len(runs) == 3
    assert comparisons["a"].sqnr_db == pytest.approx(20, abs=1e-4)
    assert comparisons["b"].sqnr_db == pytest.approx(40, abs=1e-4)


def test_no_call_no_such_argument_and_other_shapes_are_refused():
    model = TinyDenoiser()
    with pytest.raises(CalibrationError, match="no call"):
        compare(model, model, [])
    with pytest.raises(ConfigError, match="'sigma'"):
        compare(model, model, denoiser_calls(), noise_argument="sigma")
    with pytest.raises(ConfigError, match="not of one model"):
        compare(model, lambda **call: model(**call)[:, :1], denoiser_calls())


@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 4),
)
def test_powers_of_samples_add_up_to_those_of_all(rows, width, seed, batch):
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(rows * batch, width, generator=generator)
    actual = expected + 0.1 * torch.randn(rows * batch, width, generator=generator)
    powers = row_powers(expected, actual, batch)
    assert powers.shape == (batch, 2)
    signal, noise = powers.sum(dim=0).tolist()
    assert 10 * math.log10(signal / noise) == pytest.approx(sqnr_db(expected, actual), abs=1e-9)


def test_another_imaginary_part_is_an_error_of_its_sample():
    expected = torch.complex(torch.ones(3, 2), torch.zeros(3, 2))
    actual = expected + torch.tensor([0.0, 1.0, 2.0])[:, None] * 1j
    assert row_powers(expected, actual, 3).tolist() == [[2.0, 0.0], [2.0, 2.0], [2.0, 8.0]]


def test_calls_of_several_sizes_are_told_apart_by_noise_level():
    model, calls = TinyEDM(), edm_calls()
    wide = [{**call, "noisy": call["noisy"].repeat(1, 1, 1, 2)} for call in edm_calls(seed=3)]
    ratios = sqnr_by_noise_level(model, Off(model, 0.1), [*calls, *wide])
    assert list(ratios) == pytest.approx(SIGMAS)
    assert list(ratios.values()) == pytest.approx([20] * len(SIGMAS), abs=1e-3)
    narrow = sqnr_by_noise_level(model, Off(model, 0.1), calls)
    assert ratios == pytest.approx(narrow, abs=1e-3)
