"""Layout copies stand around dynamic convolutions, views around linear layers of rank 4."""

import pytest
import torch
from laws import chained
from torch import nn

from mpqdm_fx.backends.xnnpack.passes.pin_layouts import PinLayouts
from mpqdm_fx.backends.xnnpack.passes.unshare_dynamic_quantizers import UnshareDynamicQuantizers
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.dynamic_chain import DynamicChain
from mpqdm_fx.graph.qdq import insert_pair

COPY = torch.ops.aten._to_copy.default


class Layers(nn.Module):
    """Convolutions of one and two axes, linear layers of rank 3 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.line = nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3)
        self.mix, self.rows = nn.Linear(7, 6), nn.Linear(7, 5)

    def forward(self, x):
        rows = x.flatten(1, 2)
        return self.conv(torch.sin(x)), self.mix(x), self.rows(rows), self.line(x[:, :, 0])


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 5, 7)}
    graph = UnshareDynamicQuantizers()(chained(trace(Layers().eval(), inputs))).graph_module
    return graph, inputs


def call(graph, name):
    return next(n for n in graph.graph.nodes if n.op == "call_module" and n.target == name)


def test_convolution_reads_and_gives_copies(layers):
    result = PinLayouts()(layers[0])
    assert result.modified
    conv = call(result.graph_module, "conv")
    chain = DynamicChain.behind(conv.args[0])
    assert (chain.value.target, chain.choose.args[0]) == (COPY, chain.value)
    assert chain.value.kwargs == {"memory_format": torch.channels_last}
    (after,) = conv.users
    assert (after.target, after.kwargs) == (COPY, {"memory_format": torch.contiguous_format})
    assert len(result.graph_module.graph.find_nodes(op="call_function", target=COPY)) == 2
    output = result.graph_module(**layers[1])[0]
    assert output.is_contiguous()


def test_linear_layer_of_rank_4_works_on_rank_3(layers):
    graph, inputs = layers
    after = PinLayouts()(graph).graph_module
    mix = call(after, "mix")
    assert tuple(mix.meta["val"].shape[1:]) == (15, 6)
    assert DynamicChain.behind(mix.args[0]).value.target is torch.ops.aten.flatten.using_ints
    for got, want in zip(after(**inputs), graph(**inputs), strict=True):
        assert got.shape == want.shape
        assert torch.equal(got, want)


def test_other_layers_are_left_alone(layers):
    graph = layers[0]
    after = PinLayouts()(graph).graph_module
    for name in ("rows", "line"):
        chains = [DynamicChain.behind(call(g, name).args[0]) for g in (graph, after)]
        assert chains[0].value.name == chains[1].value.name


def test_shared_chain_is_left_alone():
    graph = chained(trace(Layers().eval(), {"x": torch.randn(2, 3, 5, 7)}))
    chain = DynamicChain.behind(call(graph, "conv").args[0])
    call(graph, "line").update_arg(0, chain.dequantize)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    after = PinLayouts()(graph).graph_module
    assert not after.graph.find_nodes(op="call_function", target=COPY)


def test_no_copy_is_put_behind_a_static_convolution():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.second(self.first(x))

    graph = chained(trace(Two().eval(), {"x": torch.randn(2, 3, 5, 7)}))
    chain = DynamicChain.behind(call(graph, "second").args[0])
    first = call(graph, "first")
    first.update_arg(0, DynamicChain.behind(first.args[0]).value)
    pair = insert_pair(graph, first, (0.1, 3, -128, 127, torch.int8))
    chain.choose.update_arg(0, pair)
    chain.quantize.update_arg(0, pair)
    graph.recompile()
    after = PinLayouts()(graph).graph_module
    assert DynamicChain.behind(call(after, "second").args[0]).value.name == pair.name


def test_second_run_finds_nothing_to_do(layers):
    assert not PinLayouts()(PinLayouts()(layers[0]).graph_module).modified
