import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_strategies import make_rows, weight_rows

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.solve.outliers import kurtosis, smoothing_factors


def test_gaussian_rows_have_kurtosis_three_and_uniform_ones_nine_fifths():
    generator = torch.Generator().manual_seed(0)
    assert kurtosis(torch.randn(1, 200_000, generator=generator)).item() == pytest.approx(
        3, abs=0.1
    )
    flat = torch.rand(1, 200_000, generator=generator)
    assert kurtosis(flat).item() == pytest.approx(1.8, abs=0.02)


def test_the_definition_divides_by_the_unbiased_deviation():
    # n rows of +-1: fourth moment 1, unbiased variance n / (n - 1)
    row = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert kurtosis(row).item() == pytest.approx((3 / 4) ** 2, abs=1e-15)


@given(
    st.integers(1, 5),
    st.integers(2, 60),
    st.integers(0, 2**16),
    st.floats(-1e3, 1e3).filter(lambda a: abs(a) > 1e-3),
    st.floats(-1e3, 1e3),
)
def test_kurtosis_is_invariant_to_affine_maps(rows, columns, seed, a, b):
    W = make_rows(rows, columns, "normal", seed).double()
    moved = W * a + b
    # adding b rounds w to eps * |b / a|, which is what the tolerance grows with
    slack = 1e-9 * (1 + abs(b / a) / float(W.std(dim=1).min()))
    assert torch.allclose(kurtosis(moved), kurtosis(W), rtol=slack, atol=0)


@given(weight_rows(), st.integers(-60, 60))
def test_kurtosis_of_tiny_and_huge_rows_is_finite_and_scale_free(W, exponent):
    moved = kurtosis(W.double() * 2.0**exponent)
    assert torch.equal(moved, kurtosis(W))
    assert bool(torch.isfinite(moved).all())
    assert bool((moved >= 0).all())


@given(weight_rows(), st.data())
def test_kurtosis_follows_permutations_of_the_channels(W, data):
    order = torch.tensor(data.draw(st.permutations(range(len(W)))))
    assert torch.equal(kurtosis(W[order]), kurtosis(W)[order])


@given(st.floats(-1e30, 1e30), st.integers(1, 50))
def test_constant_rows_have_kurtosis_zero(value, columns):
    assert kurtosis(torch.full((2, columns), value, dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_an_outlier_raises_the_kurtosis():
    W = make_rows(1, 500, "normal", 0).repeat(2, 1)
    W[1, 7] = 40
    plain, outlier = kurtosis(W)
    assert outlier > 10 * plain


def test_float64_extremes_do_not_overflow():
    W = torch.tensor([[1e150, -1e150, 1e150], [1e-150, -1e-150, 1e-150]], dtype=torch.float64)
    assert kurtosis(W)[0] == pytest.approx(kurtosis(W)[1].item(), rel=1e-12)


def test_kurtosis_wants_a_matrix():
    with pytest.raises(ConfigError, match="channels, K"):
        kurtosis(torch.ones(3))


peaks = st.lists(st.tuples(st.floats(0, 1e20), st.floats(0, 1e20)), min_size=1, max_size=8).map(
    lambda pairs: torch.tensor(pairs, dtype=torch.float64).T
)


@given(peaks)
def test_factors_are_positive_finite_and_clamped(drawn):
    factors = smoothing_factors(drawn[0], drawn[1])
    assert factors.dtype == torch.float64
    assert bool(((factors >= 1e-2) & (factors <= 1e2)).all())


@given(peaks)
def test_smoothing_balances_the_peaks_unless_clamped(drawn):
    x, w = drawn.clamp_min(1e-5)
    factors = smoothing_factors(x, w)
    free = (factors > 1e-2) & (factors < 1e2)
    assert torch.allclose((x / factors)[free], (w * factors)[free], rtol=1e-12)


@given(peaks)
def test_swapping_activations_and_weights_inverts_the_factors(drawn):
    product = smoothing_factors(drawn[0], drawn[1]) * smoothing_factors(drawn[1], drawn[0])
    assert torch.allclose(product, torch.ones_like(product), rtol=1e-12)


def test_channels_that_are_dead_on_both_sides_keep_their_weights():
    assert smoothing_factors(torch.zeros(2), torch.zeros(2)).tolist() == [1.0, 1.0]


def test_peaks_of_different_shapes_are_refused():
    with pytest.raises(ConfigError, match="per input channel"):
        smoothing_factors(torch.ones(2), torch.ones(3))
