"""Every dequantized value has one reader, and nothing is computed differently."""

import pytest
import torch
from torch import nn

from mpqdm_fx.backends.xnnpack.passes.unshare_dequantize import UnshareDequantize
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.qdq import qdq_ops
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import ActivationRange, StaticActivation


class Skips(nn.Module):
    """One conv output read by a sum, a product and a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        h = self.a(x)
        return torch.cat([h + self.b(h), h * 0.5, h], dim=1)


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 5, 7)}
    grid = ActivationRange(scale=0.03, zero_point=4)
    ranges = {name: StaticActivation(input=grid, output=grid) for name in ("a", "b")}
    graph = trace(Skips().eval(), inputs)
    return QuantizeActivations(ranges=ranges)(graph).graph_module, inputs


def dequantizes(graph):
    ops = qdq_ops()
    kinds = (ops.dequantize_per_tensor.default, ops.dequantize_per_channel.default)
    return [node for node in graph.graph.nodes if node.target in kinds]


def test_each_dequantize_node_has_one_user_afterwards(shared):
    graph, inputs = shared
    before = dequantizes(graph)
    assert max(len(node.users) for node in before) == 4
    result = UnshareDequantize()(graph)
    after = dequantizes(result.graph_module)
    assert result.modified
    assert [len(node.users) for node in after] == [1] * len(after)
    assert len(after) == sum(len(node.users) for node in before)
    assert torch.equal(result.graph_module(**inputs), graph(**inputs))


def test_quantize_nodes_stay_shared(shared):
    graph, _ = shared
    result = UnshareDequantize()(graph).graph_module
    quantize = qdq_ops().quantize_per_tensor.default
    counts = [len(g.graph.find_nodes(op="call_function", target=quantize)) for g in (graph, result)]
    assert counts[0] == counts[1]


def test_one_user_that_reads_it_twice_is_one_user():
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            h = self.a(x)
            return h * h

    grid = ActivationRange(scale=0.03, zero_point=4)
    inputs = {"x": torch.randn(2, 3)}
    graph = QuantizeActivations(ranges={"a": StaticActivation(input=grid, output=grid)})(
        trace(Square().eval(), inputs)
    ).graph_module
    assert not UnshareDequantize()(graph).modified


def test_weight_of_a_layer_called_twice_is_dequantized_twice():
    class Twice(nn.Module):
        def forward(self, codes, scale, x):
            zero = torch.zeros(4, dtype=torch.int64)
            w = qdq_ops().dequantize_per_channel.default(
                codes, scale, zero, 0, -127, 127, torch.int8
            )
            return nn.functional.linear(nn.functional.linear(x, w), w)

    inputs = (torch.ones(4, 4, dtype=torch.int8), torch.full((4,), 0.5), torch.randn(2, 4))
    graph = torch.export.export(Twice(), inputs, strict=False).module(check_guards=False)
    result = UnshareDequantize()(graph)
    assert len(dequantizes(result.graph_module)) == 2
    assert torch.equal(result.graph_module(*inputs), graph(*inputs))


def test_graph_without_sharing_is_left_alone(shared):
    graph, _ = shared
    once = UnshareDequantize()(graph).graph_module
    assert not UnshareDequantize()(once).modified
    plain = trace(nn.Sequential(nn.Linear(2, 2)).eval(), {"input": torch.randn(1, 2)})
    assert not UnshareDequantize()(plain).modified
