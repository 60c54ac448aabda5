"""The strengths of a correction are those of a grid search on held-out rows."""

import pytest
import torch
from calibration_strategies import energy, integers, lanes
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.layer_rows import LayerRows
from mpqdm_fx.numerics.solve.propagation import DAMPINGS, Correction, choose_correction

dampings = st.sampled_from([0.01, 0.1, 1.0, 10.0])
seeds = st.integers(0, 2**16)
GRID = [step / 100 for step in range(101)]


@st.composite
def held_out(draw, *, residual, centers=(False, True)):
    """Draw weights, training and validation rows: scarce or plentiful, alike or not.

    Rows are those that statistics take, of a layer whose bias is refitted or stays.
    """
    width, seed = draw(st.integers(2, 6)), draw(seeds)
    W = integers(seed, 3, width, reach=4)
    offset = draw(st.sampled_from([0, 3]))
    options = {"width": width, "channels": 3 if residual else 0, "offset": offset}
    error = draw(st.sampled_from([1, 4]))
    train = lanes(seed, draw(st.integers(2, 40)), error=error, **options)
    validation = lanes(seed + 9, draw(st.integers(2, 20)), error=error, **options)
    sign = draw(st.sampled_from([1, 1, -1, 3]))  # -1 and 3: what the clipping is for
    validation = LayerRows(
        inputs=validation.inputs, shift=sign * validation.shift, residual=validation.residual
    )
    means = train.means() if draw(st.sampled_from(centers)) else None
    return W, train.fitted(means), validation.fitted(means)


def validation_terms(W, train, validation, gram, damping):
    """The target on held-out rows, and what each source's full correction does of it."""
    x = validation.inputs.double()
    sources = train.targets(W)
    outputs = [x @ gram.regress(train.inputs, s, damping).double().T for s in sources]
    return sum(validation.targets(W)), outputs


@given(held_out(residual=False), dampings)
def test_one_strength_is_that_of_the_grid(drawn, damping):
    W, train, validation = drawn
    gram = Gram.of(train.inputs)
    total, (output,) = validation_terms(W, train, validation, gram, damping)
    errors = [energy(total - a * output) for a in GRID]
    best = GRID[errors.index(min(errors))]
    correction = choose_correction(W, train, gram, validation, dampings=(damping,))
    assert correction.beta == 0
    if energy(output) > 1e-6 * energy(total):  # else every strength is as good
        assert abs(correction.alpha - best) <= 0.02
    assert energy(total - correction.alpha * output) <= min(errors) + 1e-5 * energy(total)


@given(held_out(residual=True), dampings)
def test_two_strengths_are_those_of_the_grid(drawn, damping):
    W, train, validation = drawn
    gram = Gram.of(train.inputs)
    total, outputs = validation_terms(W, train, validation, gram, damping)
    q = torch.tensor([[float((a * b).sum()) for b in outputs] for a in outputs]).double()
    p = torch.tensor([float((total * output).sum()) for output in outputs]).double()
    a, b = (axis.flatten() for axis in torch.meshgrid(*[torch.tensor(GRID).double()] * 2))
    grid = torch.stack([a, b], dim=1)
    errors = energy(total) - 2 * grid @ p + ((grid @ q) * grid).sum(dim=1)
    best = grid[errors.argmin()]
    correction = choose_correction(W, train, gram, validation, dampings=(damping,))
    chosen = torch.tensor([correction.alpha, correction.beta]).double()
    error = energy(total - chosen[0] * outputs[0] - chosen[1] * outputs[1])
    assert error <= float(errors.min()) + 1e-5 * energy(total)
    spread = torch.linalg.eigvalsh(q)
    if spread[0] > max(float(spread[1]) / 4, 1e-6 * energy(total)):  # no flat valley
        assert float((chosen - best).abs().max()) <= 0.02


@given(held_out(residual=True, centers=(True,)), st.sampled_from(["shift", "residual"]), dampings)
def test_a_source_that_is_missing_has_no_strength(drawn, missing, damping):
    W, *sets = drawn
    train, validation = (
        LayerRows(
            inputs=rows.inputs,
            shift=None if missing == "shift" else rows.shift,
            residual=None if missing == "residual" else rows.residual,
        )
        for rows in sets
    )
    gram = Gram.of(train.inputs)
    correction = choose_correction(W, train, gram, validation, dampings=(damping,))
    assert (correction.alpha if missing == "shift" else correction.beta) == 0
    assert len(train.targets(W)) == 1
    assert (correction.weight is None) == (correction.alpha == correction.beta == 0)


@given(held_out(residual=True))
def test_the_damping_of_most_gain_wins_and_its_share_is_what_it_removes(drawn):
    W, train, validation = drawn
    gram = Gram.of(train.inputs)
    correction = choose_correction(W, train, gram, validation)
    singles = [choose_correction(W, train, gram, validation, dampings=(d,)) for d in DAMPINGS]
    assert correction.explained == max(single.explained for single in singles)
    assert 0 <= correction.explained <= 1 + 1e-9
    if correction.weight is None:
        assert correction == Correction()
        return
    assert correction.damping in DAMPINGS
    total, outputs = validation_terms(W, train, validation, gram, correction.damping)
    left = total - correction.alpha * outputs[0] - correction.beta * outputs[1]
    assert 1 - energy(left) / energy(total) == pytest.approx(correction.explained, abs=1e-5)


@given(
    held_out(residual=True, centers=(False,)), st.lists(st.integers(1, 8), min_size=3, max_size=3)
)
def test_rows_of_the_correction_are_only_scaled_down_into_their_bounds(drawn, bits):
    W, train, validation = drawn
    W[0] = 0  # has no norm to trust
    gram = Gram.of(train.inputs)
    bits = torch.tensor(bits)
    correction = choose_correction(W, train, gram, validation, bits=bits)
    if correction.weight is None:
        return
    assert bool((correction.weight.norm(dim=1) <= 0.3 * W.norm(dim=1) * (1 + 1e-5)).all())
    grown = (W + correction.weight).abs().amax(dim=1) / W.abs().amax(dim=1).clamp_min(1e-30)
    assert bool((grown <= 1.25 + 1e-5)[bits <= 4].all())
    sources = train.targets(W)
    weights = [gram.regress(train.inputs, source, correction.damping) for source in sources]
    free = correction.alpha * weights[0] + correction.beta * weights[1]
    factor = (correction.weight * free).sum(dim=1) / free.square().sum(dim=1).clamp_min(1e-30)
    torch.testing.assert_close(correction.weight, factor[:, None] * free, rtol=1e-4, atol=1e-5)
    assert bool(((factor >= 0) & (factor <= 1 + 1e-5)).all())
    inside = free.norm(dim=1) <= 0.299 * W.norm(dim=1)
    inside &= ((W + free).abs().amax(dim=1) <= 1.249 * W.abs().amax(dim=1)) | (bits > 4)
    assert bool((factor >= 1 - 1e-4)[inside & (free.norm(dim=1) > 1e-6)].all())


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_units_of_the_activations_do_not_change_the_strengths(unit):
    W = integers(0, 3, 6)
    train, validation = (lanes(seed, 30, 6, channels=3) for seed in (1, 2))
    means = train.means()
    train, validation = train.fitted(means), validation.fitted(means)
    plain = choose_correction(W, train, Gram.of(train.inputs), validation)

    def scaled(rows):
        return LayerRows(
            inputs=rows.inputs * unit, shift=rows.shift * unit, residual=rows.residual * unit
        )

    gram = Gram.of(scaled(train).inputs)
    correction = choose_correction(W, scaled(train), gram, scaled(validation))
    assert 0 < plain.alpha < 1 or 0 < plain.beta < 1
    assert correction.damping == plain.damping
    assert (correction.alpha, correction.beta) == pytest.approx((plain.alpha, plain.beta), rel=1e-4)
    torch.testing.assert_close(correction.weight, plain.weight, rtol=1e-3, atol=1e-5)
