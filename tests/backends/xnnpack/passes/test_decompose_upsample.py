"""Nearest upsampling as concatenation is bit-equal, for every integer factor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import draw, outputs, targets, traced
from torch.nn.functional import interpolate

from mpqdm_fx.backends.xnnpack.passes.decompose_upsample import DecomposeUpsample

aten = torch.ops.aten


def is_fused(target):
    return "upsample" in str(target)


def decomposed(graph):
    assert any(map(is_fused, targets(graph)))
    result = DecomposeUpsample()(graph)
    assert result.modified
    assert not any(map(is_fused, targets(result.graph_module)))
    return result.graph_module


def assert_bit_equal(actual, expected):
    assert actual.shape == expected.shape
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


MODES = st.sampled_from(["nearest", "nearest-exact"])


@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    factors=st.tuples(st.integers(1, 7), st.integers(1, 4)),
    by_size=st.booleans(),
    mode=MODES,
)
def test_every_integer_factor_of_an_image(shape, factors, by_size, mode):
    x = draw(*shape).float()
    x.view(-1)[0] = -0.0
    if x.numel() > 2:
        x.view(-1)[1:3] = torch.tensor([float("nan"), float("-inf")])
    size = [n * f for n, f in zip(shape[2:], factors, strict=True)]
    how = {"size": size} if by_size else {"scale_factor": [float(f) for f in factors]}
    graph = traced(lambda m, x: interpolate(x, mode=mode, **how), x, dynamic_batch=False)
    assert_bit_equal(outputs(decomposed(graph), x), outputs(graph, x))


@given(shape=st.tuples(*[st.integers(1, 5)] * 3), factor=st.integers(1, 6), mode=MODES)
def test_every_integer_factor_of_a_line(shape, factor, mode):
    x = draw(*shape).float()
    graph = traced(
        lambda m, x: interpolate(x, scale_factor=float(factor), mode=mode), x, dynamic_batch=False
    )
    assert_bit_equal(outputs(decomposed(graph), x), outputs(graph, x))


@pytest.mark.parametrize("scales", [(None, None), (2.0, 3.0), (None, 3.0)])
def test_form_with_separate_factors(scales):
    x = draw(2, 3, 4, 5).float()
    graph = traced(lambda m, x: aten.upsample_nearest2d(x, [8, 15], *scales), x)
    assert_bit_equal(outputs(decomposed(graph), x), outputs(graph, x))


@given(batch=st.integers(1, 5))
def test_batch_stays_dynamic(batch):
    graph = traced(lambda m, x: interpolate(x, scale_factor=2.0), draw(2, 3, 4, 5).float())
    x = draw(batch, 3, 4, 5, seed=1).float()
    assert_bit_equal(outputs(decomposed(graph), x), outputs(graph, x))


def test_parts_of_a_concatenation_are_different_nodes():
    # ExecuTorch's CatConfig counts inputs without repetition and refuses one
    graph = traced(lambda m, x: interpolate(x, scale_factor=(2.0, 3.0)), draw(2, 3, 4, 5).float())
    cats = [n for n in decomposed(graph).graph.nodes if n.target is aten.cat.default]
    assert [len(n.all_input_nodes) for n in cats] == [3, 2]


@pytest.mark.parametrize(
    "how",
    [
        {"scale_factor": 1.5},
        {"size": (7, 10)},
        {"size": (2, 5)},
        {"scale_factor": (2.0, 1.5)},
        {"scale_factor": 2.1},  # 4 x 5 becomes 8 x 10, but other pixels are nearest
        {"scale_factor": 2.0, "mode": "bilinear"},
    ],
)
def test_what_is_not_a_repetition_is_left_alone(how):
    graph = traced(lambda m, x: interpolate(x, **how), draw(2, 3, 4, 5).float())
    assert not DecomposeUpsample()(graph).modified


def test_factor_that_contradicts_the_size_is_left_alone():
    x = draw(2, 3, 4, 5).float()
    graph = traced(lambda m, x: aten.upsample_nearest2d(x, [8, 10], 2.0, 1.9), x)
    assert not DecomposeUpsample()(graph).modified
