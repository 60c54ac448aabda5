"""Cuts, reciprocals, poolings and whole numbers: written as XNNPACK knows them, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import draw, targets, traced
from test_time_branch import changed

from mpqdm_fx.backends.xnnpack.passes import (
    DivideReciprocals,
    FloatScalars,
    SliceChunks,
)

aten = torch.ops.aten


@given(
    size=st.integers(1, 9),
    parts=st.integers(1, 4),
    axis=st.sampled_from([1, 2, -1]),
    split=st.booleans(),
    taken=st.integers(-4, 3),
)
def test_parts_are_slices(size, parts, axis, split, taken):
    shape = [2, 3, 3]
    shape[axis] = size
    x = draw(*shape).float()
    count = len(x.split(parts, axis) if split else x.chunk(parts, axis))
    index = taken % count

    def function(m, x):
        cut = x.split(parts, dim=axis) if split else x.chunk(parts, dim=axis)
        return cut[index] * 2

    graph = changed(SliceChunks(), traced(function, x), x)
    assert not targets(graph) & {aten.chunk.default, aten.split.Tensor}


def test_parts_of_given_sizes_are_slices():
    x = draw(2, 7, 3).float()
    graph = traced(lambda m, x: torch.split(x, [2, 1, 4], dim=1)[2] * 2, x)
    assert aten.slice.Tensor in targets(changed(SliceChunks(), graph, x))


def test_a_reciprocal_is_a_division():
    x = draw(3, 4).float()
    x[0, :3] = torch.tensor([-0.0, float("inf"), 1e-42])
    graph = changed(DivideReciprocals(), traced(lambda m, x: x.reciprocal() * 2, x), x)
    assert aten.reciprocal.default not in targets(graph)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: 1 + x,
        lambda m, x: x - 3,
        lambda m, x: 2 - x,
        lambda m, x: x * 7,
        lambda m, x: x / 3,
        lambda m, x: torch.add(x, 5, alpha=2),
    ],
)
def test_whole_numbers_beside_fractions_are_fractions(function):
    x = draw(3, 4).float()
    graph = changed(FloatScalars(), traced(function, x), x)
    numbers = [
        operand
        for node in graph.graph.nodes
        for operand in node.args
        if node.op == "call_function" and isinstance(operand, int | float)
    ]
    assert [type(number) for number in numbers] == [float]


@pytest.mark.parametrize(
    "function", [lambda m, x: x + 1.5, lambda m, x: x.long() + 1, lambda m, x: x.long() / 2]
)
def test_other_numbers_stay(function):
    x = draw(3, 4).float() * 10
    assert changed(FloatScalars(), traced(function, x), x) is None
