"""Kernel calls of a program are nodes of its edge graph where their constants say which."""

import torch
from torch import fx, nn

from mpqdm_fx.backends.xnnpack.kernel_calls import KernelCall, constant_digest, nodes_of_calls


class Products(nn.Module):
    """Two of three operators read equal constants."""

    def __init__(self):
        super().__init__()
        for name, value in (("a", 1.0), ("b", 2.0), ("c", 2.0)):
            self.register_buffer(name, torch.full((3,), value))

    def forward(self, x):
        return torch.mul(x, self.a) + torch.mul(x, self.b) + torch.mul(x, self.c)


def test_calls_that_nothing_tells_apart_are_left_out():
    graph = fx.symbolic_trace(Products())
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is torch.mul:
            node.target = torch.ops.aten.mul.Tensor
    products = [n for n in graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    names = [KernelCall(op="mul", constants=(name,)) for name in "abc"]
    by_name = nodes_of_calls(graph, products, dict(enumerate(reversed(names))))
    assert [by_name[node] for node in products] == [2, 1, 0]
    one, two = (value_call(torch.full((3,), value)) for value in (1.0, 2.0))
    assert nodes_of_calls(graph, products, {7: two, 8: one, 9: two}) == {products[0]: 8}
    assert nodes_of_calls(graph, products, {7: two}) == {}


def value_call(constant):
    data = constant.numpy().tobytes()
    assert constant_digest(data) == constant_digest(data + bytes(-len(data) % 16))
    return KernelCall(op="mul", constants=(constant_digest(data),))
