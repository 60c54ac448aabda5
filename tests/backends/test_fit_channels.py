"""Channels whose bias or scale would not fit an integer kernel get a coarser scale, others none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounded_nets import Attention, Residual, rounded, widen_inputs
from torch import nn

from mpqdm_fx.backends.fit_channels import fit_channels, round_biases, split_calls
from mpqdm_fx.backends.torch_ao import lower_torch_ao
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.editing import replace_module
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.activations import ActivationRange, StaticActivation

RANGES = {
    "0": StaticActivation(
        input=ActivationRange(scale=0.02, zero_point=3),
        output=ActivationRange(scale=0.05, zero_point=-9),
    )
}


def linear(scales: torch.Tensor, bias: torch.Tensor | None, seed: int = 0):
    """A rounded linear layer with these scales, as a graph."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (len(scales), 7), generator=generator, dtype=torch.int8)
    layer = nn.Linear(7, len(scales), bias=bias is not None)
    if bias is not None:
        layer.bias.data = bias
    graph = trace(nn.Sequential(layer).eval(), {"input": torch.randn(3, 7)})
    replace_module(graph, "0", install_codes(layer, codes, scales.to(torch.bfloat16).float()))
    return graph


def test_ordinary_layer_is_returned_as_it_is():
    graph = linear(torch.full((4,), 0.01), torch.ones(4))
    assert fit_channels(graph, RANGES) is graph


def test_layer_without_a_range_is_left_alone():
    graph = linear(torch.full((4,), 1e-38), torch.ones(4))
    assert fit_channels(graph, {}) is graph


def test_only_the_degenerate_channel_changes_and_the_input_graph_does_not():
    graph = linear(torch.tensor([0.01, 1e-38, 0.02]), torch.ones(3))
    before = graph.get_submodule("0").weight_codes.clone()
    old, new = graph.get_submodule("0"), fit_channels(graph, RANGES).get_submodule("0")
    assert torch.equal(old.weight_codes, before)
    assert torch.equal(new.weight_codes[[0, 2]], old.weight_codes[[0, 2]])
    assert torch.equal(new.weight_scale[[0, 2]], old.weight_scale[[0, 2]])
    assert not new.weight_codes[1].any(), "weights of 1e-36 are zero beside a bias of 1"
    assert torch.equal(new.bias, old.bias)


@given(
    exponent=st.integers(-120, 0),
    bias=st.sampled_from([None, 0.0, 1e-6, 0.5, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_result_fits_the_kernel_and_moves_the_output_less_than_it_can_show(exponent, bias, seed):
    activation = RANGES["0"]
    graph = linear(
        torch.tensor([0.01, 2.0**exponent]),
        None if bias is None else torch.tensor([0.1, bias]),
        seed,
    )
    fitted = fit_channels(graph, RANGES)
    layer = fitted.get_submodule("0")
    step = layer.weight_scale.double() * activation.input.scale
    assert torch.all(step * 2.0**30 >= activation.output.scale * (1 - 1e-9))
    if bias is not None:
        assert torch.all(layer.bias.double().abs() <= step * 2.0**30 * (1 + 1e-9))
    assert torch.equal(layer.weight, layer.weight_codes * layer.weight_scale[:, None])
    # inputs that the range can hold
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (16, 7), generator=generator) * activation.input.scale
    with torch.no_grad():
        moved = (fitted(x) - graph(x)).abs().max()
    shown = max(abs(bias or 0.0), activation.output.scale)
    assert moved <= 7 * 128 * 2.0**-30 * shown + 1e-6 * shown


@pytest.mark.parametrize("bits", [1, 3])
def test_balanced_codes_of_a_dead_channel_become_zero(bits):
    graph = linear(torch.tensor([2.0**-126]), torch.tensor([0.3]))
    layer = graph.get_submodule("0")
    layer.weight_codes.copy_(torch.full_like(layer.weight_codes, 2**bits - 1))
    fitted = fit_channels(graph, RANGES).get_submodule("0")
    assert not fitted.weight_codes.any()


def test_rounded_biases_are_whole_steps_and_the_nearest_ones():
    graph, ranges, _ = rounded(Residual(), bits=2)
    result = round_biases(graph, ranges)
    names = ("conv_in", "conv1", "down")
    for name in names:
        old, new = graph.get_submodule(name), result.get_submodule(name)
        step = float(torch.tensor(ranges[name].input.scale)) * old.weight_scale.double()
        steps = new.bias.double() / step
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert torch.all((new.bias - old.bias).abs() <= step / 2 * (1 + 1e-5))
        assert new.weight is old.weight
    assert not torch.equal(graph.get_submodule("down").bias, result.get_submodule("down").bias)


def test_bias_behind_a_direct_neighbour_uses_the_scale_that_is_really_read():
    # `shortcut` reads the int8 output of `down`, not its own input range
    graph, ranges, _ = rounded(Residual(), bits=2)
    ranges = widen_inputs(ranges, ("shortcut",))
    layer = round_biases(graph, ranges).get_submodule("shortcut")
    step = float(torch.tensor(ranges["down"].output.scale)) * layer.weight_scale.double()
    steps = layer.bias.double() / step
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_rounding_biases_twice_changes_nothing_more():
    graph, ranges, _ = rounded(Residual(), bits=2)
    once = round_biases(graph, ranges)
    twice = round_biases(once, ranges)
    for name in ranges:
        first, second = once.get_submodule(name).bias, twice.get_submodule(name).bias
        assert first is second is None or torch.equal(first, second)


@pytest.mark.parametrize("bits", [8, 3, 1])
def test_with_rounded_biases_qnnpack_is_bit_equal_to_the_fake_quantized_graph(bits):
    graph, ranges, inputs = rounded(Residual(), bits)
    graph = round_biases(graph, ranges)
    with torch.no_grad():
        expected = QuantizeActivations(ranges=ranges)(graph).graph_module(**inputs)
        actual = lower_torch_ao(graph, ranges, inputs, "qnnpack")(**inputs)
    assert torch.equal(actual, expected)


def test_calls_on_different_scales_get_layers_of_their_own():
    graph, ranges, inputs = rounded(Attention())  # to_out(to_out(a)): reads its own output
    result, extended = split_calls(graph, ranges)
    assert set(extended) - set(ranges) == {"to_out_call"}
    first, second = result.get_submodule("to_out"), result.get_submodule("to_out_call")
    assert first.weight is second.weight
    assert first.bias is not second.bias
    assert torch.equal(first.bias, second.bias)
    with torch.no_grad():
        before = QuantizeActivations(ranges=ranges)(graph).graph_module(**inputs)
        after = QuantizeActivations(ranges=extended)(result).graph_module(**inputs)
    assert torch.equal(before, after)
    again, same = split_calls(result, extended)
    assert again is result
    assert same == extended


def test_layers_that_add_biases_in_float_are_left_alone():
    graph, ranges, _ = rounded(Attention())
    exact = ["to_out"]
    result, extended = split_calls(graph, ranges, exact)
    assert result is graph
    assert extended == ranges
    biased = round_biases(graph, ranges, [*ranges])
    assert torch.equal(biased.get_submodule("to_out").bias, graph.get_submodule("to_out").bias)
    graph = linear(torch.tensor([0.01, 1e-38, 0.02]), torch.ones(3))
    assert fit_channels(graph, RANGES, [*RANGES]) is graph


def test_calls_on_one_scale_stay_one_layer():
    graph, ranges, _ = rounded(Residual())
    result, extended = split_calls(graph, ranges)
    assert result is graph
    assert extended == ranges
