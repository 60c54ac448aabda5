"""Moving ops between dequantize and quantize move codes of one kind, and the numbers stay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.backends.xnnpack.passes.requantize_copies import MOVING_OPS, RequantizeCopies
from mpqdm_fx.graph.qdq import is_dequantize, is_quantize, qdq_ops, qdq_parameters

MOVES = {
    "cat": lambda a, b: torch.cat([a, b], dim=1),
    "cat twice the same": lambda a, b: torch.cat([a, a], dim=1),
    "view": lambda a, b: a.view(a.shape[0], -1, 2),
    "reshape": lambda a, b: a.reshape(-1, 7),
    "flatten": lambda a, b: a.flatten(1),
    "permute": lambda a, b: a.permute(0, 2, 3, 1),
    "transpose": lambda a, b: a.transpose(1, 2),
    "slice": lambda a, b: a[:, 1:],
    "select": lambda a, b: a[:, 1],
    "unsqueeze": lambda a, b: a.unsqueeze(1),
    "expand": lambda a, b: a[:, :1].expand(-1, 3, -1, -1),
    "relu": lambda a, b: torch.relu(a),
    "relu6": lambda a, b: nn.functional.relu6(a),
    "hardtanh": lambda a, b: nn.functional.hardtanh(a, -0.41, 0.33),
    "clamp": lambda a, b: a.clamp(-0.2, 0.55),
    "clamp_min": lambda a, b: a.clamp_min(-0.37),
    "max_pool2d": lambda a, b: nn.functional.max_pool2d(a, 2),
}
INPUTS = (torch.randn(2, 4, 6, 7), torch.randn(2, 4, 6, 7))


def pair(x, scale, zero_point):
    ops, limits = qdq_ops(), (-128, 127, torch.int8)
    q = ops.quantize_per_tensor.default(x, scale, zero_point, *limits)
    return ops.dequantize_per_tensor.default(q, scale, zero_point, *limits)


def graph_of(move, inner=((0.02, 3), (0.05, -7)), outer=(0.03, 1)):
    class Moves(nn.Module):
        def forward(self, a, b):
            return pair(move(pair(a, *inner[0]), pair(b, *inner[1])), *outer)

    exported = torch.export.export(Moves(), INPUTS, strict=False)
    return exported.module(check_guards=False)


def moved_as_integers(graph):
    """(parameters of the inputs, of the user) of moving ops between dequantize and quantize."""
    for node in graph.graph.nodes:
        if getattr(node.target, "overloadpacket", None) in MOVING_OPS:
            users, sources = list(node.users), node.all_input_nodes
            if all(map(is_dequantize, sources)) and len(users) == 1 and is_quantize(users[0]):
                yield {qdq_parameters(n) for n in sources}, qdq_parameters(users[0])


@pytest.mark.parametrize("name", MOVES)
def test_inputs_get_the_parameters_of_the_quantize_node_behind(name):
    graph = graph_of(MOVES[name])
    result = RequantizeCopies()(graph)
    before, after = (list(moved_as_integers(g)) for g in (graph, result.graph_module))
    assert len(before) == len(after)
    assert all(sources == {behind} for sources, behind in after)
    assert result.modified == any(sources != {behind} for sources, behind in before)
    # "expand" cuts first: it stands behind a slice, so no backend takes it as an int8 op
    assert result.modified == (name != "expand")
    assert torch.equal(result.graph_module(*INPUTS), graph(*INPUTS))
    assert not RequantizeCopies()(result.graph_module).modified


@given(
    scales=st.tuples(*[st.floats(2.0**-8, 2.0**-2, width=32)] * 3),
    zero_points=st.tuples(*[st.integers(-128, 127)] * 3),
    name=st.sampled_from(["cat", "clamp", "hardtanh", "relu", "max_pool2d", "permute"]),
)
def test_numbers_are_bit_equal_whatever_the_parameters(scales, zero_points, name):
    pairs = list(zip(scales, zero_points, strict=True))
    graph = graph_of(MOVES[name], inner=pairs[:2], outer=pairs[2])
    result = RequantizeCopies()(graph)
    assert torch.equal(result.graph_module(*INPUTS), graph(*INPUTS))
    differs = [pairs[0] != pairs[2], name == "cat" and pairs[1] != pairs[2]]
    assert result.modified == any(differs)


def test_equal_parameters_are_left_alone():
    grid = (0.02, 3)
    assert not RequantizeCopies()(graph_of(MOVES["cat"], inner=(grid, grid), outer=grid)).modified


def test_op_with_another_reader_or_a_float_input_is_left_alone():
    class Read(nn.Module):
        def forward(self, a, b):
            moved = torch.cat([pair(a, 0.02, 3), pair(b, 0.05, 3)], dim=1)
            return pair(moved, 0.03, 0) + moved

    class Mixed(nn.Module):
        def forward(self, a, b):
            return pair(torch.cat([pair(a, 0.02, 3), b], dim=1), 0.03, 0)

    for model in (Read(), Mixed()):
        graph = torch.export.export(model, INPUTS, strict=False).module(check_guards=False)
        assert not RequantizeCopies()(graph).modified


def test_arithmetic_is_not_a_move():
    class Sum(nn.Module):
        def forward(self, a, b):
            return pair(pair(a, 0.02, 3) + pair(b, 0.05, 3), 0.03, 0)

    graph = torch.export.export(Sum(), INPUTS, strict=False).module(check_guards=False)
    assert not RequantizeCopies()(graph).modified
