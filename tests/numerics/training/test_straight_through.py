"""Trainable roundings: the exact numbers forward, the documented gradients backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.graph.qdq import qdq_ops
from mpqdm_fx.numerics.activations.dynamic import fake_quantize_dynamic
from mpqdm_fx.numerics.levels.grids import dequantize, snap
from mpqdm_fx.numerics.solve.scales import quantize_uniform
from mpqdm_fx.numerics.training.straight_through import (
    fake_quantize_affine,
    fake_quantize_dynamic_ste,
    round_scale_ste,
    round_ste,
    table_values,
    values_of_codes,
)

SEEDS = st.integers(0, 2**20)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=SEEDS, bits=st.integers(1, 8))
def test_static_rounding_is_that_of_the_ops_bit_for_bit(seed, bits):
    x = 3 * drawn(seed, 4, 5)
    scale = float(drawn(seed + 1, 1).abs().clamp_min(1e-3))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    zero = int(torch.randint(low, high + 1, (1,), generator=torch.Generator().manual_seed(seed)))
    ops = qdq_ops()
    exact = float(torch.tensor(scale))
    codes = ops.quantize_per_tensor(x, exact, zero, low, high, torch.int8)
    expected = ops.dequantize_per_tensor(codes, exact, zero, low, high, torch.int8)
    actual = fake_quantize_affine(x, torch.tensor(exact), torch.tensor(float(zero)), low, high)
    assert torch.equal(actual, expected)


@given(seed=SEEDS)
def test_gradient_of_a_static_range_is_that_of_a_small_change_in_the_mean(seed):
    # the straight-through gradient is the slope of the rounded value with the rounding error held
    x = drawn(seed, 64).double().float().requires_grad_()
    scale = torch.tensor(0.11, requires_grad=True)
    zero = torch.tensor(1.0, requires_grad=True)
    weights = drawn(seed + 1, 64)
    (fake_quantize_affine(x, scale, zero, -8, 7) * weights).sum().backward()
    steps = (x / scale).detach()
    inside = ((steps.round() + 1) >= -8) & ((steps.round() + 1) <= 7)
    assert torch.equal(x.grad, weights * inside)
    outermost = torch.where(steps > 0, 6.0, -9.0)
    slopes = torch.where(inside, steps.round() - steps, outermost)
    assert torch.allclose(scale.grad, (weights * slopes).sum(), atol=1e-4)
    assert torch.allclose(zero.grad, -(weights * ~inside).sum() * 0.11, atol=1e-5)


@given(seed=SEEDS, bits=st.integers(1, 8))
def test_weights_are_those_of_their_codes_bit_for_bit(seed, bits):
    rows = drawn(seed, 3, 20)
    widths = torch.full((3,), bits)
    codes, scale = quantize_uniform(rows, widths)
    reach = torch.full((3,), 127.5 if bits == 8 else 2.0**bits)
    weights = values_of_codes(rows, scale, snap(rows, scale, widths), reach)
    assert torch.equal(weights, dequantize(codes, scale))


def test_weights_beyond_their_range_get_no_gradient_and_pull_on_the_step_instead():
    weight = torch.tensor([[0.2, -0.9, 9.0]], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    codes = snap(weight, scale, 2)
    values_of_codes(weight, scale, codes, torch.tensor([4.0])).sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0]]
    inside = (1 - 0.2 / 0.5) + (-1 + 0.9 / 0.5)
    assert scale.grad.item() == pytest.approx(inside + 3)


def test_tables_are_clipped_half_a_gap_beyond_their_own_ends():
    # the gaps at the ends are 10 and 6; the last level is repeated, and stays the same one
    table = torch.tensor([[-20.0, -10.0, 4.0, 10.0, 10.0]])
    weight = torch.tensor([[-26.0, -24.0, 0.0, 12.0, 14.0]], requires_grad=True)
    scale = torch.tensor([1.0], requires_grad=True)
    table_values(weight, scale, table).sum().backward()
    assert weight.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    # inside the rounding error, outside the outermost level
    assert scale.grad.item() == pytest.approx(-20 + (-20 + 24) + 4 + (10 - 12) + 10)


def test_levels_get_the_gradients_of_their_weights():
    weight = torch.tensor([[-1.0, 0.1, 0.2, 1.2]], requires_grad=True)
    scale = torch.tensor([0.1])
    table = torch.tensor([[-9.0, 2.0, 11.0]], requires_grad=True)
    values = table_values(weight, scale, table)
    assert torch.equal(values, torch.tensor([[-9.0, 2.0, 2.0, 11.0]]) * 0.1)
    (values * torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    assert torch.allclose(table.grad, torch.tensor([[0.1, 11.0, 100.0]]))


def test_rounding_passes_gradients_unchanged():
    x = torch.tensor([0.4, 1.6, -2.5], requires_grad=True)
    (round_ste(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert round_ste(x).tolist() == [0.0, 2.0, -2.0]
    assert x.grad.tolist() == [1.0, 2.0, 3.0]
    scale = torch.tensor([0.1234567], requires_grad=True)
    assert round_scale_ste(scale).to(torch.bfloat16).float() == round_scale_ste(scale)
    round_scale_ste(scale).sum().backward()
    assert scale.grad.tolist() == [1.0]


@given(seed=SEEDS)
def test_dynamic_rounding_is_exact_and_passes_gradients(seed):
    x = drawn(seed, 2, 3, 4).requires_grad_()
    rounded = fake_quantize_dynamic_ste(x, 8, 1)
    assert torch.equal(rounded, fake_quantize_dynamic(x, 8, 1))
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
