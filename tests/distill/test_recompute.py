"""Recomputation: the same numbers and gradients, with less held for the backward pass."""

import pytest
import torch
from small import tiny_unet, unet_calls
from torch.autograd.graph import saved_tensors_hooks

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.distill.recompute import Recomputed


@pytest.fixture(scope="module")
def graph():
    return trace(tiny_unet(), unet_calls()[0], dynamic_batch=False)


def gradients(graph, module, inputs):
    """Output, gradients by name, and bytes that were held for them."""
    graph.zero_grad()
    held = {}

    def hold(tensor):
        held[tensor.data_ptr()] = max(tensor.nbytes, held.get(tensor.data_ptr(), 0))
        return tensor

    with saved_tensors_hooks(hold, lambda tensor: tensor):
        (output,) = module(**inputs)
    parameters = {p.data_ptr() for p in graph.parameters()}
    output.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in graph.named_parameters() if p.grad is not None}
    return output, grads, sum(size for place, size in held.items() if place not in parameters)


@pytest.mark.parametrize("parts", [1, 3, 8, 10_000])
def test_gradients_are_those_of_the_graph_bit_for_bit(graph, parts):
    inputs = unet_calls()[1]
    expected, reference, _ = gradients(graph, graph, inputs)
    output, grads, _ = gradients(graph, Recomputed(graph, parts), inputs)
    assert torch.equal(output, expected)
    assert grads.keys() == reference.keys()
    for name, gradient in reference.items():
        assert torch.equal(grads[name], gradient), name


def test_only_what_crosses_the_cuts_is_held(graph):
    inputs = unet_calls()[1]
    _, _, all_of_it = gradients(graph, graph, inputs)
    module = Recomputed(graph, 6)
    _, _, between = gradients(graph, module, inputs)
    crossing = {node for part in module._parts for node in part.reads}
    assert between <= sum(node.meta["val"].nbytes for node in crossing) < all_of_it / 2
