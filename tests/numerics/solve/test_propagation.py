"""The identities behind the correction, section by section of arXiv 2504.09629 and its ridge form.

Notation: W rows of weights, X and Y = X_hat the float and the quantized lane's rows, D = X - Y.
"""

import pytest
import torch
from calibration_strategies import (
    FORMS,
    INPUT_FAMILIES,
    energy,
    fitted_rows,
    integers,
    lanes,
    make_inputs,
    weights_for,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import sample_rows, weight_rows
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.layer_rows import LayerRows
from mpqdm_fx.numerics.solve.propagation import (
    Correction,
    choose_correction,
    fixed_correction,
    output_error,
)

strengths = st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0])
dampings = st.sampled_from([0.01, 0.1, 1.0, 10.0])
seeds = st.integers(0, 2**16)
NO_RIDGE = 1e-13  # of the average diagonal: nothing, in moments of full rank


@st.composite
def problems(draw, max_width: int = 8):
    """Draw whole weights and many rows of full rank: no ridge is needed."""
    width, rows = draw(st.integers(2, max_width)), draw(st.integers(1, 4))
    family = draw(st.sampled_from(["white", "coupled", "shared", "outlier_column"]))
    W = integers(draw(seeds), rows, width, reach=4)
    return W, lanes(draw(seeds), 8 * width, width, family=family)


def by_definition(W, rows):
    """X, Y and X W^T in float64."""
    Y = rows.inputs.double()
    X = Y + rows.shift.double()
    return X, Y, X @ W.double().T


def full_correction(W, rows, damping=NO_RIDGE, form="primal"):
    gram = Gram.of(rows.inputs, form=form)
    return fixed_correction(W, rows, gram, 1.0, damping=damping).weight.double()


# No error, no correction


@given(weights_for(6), st.sampled_from(INPUT_FAMILIES), strengths, st.booleans(), seeds)
def test_one_lane_needs_no_correction(W, family, alpha, center, seed):
    rows = LayerRows(inputs=make_inputs(8, 6, family, seed), shift=None)
    rows = fitted_rows(rows, center=center)
    gram = Gram.of(rows.inputs)
    assert fixed_correction(W, rows, gram, alpha) == Correction()
    assert choose_correction(W, rows, gram, rows) == Correction()


@given(weights_for(6), st.sampled_from(INPUT_FAMILIES), st.sampled_from(FORMS), seeds)
def test_two_equal_lanes_are_corrected_by_exactly_nothing(W, family, form, seed):
    inputs = make_inputs(8, 6, family, seed)
    rows = fitted_rows(LayerRows(inputs=inputs, shift=inputs - inputs), center=True)
    gram = Gram.of(rows.inputs, form=form)
    fixed = fixed_correction(W, rows, gram, 0.5)
    assert torch.equal(W + fixed.weight, W)
    assert choose_correction(W, rows, gram, rows) == Correction()


def test_strength_zero_and_no_validation_rows_are_no_correction():
    W, rows = integers(0, 3, 4), lanes(1, 16, 4)
    gram = Gram.of(rows.inputs)
    assert fixed_correction(W, rows, gram, 0.0) == Correction()
    empty = LayerRows(inputs=rows.inputs[:0], shift=rows.shift[:0])
    assert choose_correction(W, rows, gram, empty) == Correction()


# Identities of the optimum, without ridge


@given(problems(), strengths)
def test_gain_of_a_strength_is_its_parabola(problem, alpha):
    W, rows = problem
    X, Y, target = by_definition(W, rows)
    B = full_correction(W, rows)
    t, s = energy((X - Y) @ W.double().T), energy(Y @ B.T)
    error = energy(target - Y @ (W.double() + alpha * B).T)
    assert error == pytest.approx(t - (2 * alpha - alpha**2) * s, rel=1e-6, abs=1e-6 * t)


@given(problems(), st.integers(1, 8), st.sampled_from(["uniform", "codebook"]))
def test_error_of_any_rounding_is_the_floor_plus_the_distance_to_the_optimum(problem, bits, kind):
    W, rows = problem
    X, Y, target = by_definition(W, rows)
    B = full_correction(W, rows)
    levels = RowLevels.fit(W, torch.full((len(W),), bits), kind)
    Q = levels.snap(W).double() * levels.scale.double()[:, None]
    floor = energy((X - Y) @ W.double().T) - energy(Y @ B.T)
    distance = energy(Y @ (W.double() + B - Q).T)
    error = energy(target - Y @ Q.T)
    assert error == pytest.approx(floor + distance, rel=1e-6)


@given(problems(), strengths)
def test_strength_is_a_penalty_on_leaving_the_base_layers_output(problem, alpha):
    W, rows = problem
    _, Y, target = by_definition(W, rows)
    mu = 1 / alpha - 1
    stacked = torch.cat([Y, mu**0.5 * Y])
    stacked_target = torch.cat([target, mu**0.5 * Y @ W.double().T])
    best = torch.linalg.lstsq(stacked, stacked_target).solution.T
    gram = Gram.of(rows.inputs, form="primal")
    correction = fixed_correction(W, rows, gram, alpha, damping=NO_RIDGE)
    assert (correction.alpha, correction.damping) == (alpha, NO_RIDGE)
    difference = energy(Y @ (W.double() + correction.weight.double() - best).T)
    assert difference <= 1e-12 * energy(target)


@given(problems(), strengths, dampings, st.sampled_from(FORMS))
def test_strength_is_full_strength_for_the_interpolated_input(problem, alpha, damping, form):
    W, rows = problem
    gram = Gram.of(rows.inputs, form=form)
    part = LayerRows(inputs=rows.inputs, shift=alpha * rows.shift)
    torch.testing.assert_close(
        fixed_correction(W, rows, gram, alpha, damping=damping).weight,
        fixed_correction(W, part, gram, 1.0, damping=damping).weight,
        rtol=1e-5,
        atol=1e-5,
    )


@given(problems(), dampings, st.sampled_from(FORMS))
def test_damping_is_a_ridge_towards_the_weights(problem, damping, form):
    W, rows = problem
    X, Y, target = by_definition(W, rows)
    V = W.double() + full_correction(W, rows, damping, form)
    N, eye = len(Y), torch.eye(Y.shape[1], dtype=torch.float64)
    H, G = Y.T @ Y / N, X.T @ Y / N
    ridge = damping * H.diagonal().mean() * eye
    direct = torch.linalg.solve(H + ridge, (W.double() @ (G + ridge)).T).T
    torch.testing.assert_close(V, direct, rtol=1e-6, atol=1e-5)
    root = (N * ridge.diagonal()).sqrt().diag()
    stacked = torch.cat([target, root @ W.double().T])
    best = torch.linalg.lstsq(torch.cat([Y, root]), stacked).solution.T
    torch.testing.assert_close(V, best, rtol=1e-6, atol=1e-5)


# Evaluation


@given(problems(), seeds)
def test_error_is_that_of_the_statistics_of_the_rows(problem, seed):
    W, rows = problem
    X, Y, target = by_definition(W, rows)
    Q = W + integers(seed, *W.shape)
    error = output_error(W - Q, rows.inputs, rows.targets(W))
    direct = (target - Y @ Q.double().T).square().mean(dim=0)
    torch.testing.assert_close(error, direct, rtol=1e-6, atol=1e-6)
    N, D, V = len(Y), Q.double() - W.double(), W.double()
    H, C = Y.T @ Y / N, (X - Y).T @ Y / N
    t = ((X - Y) @ V.T).square().mean(dim=0)
    statistics = ((D @ H) * D).sum(dim=1) - 2 * ((V @ C) * D).sum(dim=1) + t
    torch.testing.assert_close(error, statistics, rtol=1e-6, atol=1e-6)


@given(seeds, st.integers(0, 3))
def test_bias_takes_up_what_the_training_rows_miss_on_average(seed, channels):
    W, Q = integers(seed, 3, 5), integers(seed + 1, 3, 5)
    channels = 3 if channels else 0
    train = lanes(seed, 8, 5, channels=channels, offset=3)
    validation = lanes(seed + 9, 12, 5, channels=channels, offset=2)

    def missing(rows):
        _, Y, target = by_definition(W, rows)
        return target - Y @ Q.double().T + (0 if rows.residual is None else rows.residual.double())

    means = train.means()
    torch.testing.assert_close(means.bias(W, Q), missing(train).mean(dim=0), rtol=0, atol=1e-9)
    for rows in (train, validation):
        expected = (missing(rows) - missing(train).mean(dim=0)).square().mean(dim=0)
        fitted = rows.fitted(means)
        error = output_error(W - Q, fitted.inputs, fitted.targets(W))
        torch.testing.assert_close(error, expected, rtol=1e-6, atol=1e-6)


@given(seeds, dampings, st.sampled_from(FORMS))
def test_centred_correction_ignores_constant_shifts(seed, damping, form):
    W, drawn = integers(seed, 3, 5), lanes(seed, 12, 5, offset=3)
    far = LayerRows(inputs=drawn.inputs, shift=drawn.shift + integers(seed, 5, reach=9))
    means, far_means = drawn.means(), far.means()
    rows, moved = drawn.fitted(means), far.fitted(far_means)
    gram = Gram.of(rows.inputs, form=form)
    torch.testing.assert_close(
        fixed_correction(W, rows, gram, 1.0, damping=damping).weight,
        fixed_correction(W, moved, gram, 1.0, damping=damping).weight,
        rtol=1e-4,
        atol=1e-4,
    )
    validation = lanes(seed + 9, 12, 5, offset=1)
    far = LayerRows(inputs=validation.inputs, shift=validation.shift + integers(seed, 5, reach=9))
    near = choose_correction(W, rows, gram, validation.fitted(means))
    same = choose_correction(W, moved, gram, far.fitted(far_means))
    assert (near.weight is None) == (same.weight is None)
    assert same.alpha == pytest.approx(near.alpha, abs=1e-4)


# Symmetries


def rotation(seed, width):
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q.float()


@given(seeds, st.integers(2, 10), dampings, st.booleans(), st.sampled_from(FORMS))
def test_correction_turns_with_the_inputs(seed, width, damping, center, form):
    W, R = integers(seed, 3, width), rotation(seed, width)
    train, validation = (lanes(s, 2 * width, width, channels=3) for s in (seed, seed + 9))

    def turned(rows):
        return LayerRows(inputs=rows.inputs @ R, shift=rows.shift @ R, residual=rows.residual)

    means = train.means() if center else None
    train, validation = train.fitted(means), validation.fitted(means)
    gram = Gram.of(train.inputs, form=form)
    turned_gram = Gram.of(turned(train).inputs, form=form)
    fixed = fixed_correction(W, train, gram, 0.5, damping=damping)
    moved = fixed_correction(W @ R, turned(train), turned_gram, 0.5, damping=damping)
    torch.testing.assert_close(moved.weight, fixed.weight @ R, rtol=1e-3, atol=1e-3)
    single = (damping,)
    chosen = choose_correction(W, train, gram, validation, dampings=single)
    moved = choose_correction(
        W @ R, turned(train), turned_gram, turned(validation), dampings=single
    )
    assert moved.explained == pytest.approx(chosen.explained, abs=1e-4)
    if chosen.explained > 1e-3:
        assert (moved.alpha, moved.beta) == pytest.approx((chosen.alpha, chosen.beta), abs=1e-3)
        torch.testing.assert_close(moved.weight, chosen.weight @ R, rtol=1e-3, atol=1e-3)


@given(seeds, strengths, dampings, st.sampled_from(FORMS))
def test_rows_of_weights_are_corrected_one_by_one_at_a_given_strength(seed, alpha, damping, form):
    W, rows = integers(seed, 4, 5), lanes(seed, 12, 5)
    gram = Gram.of(rows.inputs, form=form)
    together = fixed_correction(W, rows, gram, alpha, damping=damping).weight
    for row in range(4):
        alone = fixed_correction(W[row : row + 1], rows, gram, alpha, damping=damping).weight
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-5)


@given(seeds, st.booleans(), st.booleans())
def test_both_forms_choose_the_same_correction(seed, center, residual):
    W, (train, validation) = (
        integers(seed, 3, 10),
        (lanes(s, 4, 10, channels=3 * residual) for s in (seed, seed + 9)),
    )
    means = train.means() if center else None
    train, validation = train.fitted(means), validation.fitted(means)
    primal, dual = (
        choose_correction(W, train, Gram.of(train.inputs, form=form), validation) for form in FORMS
    )
    assert dual.explained == pytest.approx(primal.explained, abs=1e-4)
    if primal.damping == dual.damping and primal.weight is not None:
        torch.testing.assert_close(dual.weight, primal.weight, rtol=1e-3, atol=1e-3)


# Convolutions


@given(st.sampled_from([1, 2, 4]), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2), seeds)
def test_targets_of_all_groups_are_the_convolution_of_the_shift(
    groups, stride, dilation, padding, seed
):
    options = {"stride": stride, "dilation": dilation, "padding": padding}
    conv = nn.Conv2d(4, 8, (3, 2), groups=groups, bias=False, **options)
    x, x_hat = integers(seed, 2, 4, 7, 6), integers(seed + 1, 2, 4, 7, 6)
    with torch.no_grad():
        conv.weight.copy_(integers(seed + 2, *conv.weight.shape))
        expected = conv(x - x_hat).movedim(1, -1).reshape(-1, 8).double()
    inputs = sample_rows(conv, x_hat)
    residual = integers(seed + 3, len(inputs), 8)
    rows = LayerRows(inputs=inputs, shift=sample_rows(conv, x) - inputs, residual=residual)
    W, channels = weight_rows(conv), 8 // groups
    assert len(rows) == len(expected)
    parts = [rows.group(g, channels) if groups > 1 else rows for g in range(groups)]
    targets = [part.targets(W[g * channels : (g + 1) * channels]) for g, part in enumerate(parts)]
    assert torch.equal(torch.cat([shift for shift, _ in targets], dim=1), expected)
    assert torch.equal(torch.cat([rest for _, rest in targets], dim=1), residual.double())


@pytest.mark.parametrize("form", FORMS)
def test_rows_whose_moments_are_not_finite_are_refused(form):
    inputs = torch.full((4, 3), 1e30)
    gram = Gram.of(inputs, form=form)
    rows = LayerRows(inputs=inputs, shift=torch.ones(4, 3))
    for correct in (
        lambda: fixed_correction(torch.ones(2, 3), rows, gram, 0.5),
        lambda: choose_correction(torch.ones(2, 3), rows, gram, rows),
    ):
        with pytest.raises(CalibrationError, match="degenerate or holds NaN"):
            correct()
