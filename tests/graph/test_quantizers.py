"""The modules that round activations: equal to the plain formula, and exportable."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.editing import infer_val
from mpqdm_fx.graph.qdq import insert_pair, qdq_ops, quick_form
from mpqdm_fx.graph.quantizers import (
    CodebookQuantizer,
    DynamicQuantizer,
    NoiseLevelGroups,
    NoiseLevelQuantizer,
    fixed_quantizer,
)
from mpqdm_fx.numerics.activations.codebook import fake_quantize_levels
from mpqdm_fx.numerics.activations.dynamic import fake_quantize_dynamic
from mpqdm_fx.numerics.activations.ranges import fake_quantize
from mpqdm_fx.records.activations import ActivationRange, NoiseLevels

SCALES, ZERO_POINTS = [0.1, 0.013, 0.5], [0, -7, 3]


TABLES = [
    ActivationRange(scale=scale, zero_point=0, bits=3, levels=levels)
    for scale, levels in ((0.1, (-60, -7, 0, 7, 60)), (0.5, (-3, -1, 0, 1, 2, 3, 5, 9)))
]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def values(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 2**16),
    groups=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    repeats=st.integers(1, 3),
    bits=st.integers(4, 8),
)
def test_each_sample_is_rounded_with_the_range_of_its_group(seed, groups, repeats, bits):
    x = values(seed, len(groups) * repeats, 3, 5)
    got = NoiseLevelQuantizer(SCALES, ZERO_POINTS, bits)(x, torch.tensor(groups))
    scales = torch.tensor(SCALES).tolist()  # as float32 holds them
    for index, group in enumerate(groups):
        rows = slice(index * repeats, (index + 1) * repeats)
        want = fake_quantize(x[rows], scales[group], ZERO_POINTS[group], bits)
        assert torch.equal(got[rows], want)


@given(seed=st.integers(0, 2**16), group=st.integers(0, 2))
def test_one_group_serves_all_samples(seed, group):
    x = values(seed, 4, 6)
    module = NoiseLevelQuantizer(SCALES, ZERO_POINTS)
    assert torch.equal(module(x, torch.tensor([group])), module(x, torch.tensor([group] * 4)))


@given(
    seed=st.integers(0, 2**16),
    groups=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    repeats=st.integers(1, 3),
)
def test_each_sample_is_rounded_to_the_levels_of_its_group(seed, groups, repeats):
    x = values(seed, len(groups) * repeats, 3, 5)
    module = CodebookQuantizer(TABLES)
    got = module(x, torch.tensor(groups))
    for index, group in enumerate(groups):
        rows = slice(index * repeats, (index + 1) * repeats)
        table, alone = TABLES[group], CodebookQuantizer([TABLES[group]])
        scale, levels = torch.tensor([table.scale]), torch.tensor([table.levels]).float()
        assert torch.equal(got[rows], fake_quantize_levels(x[rows], scale, levels))
        assert torch.equal(got[rows], alone(x[rows]))
    assert torch.equal(module(x, torch.tensor([1])), CodebookQuantizer(TABLES[1:])(x))


def test_a_quantizer_of_levels_gives_its_ranges_back():
    got = CodebookQuantizer(TABLES).ranges
    assert [r.levels for r in got] == [r.levels for r in TABLES]
    assert [r.scale for r in got] == torch.tensor([r.scale for r in TABLES]).tolist()
    even = ActivationRange(scale=0.1, zero_point=0, bits=3)
    for wrong in ([even, TABLES[0]], [TABLES[0], ActivationRange(scale=1.0, zero_point=0, bits=4)]):
        with pytest.raises(ConfigError, match="one width"):
            fixed_quantizer(wrong)


def test_rounding_keeps_dtype_shape_and_memory_layout():
    x = values(0, 2, 3, 4, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
    for got in (
        NoiseLevelQuantizer(SCALES, ZERO_POINTS)(x, torch.tensor([0, 1])),
        CodebookQuantizer(TABLES)(x, torch.tensor([0, 1])),
        CodebookQuantizer(TABLES[:1])(x),
        DynamicQuantizer(8, 3)(x),
    ):
        assert (got.dtype, got.shape, got.stride()) == (x.dtype, x.shape, x.stride())


def test_a_quantizer_gives_its_ranges_back():
    ranges = NoiseLevelQuantizer(SCALES, ZERO_POINTS, 6).ranges
    assert [r.zero_point for r in ranges] == ZERO_POINTS
    assert [r.scale for r in ranges] == torch.tensor(SCALES).tolist()
    assert {r.bits for r in ranges} == {6}


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True).map(sorted),
    st.lists(st.one_of(st.integers(0, 99), st.floats(0, 99, width=32)), min_size=1, max_size=5),
)
def test_groups_are_those_of_the_noise_levels(boundaries, timesteps):
    levels = NoiseLevels(boundaries=tuple(boundaries))
    module = NoiseLevelGroups(levels.boundaries)
    steps = torch.tensor(timesteps)
    assert torch.equal(module(steps), levels.group_of(steps))
    assert torch.equal(module(steps[0]), levels.group_of(steps[:1])), "a 0-d timestep"


@given(st.integers(0, 2**16), st.integers(1, 8), st.integers(1, 3))
def test_dynamic_quantizer_is_the_formula(seed, bits, axes):
    x = values(seed, 2, 3, 5)
    assert torch.equal(DynamicQuantizer(bits, axes)(x), fake_quantize_dynamic(x, bits, axes))


class ByLevel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups = NoiseLevelGroups((10.0, 20.5))
        self.quantizer = NoiseLevelQuantizer(SCALES, ZERO_POINTS)

    def forward(self, x, timestep):
        folded = torch.cat([x[:, :1], x[:, 1:]], dim=1).flatten(0, 1)  # [2 B, C]
        return self.quantizer(x, self.groups(timestep)), self.quantizer(
            folded, self.groups(timestep)
        )


def test_noise_level_modules_export_with_a_dynamic_batch_bit_for_bit():
    model, batch = ByLevel(), torch.export.Dim("batch", min=2, max=64)
    example = (values(0, 3, 2, 5), torch.tensor([5, 15, 25]))
    shapes = {"x": {0: batch}, "timestep": {0: batch}}
    exported = torch.export.export(model, example, dynamic_shapes=shapes, strict=False).module()
    for size in (3, 7):
        inputs = values(size, size, 2, 5), torch.arange(size) * 6
        for got, want in zip(exported(*inputs), model(*inputs), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("axes", [1, 2, (-2,)])
def test_dynamic_quantizer_exports_with_a_dynamic_batch_bit_for_bit(axes):
    model, batch = DynamicQuantizer(8, axes), torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        model, (values(0, 3, 4, 5),), dynamic_shapes={"x": {0: batch}}, strict=False
    ).module()
    assert torch.equal(exported(values(1, 6, 4, 5)), model(values(1, 6, 4, 5)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoiseLevelQuantizer([0.1], [0, 0]),
        lambda: NoiseLevelQuantizer([], []),
        lambda: NoiseLevelQuantizer([0.0], [0]),
        lambda: NoiseLevelQuantizer([0.1], [8], 4),
        lambda: DynamicQuantizer(9),
        lambda: DynamicQuantizer(8, 0),
        lambda: DynamicQuantizer(8, ()),
        lambda: DynamicQuantizer(8, (1,)),
        lambda: NoiseLevelGroups((2.0, 1.0)),
    ],
)
def test_impossible_quantizers_are_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_inserted_pair_has_the_values_that_running_it_would_give(dtype, channels_last):
    class Double(nn.Module):
        def forward(self, x):
            return x * 2

    x = torch.randn(2, 3, 4, 5).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    graph_module = trace(Double(), {"x": x})
    (source,) = graph_module.graph.find_nodes(op="placeholder")
    restored = insert_pair(graph_module, source, (0.05, 3, -128, 127, torch.int8))
    for node in (restored.args[0], restored):
        actual = node.meta["val"]
        infer_val(graph_module, node)
        expected = node.meta["val"]
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride()


@given(
    seed=st.integers(0, 2**16),
    bits=st.integers(1, 8),
    log_scale=st.floats(-30, 30),
    zero_point=st.integers(-128, 127),
    half=st.booleans(),
    channels_last=st.booleans(),
)
def test_quick_forms_have_the_bits_of_the_ops(
    seed, bits, log_scale, zero_point, half, channels_last
):
    dtype = torch.float16 if half else torch.float32
    scale = float(torch.tensor(10.0**log_scale))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    parameters = (scale, max(low, min(high, zero_point)), low, high, torch.int8)
    special = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e20, 1e-40, -1e-45, 0.0, -0.0]
    ties = scale * (torch.arange(10) - 4.5)
    x = torch.cat([scale * values(seed, 40) * 2**bits, torch.tensor(special), ties])
    x = x.reshape(2, 3, 2, 5).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    ops, before = qdq_ops(), x.clone()
    quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    codes = quantize(x, *parameters)
    quick = quick_form(quantize)(x, *parameters)
    assert torch.equal(quick, codes)
    assert quick.stride() == codes.stride()
    assert same_bits(x, before)
    for kwargs in ({}, {"out_dtype": dtype}):
        expected = dequantize(codes, *parameters, **kwargs)
        actual = quick_form(dequantize)(codes, *parameters, **kwargs)
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        assert same_bits(actual, expected)
    assert quick_form(torch.ops.aten.relu.default) is None
