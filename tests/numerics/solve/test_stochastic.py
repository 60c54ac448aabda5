"""Stochastic rounding: one of the two levels around, the weight as the mean."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.numerics.levels.grids import snap, uniform_levels
from mpqdm_fx.numerics.solve.stochastic import stochastic_codes, stochastic_places

SEEDS = st.integers(0, 2**20)
#: Midpoints of equal parts of [0, 1): over them a share of draws is exact to one part.
PARTS = 500
DRAWS = (torch.arange(PARTS) + 0.5) / PARTS


def ratios(seed, count, size):
    return size * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@given(seed=SEEDS, bits=st.integers(1, 8), scale=st.floats(1e-3, 1e3))
def test_mean_of_the_codes_is_the_weight_inside_the_range(seed, bits, scale):
    top = float(uniform_levels(bits).max())
    ratio = ratios(seed, 9, top).clamp(-1.5 * top, 1.5 * top)
    weight = (ratio * scale)[:, None].expand(-1, PARTS)
    scales, widths = torch.full((9,), scale), torch.full((9,), bits)
    codes = stochastic_codes(weight, scales, widths, DRAWS.expand(9, -1)).double()
    spacing = 1 if bits == 8 else 2
    expected = ratio.clamp(-top, top).double()
    assert torch.allclose(codes.mean(1), expected, atol=spacing * 1.5 / PARTS)
    # and each is a level next to the weight
    assert bool(torch.isin(codes, uniform_levels(bits).double()).all())
    assert float((codes - expected[:, None]).abs().max()) <= spacing * 1.01


@given(seed=SEEDS, levels=st.lists(st.integers(-127, 127), min_size=1, max_size=16))
def test_tables_have_the_same_means_and_may_repeat_a_level(seed, levels):
    table = torch.tensor(sorted(levels)).float()[None]
    low, high = float(table.min()), float(table.max())
    ratio = ratios(seed, 9, 100.0)
    places = stochastic_places(
        ratio[:, None].expand(-1, PARTS), table.expand(9, -1).contiguous(), DRAWS.expand(9, -1)
    )
    values = table[0][places].double()
    expected = ratio.clamp(low, high).double()
    widest = float(table.diff().max()) if len(levels) > 1 else 0.0
    assert torch.allclose(values.mean(1), expected, atol=widest * 1.5 / PARTS + 1e-6)
    assert float((values - expected[:, None]).abs().max()) <= widest + 1e-3


@given(seed=SEEDS, bits=st.integers(1, 8))
def test_a_draw_in_the_middle_takes_the_nearest_level(seed, bits):
    weight = ratios(seed, 40, 5.0).reshape(4, 10)
    scale, widths = torch.full((4,), 0.3), torch.full((4,), bits)
    codes = stochastic_codes(weight, scale, widths, torch.full((4, 10), 0.5))
    assert torch.equal(codes, snap(weight, scale, widths))
