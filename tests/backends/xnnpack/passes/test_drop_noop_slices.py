"""Slices that take everything go; slices that take a part stay."""

import torch
from torch import nn

from mpqdm_fx.backends.xnnpack.passes.drop_noop_slices import DropNoopSlices
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.qdq import qdq_ops

SLICE = torch.ops.aten.slice.Tensor


class Crop(nn.Module):
    def forward(self, x):
        whole = SLICE(SLICE(x, 0, 0, 2**63 - 1), 1, 0, 3)
        return SLICE(whole, 2, 1, 2**63 - 1) * SLICE(whole, 2, 0, 4)


def slices(graph):
    return graph.graph.find_nodes(op="call_function", target=SLICE)


def graph_of(model, x):
    return torch.export.export(model, (x,), strict=False).module(check_guards=False)


def test_only_the_slices_that_cut_are_left():
    x = torch.randn(2, 3, 5)
    graph = graph_of(Crop(), x)
    result = DropNoopSlices()(graph)
    assert result.modified
    assert len(slices(graph)) == 4
    assert [node.args[1] for node in slices(result.graph_module)] == [2, 2]
    assert torch.equal(result.graph_module(x), graph(x))
    assert not DropNoopSlices()(result.graph_module).modified


def test_value_without_metadata_behind_a_pair_is_recognised():
    class Pair(nn.Module):
        def forward(self, x):
            ops, settings = qdq_ops(), (0.1, 0, -128, 127, torch.int8)
            q = ops.quantize_per_tensor.default(x, *settings)
            return SLICE(ops.dequantize_per_tensor.default(q, *settings), 1, 0, 3)

    x = torch.randn(2, 3)
    graph = graph_of(Pair(), x)
    for node in graph.graph.nodes:
        if "quantize" in str(node.target):
            del node.meta["val"]  # as convert_pt2e leaves them
    result = DropNoopSlices()(graph)
    assert not slices(result.graph_module)
    assert torch.equal(result.graph_module(x), graph(x))


def test_graph_with_a_dynamic_batch_is_left_alone():
    inputs = {"x": torch.randn(2, 3, 5)}
    graph = trace(Crop().eval(), inputs)
    assert graph.meta["signature"].dynamic_batch
    assert not DropNoopSlices()(graph).modified
