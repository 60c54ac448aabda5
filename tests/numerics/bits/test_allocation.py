import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_strategies import make_rows

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.bits.allocation import (
    PROMOTED_FRACTIONS,
    choose_fraction,
    mixed_error,
    omq_bits,
    omq_search,
    output_errors,
)
from mpqdm_fx.numerics.levels.codebook import quantize_codebook
from mpqdm_fx.numerics.levels.grids import dequantize
from mpqdm_fx.numerics.solve.scales import quantize_uniform

scores = st.lists(st.floats(-5, 100, width=32), min_size=1, max_size=40).map(torch.tensor)
tied_scores = st.lists(st.integers(0, 3).map(float), min_size=1, max_size=40).map(torch.tensor)
fractions = st.sampled_from(PROMOTED_FRACTIONS)


@given(scores | tied_scores, st.integers(1, 8), fractions)
def test_the_average_is_exactly_the_base_width_and_moves_are_balanced(score, base, fraction):
    bits = omq_bits(score, base, fraction)
    promoted, demoted = int((bits == base + 1).sum()), int((bits == base - 1).sum())
    assert int(bits.sum()) == base * len(score)
    assert promoted == demoted
    assert promoted + demoted + int((bits == base).sum()) == len(score)
    assert bits.dtype == torch.int64
    expected = math.floor(round(fraction * 10) * len(score) / 10)
    assert promoted == (expected if 1 < base < 8 else 0)


@given(scores | tied_scores, st.integers(2, 7), fractions)
def test_a_higher_score_never_gets_fewer_bits(score, base, fraction):
    bits = omq_bits(score, base, fraction)
    higher = score[:, None] > score[None, :]
    assert bool((~higher | (bits[:, None] >= bits[None, :])).all())


@given(st.permutations(range(23)), st.integers(2, 7), fractions)
def test_allocation_follows_permutations_of_distinct_scores(order, base, fraction):
    score = torch.arange(23).float() ** 1.5
    order = torch.tensor(order)
    assert torch.equal(
        omq_bits(score[order], base, fraction), omq_bits(score, base, fraction)[order]
    )


@given(st.integers(1, 40), st.integers(2, 7), fractions)
def test_ties_are_broken_by_the_order_of_the_channels(count, base, fraction):
    bits = omq_bits(torch.ones(count), base, fraction)
    assert torch.equal(bits, bits.sort(descending=True).values)


@pytest.mark.parametrize("count", range(1, 10))
def test_layers_of_few_channels_promote_no_channel_at_a_tenth(count):
    assert omq_bits(torch.arange(count).float(), 3, 0.1).tolist() == [3] * count


@pytest.mark.parametrize(
    ("base", "fraction", "message"), [(0, 0.1, "1 to 8"), (9, 0.1, "1 to 8"), (4, 0.6, "0.5")]
)
def test_widths_and_fractions_out_of_range_are_refused(base, fraction, message):
    with pytest.raises(ConfigError, match=message):
        omq_bits(torch.ones(4), base, fraction)


def test_a_nan_score_is_refused():
    with pytest.raises(CalibrationError, match="NaN"):
        omq_bits(torch.tensor([1.0, math.nan]), 3, 0.5)


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=8))
def test_the_least_error_wins_and_ties_move_fewer_channels(errors):
    best = choose_fraction(errors)
    assert errors[best] == min(errors)
    assert best == errors.index(min(errors))
    assert best == choose_fraction(torch.tensor(errors, dtype=torch.float64))


def test_a_candidate_without_a_usable_error_is_passed_over_or_refused():
    assert choose_fraction([math.nan, 3.0, math.inf]) == 1
    for errors in ([], [math.nan, math.inf]):
        with pytest.raises(CalibrationError, match="no usable error"):
            choose_fraction(errors)


@st.composite
def layers(draw):
    """Weight, float and disturbed input rows, scores; grouped or not."""
    seed, groups = draw(st.integers(0, 2**16)), draw(st.sampled_from([1, 1, 2]))
    generator = torch.Generator().manual_seed(seed)
    channels, columns = groups * draw(st.integers(1, 8)), draw(st.integers(1, 16))
    W = make_rows(channels, columns, draw(st.sampled_from(["normal", "student_t"])), seed)
    shape = (9, columns) if groups == 1 and draw(st.booleans()) else (9, groups, columns)
    X = torch.randn(shape, generator=generator)
    X_hat = X + draw(st.sampled_from([0.0, 0.01, 0.3])) * torch.randn(shape, generator=generator)
    return W, X, X_hat, torch.rand(channels, generator=generator)


def direct_error(W, bits, X, X_hat):
    """The objective as the paper writes it, in float64, group by group."""
    W_hat = dequantize(*quantize_uniform(W, bits)).double()
    X, X_hat = (t if t.ndim == 3 else t[:, None] for t in (X.double(), X_hat.double()))
    groups, total = X.shape[1], 0.0
    for group, (w, w_hat) in enumerate(
        zip(W.double().chunk(groups), W_hat.chunk(groups), strict=True)
    ):
        total += float((X[:, group] @ w.T - X_hat[:, group] @ w_hat.T).square().sum())
    return total / (len(X) * len(W))


@settings(max_examples=20)
@given(layers(), st.integers(2, 7))
def test_the_search_finds_the_least_error_that_brute_force_finds(layer, base):
    W, X, X_hat, score = layer
    choice = omq_search(W, X, X_hat, score, base)
    brute = [
        direct_error(W, omq_bits(score, base, share), X, X_hat) for share in PROMOTED_FRACTIONS
    ]
    assert choice.errors == pytest.approx(brute, rel=1e-3, abs=1e-9)
    chosen = PROMOTED_FRACTIONS.index(choice.fraction)
    assert choice.errors[chosen] == min(choice.errors) <= choice.errors[0]
    assert torch.equal(choice.bits, omq_bits(score, base, choice.fraction))


@given(layers(), st.sampled_from([1, 8]))
def test_one_and_eight_bits_are_not_mixed(layer, base):
    W, X, X_hat, score = layer
    choice = omq_search(W, X, X_hat, score, base)
    assert choice.fraction == 0
    assert choice.bits.tolist() == [base] * len(W)


@settings(max_examples=10)
@given(layers())
def test_the_search_quantizes_with_what_it_is_given(layer):
    W, X, X_hat, score = layer
    seen = []

    def quantize(weight, bits):
        seen.append(bits.unique().tolist())
        return quantize_codebook(weight, bits)

    choice = omq_search(W, X, X_hat, score, 3, quantize)
    assert len(choice.errors) == len(PROMOTED_FRACTIONS)
    assert seen == ([[2], [3], [4]] if len(W) > 1 else [[3]])
    expected = output_errors(
        W, dequantize(*quantize_codebook(W, torch.full((len(W),), 3))), X, X_hat
    )
    assert choice.errors[0] == pytest.approx(float(expected.mean()))


@given(layers())
def test_equal_weights_and_inputs_have_no_output_error(layer):
    W, X, _, _ = layer
    assert not output_errors(W, W, X, X).any()


def test_mixed_error_takes_each_channel_at_its_width():
    errors = torch.tensor([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0], [0.1, 0.2, 0.3]])
    mixed = mixed_error(errors, torch.tensor([2, 3, 4]), torch.tensor([4, 3, 2]))
    assert mixed == pytest.approx((0.1 + 2 + 30) / 3)


@pytest.mark.parametrize(
    ("weight", "rows"), [((4, 3), (5, 2)), ((3, 3), (5, 2, 3)), ((4, 3), (5,)), ((4,), (5, 4))]
)
def test_shapes_that_do_not_fit_are_refused(weight, rows):
    W, X = torch.zeros(weight), torch.zeros(rows)
    with pytest.raises(ConfigError, match="do not fit"):
        output_errors(W, W, X, X)
