"""Transposed convolutions become ordinary ones that compute the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.parameters import present_tensors
from mpqdm_fx.passes import SubpixelConvolutions

LAYERS = (nn.ConvTranspose1d, nn.ConvTranspose2d)
ORDINARY = (nn.Conv1d, nn.Conv2d)


@st.composite
def layers(draw):
    """A transposed convolution whose stride divides its kernel along each axis."""
    rank = draw(st.sampled_from([1, 2]))
    steps = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    stride, taps, pads = draw(steps), draw(steps), draw(steps)
    kernel = [s * t for s, t in zip(stride, taps, strict=True)]
    padding = [min(p, k // 2) for p, k in zip(pads, kernel, strict=True)]
    extra = [draw(st.integers(0, min(p, s - 1))) for p, s in zip(padding, stride, strict=True)]
    return LAYERS[rank - 1](
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        output_padding=extra,
        bias=draw(st.booleans()),
    )


def rewritten(net, x):
    graph = trace(net.eval(), (x,))
    result = SubpixelConvolutions()(graph)
    return graph, result


@given(layer=layers(), seed=st.integers(0, 99), batch=st.integers(1, 3))
def test_the_ordinary_convolution_computes_the_same(layer, seed, batch):
    torch.manual_seed(seed)
    layer.reset_parameters()
    net = nn.Sequential(layer)
    x = torch.randn(batch, layer.in_channels, *(4, 5)[: len(layer.stride)])
    _, result = rewritten(net, x)
    assert result.modified
    ((name, found),) = weight_layers(result.graph_module).items()
    assert name == "0"
    assert type(found.module) is ORDINARY[len(layer.stride) - 1]
    assert found.module.weight.numel() == layer.weight.numel()
    with torch.no_grad():
        expected = layer.double()(x.double())
        actual = result.graph_module(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_pixel_with_values_of_its_own_comes_out_where_it_did():
    # whole numbers: sums are exact in any order
    layer = nn.ConvTranspose1d(1, 1, 6, stride=3, padding=2, output_padding=1)
    layer.weight.data = torch.arange(1.0, 7).reshape(1, 1, 6)
    layer.bias.data = torch.tensor([100.0])
    x = torch.tensor([[[1.0, 10.0, 1000.0]]])
    graph, result = rewritten(nn.Sequential(layer), x)
    assert torch.equal(result.graph_module(x), graph(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 3, 4, stride=2, padding=1)

    def forward(self, x):
        return self.up(torch.sin(self.up(x)))


def test_a_layer_that_is_called_twice_stays_one_layer():
    torch.manual_seed(0)
    net, x = Twice(), torch.randn(2, 3, 5)
    graph, result = rewritten(net, x)
    (layer,) = weight_layers(result.graph_module).values()
    assert len(layer.nodes) == 2
    torch.testing.assert_close(result.graph_module(x), graph(x), rtol=1e-5, atol=1e-5)
    assert not SubpixelConvolutions()(result.graph_module).modified


def test_its_parameters_are_still_those_of_the_model():
    _, result = rewritten(nn.Sequential(nn.ConvTranspose1d(3, 2, 4, stride=2)), torch.ones(1, 3, 5))
    entries = {p.name: (p.numel, names) for p, names, _ in present_tensors(result.graph_module)}
    assert entries == {"0.weight": (24, ("0.weight",)), "0.bias": (2, ("0.bias",))}


KEPT = {
    "rest": nn.ConvTranspose1d(4, 4, 3, stride=2),
    "groups": nn.ConvTranspose1d(4, 4, 4, stride=2, groups=2),
    "dilation": nn.ConvTranspose1d(4, 4, 4, stride=2, dilation=2),
    "beyond the end": nn.ConvTranspose1d(4, 4, 4, stride=2, output_padding=1),
    "volume": nn.ConvTranspose3d(4, 4, 2, stride=2),
}


@pytest.mark.parametrize("name", KEPT)
def test_others_stay_as_they_are(name):
    layer = KEPT[name]
    x = torch.randn(2, 4, *(5, 3, 3)[: len(layer.stride)])
    assert not rewritten(nn.Sequential(layer), x)[1].modified


def test_what_is_left_is_named():
    graph, _ = rewritten(nn.Sequential(nn.ConvTranspose1d(3, 2, 4, stride=2)), torch.ones(1, 3, 5))
    with pytest.raises(DialectError, match="transposed convolution 0"):
        SubpixelConvolutions().ensures(graph)
