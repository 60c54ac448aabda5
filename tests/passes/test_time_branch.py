"""What stands between a timestep and XNNPACK: unit factors, constants, late casts, unit axes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import Call, draw, outputs, targets, traced
from torch import nn

from mpqdm_fx.backends.xnnpack.passes import (
    CastEarly,
    DropUnitFactors,
    FoldConstants,
    ReshapeUnitAxes,
)

aten = torch.ops.aten


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def changed(graph_pass, graph, x):
    """The rewritten graph, which gives the same bits; None if the pass left it alone."""
    result = graph_pass(graph)
    actual, expected = outputs(result.graph_module, x), outputs(graph, x)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert bits(actual) == bits(expected)
    return result.graph_module if result.modified else None


def special():
    x = draw(3, 4).float()
    x[0, :3] = torch.tensor([-0.0, float("nan"), float("-inf")])
    return x


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x / 1.0,
        lambda m, x: x / 1,
        lambda m, x: 1 * x,
        lambda m, x: x * torch.ones(4),
        lambda m, x: torch.ones(3, 4) * x,
        lambda m, x: x.expand(3, 4),
        lambda m, x: x * torch.ones(x.shape[0], 1),
    ],
)
def test_unit_factor_goes(function):
    graph = traced(function, special())
    plain = changed(DropUnitFactors(), graph, special())
    assert not targets(plain)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda m, x: x / 2.0, special()),
        (lambda m, x: x.expand(2, 3, 4), special()),
        (lambda m, x: x * torch.ones(2, 1, 1), special()),
        (lambda m, x: x / 1, torch.arange(6)),  # integers become floats
        (lambda m, x: x * 1.0, torch.arange(6)),
        (lambda m, x: torch.div(x, 1, rounding_mode="floor"), special()),
    ],
)
def test_factor_that_changes_something_stays(function, x):
    assert changed(DropUnitFactors(), traced(function, x, dynamic_batch=False), x) is None


def frequencies(m, x):
    exponent = -math.log(10000) * torch.arange(0, 8, dtype=torch.float32) / 8
    return x[:, None].float() * torch.exp(exponent)[None, :]


def test_frequencies_of_a_timestep_become_one_buffer():
    x = torch.tensor([3, 900])
    plain = changed(FoldConstants(), traced(frequencies, x), x)
    (name,) = dict(plain.named_buffers())
    assert plain.get_buffer(name).shape == (1, 8)
    assert not targets(plain) & {aten.arange.start, aten.exp.default}


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + m.w.exp(),  # a parameter may be trained or quantized
        lambda m, x: x + torch.ones(x.shape[0], 1),  # depends on the batch
        lambda m, x: x.sum() + torch.arange(70_000.0),
        lambda m, x: x.sum() + torch.arange(1_100_000),
    ],
)
def test_what_is_no_small_constant_is_not_folded_away(function):
    x = draw(3, 4).float()
    module = Call(function)
    module.w = nn.Parameter(draw(4).float())
    graph = traced(module, x)
    plain = FoldConstants()(graph).graph_module
    assert targets(plain) & {aten.exp.default, aten.ones.default, aten.arange.default}


def buckets(m, x):
    """T5's: bits of a logarithm decide the number of a bucket."""
    distances = (torch.arange(300)[None, :] - torch.arange(300)[:, None]).abs()
    far = 8 + (torch.log(distances.float() / 8) / math.log(16) * 8).long()
    return x + m.table[torch.where(distances < 8, distances, far.clamp(max=15))]


def test_integers_that_were_rounded_from_more_floats_than_are_stored_are_folded():
    x, module = draw(3, 1, 1).float(), Call(buckets)
    module.table = nn.Parameter(draw(16).float())
    plain = changed(FoldConstants(), traced(module, x), x)
    (name,) = dict(plain.named_buffers())
    assert plain.get_buffer(name).shape == (300, 300)
    assert plain.get_buffer(name).dtype == torch.int64
    assert not targets(plain) & {aten.arange.default, aten.log.default, aten.where.self}
    assert not FoldConstants()(plain).modified


def test_floats_are_computed_from_the_last_constants_that_are_stored():
    def function(m, x):
        return x + (torch.arange(300.0)[None, :] * torch.arange(300.0)[:, None] / 7)

    x = draw(3, 1, 1).float()
    plain = changed(FoldConstants(), traced(function, x), x)
    sizes = sorted(buffer.numel() for buffer in plain.buffers())
    assert sizes[-1] == 300
    assert {aten.mul.Tensor, aten.div.Tensor} <= targets(plain)
    assert aten.arange.default not in targets(plain)


def test_random_numbers_are_not_folded():
    # tracing refuses them: put one in by hand
    graph = traced(lambda m, x: x + torch.ones(4), draw(3, 4).float())
    (ones,) = graph.graph.find_nodes(op="call_function", target=aten.ones.default)
    assert FoldConstants()(graph).modified
    ones.target = aten.rand.default
    assert not FoldConstants()(graph).modified


MOVES = {
    "unsqueeze": lambda x: x.unsqueeze(1),
    "reshape": lambda x: x.reshape(2, -1),
    "transpose": lambda x: x.transpose(0, 1),
    "expand": lambda x: x.unsqueeze(0).expand(3, *x.shape),
    "select": lambda x: x[-1],
}


@given(names=st.lists(st.sampled_from(list(MOVES)), min_size=1, max_size=3))
def test_cast_goes_before_every_move(names):
    def function(m, x):
        for name in names:
            x = MOVES[name](x) if x.dim() > 1 or name in ("unsqueeze", "reshape") else x
        return x.float()

    x = torch.arange(-6, 6).reshape(2, 6)
    plain = changed(CastEarly(), traced(function, x, dynamic_batch=False), x)
    (cast,) = [n for n in plain.graph.nodes if n.target is aten.to.dtype]
    assert cast.args[0].op == "placeholder"


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.float().unsqueeze(1),
        lambda m, x: (x * 2).float(),
        lambda m, x: x.unsqueeze(1).float() + x.unsqueeze(1).sum(),
        lambda m, x: x.unsqueeze(1).double(),
    ],
)
def test_cast_that_gains_nothing_stays(function):
    x = torch.arange(-6, 6)
    graph = traced(function, x, dynamic_batch=False)
    plain = changed(CastEarly(), graph, x)
    assert plain is None or len(plain.graph.nodes) == len(graph.graph.nodes)


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    axis=st.integers(-2, 2),
    index=st.integers(-3, 2),
    kind=st.sampled_from(["unsqueeze", "squeeze", "select"]),
)
def test_unit_axes_are_reshaped(shape, axis, index, kind):
    axis = axis % len(shape) if kind != "unsqueeze" else axis % (len(shape) + 1)
    index = index % shape[axis] if kind == "select" else index
    x = draw(*shape).float()

    def function(m, x):
        if kind == "select":
            return x.select(axis, index) * 2
        return (x.unsqueeze(axis) if kind == "unsqueeze" else x.squeeze(axis)) * 2

    graph = traced(function, x, dynamic_batch=False)
    plain = changed(ReshapeUnitAxes(), graph, x)
    if outputs(graph, x).dim() == 0:
        assert plain is None  # a number, which no kernel takes
    else:
        left = targets(plain) & {aten.unsqueeze.default, aten.squeeze.dim, aten.select.int}
        assert not left


def test_batch_stays_dynamic():
    graph = traced(lambda m, x: x[:, None, 1].unsqueeze(-1) * 2, draw(2, 3, 4).float())
    assert changed(ReshapeUnitAxes(), graph, draw(5, 3, 4).float()) is not None
