"""Every reader of a value quantized at run time has its own chain, and nothing is changed."""

import pytest
import torch
from laws import chained
from torch import nn

from mpqdm_fx.backends.xnnpack.passes.unshare_dynamic_quantizers import UnshareDynamicQuantizers
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.dynamic_chain import DynamicChain
from mpqdm_fx.graph.editing import copy_graph_module


class Shared(nn.Module):
    """A convolution and two linear layers on one value, a third linear layer on another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.a, self.b, self.c = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.conv(x), self.c(torch.tanh(self.a(x) + self.b(x)))


def chains(graph):
    return [c for node in graph.graph.nodes if (c := DynamicChain.behind(node)) is not None]


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 5, 7)}
    return chained(trace(Shared().eval(), inputs)), inputs


def test_each_reader_has_its_own_chain_afterwards(shared):
    graph, inputs = shared
    assert [len(chain.dequantize.users) for chain in chains(graph)] == [3, 1]
    result = UnshareDynamicQuantizers()(graph)
    assert result.modified
    after = chains(result.graph_module)
    assert len(after) == 4
    assert all(chain.is_private for chain in after)
    nodes = [node for chain in after for node in chain.nodes]
    assert len(set(nodes)) == 5 * 4, "no two chains have a node in common"
    assert len({chain.value for chain in after}) == 2, "they still read the same values"
    for got, want in zip(result.graph_module(**inputs), graph(**inputs), strict=True):
        assert torch.equal(got, want)


def test_chains_that_share_their_range_alone_are_separated_too(shared):
    graph, inputs = shared
    graph = copy_graph_module(graph)
    chain = chains(graph)[0]
    last = list(chain.dequantize.users)[-1]
    with graph.graph.inserting_after(chain.dequantize):
        again = graph.graph.node_copy(chain.dequantize)
    last.replace_input_with(chain.dequantize, again)
    graph.recompile()
    after = UnshareDynamicQuantizers()(graph).graph_module
    assert all(chain.is_private for chain in chains(after))
    for got, want in zip(after(**inputs), graph(**inputs), strict=True):
        assert torch.equal(got, want)


def test_private_chains_are_left_alone(shared):
    once = UnshareDynamicQuantizers()(shared[0]).graph_module
    assert not UnshareDynamicQuantizers()(once).modified
