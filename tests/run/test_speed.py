"""Predicted times order the kinds of activations as the kernels do."""

import pytest
import torch
from small import TinyNet, Twice, net_calls
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.run.cost import bind_sizes, multiply_adds
from mpqdm_fx.run.speed import InputOption, layer_time, other_time, weight_bytes

KINDS = ("float", "static", "dynamic")
OPTIONS = {kind: InputOption(kind=kind) for kind in KINDS}


def timed(layer, shape, exponent=0.0):
    """Time of each kind of a model that is one layer."""
    call = {"input": torch.randn(shape)}
    graph_module = trace(nn.Sequential(layer), call)
    sizes = bind_sizes(graph_module, call)
    (weight_layer,) = weight_layers(graph_module).values()
    options = {kind: InputOption(kind=kind, exponent=exponent) for kind in KINDS}
    return {
        kind: layer_time(graph_module, weight_layer, option, sizes)
        for kind, option in options.items()
    }


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(256, 256, 3, padding=1), (1, 256, 16, 16)),
        (nn.Conv2d(512, 256, 3, padding=1, stride=2), (2, 512, 16, 16)),
        (nn.Linear(1024, 4096), (1, 256, 1024)),
    ],
)
def test_wide_layers_are_fastest_in_integers_and_dynamic_ones_write_floats(layer, shape):
    times = timed(layer, shape)
    assert times["dynamic"] < times["static"] < times["float"]
    assert 2 < times["float"] / times["dynamic"] < 4  # four products in the time of one, at best


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 4, 1), (1, 4, 64, 64)),
        (nn.Conv2d(8, 16, 1), (1, 8, 32, 32)),
        (nn.Conv2d(32, 32, 3, padding=1, groups=32), (1, 32, 32, 32)),
    ],
)
def test_layers_of_few_products_are_fastest_in_float(layer, shape):
    times = timed(layer, shape)
    assert times["float"] < times["dynamic"] < times["static"]


def test_a_layer_of_one_row_takes_the_time_of_fetching_its_weights():
    times = timed(nn.Linear(512, 512), (1, 512))
    assert times["float"] / times["dynamic"] == pytest.approx(4, rel=0.1)


def test_channels_that_are_scaled_cost_a_product_of_each_number_read():
    layer, shape = nn.Conv2d(16, 8, 3, padding=1), (2, 16, 9, 9)
    plain, half, full = (timed(layer, shape, exponent) for exponent in (0.0, 0.5, 1.0))
    assert half == full
    assert plain["float"] == full["float"]
    extra = {kind: full[kind] - plain[kind] for kind in ("static", "dynamic")}
    assert extra["static"] == extra["dynamic"] > 2 * 16 * 9 * 9


def test_weights_are_bytes_for_integer_kernels_and_floats_for_float_ones():
    graph_module = trace(TinyNet(), net_calls()[0])
    for layer in weight_layers(graph_module).values():
        float_bytes, *int_bytes = (weight_bytes(layer, option) for option in OPTIONS.values())
        assert float_bytes == layer.weight.numel() * 4
        assert int_bytes == [layer.weight.numel()] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_called_twice_takes_twice_as_long(kind):
    once = timed(nn.Linear(16, 16), (3, 16))[kind]
    call = {"x": torch.randn(3, 16)}
    graph_module = trace(Twice(nn.Linear(16, 16)), call)
    (layer,) = weight_layers(graph_module).values()
    twice = layer_time(graph_module, layer, OPTIONS[kind], bind_sizes(graph_module, call))
    assert twice == pytest.approx(2 * once)


@pytest.mark.parametrize("kind", KINDS)
def test_times_grow_with_the_batch_but_for_the_weights(kind):
    graph_module = trace(TinyNet(), net_calls()[0])
    layer = weight_layers(graph_module)["body"]
    single, two, four = (
        layer_time(
            graph_module, layer, OPTIONS[kind], bind_sizes(graph_module, net_calls(batch=batch)[0])
        )
        for batch in (1, 2, 4)
    )
    assert 0 < two - single == pytest.approx((four - two) / 2)


class Others(nn.Module):
    """Views, products without weights and elementwise steps beside one layer."""

    def __init__(self, *, views=False, product=False, steps=0):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.views, self.product, self.steps = views, product, steps

    def forward(self, x):
        h = self.layer(x)
        if self.views:
            h = h.transpose(1, 2).transpose(1, 2)
        if self.product:
            h = h @ h.transpose(1, 2) @ h
        for _ in range(self.steps):
            h = torch.tanh(h)
        return h


def others(**parts):
    call = {"x": torch.randn(2, 16, 8)}
    graph_module = trace(Others(**parts), call)
    sizes = bind_sizes(graph_module, call)
    return other_time(graph_module, sizes), multiply_adds(graph_module, sizes)


def test_views_are_free_and_products_and_elements_are_not():
    assert others()[0] == 0
    assert others(views=True)[0] == 0
    (product, counted), (_, plain) = others(product=True), others()
    assert product == counted - plain > 0
    once, twice = others(steps=1)[0], others(steps=2)[0]
    assert twice == 2 * once > 2 * 16 * 8
