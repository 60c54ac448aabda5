"""Rows that count more than others: the weighted statistics are plain ones of the fitted rows."""

import pytest
import torch
from calibration_strategies import integers, lanes
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.layer_rows import LayerRows
from mpqdm_fx.numerics.solve.propagation import choose_correction, fixed_correction, output_error

seeds = st.integers(0, 2**16)
PARTS = ("inputs", "shift", "residual")


def with_weights(rows, weights):
    return LayerRows(inputs=rows.inputs, shift=rows.shift, residual=rows.residual, weights=weights)


@st.composite
def weighted_rows(draw, width=5, channels=3):
    """Draw rows of both lanes with whole weights 1..9, their mean anywhere."""
    rows = lanes(draw(seeds), draw(st.integers(1, 8)), width, channels=channels, offset=2)
    weights = 5 + integers(draw(seeds), len(rows), reach=4)
    return with_weights(rows, weights)


def repeated(rows):
    """The same rows, each as often as its weight says."""
    index = torch.arange(len(rows)).repeat_interleave(rows.weights.long())
    return with_weights(rows.take(index), None)


def fit(rows, *, center):
    return rows.fitted(rows.means() if center else None)


@given(weighted_rows(), st.booleans())
def test_plain_sums_of_squares_of_fitted_rows_are_the_weighted_ones(rows, center):
    fitted, means = fit(rows, center=center), rows.means()
    share = rows.weights.double() / rows.weights.double().mean()
    assert fitted.weights is None
    for name in PARTS:
        part = getattr(rows, name).double() - getattr(means, name) * center
        actual = getattr(fitted, name)
        assert actual.dtype == torch.float32
        expected = part.T @ (share[:, None] * part)
        torch.testing.assert_close(
            actual.double().T @ actual.double(), expected, rtol=1e-5, atol=1e-4
        )


@given(weighted_rows(), st.booleans(), seeds)
def test_a_whole_weight_repeats_its_row(rows, center, seed):
    many, W = repeated(rows), integers(seed, 3, 5)
    once, often = fit(rows, center=center), fit(many, center=center)
    for name in PARTS:
        torch.testing.assert_close(getattr(rows.means(), name), getattr(many.means(), name))
    weighted_gram, repeated_gram = Gram.of(once.inputs), Gram.of(often.inputs)
    torch.testing.assert_close(weighted_gram.diagonal, repeated_gram.diagonal, rtol=1e-5, atol=1e-5)
    left = integers(seed + 1, 3, 5)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(
        weighted_gram.quadratic(left), repeated_gram.quadratic(left), **close
    )
    errors = [output_error(left, part.inputs, part.targets(W)) for part in (once, often)]
    torch.testing.assert_close(*errors, **close)
    corrections = [
        fixed_correction(W, part, gram, 0.5, damping=0.1).weight
        for part, gram in ((once, weighted_gram), (often, repeated_gram))
    ]
    torch.testing.assert_close(*corrections, rtol=1e-3, atol=1e-3)


@given(weighted_rows(), weighted_rows(), st.booleans(), seeds)
def test_strengths_are_those_of_rows_repeated(train, validation, center, seed):
    W, corrections = integers(seed, 3, 5), []
    for fitted_to, judges in ((train, validation), (repeated(train), repeated(validation))):
        means = fitted_to.means() if center else None
        fitted = fitted_to.fitted(means)
        judge = judges.fitted(means)
        corrections.append(
            choose_correction(W, fitted, Gram.of(fitted.inputs), judge, dampings=(0.1,))
        )
    once, often = corrections
    assert once.explained == pytest.approx(often.explained, abs=1e-3)
    assert (once.weight is None) == (often.weight is None) or often.explained < 1e-3


@given(weighted_rows(), st.integers(-20, 20))
def test_only_proportions_of_weights_matter(rows, exponent):
    scaled = with_weights(rows, rows.weights * 2.0**exponent)
    for name in PARTS:
        assert torch.equal(getattr(scaled.means(), name), getattr(rows.means(), name))
        for center in (False, True):
            expected, actual = (getattr(fit(part, center=center), name) for part in (rows, scaled))
            assert torch.equal(expected, actual)


@given(weighted_rows())
def test_rows_of_one_weight_are_rows_without(rows):
    alike, plain = with_weights(rows, torch.full((len(rows),), 3.0)), with_weights(rows, None)
    for name in PARTS:
        torch.testing.assert_close(getattr(alike.means(), name), getattr(plain.means(), name))
        actual, expected = (getattr(fit(part, center=False), name) for part in (alike, plain))
        assert torch.equal(actual, expected)


@given(weighted_rows(), seeds, st.sets(st.sampled_from(["shift", "residual", "weights"])))
def test_the_bias_of_the_means_leaves_no_weighted_mean_error(rows, seed, missing):
    parts = {name: None if name in missing else getattr(rows, name) for name in (*PARTS, "weights")}
    rows = LayerRows(**parts)
    W, Q = integers(seed, 3, 5), integers(seed + 1, 3, 5)
    error = rows.inputs.double() @ (W - Q).double().T
    for target in rows.targets(W):
        error = error + target
    left = error - rows.means().bias(W, Q)
    weights = torch.ones(len(rows)) if rows.weights is None else rows.weights
    mean = weights.double() @ left / float(weights.sum())
    torch.testing.assert_close(mean, torch.zeros(3).double(), rtol=0, atol=1e-9)
    # and so no other bias has a smaller error
    shifted = left + integers(seed + 2, 3)
    least, more = (weights.double() @ x.square() for x in (left, shifted))
    assert bool((least <= more + 1e-9).all())


def test_rows_that_judge_lose_the_means_of_those_that_fit():
    train, judge = (
        lanes(seed, 6, 4, channels=2, offset=offset) for seed, offset in ((0, 3), (1, 7))
    )
    means = train.means()
    fitted = judge.fitted(means)
    for name in PARTS:
        expected = (getattr(judge, name).double() - getattr(means, name)).float()
        assert torch.equal(getattr(fitted, name), expected)
    assert float(fitted.inputs.mean()) == pytest.approx(4, abs=1e-5)


def test_no_rows_are_fitted_to_no_rows():
    rows = with_weights(lanes(0, 3, 4), torch.arange(6) + 1.0)
    empty = rows.take(slice(0, 0)).fitted(rows.means())
    assert len(empty) == 0
    assert empty.shift.shape == (0, 4)


def test_groups_and_joins_keep_each_rows_weight():
    generator = torch.Generator().manual_seed(0)
    inputs, shift = (torch.randn(4, 2, 3, generator=generator) for _ in range(2))
    residual, weights = torch.randn(4, 6, generator=generator), torch.arange(4) + 1.0
    rows = LayerRows(inputs=inputs, shift=shift, residual=residual, weights=weights)
    group = rows.group(1, 3)
    assert torch.equal(group.inputs, inputs[:, 1])
    assert torch.equal(group.shift, shift[:, 1])
    assert torch.equal(group.residual, residual[:, 3:])
    assert torch.equal(group.weights, weights)
    # each group's rows are weighted by row, whatever the axis of groups
    assert torch.equal(rows.fitted(None).inputs[:, 1], group.fitted(None).inputs)
    joined = LayerRows.join([rows.take(slice(0, 1)), rows.take(slice(1, None))])
    assert all(
        torch.equal(getattr(joined, name), getattr(rows, name)) for name in (*PARTS, "weights")
    )
    assert LayerRows.join([rows, with_weights(rows, None)]).weights is None


@pytest.mark.parametrize("weights", [None, torch.arange(5) + 1.0])
def test_means_of_grouped_rows_are_those_of_each_group(weights):
    generator = torch.Generator().manual_seed(0)
    inputs, shift = (torch.randn(5, 2, 3, generator=generator) for _ in range(2))
    rows = LayerRows(inputs=inputs, shift=shift, weights=weights)
    means = rows.means()
    for group in range(2):
        alone = rows.group(group, 1)
        torch.testing.assert_close(means.inputs[group], alone.means().inputs)
        torch.testing.assert_close(means.shift[group], alone.means().shift)
        fitted = rows.fitted(means).group(group, 1)
        torch.testing.assert_close(fitted.inputs, alone.fitted(alone.means()).inputs)
