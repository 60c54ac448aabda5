"""The modules that round activations: equal to the plain formula, and exportable."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.activations import NoiseLevels
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.quantizers import DynamicQuantizer, NoiseLevelGroups, NoiseLevelQuantizer
from mpqdm_fx.numerics.dynamic import fake_quantize_dynamic
from mpqdm_fx.numerics.ranges import fake_quantize

SCALES, ZERO_POINTS = [0.1, 0.013, 0.5], [0, -7, 3]


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


def test_rounding_keeps_dtype_shape_and_memory_layout():
    x = values(0, 2, 3, 4, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
    for got in (
        NoiseLevelQuantizer(SCALES, ZERO_POINTS)(x, torch.tensor([0, 1])),
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
    told = torch.tensor(timesteps)
    assert torch.equal(module(told), levels.group_of(told))
    assert torch.equal(module(told[0]), levels.group_of(told[:1])), "a 0-d timestep"


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
