"""The scale search finds what it found before it was made quick: the same bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_strategies import importances, make_rows, weight_rows

from mpqdm_fx.numerics.solve import scales
from mpqdm_fx.numerics.solve.scales import quantize_uniform, uniform_scales

FAMILIES = ("normal", "student_t", "outlier_element", "tiny", "huge", "small_integers")


@given(weight_rows(), st.data())
def test_scales_at_all_widths_are_those_of_each_width(W, data):
    h = data.draw(importances(W.shape))
    by_width = uniform_scales(W, h)
    assert by_width.shape == (8, len(W))
    for bits in range(1, 9):
        assert torch.equal(
            by_width[bits - 1], quantize_uniform(W, torch.full((len(W),), bits), h)[1]
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_that_are_left_out_are_never_the_best(monkeypatch, family, weighted):
    W = make_rows(6, 300, family, 3)
    h = torch.rand(300, generator=torch.Generator().manual_seed(1)) ** 3 if weighted else None
    quick = uniform_scales(W, h)
    monkeypatch.setattr(scales, "_PRUNED", 9)
    assert torch.equal(quick, uniform_scales(W, h))


@given(st.integers(0, 2**16), st.integers(1, 30))
def test_without_repeats_every_scale_is_there_once(seed, width):
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(1, 12, (3, width), generator=generator).double()
    unique = scales._without_repeats(candidates)
    for row, values in zip(candidates.tolist(), unique.tolist(), strict=True):
        distinct = sorted(set(row))
        assert values[: len(distinct)] == distinct
        assert set(values) == set(distinct)


@given(st.integers(2, 8), st.integers(0, 2**16))
def test_rows_on_a_grid_keep_their_finest_scale(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    top = 127 if bits == 8 else 2**bits - 1
    step = torch.rand(5, generator=generator).bfloat16().float()[:, None] + 0.5
    step = step.bfloat16().float()
    codes = 2 * torch.randint(0, 2 ** (bits - 1), (5, 40), generator=generator) + 1
    codes = codes.clamp_max(top if top % 2 else top - 1).float()
    codes[:, 0] = top
    W = codes * step
    actual, scale = quantize_uniform(W, torch.full((5,), bits))
    assert torch.equal(scale, step[:, 0])
    assert torch.equal(actual.float(), codes)
