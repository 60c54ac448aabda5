"""What the tests of the norm passes share: graphs of one op, and what float64 says."""

import torch
from torch import nn

from mpqdm_fx.capture.trace import trace


class Call(nn.Module):
    """A function of one image, with tensors of its own."""

    def __init__(self, function, **tensors) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        return (self.function(self, x),)


def traced(function, x, dynamic_batch=True, **tensors):
    """Graph of a function or module on one input."""
    module = function if isinstance(function, nn.Module) else Call(function, **tensors)
    return trace(module.eval(), (x,), dynamic_batch=dynamic_batch)


def traced_in(dtype, module, x):
    """Graph of a module in another precision: a trace itself computes in float32."""
    graph = traced(module, x.float()).to(dtype)
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            node.meta["val"] = value.to(dtype)
    return graph


def randomized(norm, seed=0):
    """The norm with random parameters, around 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + (name == "weight"))
    return norm


def draw(*shape, seed=0, mean=0.0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * std + mean


def outputs(graph_module, x):
    """What a graph of one input gives."""
    with torch.no_grad():
        result = graph_module(x)
    return result[0] if isinstance(result, tuple) else result


def assert_close(actual, expected, rtol=1e-5):
    """Same shape and dtype, and no number off by more than `rtol` of the largest."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


def targets(graph_module):
    """Functions and module classes that the graph calls."""
    nodes = graph_module.graph.nodes
    called = {type(graph_module.get_submodule(n.target)) for n in nodes if n.op == "call_module"}
    return called | {n.target for n in nodes if n.op == "call_function"}
