"""Errors of channels at each width: exact for small layers, near for large ones."""

import pytest
import torch

from mpqdm_fx.bits.rounding_errors import ChannelInputs, channel_errors, feedback_gains
from mpqdm_fx.numerics.levels.grids import dequantize
from mpqdm_fx.numerics.solve.layer_rows import LayerRows
from mpqdm_fx.numerics.solve.scales import quantize_uniform


def _rows(count, width, seed=0, *, correlated=False, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    if correlated:  # eight directions carry nearly all of the energy
        few = torch.randn(8, width, generator=torch.Generator().manual_seed(99))
        rows = 0.1 * rows + torch.randn(count, 8, generator=generator) @ few
    return rows + shift


def _fitted(fit, held_out, *, center):
    """Both as statistics take them, less the first's mean where a bias makes up for it."""
    rows = LayerRows(inputs=fit, shift=None)
    means = rows.means() if center else None
    return rows.fitted(means).inputs, LayerRows(inputs=held_out, shift=None).fitted(means).inputs


def _weight(channels, width, seed=1):
    return torch.randn(channels, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("center", [False, True])
def test_errors_of_a_small_layer_are_those_of_its_rounded_rows(center):
    W, X = _weight(6, 20), _rows(300, 20, shift=1.0)
    inputs = ChannelInputs.of(*_fitted(X, X, center=center), 6)
    uniform, codebook = channel_errors(W, inputs)
    assert uniform.shape == (6, 8)
    assert codebook.shape == (6, 4)
    for bits in (1, 4, 8):
        codes, scale = quantize_uniform(W, torch.full((6,), bits), inputs.energy.float())
        outputs = X.double() @ (W - dequantize(codes, scale)).double().T
        exact = outputs.var(0, unbiased=False) if center else outputs.square().mean(0)
        torch.testing.assert_close(uniform[:, bits - 1], exact, rtol=1e-3, atol=1e-9)


def test_a_grouped_layer_is_its_groups():
    W, X = _weight(6, 9), _rows(200, 18).view(200, 2, 9)
    uniform, codebook = channel_errors(W, ChannelInputs.of(*_fitted(X, X, center=True), 6))
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        inputs = ChannelInputs.of(*_fitted(X[:, group], X[:, group], center=True), 3)
        alone = channel_errors(W[rows], inputs)
        torch.testing.assert_close(uniform[rows], alone[0])
        torch.testing.assert_close(codebook[rows], alone[1])


def test_numbers_that_are_outputs_of_their_own_cost_their_energy():
    W, energy = _weight(3, 10), torch.rand(3, 10).double()
    uniform, codebook = channel_errors(W, ChannelInputs(rows=None, energy=energy))
    codes, scale = quantize_uniform(W, torch.full((3,), 3), energy.float())
    exact = (energy * (W - dequantize(codes, scale)).double().square()).sum(1)
    torch.testing.assert_close(uniform[:, 2], exact)
    assert bool((codebook <= uniform[:, :4] * (1 + 1e-6)).all())  # what the fit minimises


@pytest.mark.parametrize("grouped", [False, True])
def test_the_estimate_for_large_layers_is_near_the_exact_errors(grouped):
    W, X = _weight(40, 192), _rows(400, 384)
    X = X.view(400, 2, 192) if grouped else X[:, :192]
    inputs = ChannelInputs.of(*_fitted(X, X, center=True), 40)
    exact = channel_errors(W, inputs)
    near = channel_errors(W, inputs, max_numbers=1)
    for a, b in zip(near, exact, strict=True):
        assert a.shape == b.shape
        ratio = a / b
        assert float(ratio.min()) > 0.6
        assert float(ratio.max()) < 1.8


def test_an_estimate_of_zero_rows_is_zero():
    W = torch.zeros(40, 192)
    W[:5] = _weight(5, 192)
    inputs = ChannelInputs.of(_rows(50, 192), _rows(50, 192, seed=3), 40)
    uniform, _ = channel_errors(W, inputs, max_numbers=1)
    assert float(uniform[5:].max()) < 1e-60
    assert float(uniform[:5].min()) > 0


def test_a_bit_is_worth_six_decibels_where_there_are_many():
    W, X = _weight(8, 64), _rows(500, 64)
    inputs = ChannelInputs.of(*_fitted(X, X, center=True), 8)
    uniform, _ = channel_errors(W, inputs, codebooks=False)
    per_bit = (uniform[:, 3] / uniform[:, 6]) ** (1 / 3)
    assert 3.0 < float(per_bit.mean()) < 4.5


def test_feedback_gains_nothing_on_independent_inputs():
    fit, held_out = _fitted(_rows(4000, 32), _rows(1000, 32, seed=5), center=True)
    uniform, codebook = feedback_gains(_weight(16, 32), fit, held_out)
    assert uniform.shape == (8,)
    assert codebook.shape == (4,)
    assert bool(((uniform > 0.85) & (uniform < 1.15)).all())


def test_feedback_gains_much_on_correlated_inputs_and_least_at_one_bit():
    fit, held_out = _rows(3000, 64, correlated=True), _rows(1000, 64, seed=5, correlated=True)
    uniform, codebook = feedback_gains(_weight(16, 64), *_fitted(fit, held_out, center=True))
    assert float(uniform[3:].max()) < 0.2
    assert float(uniform[0]) > 2 * float(uniform[3])
    assert float(codebook[3]) < 0.3


def test_feedback_from_few_rows_gains_less_on_others():
    W, tests = _weight(16, 64), _rows(1000, 64, seed=5, correlated=True)
    few, many = (
        feedback_gains(W, *_fitted(rows, tests, center=True), codebooks=False)[0]
        for rows in (_rows(count, 64, correlated=True) for count in (12, 3000))
    )
    assert float(few[4]) > 1.5 * float(many[4])


def test_the_first_group_stands_for_all():
    W = _weight(8, 16)
    fit, tests = _rows(500, 32).view(500, 2, 16), _rows(200, 32, seed=2).view(200, 2, 16)
    grouped = feedback_gains(W, fit, tests)
    alone = feedback_gains(W[:4], fit[:, 0], tests[:, 0])
    for a, b in zip(grouped, alone, strict=True):
        torch.testing.assert_close(a, b)
