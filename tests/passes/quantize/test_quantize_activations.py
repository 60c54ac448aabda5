"""Which values are quantized, for whom, with what range."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import traced_in
from small import Twice
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.qdq import is_dequantize, is_quantize, qdq_parameters
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations, activation_sites
from mpqdm_fx.records.activations import ActivationRange, StaticActivation


def make_range(scale: float = 0.125, zero_point: int = 0, bits: int = 8) -> ActivationRange:
    return ActivationRange(scale=scale, zero_point=zero_point, bits=bits)


def make_layer(
    input_scale: float = 0.125, output_scale: float = 0.25, bits: int = 8, output_bits: int = 8
) -> StaticActivation:
    return StaticActivation(
        input=make_range(input_scale, bits=bits), output=make_range(output_scale, bits=output_bits)
    )


class Chain(nn.Module):
    """conv -> conv, and the first one's output also goes into a norm."""

    def __init__(self, with_norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)
        self.norm = nn.GroupNorm(2, 4) if with_norm else None

    def forward(self, x):
        h = self.first(x)
        y = self.second(h)
        return y if self.norm is None else y + self.norm(h)


class Projections(nn.Module):
    """Three linear layers and a norm read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x = x * 2.0
        return self.to_q(x) * self.to_k(x) + self.to_v(x) + self.norm(x)


def quantize(model: nn.Module, inputs: dict, ranges: dict):
    graph = trace(model.eval(), inputs)
    return graph, QuantizeActivations(ranges=ranges)(graph).graph_module


def chain(ranges: dict, with_norm: bool = True):
    return quantize(Chain(with_norm), {"x": torch.randn(3, 2, 3, 5)}, ranges)


def producer(node):
    """(source, parameters) of the pairs that lead to a node's first input, nearest first."""
    pairs, value = [], node.args[0]
    while is_dequantize(value):
        assert is_quantize(value.args[0])
        assert qdq_parameters(value) == qdq_parameters(value.args[0])
        pairs.append(qdq_parameters(value))
        value = value.args[0].args[0]
    return value, pairs


def call_of(graph, name):
    (node,) = graph.graph.find_nodes(op="call_module", target=name)
    return node


def parameters(scale: float, bits: int = 8) -> tuple:
    return (scale, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, torch.int8)


def test_input_pair_serves_weight_layers_only_and_is_shared_by_projections():
    ranges = {name: make_layer() for name in ("to_q", "to_k", "to_v")}
    _, result = quantize(Projections(), {"x": torch.randn(3, 4)}, ranges)
    sources = {call_of(result, name).args[0] for name in ranges}
    assert len(sources) == 1, "one pair per value"
    value, pairs = producer(call_of(result, "to_q"))
    assert pairs == [parameters(0.125)]
    assert call_of(result, "norm").args[0] is value, "the norm reads the float value"


def test_output_pair_replaces_all_uses_and_the_graph_output():
    _, result = chain({"first": make_layer(), "second": make_layer()})
    assert producer(call_of(result, "norm"))[1] == [parameters(0.25)]
    for name in ("first", "second"):
        assert all(is_quantize(user) for user in call_of(result, name).users)


def test_direct_chain_at_equal_width_gets_one_pair_with_the_output_range():
    _, result = chain({"first": make_layer(), "second": make_layer(input_scale=0.5)})
    value, pairs = producer(call_of(result, "second"))
    assert (value, pairs) == (call_of(result, "first"), [parameters(0.25)])


def test_direct_chain_with_a_narrower_reader_gets_one_pair_with_the_input_range():
    ranges = {"first": make_layer(), "second": make_layer(input_scale=0.5, bits=4)}
    _, result = chain(ranges, with_norm=False)
    value, pairs = producer(call_of(result, "second"))
    assert (value, pairs) == (call_of(result, "first"), [parameters(0.5, bits=4)])


def test_narrower_reader_does_not_narrow_what_others_read():
    ranges = {"first": make_layer(), "second": make_layer(input_scale=0.5, bits=4)}
    _, result = chain(ranges)
    assert producer(call_of(result, "second"))[1] == [parameters(0.5, bits=4), parameters(0.25)]
    assert producer(call_of(result, "norm"))[1] == [parameters(0.25)]


def test_wider_reader_takes_the_output_pair_as_it_is():
    ranges = {"first": make_layer(output_bits=4), "second": make_layer(input_scale=0.5)}
    _, result = chain(ranges)
    assert producer(call_of(result, "second"))[1] == [parameters(0.25, bits=4)]


def test_projections_of_different_widths_get_a_pair_each():
    ranges = {
        "to_q": make_layer(input_scale=0.5, bits=4),
        "to_k": make_layer(input_scale=0.25),
        "to_v": make_layer(input_scale=2.0, bits=4),
    }
    _, result = quantize(Projections(), {"x": torch.randn(3, 4)}, ranges)
    producers = {name: producer(call_of(result, name))[1] for name in ranges}
    narrow = [parameters(0.5, bits=4)]
    assert producers == {"to_q": narrow, "to_k": [parameters(0.25)], "to_v": narrow}


def test_layers_without_a_range_stay_in_float():
    graph, result = chain({"second": make_layer()})
    assert call_of(result, "first").args[0].op == "placeholder"
    assert producer(call_of(result, "second"))[1] == [parameters(0.125)]
    none = QuantizeActivations(ranges={})(graph)
    assert not none.modified


def test_a_layer_called_twice_is_quantized_at_both_calls():
    _, result = quantize(Twice(nn.Linear(4, 4)), {"x": torch.randn(3, 4)}, {"layer": make_layer()})
    calls = result.graph.find_nodes(op="call_module", target="layer")
    assert [producer(call)[1] for call in calls] == [[parameters(0.125)]] * 2
    assert all(is_quantize(user) for call in calls for user in call.users)


def test_half_precision_stays_half_precision():
    inputs = {"x": torch.randn(3, 2, 3, 5, dtype=torch.bfloat16)}
    ranges = {"first": make_layer(), "second": make_layer()}
    graph = traced_in(torch.bfloat16, Chain(), inputs["x"])
    result = QuantizeActivations(ranges=ranges)(graph).graph_module
    assert result(**inputs).dtype == graph(**inputs).dtype == torch.bfloat16


def test_placeholders_stay_first_and_in_order():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    inputs = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}
    _, result = quantize(Two(), inputs, {"a": make_layer(), "b": make_layer()})
    assert [n.target for n in list(result.graph.nodes)[:2]] == ["x", "y"]


def test_second_run_with_other_ranges_changes_nothing_and_partial_runs_are_refused():
    ranges = {"first": make_layer(), "second": make_layer()}
    _, result = chain(ranges)
    doubled = {name: make_layer(2.0, 2.0) for name in ranges}
    assert not QuantizeActivations(ranges=doubled)(result).modified
    _, partial = chain({"second": make_layer()})
    with pytest.raises(DialectError, match="all layers at once"):
        QuantizeActivations(ranges=ranges)(partial)


def test_range_of_an_unknown_layer_is_refused_by_name():
    with pytest.raises(DialectError, match="'third'"):
        chain({"third": make_layer()})


def test_scale_is_rounded_to_the_float32_that_every_backend_stores():
    graph = trace(Chain().eval(), {"x": torch.randn(3, 2, 3, 5)})
    calls = {call_of(graph, "first"): "first"}
    sites = activation_sites(calls, {"first": make_layer(input_scale=0.1)})
    assert sites[0].range.scale == float(torch.tensor(0.1))


@given(
    bits=st.integers(2, 8),
    scale=st.floats(2.0**-10, 4.0, width=32),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_dequantized_value_is_the_nearest_code_in_range(bits, scale, fraction, seed):
    low = -(2 ** (bits - 1))
    zero_point = low + round(fraction * (2**bits - 1))
    identity = nn.Linear(3, 3, bias=False)
    identity.weight.data = torch.eye(3)
    model = nn.Sequential(identity).eval()
    x = 3 * scale * torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    chosen = ActivationRange(scale=scale, zero_point=zero_point, bits=bits)
    ranges = {"0": StaticActivation(input=chosen, output=chosen)}
    _, result = quantize(model, {"input": x}, ranges)
    got = result(input=x)
    codes = got / scale + zero_point
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert codes.round().min() >= low
    assert codes.round().max() <= -low - 1
    inside = (x / scale + zero_point > low) & (x / scale + zero_point < -low - 1)
    error = (got - x).abs()[inside]
    assert error.numel() == 0 or float(error.max()) <= scale * (0.5 + 1e-3)
    assert math.isfinite(float(got.sum()))


def test_every_named_layer_is_between_pairs_and_the_function_is_close_at_eight_bits():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 2, 3, 5)}
    fine = StaticActivation(input=make_range(8 / 256), output=make_range(8 / 256))
    graph, result = quantize(Chain(), inputs, {"first": fine, "second": fine})
    for layer in weight_layers(result).values():
        for call in layer.nodes:
            assert is_dequantize(call.args[0])
            assert all(is_quantize(user) for user in call.users)
    # Two roundings reach the output through one 4-term dot product with weights below 0.5, one
    # more through the norm (gain below 4), and one is the output's own.
    assert (graph(**inputs) - result(**inputs)).abs().max() < 6 * 8 / 256
