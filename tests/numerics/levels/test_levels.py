import pytest
import torch
from calibration_strategies import levels_for, select
from hypothesis import given
from hypothesis import strategies as st
from numerics_strategies import importances, weight_rows, weights_and_bits

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.levels.codebook import quantize_codebook
from mpqdm_fx.numerics.levels.grids import dequantize, uniform_levels
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.scales import quantize_uniform

kinds = st.sampled_from(["uniform", "codebook"])
QUANTIZE = {"uniform": quantize_uniform, "codebook": quantize_codebook}


def level_set(levels: RowLevels, row: int) -> torch.Tensor:
    """The levels of one row by definition, float64."""
    if levels.tables is not None and levels.bits[row] <= 4:
        return levels.tables[row].unique().double()
    return uniform_levels(int(levels.bits[row])).double()


@st.composite
def fitted(draw):
    """Draw weights of any family, widths and level sets fitted to them."""
    W, bits = draw(weights_and_bits())
    kind = draw(kinds)
    return W, RowLevels.fit(W, bits, kind, draw(importances(W.shape))), kind


@given(
    fitted(), st.floats(-2, 2), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 9)
)
def test_snap_takes_the_nearest_of_all_levels_of_the_row(drawn, log_factor, dtype, seed):
    W, levels, _ = drawn
    noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    values = (W.to(dtype) + W.abs().mean() * noise) * 10.0**log_factor
    codes = levels.snap(values)
    assert codes.dtype == dtype
    for row, scale in enumerate(levels.scale.double()):
        row_levels = level_set(levels, row)
        assert set(codes[row].tolist()) <= set(row_levels.tolist())
        distance = (values[row].double()[:, None] - row_levels * scale).abs()
        chosen = (values[row].double() - codes[row].double() * scale).abs()
        slack = values[row].double().abs() * 2 * torch.finfo(dtype).eps  # of the division
        assert bool((chosen <= distance.amin(dim=1) + slack).all())


@given(fitted())
def test_level_sets_have_at_most_their_bits_and_tables_are_ascending_whole_numbers(drawn):
    W, levels, kind = drawn
    assert levels.scale.shape == levels.bits.shape == (len(W),)
    assert torch.equal(levels.fitted, (levels.bits <= 4) & (levels.tables is not None))
    assert (levels.tables is None) == (kind == "uniform" or bool((levels.bits > 4).all()))
    for row, bits in enumerate(levels.bits.tolist()):
        assert len(level_set(levels, row)) <= (2**bits if bits < 8 else 255)
    if levels.tables is not None:
        tables = levels.tables
        assert tables.shape == (len(W), 16)
        assert bool((tables.diff(dim=1) >= 0).all())
        assert torch.equal(tables, tables.to(torch.int8).float())
        assert not tables[~levels.fitted].any()
        assert torch.equal(tables.bfloat16().float(), tables)


@given(weights_and_bits(), kinds, st.data())
def test_fitted_levels_are_those_of_the_quantizer(drawn, kind, data):
    W, bits = drawn
    importance = data.draw(importances(W.shape))
    levels = RowLevels.fit(W, bits, kind, importance)
    codes, scale = QUANTIZE[kind](W, bits, importance)
    assert torch.equal(levels.scale, scale)
    snapped = levels.snap(W).to(torch.int8)
    error, expected = ((W.double() - dequantize(q, scale).double()).abs() for q in (snapped, codes))
    slack = W.double().abs() * 2**-22
    assert bool((error <= expected + slack).all())
    if kind == "uniform":
        assert torch.equal(snapped, codes)


@given(fitted())
def test_levels_snap_to_themselves(drawn):
    W, levels, _ = drawn
    codes = levels.snap(W)
    assert torch.equal(levels.snap(codes * levels.scale[:, None]), codes)


@given(fitted())
def test_values_out_of_range_take_the_outermost_level(drawn):
    W, levels, _ = drawn
    far = levels.scale.double()[:, None] * torch.tensor([-1e6, 1e6], dtype=torch.float64)
    ends = [level_set(levels, row)[[0, -1]] for row in range(len(W))]
    assert torch.equal(levels.snap(far), torch.stack(ends))


@given(weights_and_bits(), kinds, st.data())
def test_rows_of_all_widths_at_once_are_the_rows_of_each_width(drawn, kind, data):
    W, bits = drawn
    importance = data.draw(importances(W.shape))
    together = RowLevels.fit(W, bits, kind, importance)
    codes = together.snap(W)
    for width in bits.unique().tolist():
        rows = (bits == width).nonzero()[:, 0]
        h = importance if importance is None or importance.ndim == 1 else importance[rows]
        alone = RowLevels.fit(W[rows], bits[rows], kind, h)
        assert torch.equal(alone.scale, together.scale[rows])
        assert torch.equal(alone.snap(W[rows]), codes[rows])
        if alone.tables is not None:
            assert torch.equal(alone.tables, together.tables[rows])


@given(fitted(), st.floats(1e-3, 1e3))
def test_other_scales_are_rounded_to_bfloat16_and_keep_the_levels(drawn, factor):
    _, levels, _ = drawn
    moved = levels.with_scale(levels.scale * factor)
    assert torch.equal(moved.scale.bfloat16().float(), moved.scale)
    assert moved.bits is levels.bits
    assert moved.tables is levels.tables


@given(fitted())
def test_unclipped_levels_are_at_most_half_a_spacing_from_every_weight(drawn):
    W, levels, _ = drawn
    moved = levels.unclipped(W)
    assert torch.equal(moved.scale.bfloat16().float(), moved.scale)
    error = (W.double() - moved.snap(W.double()) * moved.scale.double()[:, None]).abs().amax(dim=1)
    half = moved.scale.double() * torch.where(levels.bits == 8, 0.5, 1.0)
    assert bool((error <= half * (1 + 1e-6))[~levels.fitted].all())
    used = moved.snap(W).abs().amax(dim=1)
    top = torch.where(levels.bits == 8, 127, 2**levels.bits - 1)
    free = ~levels.fitted & (W.abs().amax(dim=1) > 0)
    assert torch.equal(used[free], top[free].float())  # and no level is wasted
    assert torch.equal(moved.scale[~free], levels.scale[~free])
    assert moved.bits is levels.bits
    assert moved.tables is levels.tables


@given(st.data())
def test_snap_of_part_of_the_columns_is_that_part(data):
    W = data.draw(weight_rows())
    levels = data.draw(levels_for(W))
    column = data.draw(st.integers(0, W.shape[1] - 1))
    codes = levels.snap(W)
    assert torch.equal(levels.snap(W[:, column : column + 1]), codes[:, column : column + 1])
    row = data.draw(st.integers(0, len(W) - 1))
    assert torch.equal(select(levels, [row]).snap(W[row : row + 1]), codes[row : row + 1])


def test_wrong_widths_and_weights_are_refused():
    with pytest.raises(ConfigError, match="1 to 8"):
        RowLevels.fit(torch.ones(1, 2), torch.tensor([9]), "uniform")
    with pytest.raises(ConfigError, match="one width per output channel"):
        RowLevels.fit(torch.ones(2, 2), torch.tensor([4]), "codebook")
    with pytest.raises(CalibrationError):
        RowLevels.fit(torch.tensor([[1.0, float("nan")]]), torch.tensor([4]), "codebook")


@given(weights_and_bits(), kinds, st.integers(1, 3))
def test_matrices_that_are_fitted_together_have_the_levels_of_each_alone(drawn, kind, count):
    W, bits = drawn
    parts = [W * (1 + index) for index in range(count)]
    together = RowLevels.fit(torch.cat(parts), bits.repeat(count), kind).split(len(W))
    assert len(together) == count
    for part, levels in zip(parts, together, strict=True):
        alone = RowLevels.fit(part, bits, kind)
        assert torch.equal(levels.bits, alone.bits)
        assert torch.equal(levels.scale, alone.scale)
        assert (levels.tables is None) == (alone.tables is None)
        assert torch.equal(levels.snap(part), alone.snap(part))


@given(fitted(), st.integers(0, 9))
def test_columns_are_snapped_as_whole_matrices_are(drawn, seed):
    W, levels, _ = drawn
    ratio = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed)).double() * 9
    snapper = levels.snapper(ratio)
    whole = levels.with_scale(torch.ones_like(levels.scale)).snap(ratio)
    for column, expected in zip(ratio.T, whole.T, strict=True):
        codes = torch.empty_like(column)
        snapper(column / 2, codes)
        assert torch.equal(2 * codes, expected)
