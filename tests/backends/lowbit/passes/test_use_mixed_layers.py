"""Layers in own operators compute what the quantized layers compute, on values channels last."""

import pytest
import torch
from rounded_nets import Attention, measured_ranges, round_to_grid
from small import TinyNet, Twice, net_calls
from torch import nn

from mpqdm_fx.backends.fit_channels import read_ranges
from mpqdm_fx.backends.lowbit.blob import pack_blob, unpack_blob
from mpqdm_fx.backends.lowbit.passes import ReuseCodes, UseMixedLayers
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.rebuild import infer_static_values
from mpqdm_fx.passes import QuantizeActivations
from mpqdm_fx.records.activations import ActivationRange, DynamicActivation, StaticActivation
from mpqdm_fx.testing import count

mpqdm = torch.ops.mpqdm

GRID = ActivationRange(scale=1 / 16, zero_point=3)


def rounded(net, inputs, bits=4):
    torch.manual_seed(0)
    graph = round_to_grid(trace(net.eval(), inputs), bits)
    infer_static_values(graph, list(inputs.values()))
    return graph


def blobs(graph, names):
    layers = {name: weight_layers(graph)[name].module for name in names}
    return {n: pack_blob(m.weight_codes, m.weight_scale, m.bias) for n, m in layers.items()}


def taken(graph, names):
    """The graph with these layers in own operators, and what it is to compute."""
    result = UseMixedLayers(blobs=blobs(graph, names))(graph)
    assert result.modified
    return result.graph_module, QuantizeActivations(
        ranges=dict.fromkeys(names, DynamicActivation())
    )(graph).graph_module


def assert_close(actual, expected, inputs):
    with torch.no_grad():
        a, b = (graph(**inputs) for graph in (actual, expected))
    for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
        assert x.shape == y.shape
        assert (x - y).abs().max() <= 2e-6 * y.abs().max()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_convolution(kernel, stride, padded, bias):
    net = nn.Conv2d(8, 5, kernel, stride, kernel // 2 if padded else 0, bias=bias)
    inputs = {"x": torch.randn(3, 8, 9, 6, generator=torch.Generator().manual_seed(1))}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = net

        def forward(self, x):
            return (self.layer(x),)

    graph = rounded(Net(), inputs)
    own, expected = taken(graph, ["layer"])
    assert_close(own, expected, inputs)
    pointwise = kernel == stride == 1
    operator = mpqdm.linear_mixed.default if pointwise else mpqdm.conv2d_mixed.default
    assert count(own, operator) == 1
    # a range a sample; a pixel where XNNPACK has a linear layer over the pixels
    (quantize,) = own.graph.find_nodes(op="call_function", target=mpqdm.quantize_mixed.default)
    assert quantize.args[1] == (3 * 9 * 6 if pointwise else 3)


class Upsampled(nn.Module):
    """An image, larger, and a convolution."""

    def __init__(self, mode="nearest", factor=2.0):
        super().__init__()
        self.mode, self.factor = mode, factor
        self.layer = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x):
        return self.layer(nn.functional.interpolate(x, scale_factor=self.factor, mode=self.mode))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_convolution_repeats_pixels_that_were_upsampled_in_front_of_it(mode, fixed):
    inputs = {"x": torch.randn(3, 8, 5, 4, generator=torch.Generator().manual_seed(1))}
    graph = rounded(Upsampled(mode), inputs)
    if fixed:
        pair = StaticActivation(input=GRID, output=GRID)
        ranges, static = {"layer": pair}, {"layer": [pair]}
    else:
        ranges, static = {"layer": DynamicActivation()}, {}
    own = UseMixedLayers(blobs=blobs(graph, ["layer"]), static=static)(graph).graph_module
    assert_close(own, QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    assert not any("upsample" in str(node.target) for node in own.graph.nodes)
    (call,) = own.graph.find_nodes(op="call_function", target=mpqdm.conv2d_mixed.default)
    assert call.args[0].meta["val"].shape == (3, 5, 4, 8)  # codes of the small image


@pytest.mark.parametrize(
    ("mode", "factor"), [("nearest", 3.0), ("nearest", 1.5), ("bilinear", 2.0)]
)
def test_other_upsampling_stays_where_it_is(mode, factor):
    inputs = {"x": torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))}
    graph = rounded(Upsampled(mode, factor), inputs)
    own, expected = taken(graph, ["layer"])
    assert_close(own, expected, inputs)
    assert sum("upsample" in str(node.target) for node in own.graph.nodes) == 1


def test_the_blob_takes_the_place_of_the_weight():
    inputs = net_calls(1)[0]
    graph = rounded(TinyNet(), inputs)
    codes = weight_layers(graph)["body"].module.weight_codes
    own, expected = taken(graph, ["body", "mix"])
    assert_close(own, expected, inputs)
    state = own.state_dict()
    assert [n for n in state if n.startswith(("body", "mix"))] == [
        "body.weight_blob", "mix.weight_blob",
    ]  # fmt: skip
    packed = unpack_blob(state["body.weight_blob"]).codes
    assert torch.equal(packed.view(16, 3, 3, 12), codes.permute(0, 2, 3, 1))
    assert set(weight_layers(own)) == {"conv_in", "conv_out"}


def test_fixed_ranges_are_constants_and_results_are_rounded():
    inputs = Attention.inputs()
    graph = rounded(Attention(), inputs)
    ranges = measured_ranges(graph, inputs)
    names = ["to_q", "to_k", "to_v", "to_out"]
    static = {
        name: [StaticActivation(input=r, output=ranges[name].output) for r in reads]
        for name, reads in read_ranges(graph, {n: ranges[n] for n in names}).items()
    }
    second = static["to_out"][1].input  # the second call reads the first
    assert second.scale == float(torch.tensor(ranges["to_out"].output.scale))
    own = UseMixedLayers(blobs=blobs(graph, names), static=static)(graph).graph_module
    own = ReuseCodes()(own).graph_module
    expected = QuantizeActivations(ranges={n: ranges[n] for n in names})(graph).graph_module
    assert_close(own, expected, inputs)
    # one for the shared input, five results, one input of the first call of the last layer
    assert count(own, mpqdm.quantize_static_mixed.default) == 7
    assert count(own, mpqdm.quantize_mixed.default) == 0
    scales = {float(value) for name, value in own.state_dict().items() if ".scale" in name}
    used = {r.scale for pairs in static.values() for p in pairs for r in (p.input, p.output)}
    assert scales == {float(torch.tensor(scale)) for scale in used}


def test_layers_on_one_value_share_its_codes():
    inputs = Attention.inputs()
    graph = rounded(Attention(), inputs)
    own, expected = taken(graph, ["to_q", "to_k", "to_v", "to_out"])
    assert_close(own, expected, inputs)
    quantizers = own.graph.find_nodes(op="call_function", target=mpqdm.quantize_mixed.default)
    readers = [len({u for item in q.users for u in item.users}) for q in quantizers]
    assert readers == [3, 1, 1]  # three projections; each call of the last layer its own value
    assert sum("weight_blob" in str(n.target) for n in own.graph.find_nodes(op="get_attr")) == 4


def test_a_layer_that_is_called_twice_has_one_blob():
    inputs = {"x": torch.randn(2, 8, 5, 5)}
    graph = rounded(Twice(nn.Conv2d(8, 8, 3, padding=1)), inputs)
    own, expected = taken(graph, ["layer"])
    assert_close(own, expected, inputs)
    assert [name for name in own.state_dict() if "blob" in name] == ["layer.weight_blob"]
    assert count(own, mpqdm.conv2d_mixed.default) == 2


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Conv2d(8, 4, 3, padding=1, groups=2),
        nn.Conv2d(8, 4, 3, padding=2, dilation=2),
        nn.Conv2d(8, 4, 3, padding=2),
        nn.Conv2d(8, 4, 5, padding=2),
        nn.Conv2d(8, 4, 3, stride=3, padding=1),
        nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    ],
)
def test_what_own_kernels_do_not_have_is_left_alone(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return (self.layer(x),)

    graph = rounded(Net(), {"x": torch.randn(2, layer.in_channels, 9, 9)})
    blob = torch.zeros(128, dtype=torch.uint8)
    assert not UseMixedLayers(blobs={"layer": blob})(graph).modified


def test_sizes_that_are_not_known_are_left_alone():
    inputs = net_calls(1)[0]
    graph = round_to_grid(trace(TinyNet().eval(), inputs), 4)  # any batch
    assert not UseMixedLayers(blobs=blobs(graph, ["body"]))(graph).modified
