"""Gated projections become two layers."""

import pytest
import torch
from one_block_graphs import one_block, run, weight_shapes
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes import NORMALIZE, SplitGeglu
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.testing import assert_same_function, count

aten = torch.ops.aten


@pytest.mark.parametrize("variant", [0, 1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_projection_becomes_value_and_gate(variant, bias):
    case = one_block("geglu", variant=variant, bias=bias)
    assert weight_shapes(case.graph_module)["blocks.1.proj"] == (32, 8)
    result = run(SplitGeglu(), case)
    assert result.modified
    shapes = weight_shapes(result.graph_module)
    assert shapes["blocks.1.proj_value"] == shapes["blocks.1.proj_gate"] == (16, 8)
    assert "blocks.1.proj" not in shapes
    for cut in (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
        assert count(result.graph_module, cut) == 0
    weight = case.graph_module.get_submodule("blocks.1.proj").weight
    first, second = ("gate", "value") if variant == 3 else ("value", "gate")
    halves = [
        result.graph_module.get_submodule(f"blocks.1.proj_{role}").weight
        for role in (first, second)
    ]
    assert torch.equal(torch.cat(halves), weight)


class _Halves(nn.Module):
    def __init__(self, combine):
        super().__init__()
        self.proj = nn.Linear(4, 8)
        self.combine = combine

    def forward(self, x):
        return (self.combine(self.proj(x), x),)


def _no_gate(y, x):
    a, b = y.chunk(2, dim=-1)
    return a + b


def _other_user(y, x):
    a, b = y.chunk(2, dim=-1)
    return a * torch.nn.functional.gelu(b) + y.sum()


def _other_axis(y, x):
    a, b = y.chunk(2, dim=1)
    return a * torch.nn.functional.gelu(b)


def _three_parts(y, x):
    a, b = y.split([3, 3, 2], dim=-1)[:2]
    return a * torch.nn.functional.gelu(b)


@pytest.mark.parametrize("combine", [_no_gate, _other_user, _other_axis, _three_parts])
def test_projection_that_is_not_gated_stays(combine):
    graph_module = trace(_Halves(combine).eval(), {"x": torch.randn(2, 6, 4)})
    result = SplitGeglu()(graph_module)
    assert not result.modified
    assert weight_shapes(result.graph_module) == {"proj": (8, 4)}


class _SharedGate(nn.Module):
    def __init__(self, second):
        super().__init__()
        self.proj = nn.Linear(4, 8)
        self.second = second

    def forward(self, x):
        a, b = self.proj(x).chunk(2, dim=-1)
        y = a * torch.nn.functional.gelu(b)
        return (self.second(self.proj(y)),)


def _gated(y):
    a, b = y.chunk(2, dim=-1)
    return a * torch.nn.functional.gelu(b)


def test_projection_called_twice_is_split_once_for_both_calls():
    graph_module = trace(_SharedGate(_gated).eval(), {"x": torch.randn(2, 6, 4)})
    result = SplitGeglu()(graph_module)
    assert result.modified
    layers = weight_layers(result.graph_module)
    assert {name: len(layer.nodes) for name, layer in layers.items()} == {
        "proj_value": 2,
        "proj_gate": 2,
    }
    inputs = {"x": torch.randn(3, 6, 4)}
    assert_same_function(graph_module, result.graph_module, inputs, rtol=SplitGeglu.tolerance)


def test_projection_with_one_ungated_call_stays():
    graph_module = trace(_SharedGate(torch.neg).eval(), {"x": torch.randn(2, 6, 4)})
    assert not SplitGeglu()(graph_module).modified


def test_pipeline_opens_patterns_for_later_passes():
    # the dropout between projection and chunk has to go before the projection can be split
    def dropped(y, x):
        a, b = torch.nn.functional.dropout(y, 0.5, training=False).chunk(2, dim=-1)
        return a * torch.nn.functional.gelu(b)

    graph_module = trace(_Halves(dropped).eval(), {"x": torch.randn(2, 6, 4)})
    assert not SplitGeglu()(graph_module).modified
    result = Pipeline(passes=NORMALIZE)(graph_module)
    assert set(weight_shapes(result.graph_module)) == {"proj_value", "proj_gate"}
