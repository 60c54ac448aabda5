import logging

import pytest
import torch
from calibration_strategies import (
    FORMS,
    fitted_inputs,
    fitted_rows,
    input_rows,
    integers,
    make_inputs,
    make_moments,
    moments,
)
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.solve import gram as gram_module
from mpqdm_fx.numerics.solve.gram import DUAL_ROWS, Gram, cholesky, kept_rows
from mpqdm_fx.numerics.solve.layer_rows import LayerRows

dampings = st.sampled_from([0.01, 0.1, 1.0, 10.0])


def h_norm(B, H):
    """Norm of B's rows as functions of the inputs, plus a little of the plain one."""
    H = H + 1e-6 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    return float(((B.double() @ H) * B.double()).sum().sqrt())


def ridge_by_least_squares(rows, targets, ridge, *, intercept):
    """Ridge regression from its definition: more rows, and a column for the free intercept."""
    x, (count, width) = rows.double(), rows.shape
    root = (count * ridge) ** 0.5
    penalty = torch.eye(width, dtype=torch.float64) * root
    if intercept:
        x = torch.cat([x, torch.ones(count, 1, dtype=torch.float64)], dim=1)
        penalty = torch.cat([penalty, torch.zeros(width, 1, dtype=torch.float64)], dim=1)
    y = torch.cat([targets.double(), torch.zeros(width, targets.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(torch.cat([x, penalty]), y, driver="gelsd").solution[:width].T


def ridge_by_conjugate_gradients(rows, targets, ridge, steps):
    """The same without a factor or a K x K matrix, as for layers too wide for either."""
    x, y = rows.double(), targets.double()
    B = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    residual = x.T @ y / len(x)
    direction = residual.clone()
    for _ in range(steps):
        power = residual.square().sum(dim=0)
        moved = x.T @ (x @ direction) / len(x) + ridge * direction
        step = power / (direction * moved).sum(dim=0).clamp_min(1e-300)
        B += step * direction
        residual = residual - step * moved
        direction = residual + residual.square().sum(dim=0) / power.clamp_min(1e-300) * direction
    return B.T


@given(input_rows(), st.booleans(), st.sampled_from(FORMS), st.integers(1, 50), st.data())
def test_moments_are_those_of_the_definition_whatever_the_chunks(rows, center, form, chunk, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_module, "_CHUNK", chunk)
        case = make_moments(rows, center=center, form=form)
    gram, H = case.gram, case.H
    assert (gram.count, gram.width) == rows.shape
    assert torch.equal(gram.diagonal, H.diagonal())
    assert gram.mean_diagonal == pytest.approx(float(H.diagonal().mean()))
    left = integers(data.draw(st.integers(0, 99)), 3, gram.width)
    torch.testing.assert_close(gram.multiply(left), left.double() @ H, rtol=1e-6, atol=1e-9)
    quadratic = ((left.double() @ H) * left.double()).sum(dim=1)
    torch.testing.assert_close(gram.quadratic(left), quadratic, rtol=1e-5, atol=1e-9)
    assert bool((gram.quadratic(left) >= 0).all())


@given(input_rows())
def test_the_dual_form_is_chosen_where_rows_are_fewer_than_their_width(rows):
    gram = Gram.of(rows)
    assert (gram.rows is not None) == (len(rows) < rows.shape[1])
    assert (gram.matrix is None) == (gram.rows is not None)


@given(
    input_rows(),
    st.booleans(),
    st.sampled_from(FORMS),
    dampings,
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_regression_is_ridge_regression_with_a_free_intercept_if_centred(
    rows, center, form, damping, outputs, seed
):
    targets = integers(seed, len(rows), outputs) + 2
    fitted = fitted_rows(LayerRows(inputs=rows, shift=None, residual=targets), center=center)
    gram = Gram.of(fitted.inputs, form=form)
    B = gram.regress(fitted.inputs, fitted.residual, damping)
    expected = ridge_by_least_squares(rows, targets, gram.ridge(damping), intercept=center)
    assert B.dtype == torch.float32
    H = make_moments(rows, center=center).H
    assert h_norm(B - expected, H) <= 1e-5 * h_norm(expected, H) + 1e-5


@given(input_rows(), dampings, st.integers(0, 99))
def test_conjugate_gradients_without_a_matrix_come_within_one_percent(rows, damping, seed):
    targets = integers(seed, len(rows), 3)
    case = make_moments(rows)
    B = case.gram.regress(rows, targets, damping)
    steps = 2 * rows.shape[1]
    close = ridge_by_conjugate_gradients(rows, targets, case.gram.ridge(damping), steps)
    assert h_norm(B - close, case.H) <= 0.01 * h_norm(B, case.H) + 1e-6


@given(input_rows(), st.booleans(), dampings, st.integers(0, 99))
def test_both_forms_regress_to_the_same_weights(rows, center, damping, seed):
    targets = integers(seed, len(rows), 3)
    fitted = fitted_rows(LayerRows(inputs=rows, shift=None, residual=targets), center=center)
    primal, dual = (
        Gram.of(fitted.inputs, form=form).regress(fitted.inputs, fitted.residual, damping)
        for form in FORMS
    )
    H = make_moments(rows, center=center).H
    assert h_norm(primal - dual, H) <= 1e-5 * h_norm(primal, H) + 1e-5  # targets are about 2


@given(moments(), st.integers(-12, 12), dampings)
def test_units_of_the_inputs_only_divide_the_regression(drawn, exponent, damping):
    targets = integers(1, len(drawn.rows), 2)
    form = "dual" if drawn.gram.matrix is None else "primal"
    scaled = drawn.rows * 2.0**exponent
    gram = Gram.of(scaled, form=form)
    B = drawn.gram.regress(drawn.rows, targets, damping)
    if bool((drawn.gram.diagonal > 0).any()):
        assert torch.equal(gram.regress(scaled, targets, damping) * 2.0**exponent, B)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_have_a_ridge_and_regress_to_nothing(form):
    gram = Gram.of(torch.zeros(4, 3), form=form)
    assert gram.ridge(0.01) > 0
    assert not gram.regress(torch.zeros(4, 3), torch.ones(4, 2), 0.01).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rows_of_any_dtype_count_as_float32(form, dtype, center):
    rows, targets = make_inputs(8, 5, "coupled", 0, 2), integers(0, 16, 2)
    fitted = [fitted_inputs(x, center=center) for x in (rows, rows.to(dtype))]
    weights = [Gram.of(x, form=form).regress(x, targets, 0.1) for x in fitted]
    assert torch.equal(*weights)


@pytest.mark.parametrize("form", FORMS)
def test_large_factors_are_float32_and_close(form, monkeypatch):
    rows, targets = make_inputs(8, 5, "coupled", 0), integers(0, 16, 2)
    exact = Gram.of(rows, form=form).regress(rows, targets, 0.1)
    monkeypatch.setattr(gram_module, "DOUBLE_WIDTH", 4)
    gram = Gram.of(rows, form=form)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram.regress(rows, targets, 0.1), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_not_finite_are_refused(value, form):
    rows = torch.ones(3, 4)
    rows[1, 2] = value
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        Gram.of(rows, form=form)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 3, 4)])
def test_what_is_no_matrix_of_rows_is_refused(shape):
    with pytest.raises(ConfigError, match=r"rows \[N, K\]"):
        Gram.of(torch.ones(shape))


@given(input_rows(), st.floats(1e-3, 10))
def test_factor_is_that_of_the_matrix_plus_ridge_and_leaves_the_matrix_alone(rows, ridge):
    H = make_moments(rows).H
    before = H.clone()
    factor, used = cholesky(H, ridge)
    assert torch.equal(H, before)
    assert used == ridge
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, H + ridge * torch.eye(len(H)).double())


def test_a_singular_matrix_gets_the_first_tenfold_ridge_that_helps_and_a_warning(caplog):
    matrix = torch.diag(torch.tensor([1.0, -0.05], dtype=torch.float64))
    with caplog.at_level(logging.WARNING):
        factor, used = cholesky(matrix, 1e-3)
    assert used == pytest.approx(0.1)
    torch.testing.assert_close(factor.square().sum(dim=1), matrix.diagonal() + used)
    assert "ridge raised 0.001 -> 0.1" in caplog.text


def test_a_regular_matrix_is_factored_without_a_word(caplog):
    with caplog.at_level(logging.DEBUG):
        cholesky(torch.eye(3), 1e-3)
    assert not caplog.records


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e6])
def test_a_matrix_without_factor_is_refused_with_the_last_ridge_tried(bad):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 1] = bad
    with pytest.raises(CalibrationError, match=r"\(3, 3\).* 100;"):
        cholesky(matrix, 1e-3)


sizes = st.integers(1, 10_000)


@given(sizes, sizes, sizes)
def test_as_many_rows_are_kept_as_fill_the_matrix_or_as_the_dual_form_takes(width, have, limit):
    kept = kept_rows(width, have, limit)
    available = min(have, limit)
    if width <= available:
        assert kept == available
    else:
        assert kept == min(available, DUAL_ROWS)
        assert kept < width


@pytest.mark.parametrize("width", [5, 192, 193, 400])
def test_moments_are_symmetric_and_those_of_the_whole_product(width):
    rows = torch.randn(1500, width, generator=torch.Generator().manual_seed(width))
    matrix = Gram.of(rows, form="primal").matrix
    block = gram_module._BLOCK
    assert torch.equal(matrix[:block, block:], matrix[block:, :block].T)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(matrix, rows.double().T @ rows.double() / 1500, rtol=1e-4, atol=1e-5)


@given(moments(), st.integers(1, 4), st.integers(0, 2**16))
def test_one_regression_serves_all_ridges(known, outputs, seed):
    rows = known.rows
    targets = torch.randn(len(rows), outputs, generator=torch.Generator().manual_seed(seed))
    regression = known.gram.regression(rows, targets)
    for damping in (0.01, 1.0, 10.0):
        again = known.gram.regress(rows, targets, damping)
        assert torch.equal(regression.solve(damping), again)
