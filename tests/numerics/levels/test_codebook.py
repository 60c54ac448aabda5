import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numerics_strategies import importances, make_rows, weight_rows, weights_and_bits

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.levels import codebook
from mpqdm_fx.numerics.levels.codebook import code_ranks, codebook_tables, quantize_codebook
from mpqdm_fx.numerics.levels.grids import CODEBOOK_MAX_BITS, dequantize
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.numerics.solve import rows as rows_module
from mpqdm_fx.numerics.solve.scales import quantize_uniform

TINY = torch.finfo(torch.float32).tiny


def full(W, bits):
    return torch.full((len(W),), bits)


def loss(W, codes, scale, importance):
    """Weighted squared error of each row, in float64."""
    h = torch.ones_like(W) if importance is None else importance.expand_as(W)
    h = torch.where(((h > 0) & (W != 0)).any(dim=1, keepdim=True), h, torch.ones_like(h))
    return (h.double() * (W.double() - dequantize(codes, scale).double()).square()).sum(dim=1)


@given(st.data())
def test_codebook_is_never_worse_than_uniform_in_the_error_it_is_fitted_to(data):
    W, bits = data.draw(weights_and_bits())
    importance = data.draw(importances(W.shape))
    fitted = loss(W, *quantize_codebook(W, bits, importance), importance)
    uniform = loss(W, *quantize_uniform(W, bits, importance), importance)
    assert bool((fitted <= uniform * (1 + 1e-12)).all())  # the test sums in another order


def test_a_fit_that_fails_falls_back_to_the_uniform_solution(monkeypatch):
    monkeypatch.setattr(codebook, "_lloyd", lambda rows, centers: centers[:, :2] * 0 + 0.01)
    W = make_rows(4, 50, "normal", 0)
    fitted, uniform = (
        quantize(W, full(W, 2)) for quantize in (quantize_codebook, quantize_uniform)
    )
    assert torch.equal(fitted[0], uniform[0])
    assert torch.equal(fitted[1], uniform[1])


@given(st.data())
def test_channels_use_at_most_their_levels_and_bfloat16_scales(data):
    W, bits = data.draw(weights_and_bits())
    codes, scale = quantize_codebook(W, bits, data.draw(importances(W.shape)))
    assert torch.equal(scale.bfloat16().float(), scale)
    assert int(codes.min()) >= -127
    assert bool(torch.isfinite(dequantize(codes, scale)).all())
    for row, width in zip(codes, bits.tolist(), strict=True):
        assert len(row.unique()) <= 2**width


@given(st.data())
def test_channels_wider_than_four_bits_are_uniform(data):
    W, bits = data.draw(weights_and_bits())
    importance = data.draw(importances(W.shape))
    codes, scale = quantize_codebook(W, bits, importance)
    uniform_codes, uniform_scale = quantize_uniform(W, bits, importance)
    wide = bits > CODEBOOK_MAX_BITS
    assert torch.equal(codes[wide], uniform_codes[wide])
    assert torch.equal(scale[wide], uniform_scale[wide])


@given(st.data())
def test_every_weight_takes_the_nearest_value_of_its_channel(data):
    W, bits = data.draw(weights_and_bits(max_bits=CODEBOOK_MAX_BITS))
    codes, scale = quantize_codebook(W, bits, data.draw(importances(W.shape)))
    distance = (W.double() - dequantize(codes, scale).double()).abs()
    values = codes.double() * scale.double()[:, None]  # [O, K]: those that the channel uses
    nearest = (W.double()[:, :, None] - values[:, None, :]).abs().amin(dim=2)
    assert bool(
        (distance <= nearest + W.double().abs() * 2**-22 + scale.double()[:, None] * 1e-6).all()
    )


@given(st.data())
def test_rows_do_not_influence_each_other_whatever_the_chunks(data):
    W, bits = data.draw(weights_and_bits())
    importance = data.draw(importances(W.shape))
    order = torch.tensor(data.draw(st.permutations(range(len(W)))))
    h = importance if importance is None or importance.ndim == 1 else importance[order]
    codes, scale = quantize_codebook(W, bits, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "MAX_CHUNK", 1)
        moved_codes, moved_scale = quantize_codebook(W[order], bits[order], h)
    assert torch.equal(moved_codes, codes[order])
    assert torch.equal(moved_scale, scale[order])


@given(st.data())
def test_powers_of_two_scale_the_scale_and_leave_the_codes(data):
    W = data.draw(weight_rows())
    W = W[W.abs().amax(dim=1) > 0]
    if not len(W):
        return
    exponent = data.draw(st.integers(-20, 60))
    bits, importance = full(W, data.draw(st.integers(1, 4))), data.draw(importances(W.shape))
    codes, scale = quantize_codebook(W, bits, importance)
    if scale.min().item() * 2.0**exponent < TINY:
        return
    moved_codes, moved_scale = quantize_codebook(W * 2.0**exponent, bits, importance)
    assert torch.equal(moved_codes, codes)
    assert torch.equal(moved_scale.double(), scale.double() * 2.0**exponent)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 60), st.integers(0, 2**16))
def test_rows_of_few_int8_values_are_kept_exactly(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(-127, 128, (rows, 2**bits), generator=generator)
    pick = torch.randint(2**bits, (rows, columns), generator=generator)
    scale = (torch.rand(rows, 1, generator=generator) + 0.5).bfloat16().float()
    W = table.gather(1, pick).float() * scale
    assert torch.equal(dequantize(*quantize_codebook(W, full(W, bits))), W)


@settings(max_examples=15)
@given(st.integers(0, 2**16), st.integers(4, 9))
@example(7510, 8)  # Lloyd's iteration alone stops 11 % above the optimum
def test_two_levels_reach_the_best_split_of_a_short_row(seed, columns):
    # Brute force: every split of the sorted row into two cells, each at its mean.
    W = make_rows(3, columns, "normal", seed)
    ordered = W.double().sort(dim=1).values
    best = torch.full((3,), math.inf, dtype=torch.float64)
    for cut in range(columns + 1):
        parts = [part for part in (ordered[:, :cut], ordered[:, cut:]) if part.shape[1]]
        error = sum((p - p.mean(dim=1, keepdim=True)).square().sum(dim=1) for p in parts)
        best = torch.minimum(best, error)
    mine = loss(W, *quantize_codebook(W, full(W, 1)), None)
    # moving both centers to int8 values costs up to (1/254)^2 of the larger one, squared
    allowance = best + W.double().square().sum(dim=1) * 1e-4
    assert bool((mine <= allowance).all())


# J. Max, "Quantizing for Minimum Distortion" (1960), table I: non-uniform quantizer, unit normal.
@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)]
)
def test_gaussian_rows_reach_the_optimum_quantizer(bits, distortion):
    W = torch.randn(20, 20000, generator=torch.Generator().manual_seed(bits))
    measured = sqnr_db(W, dequantize(*quantize_codebook(W, full(W, bits))))
    assert measured == pytest.approx(-10 * math.log10(distortion), abs=0.06)


@pytest.mark.parametrize("family", ["student_t", "outlier_element"])
def test_codebooks_gain_decibels_on_heavy_tails(family):
    W = make_rows(16, 400, family, 3)
    for bits in (2, 3, 4):
        fitted = dequantize(*quantize_codebook(W, full(W, bits)))
        uniform = dequantize(*quantize_uniform(W, full(W, bits)))
        assert sqnr_db(W, fitted) > sqnr_db(W, uniform) + 1.0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_zero_row_is_exactly_zero(bits):
    W = torch.zeros(2, 7)
    assert not dequantize(*quantize_codebook(W, full(W, bits))).any()


def test_bad_weights_and_importance_are_refused():
    with pytest.raises(CalibrationError, match="channel 1"):
        quantize_codebook(torch.tensor([[1.0], [math.nan]]), torch.tensor([2, 2]))
    with pytest.raises(CalibrationError, match="importance"):
        quantize_codebook(torch.ones(1, 2), torch.tensor([2]), torch.tensor([-1.0, 1.0]))
    with pytest.raises(ConfigError, match="1 to 8"):
        quantize_codebook(torch.ones(1, 2), torch.tensor([9]))


@given(st.data())
def test_tables_list_each_channels_values_and_ranks_point_at_them(data):
    W, bits = data.draw(weights_and_bits(max_bits=CODEBOOK_MAX_BITS))
    codes, _ = quantize_codebook(W, bits)
    tables, ranks = codebook_tables(codes, bits), code_ranks(codes, bits)
    assert tables.shape == (len(W), 2 ** int(bits.max()))
    assert torch.equal(tables.gather(1, ranks.long()), codes)
    for table, row in zip(tables, codes, strict=True):
        assert table.tolist() == sorted(table.tolist())
        assert torch.equal(table.unique(), row.unique())


def test_channels_wider_than_four_bits_have_no_table():
    codes = torch.tensor([[1, -1], [5, 7], [2, 2]], dtype=torch.int8)
    tables = codebook_tables(codes, torch.tensor([2, 5, 1]))
    assert tables.tolist() == [[-1, 1, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2]]
    assert codebook_tables(codes, torch.tensor([8, 5, 7])).shape == (3, 0)


@pytest.mark.parametrize("measure", [codebook_tables, code_ranks])
def test_more_values_than_the_width_holds_are_refused(measure):
    codes = torch.tensor([0, 0, 0, 1, 2], dtype=torch.int8)[None]
    with pytest.raises(ConfigError, match="1 bits uses 3 values"):
        measure(codes, torch.tensor([1]))
