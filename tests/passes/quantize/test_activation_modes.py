"""Ranges by noise level and at run time: where they sit, and what they compute."""

import copy
from dataclasses import replace

import laws
import pytest
import torch
from hypothesis import given, settings
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ConfigError, DialectError
from mpqdm_fx.graph.layers import called_module, weight_layers
from mpqdm_fx.graph.qdq import is_dequantize, qdq_parameters
from mpqdm_fx.graph.quantizer_sites import quantizer_sites, read_activations, set_site_ranges
from mpqdm_fx.graph.quantizers import (
    CodebookQuantizer,
    DynamicQuantizer,
    NoiseLevelGroups,
    NoiseLevelQuantizer,
)
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import (
    ActivationRange,
    DynamicActivation,
    NoiseLevels,
    StaticActivation,
    TimestepActivation,
    placeholder_activations,
)

LEVELS = NoiseLevels(boundaries=(300.0, 650.5))


def layer(scale: float, bits: int = 8) -> StaticActivation:
    return StaticActivation(
        input=ActivationRange(scale=scale, zero_point=1, bits=bits),
        output=ActivationRange(scale=2 * scale, zero_point=-1),
    )


def by_level(*scales: float, bits: int = 8) -> TimestepActivation:
    return TimestepActivation(groups=tuple(layer(scale, bits) for scale in scales))


class Net(nn.Module):
    """A convolution and three linear layers on its output, one of them also on a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.to_q, self.to_k = nn.Linear(5, 5), nn.Linear(5, 5)
        self.table = nn.Linear(4, 5)
        self.register_buffer("constant", torch.randn(7, 4))

    def forward(self, x, timestep):
        h = self.conv(x) * torch.cos(timestep.float()).view(-1, 1, 1, 1)
        return self.to_q(h) + self.to_k(h) + self.table(self.constant).sum(0)


INPUTS = {"x": torch.randn(3, 2, 4, 5), "timestep": torch.tensor([10, 400, 900])}
NAMES = ("conv", "to_q", "to_k", "table")


@pytest.fixture(scope="module")
def net():
    return trace(Net().eval(), INPUTS)


def run(graph_pass, graph_module):
    return graph_pass(graph_module).graph_module


def test_equal_ranges_in_all_groups_are_the_static_range_bit_for_bit(net):
    static = run(QuantizeActivations(ranges=dict.fromkeys(NAMES, layer(0.03))), net)
    same = dict.fromkeys(NAMES, by_level(0.03, 0.03, 0.03))
    grouped = run(QuantizeActivations(ranges=same, noise_levels=LEVELS), net)
    assert torch.equal(grouped(**INPUTS), static(**INPUTS))


@pytest.mark.parametrize("groups", [1, 3])
def test_levels_of_all_codes_are_the_evenly_spaced_range_but_halfway(net, groups):
    even = ActivationRange(scale=0.03, zero_point=0, bits=4)
    levels = replace(even, levels=tuple(range(-8, 8)))
    fitted = StaticActivation(input=levels, output=ActivationRange(scale=0.03, zero_point=0))
    plain = replace(fitted, input=even)
    kinds = [a if groups == 1 else TimestepActivation(groups=(a,) * 3) for a in (fitted, plain)]
    got, want = (
        run(QuantizeActivations(ranges=dict.fromkeys(NAMES, a), noise_levels=LEVELS), net)
        for a in kinds
    )
    assert any(called_module(got, node, CodebookQuantizer) for node in got.graph.nodes)
    assert torch.allclose(got(**INPUTS), want(**INPUTS), atol=1e-5)


def test_each_sample_gets_the_static_range_of_its_noise_level(net):
    scales = (0.01, 0.05, 0.2)
    ranges = {name: by_level(*scales) for name in NAMES if name != "table"}
    grouped = run(QuantizeActivations(ranges=ranges, noise_levels=LEVELS), net)(**INPUTS)
    for index, scale in enumerate(scales):  # the three timesteps are in the three groups
        alone = run(QuantizeActivations(ranges=dict.fromkeys(ranges, layer(scale))), net)
        assert torch.equal(grouped[index], alone(**INPUTS)[index])


def test_one_node_tells_the_groups_to_all_quantizers_and_projections_share_theirs(net):
    ranges = dict.fromkeys(NAMES, by_level(0.1, 0.2, 0.3))
    result = run(QuantizeActivations(ranges=ranges, noise_levels=LEVELS), net)
    nodes = result.graph.nodes
    (groups,) = (n for n in nodes if called_module(result, n, NoiseLevelGroups))
    assert groups.args[0].target == "timestep"
    quantizers = [n for n in nodes if called_module(result, n, NoiseLevelQuantizer)]
    assert all(node.args[1] is groups for node in quantizers)
    (to_q,) = result.graph.find_nodes(op="call_module", target="to_q")
    (to_k,) = result.graph.find_nodes(op="call_module", target="to_k")
    assert to_q.args[0] is to_k.args[0]
    # conv: in, out; projections: one in, two out
    assert len(quantizers) == 5


def test_a_value_without_the_batch_gets_a_static_pair_with_the_first_range(net):
    ranges = dict.fromkeys(NAMES, by_level(0.1, 0.2, 0.3))
    result = run(QuantizeActivations(ranges=ranges, noise_levels=LEVELS), net)
    (table,) = result.graph.find_nodes(op="call_module", target="table")
    assert is_dequantize(table.args[0])
    assert qdq_parameters(table.args[0])[:2] == (float(torch.tensor(0.1)), 1)


def test_a_graph_that_is_told_no_timestep_refuses_noise_levels():
    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 1)

        def forward(self, sample):
            return self.conv(sample)

    graph = trace(Still().eval(), {"sample": torch.randn(2, 2, 3, 3)})
    graph_pass = QuantizeActivations(ranges={"conv": by_level(1, 2, 3)}, noise_levels=LEVELS)
    with pytest.raises(DialectError, match=r"takes \(sample\).*'static' or 'dynamic'"):
        graph_pass(graph)


def test_ranges_that_do_not_fit_the_noise_levels_are_refused():
    with pytest.raises(ConfigError, match=r"conv.*noise_levels"):
        QuantizeActivations(ranges={"conv": by_level(1, 2, 3)})
    with pytest.raises(ConfigError, match=r"2 groups.*3 groups"):
        QuantizeActivations(ranges={"conv": by_level(1, 2)}, noise_levels=LEVELS)


def test_dynamic_inputs_have_a_range_per_sample_or_per_row_and_outputs_stay_float(net):
    ranges = dict.fromkeys(NAMES, DynamicActivation(bits=6))
    result = run(QuantizeActivations(ranges=ranges), net)
    sites = {}
    for name, weight_layer in weight_layers(result).items():
        (call,) = weight_layer.nodes
        quantizer = called_module(result, call.args[0], DynamicQuantizer)
        sites[name] = (quantizer.bits, quantizer.axes)
        assert not any(called_module(result, user, DynamicQuantizer) for user in call.users)
    assert sites == {"conv": (6, 3), "to_q": (6, 1), "to_k": (6, 1), "table": (6, 1)}
    # to_q and to_k share one
    quantizers = [n for n in result.graph.nodes if called_module(result, n, DynamicQuantizer)]
    assert len(quantizers) == 3


def test_a_convolution_and_a_linear_layer_on_one_value_get_ranges_of_their_own():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(4, 4)

        def forward(self, x):
            x = x * 2
            return self.conv(x) + self.linear(x)

    graph = trace(Both().eval(), {"x": torch.randn(3, 2, 4, 4)})
    ranges = dict.fromkeys(("conv", "linear"), DynamicActivation())
    result = run(QuantizeActivations(ranges=ranges), graph)
    axes = {
        str(user.target): module.axes
        for node in result.graph.nodes
        if (module := called_module(result, node, DynamicQuantizer)) is not None
        for user in node.users
    }
    assert axes == {"conv": 3, "linear": 1}


def test_dynamic_ranges_of_a_sample_do_not_depend_on_the_batch(net):
    ranges = dict.fromkeys(NAMES, DynamicActivation())
    result = run(QuantizeActivations(ranges=ranges), net)
    loud = {**INPUTS, "x": INPUTS["x"].clone()}
    loud["x"][0] *= 1000
    assert torch.equal(result(**loud)[1:], result(**INPUTS)[1:])


@pytest.fixture(scope="module", params=["UNet2DModel", "UNet2DConditionModel"])
def unet(request):
    plain = request.param == "UNet2DModel"
    model = tiny_unet() if plain else tiny_condition_unet()
    call = (unet_calls if plain else condition_calls)(1)[0]
    graph = trace(model, call)
    return graph, graph.meta["signature"].normalize((), call)


@pytest.mark.parametrize("mode", ["static", "timestep", "dynamic"])
def test_whole_unets_run_at_any_batch_and_change_little_at_eight_bits(unet, mode):
    graph, inputs = unet
    ranges = placeholder_activations(
        dict.fromkeys(weight_layers(graph), 8), mode, groups=LEVELS.count
    )
    fine = ActivationRange(scale=16 / 256, zero_point=0)
    result = run(QuantizeActivations(ranges=ranges, noise_levels=LEVELS), graph)
    for site in quantizer_sites(result).values():
        if site.kind != "dynamic":
            set_site_ranges(result, site.node, [fine] * (LEVELS.count if mode == "timestep" else 1))
    result.recompile()
    want, got = graph(**inputs)[0], result(**inputs)[0]
    assert 0 < (want - got).norm() < 0.2 * want.norm()
    larger = {k: torch.cat([v, v]) for k, v in inputs.items()}
    assert torch.allclose(result(**larger)[0][: len(got)], got, atol=1e-5)


@settings(max_examples=3)
@given(case=laws.cases(max_blocks=3))
def test_every_mode_survives_export(case):
    for graph_pass in QuantizeActivations.examples(case.graph_module):
        laws.survives_export(graph_pass, case)


@settings(max_examples=15)
@given(case=laws.cases(max_blocks=4))
def test_ranges_read_back_quantize_the_float_graph_to_the_same_numbers(case):
    if read_activations(case.graph_module):
        return  # with quantized activations already: nothing is inserted
    for graph_pass in QuantizeActivations.examples(case.graph_module):
        result = run(graph_pass, case.graph_module)
        activations = read_activations(result)
        assert activations.keys() <= graph_pass.ranges.keys()
        used = {site.key[0] for site in quantizer_sites(result).values()}
        assert used <= activations.keys()
        again = run(replace(graph_pass, ranges=activations), case.graph_module)
        for expected, actual in zip(result(**case.inputs), again(**case.inputs), strict=True):
            assert torch.equal(expected, actual)
        assert read_activations(again) == activations


def test_quantized_graphs_can_be_deep_copied(net):
    ranges = dict.fromkeys(NAMES, by_level(0.1, 0.2, 0.3))
    result = run(QuantizeActivations(ranges=ranges, noise_levels=LEVELS), net)
    assert torch.equal(copy.deepcopy(result)(**INPUTS), result(**INPUTS))
