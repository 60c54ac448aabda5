"""Quantizers stay with the layers that own them, on either side of a cut; the bits stay too."""

import pytest
import torch
from small import condition_calls, tiny_condition_unet
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.lanes import is_quantizer
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.qdq import insert_pair, is_dequantize, is_quantize
from mpqdm_fx.graph.quantizer_sites import quantizer_sites
from mpqdm_fx.graph.quantizers import DynamicQuantizer
from mpqdm_fx.passes.quantize.carry_error_lane import CarryErrorLane
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import (
    ActivationRange,
    DynamicActivation,
    NoiseLevels,
    StaticActivation,
    TimestepActivation,
)
from mpqdm_fx.split.methods import run_methods, split_methods
from mpqdm_fx.split.timestep_table import tabulate_timesteps
from mpqdm_fx.testing import count

PROMPT = {"encode_prompt": ["encoder_hidden_states"]}
RANGE = ActivationRange(scale=0.05, zero_point=3, bits=8)
STATIC = StaticActivation(input=RANGE, output=RANGE)


@pytest.fixture(scope="module")
def text_unet():
    return trace(tiny_condition_unet(), condition_calls(1)[0])


def quantized(graph, activation):
    ranges = dict.fromkeys(weight_layers(graph), activation)
    levels = None
    if isinstance(activation, TimestepActivation):
        levels = NoiseLevels(boundaries=(500.0,))
    return QuantizeActivations(ranges=ranges, noise_levels=levels)(graph).graph_module


def assert_whole_quantizers(method):
    for node in method.graph.nodes:
        if is_quantize(node):
            assert any(is_dequantize(user) for user in node.users)
        if is_dequantize(node):
            assert is_quantize(node.args[0])
        if is_quantizer(method, node):
            assert node.users


@pytest.mark.parametrize("activation", [STATIC, DynamicActivation(bits=8)], ids=["static", "dyn"])
def test_methods_of_a_quantized_unet_give_its_bits_and_keep_its_quantizers_whole(
    text_unet, activation
):
    whole = quantized(text_unet, activation)
    methods = split_methods(whole, PROMPT)
    (inputs,) = condition_calls(1)
    assert torch.equal(run_methods(methods, inputs)[0], whole(**inputs)[0])
    for method in methods.values():
        assert_whole_quantizers(method)
    of_whole = set(quantizer_sites(whole).values())
    sites = {n: quantizer_sites(method) for n, method in methods.items()}
    hoisted = list(weight_layers(methods["encode_prompt"]))
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in hoisted)
    assert sum(map(len, sites.values())) == len(of_whole)
    for site in sites["encode_prompt"].values():
        assert set(site.readers) <= set(hoisted)
        assert site.writer is None or site.writer in hoisted


def test_time_branch_of_a_quantized_unet_is_tabulated_with_its_quantizers(text_unet):
    whole = quantized(text_unet, STATIC)
    table = tabulate_timesteps(whole, [900, 20])
    (inputs,) = condition_calls(1)
    want = whole(**{**inputs, "timestep": torch.tensor([20, 20])})[0]
    assert torch.equal(table(**{**inputs, "timestep": torch.tensor([1, 1])})[0], want)
    assert_whole_quantizers(table)


def test_ranges_by_noise_level_keep_keys_in_the_step_and_fit_into_tables(text_unet):
    wide = StaticActivation(input=RANGE, output=ActivationRange(scale=0.1, zero_point=0, bits=8))
    whole = quantized(text_unet, TimestepActivation(groups=(STATIC, wide)))
    (inputs,) = condition_calls(1)
    # their quantizers ask for the noise level, so keys and values change from step to step
    assert list(split_methods(whole, PROMPT)) == ["denoise"]
    for step, timestep in enumerate((900, 20)):
        table = tabulate_timesteps(whole, [900, 20])
        want = whole(**{**inputs, "timestep": torch.tensor([timestep] * 2)})[0]
        assert torch.equal(table(**{**inputs, "timestep": torch.tensor([step] * 2)})[0], want)


def test_ranges_by_noise_level_are_not_put_behind_tables(text_unet):
    # the groups would be told by the position in the schedule instead of the timestep
    table = tabulate_timesteps(text_unet, [900, 20])
    with pytest.raises(DialectError, match="quantize first, then tabulate"):
        quantized(table, TimestepActivation(groups=(STATIC, STATIC)))


def test_graphs_of_two_lanes_are_neither_split_nor_tabulated(text_unet):
    lanes = CarryErrorLane()(text_unet).graph_module
    with pytest.raises(DialectError, match=r"two lanes.*rounded"):
        split_methods(lanes, PROMPT)
    with pytest.raises(DialectError, match="two lanes"):
        tabulate_timesteps(lanes, [900, 20])


class Scores(nn.Module):
    """A product that reads a projection of the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = nn.Linear(4, 6)

    def forward(self, sample, condition):
        return torch.bmm(sample, self.to_k(condition).transpose(1, 2))


def scores():
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(2, 5, 6), "condition": torch.randn(2, 7, 4)}
    return trace(Scores().eval(), inputs), inputs


@pytest.mark.parametrize("dynamic", [False, True])
def test_quantizer_of_what_a_product_reads_stays_with_the_product(dynamic):
    graph, inputs = scores()
    keys = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.transpose.int)[0]
    (product,) = keys.users
    if dynamic:
        graph.add_module("round", DynamicQuantizer())
        with graph.graph.inserting_after(keys):
            codes = graph.graph.call_module("round", (keys,))
        codes.meta["val"] = keys.meta["val"]
    else:
        codes = insert_pair(graph, keys, (0.05, 0, -128, 127, torch.int8))
    product.replace_input_with(keys, codes)
    graph.recompile()
    methods = split_methods(graph, {"encode": ["condition"]})
    assert torch.equal(run_methods(methods, inputs), graph(**inputs))
    encode, denoise = methods.values()
    assert not any(is_quantizer(encode, node) for node in encode.graph.nodes)
    assert any(is_quantizer(denoise, node) for node in denoise.graph.nodes)
    assert_whole_quantizers(denoise)
    assert count(denoise, nn.Linear) == 0


def test_quantizer_of_what_a_layer_writes_stays_with_the_layer():
    graph, inputs = scores()
    whole = quantized(graph, STATIC)
    encode, denoise = split_methods(whole, {"encode": ["condition"]}).values()
    assert sum(map(is_quantize, encode.graph.nodes)) == 2
    assert not any(is_quantizer(denoise, node) for node in denoise.graph.nodes)
    assert torch.equal(run_methods({"encode": encode, "denoise": denoise}, inputs), whole(**inputs))
