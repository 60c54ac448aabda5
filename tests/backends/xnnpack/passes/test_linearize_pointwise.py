"""1x1 convolutions as linear layers."""

import pytest
import torch
from torch import nn

from mpqdm_fx.backends.xnnpack.passes import LinearizePointwise
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.levels.int4 import quantize_int4
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.testing import assert_same_function

_aten = torch.ops.aten


class Projections(nn.Module):
    """What an attention block with convolutions for projections does around them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        h = self.proj_in(x)
        batch, channels, height, width = h.shape
        h = self.inner(h.permute(0, 2, 3, 1).reshape(batch, height * width, channels))
        h = h.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return self.proj_out(h) + x


def traced(module, **inputs):
    return trace(module.eval(), inputs, dynamic_batch=False)


def permutations(graph):
    return graph.graph.find_nodes(op="call_function", target=_aten.permute.default)


def test_permutations_of_an_attention_block_cancel():
    x = torch.randn(2, 6, 3, 5)
    graph = traced(Projections(), x=x)
    result = LinearizePointwise()(graph).graph_module
    assert all(isinstance(la.module, nn.Linear) for la in weight_layers(result).values())
    assert list(weight_layers(result)) == list(weight_layers(graph))
    assert len(permutations(graph)) == 2
    assert len(permutations(result)) == 2  # one before, one behind the whole block
    assert_same_function(graph, result, {"x": x}, rtol=1e-5)


def test_integers_and_scales_stay_with_the_layer():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 1)
    codes, scale = quantize_int4(conv.weight.detach().flatten(1), torch.full((4,), 4))
    net = nn.Sequential(install_codes(conv, codes.view_as(conv.weight), scale))
    graph = traced(net, input=torch.randn(2, 6, 3, 5))
    result = LinearizePointwise(layers=frozenset({"0"}))(graph).graph_module
    linear = result.get_submodule("0")
    assert torch.equal(linear.weight_codes, codes)
    assert torch.equal(linear.weight, codes.float() * linear.weight_scale[:, None])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 6, 1, stride=2),
        nn.Conv2d(6, 6, 1, padding=1),
        nn.Conv2d(6, 6, 1, groups=2),
    ],
    ids=["kernel", "stride", "padding", "groups"],
)
def test_other_convolutions_stay(conv):
    graph = traced(nn.Sequential(conv), input=torch.randn(2, 6, 4, 4))
    assert not LinearizePointwise()(graph).modified


def test_only_the_layers_named_are_rewritten():
    graph = traced(Projections(), x=torch.randn(2, 6, 3, 5))
    result = LinearizePointwise(layers=frozenset({"proj_in"}))(graph).graph_module
    assert isinstance(result.proj_in, nn.Linear)
    assert isinstance(result.proj_out, nn.Conv2d)
