"""Four-bit rows on the integers -8..7."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.levels.grids import dequantize, round_scale
from mpqdm_fx.numerics.levels.int4 import int4_levels, nearest_int4, quantize_int4
from mpqdm_fx.numerics.levels.packing import pack_layer, storage_bits, unpack_layer
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.gptq import gptq
from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.scales import quantize_uniform


def weights(seed: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-6, 6, rows, base=2)[:, None]
    return torch.randn(rows, columns, generator=generator) * size


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), columns=st.integers(1, 40))
def test_codes_are_the_nearest_integers_of_a_stored_scale(seed, rows, columns):
    W, bits = weights(seed, rows, columns), torch.full((rows,), 4)
    codes, scale = quantize_int4(W, bits)
    assert torch.equal(scale, round_scale(scale))
    want = (W / scale[:, None]).round().clamp(-8, 7)
    assert torch.equal(codes.float(), want)


@given(seed=st.integers(0, 10**6), columns=st.integers(1, 40), power=st.integers(-20, 20))
def test_a_row_on_the_grid_comes_back_and_powers_of_two_pass_through(seed, columns, power):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (5, columns), generator=generator).to(torch.int8)
    codes[:, 0] = torch.tensor([-8, -1, 1, 4, 7])  # no row of zeros, which has a scale of its own
    scale = round_scale(torch.rand(5, generator=generator) + 0.1)
    W, bits = dequantize(codes, scale), torch.full((5,), 4)
    plain = quantize_int4(W, bits)
    assert torch.equal(dequantize(*plain), W)
    scaled = quantize_int4(W * 2.0**power, bits)
    assert torch.equal(scaled[0], plain[0])
    assert torch.equal(scaled[1], plain[1] * 2.0**power)


@given(seed=st.integers(0, 10**6))
def test_scale_is_at_least_as_good_as_any_of_a_fine_grid(seed):
    W, bits = weights(seed, 4, 48), torch.full((4,), 4)
    codes, scale = quantize_int4(W, bits)
    error = (W - dequantize(codes, scale)).square().sum(dim=1)
    top = W.abs().amax(dim=1)
    for ratio in torch.linspace(0.05, 0.3, 200):
        trial = round_scale(ratio * top)
        q = (W / trial[:, None]).round().clamp(-8, 7)
        trial_error = (W - q * trial[:, None]).square().sum(dim=1)
        assert bool((error <= 1.03 * trial_error).all())


def test_error_is_that_of_balanced_levels_within_half_a_decibel():
    W, bits = weights(0, 64, 512), torch.full((64,), 4)
    errors = [
        ((W - dequantize(*quantize(W, bits))).square().sum(1) / W.square().sum(1)).mean()
        for quantize in (quantize_int4, quantize_uniform)
    ]
    assert abs(float(10 * torch.log10(errors[0] / errors[1]))) < 0.5


@given(seed=st.integers(0, 10**6), columns=st.integers(1, 30))
def test_packing_returns_the_codes_at_four_bits_without_tables(seed, columns):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(1, 9, (6,), generator=generator)
    codes, _ = quantize_int4(weights(seed, 6, columns), bits)
    packed = pack_layer(codes, bits, "int4")
    assert packed.tables.numel() == 0
    stored = storage_bits((6, columns), bits, "int4")
    assert stored == storage_bits((6, columns), bits, "uniform")
    assert 8 * len(packed.stream) == stored.codes
    back, widths = unpack_layer(packed, (6, columns), bits, "int4")
    assert torch.equal(back, codes)
    assert torch.equal(widths, bits)


def test_packing_refuses_codes_outside():
    codes = torch.tensor([[1, -8], [8, 0]], dtype=torch.int8)
    with pytest.raises(ConfigError, match="channel 1 are not within"):
        pack_layer(codes, torch.tensor([4, 4]), "int4")


@given(seed=st.integers(0, 10**6))
def test_error_feedback_stays_on_the_levels_of_every_width(seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.tensor([2, 3, 4, 4, 6, 8])
    W, x = weights(seed, 6, 16), torch.randn(64, 16, generator=generator)
    levels = RowLevels.fit(W, bits, "int4")
    codes = gptq(W, levels, Gram.of(x))
    pack_layer(codes, bits, "int4")  # refuses what is no level
    assert set(codes[2:4].unique().tolist()) <= set(int4_levels().tolist())
    assert bool((codes[0].int() % 2 != 0).all())
    assert torch.equal(levels.snap(W)[2:4], (W / levels.scale[:, None]).round().clamp(-8, 7)[2:4])


def test_rows_of_zeros_stay_zero():
    codes, _ = quantize_int4(torch.zeros(2, 8), torch.tensor([4, 4]))
    assert not bool(codes.any())


@given(seed=st.integers(0, 10**6), columns=st.integers(1, 30))
def test_plain_rounding_reaches_to_the_largest_weight_and_is_off_by_half_a_step(seed, columns):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, columns, generator=generator)
    rows[3] = 0
    codes, scale = nearest_int4(rows)
    assert torch.equal(scale, round_scale(scale))
    assert bool((scale > 0).all())
    assert set(codes.unique().tolist()) <= set(int4_levels().tolist())
    # bfloat16 has eight bits: the scale may be a little short of the largest weight
    error = (rows - codes * scale[:, None]).abs()
    assert bool((error <= scale[:, None] * (0.5 + 7 * 2**-8)).all())
