"""Costs are counted from shapes: multiply-adds as torch counts them, bytes as tensors have them."""

import pytest
import torch
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.run.cost import (
    bind_calls,
    bind_sizes,
    multiply_adds,
    node_cost,
    per_call,
    tensor_bytes,
    value_bytes,
)


def counted_by_torch(graph_module, inputs):
    """Multiply-adds of convolutions, matrix products and attention."""
    # the counter does not know the fused attention of CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        graph_module(**inputs)
    return counter.get_total_flops() // 2


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1)
        self.linear = nn.Linear(6, 10)

    def forward(self, x):
        h = self.conv(x).flatten(2).transpose(1, 2)
        scores = h @ h.transpose(1, 2)
        heads = self.linear(h).unflatten(-1, (2, 5)).transpose(1, 2)
        mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return torch.bmm(scores, h), mixed, torch.addmm(h[0], scores[0], h[0])


def counted(graph_module, inputs):
    return multiply_adds(graph_module, bind_sizes(graph_module, inputs))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_multiply_adds_are_those_that_torch_counts(batch):
    torch.manual_seed(0)
    graph_module = trace(Products().eval(), {"x": torch.randn(2, 4, 6, 8)})
    inputs = {"x": torch.randn(batch, 4, 6, 8)}
    assert counted(graph_module, inputs) == counted_by_torch(graph_module, inputs)


@pytest.mark.parametrize(
    ("make", "calls"), [(tiny_unet, unet_calls), (tiny_condition_unet, condition_calls)]
)
def test_multiply_adds_of_a_unet_are_those_that_torch_counts(make, calls):
    (inputs,) = calls(calls=1)
    graph_module = trace(make(), inputs)
    assert counted(graph_module, inputs) == counted_by_torch(graph_module, inputs)


def test_every_node_costs_something_and_more_at_a_larger_batch():
    (inputs,) = unet_calls(calls=1)
    graph_module = trace(tiny_unet(), inputs)
    single = dict.fromkeys(bind_sizes(graph_module, inputs), 1)
    eight = dict.fromkeys(single, 8)
    for node in graph_module.graph.nodes:
        assert 1 <= node_cost(graph_module, node, single) <= node_cost(graph_module, node, eight)
    conv = next(n for n in graph_module.graph.nodes if n.target == "conv_in")
    assert node_cost(graph_module, conv, eight) == 8 * node_cost(graph_module, conv, single)


def test_bytes_of_a_value_are_those_of_the_tensor():
    (inputs,) = unet_calls(calls=1, batch=5)
    graph_module = trace(tiny_unet(), unet_calls(calls=1)[0])
    sizes, checked = bind_sizes(graph_module, inputs), []

    class Check(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node.op.startswith("call_"):
                assert value_bytes(node, sizes) == tensor_bytes(value), node
                halved = [t.half() for t in [value] if getattr(t, "dtype", 0) == torch.float32]
                if halved:
                    assert value_bytes(node, sizes, half=True) == tensor_bytes(halved)
                checked.append(node)
            return value

    with torch.no_grad():
        Check(graph_module).run(*inputs.values())
    assert len(checked) > 100


def test_bytes_of_nested_values_are_summed():
    value = (torch.zeros(3, dtype=torch.int64), [torch.zeros(2, 2), 7], {"a": None})
    assert tensor_bytes(value) == 24 + 16


def test_calls_of_one_shape_share_their_sizes():
    calls = [*unet_calls(calls=3, batch=2), *unet_calls(calls=1, batch=4)]
    graph_module = trace(tiny_unet(), calls[0])
    sizes = bind_calls(graph_module, calls)
    assert sizes[0] is sizes[1] is sizes[2] is not sizes[3]
    measured = []
    result = per_call(sizes, lambda known: measured.append(known) or next(iter(known.values())))
    assert result == [2, 2, 2, 4]
    assert len(measured) == 2


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, extra):
        return self.linear(extra["x"]) + extra["shift"]


def test_sizes_are_found_in_containers():
    calls = [{"extra": {"x": torch.randn(n, 3, 4), "shift": torch.randn(n, 1, 4)}} for n in (2, 7)]
    graph_module = trace(Shifted().eval(), calls[0])
    assert list(bind_sizes(graph_module, calls[1]).values()) == [7]
