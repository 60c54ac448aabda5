"""Channels of an input are divided by powers of two and weights multiplied: the same to the bit."""

import pytest
import torch
from small import Twice
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.describe import describe
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.solve.outliers import power_of_two
from mpqdm_fx.passes.quantize.scale_inputs import SCALES, ScaleInputs, factors_of, is_scaled


def powers(channels, seed=0):
    """Factors 1/8..8."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 ** torch.randint(-3, 4, (channels,), generator=generator)


def scaled(model, call, factors):
    """The traced graph, the pass's result, and whether their outputs are the same to the bit."""
    torch.manual_seed(0)
    graph_module = trace(model.eval(), call)
    result = ScaleInputs(factors=factors)(graph_module)
    with torch.no_grad():
        for got, want in zip(result.graph_module(**call), graph_module(**call), strict=True):
            assert torch.equal(got, want)
    return graph_module, result


def products(graph_module):
    """What weight layers read, without repetitions."""
    layers = weight_layers(graph_module).values()
    return {call.args[0] for layer in layers for call in layer.nodes if is_scaled(call)}


class Shared(nn.Module):
    """Three linear layers on one value."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 5) for _ in range(3))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x), torch.sin(x)


def test_layers_that_read_one_value_with_the_same_factors_share_the_product():
    call = {"x": torch.randn(3, 4, 6)}
    same, different = powers(6), powers(6, seed=1)
    assert not torch.equal(same, different)
    _, result = scaled(Shared(), call, {"q": same, "k": same.clone(), "v": different})
    layers = weight_layers(result.graph_module)
    read = {name: layer.nodes[0].args[0] for name, layer in layers.items()}
    assert read["q"] is read["k"]
    assert read["q"] is not read["v"]
    assert len(products(result.graph_module)) == 2
    buffers = {name for name, _ in result.graph_module.named_buffers()}
    assert buffers == {f"{SCALES}.q", f"{SCALES}.v"}
    # others still read the value itself
    (sine,) = result.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.sin.default
    )
    assert sine.args[0].op == "placeholder"
    # and a layer that has no factors, too
    _, partial = scaled(Shared(), call, {"q": same})
    layers = weight_layers(partial.graph_module)
    assert [is_scaled(layers[name].nodes[0]) for name in "qkv"] == [True, False, False]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_a_grouped_convolution_has_a_factor_for_each_channel_of_all_groups(groups, padding_mode):
    conv = nn.Conv2d(8, 12, 3, groups=groups, padding=1, padding_mode=padding_mode)
    model, call = nn.Sequential(conv, nn.SiLU()), {"input": torch.randn(2, 8, 5, 6)}
    factor = powers(8)
    graph_module, result = scaled(model, call, {"0": factor})
    weight = result.graph_module.get_submodule("0").weight
    old = graph_module.get_submodule("0").weight
    for out in range(12):
        first = out // (12 // groups) * (8 // groups)
        factors = factor[first : first + 8 // groups]
        assert torch.equal(weight[out], old[out] * factors[:, None, None])
    scales = result.graph_module.get_buffer(f"{SCALES}.0")
    assert torch.equal(scales, (1 / factor).view(8, 1, 1))


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6), (2, 3, 4, 6)])
def test_a_linear_layer_has_a_factor_for_each_number_of_a_row(shape):
    factor, call = powers(6), {"input": torch.randn(shape)}
    graph_module, result = scaled(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), call, {"0": factor})
    layer = weight_layers(result.graph_module)["0"]
    assert torch.equal(layer.weight, graph_module.get_submodule("0").weight * factor)
    assert torch.equal(result.graph_module.get_submodule("0").bias, layer.module.bias)
    assert torch.equal(result.graph_module.get_buffer(f"{SCALES}.0"), 1 / factor)


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.Conv1d(6, 6, 3, padding=1)])
def test_a_layer_that_is_called_twice_reads_a_product_each_time(layer):
    shape = (3, 6) if isinstance(layer, nn.Linear) else (3, 6, 7)
    _, result = scaled(Twice(layer), {"x": torch.randn(shape)}, {"layer": powers(6)})
    (weight_layer,) = weight_layers(result.graph_module).values()
    assert [is_scaled(call) for call in weight_layer.nodes] == [True, True]
    assert len(products(result.graph_module)) == 2


def test_the_input_graph_is_left_as_it_was():
    call = {"x": torch.randn(3, 4, 6)}
    graph_module = trace(Shared(), call)
    before = graph_module.q.weight.clone()
    ScaleInputs(factors={"q": powers(6)})(graph_module)
    assert torch.equal(graph_module.q.weight, before)
    assert not products(graph_module)


def test_a_second_run_changes_nothing():
    call = {"x": torch.randn(3, 4, 6)}
    factors = {name: powers(6) for name in "qkv"}
    _, first = scaled(Shared(), call, factors)
    assert first.modified
    again = ScaleInputs(factors=factors)(first.graph_module)
    assert not again.modified
    assert torch.equal(again.graph_module.q.weight, first.graph_module.q.weight)
    assert not ScaleInputs(factors={})(first.graph_module).modified


@pytest.mark.parametrize("value", [3.0, 0.75, 0.0, -2.0, 2.0**-140, float("nan"), float("inf")])
def test_factors_that_are_no_powers_of_two_are_refused_by_name(value):
    factor = powers(6)
    factor[2] = value
    with pytest.raises(DialectError, match=r"^q: factors of its input are powers of two"):
        ScaleInputs(factors={"k": powers(6), "q": factor})


def test_factors_that_do_not_fit_the_graph_are_refused_by_name():
    graph_module = trace(Shared(), {"x": torch.randn(3, 4, 6)})
    with pytest.raises(DialectError, match="'w', which is no weight layer"):
        ScaleInputs(factors={"w": powers(6)})(graph_module)
    with pytest.raises(
        DialectError, match=r"k: it reads 6 channels, and has factors of shape \(5,"
    ):
        ScaleInputs(factors={"k": powers(5)})(graph_module)


def test_the_next_power_of_two_is_the_one_on_the_logarithmic_scale():
    values = torch.tensor([1.0, 1.4, 1.42, 2.8, 2.9, 0.7, 0.72, 1e-3, 3e8])
    expected = torch.tensor([1.0, 1.0, 2.0, 2.0, 4.0, 0.5, 1.0, 2.0**-10, 2.0**28])
    assert torch.equal(power_of_two(values), expected)


def test_the_factors_of_a_graph_bring_its_float_model_into_the_same_form():
    call = {"x": torch.randn(3, 4, 6)}
    factors = {"q": powers(6), "k": powers(6), "v": powers(6, seed=1)}
    plain, result = scaled(Shared(), call, factors)
    actual = factors_of(result.graph_module)
    assert actual.keys() == factors.keys()
    assert all(torch.equal(actual[name], factor) for name, factor in factors.items())
    again = ScaleInputs(factors=actual)(plain).graph_module
    assert describe(again) == describe(result.graph_module)
    assert factors_of(plain) == {}
