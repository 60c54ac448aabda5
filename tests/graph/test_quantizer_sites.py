"""Quantizers of a graph, found again and given other ranges."""

import pytest
import torch
from small import Twice
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import copy_graph_module
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.graph.quantizer_sites import (
    quantizer_sites,
    read_activations,
    row_axes,
    set_site_ranges,
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

LEVELS = NoiseLevels(boundaries=(2.5, 6.0))


class Net(nn.Module):
    """A chain with a norm beside it, and two projections of one value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.to_q, self.to_k = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x, timestep):
        h = self.first(x)
        h = torch.tanh(self.second(h) + self.norm(h)) * timestep.float().view(-1, 1, 1, 1)
        return self.to_q(h) + self.to_k(h)


INPUTS = {"x": torch.randn(3, 2, 4, 5), "timestep": torch.tensor([1, 5, 9])}
NAMES = ("first", "second", "to_q", "to_k")


@pytest.fixture(scope="module")
def graph():
    return trace(Net().eval(), INPUTS)


def quantize(graph, mode, bits=8):
    ranges = placeholder_activations(dict.fromkeys(NAMES, bits), mode, groups=3)
    return QuantizeActivations(ranges=ranges, noise_levels=LEVELS)(graph).graph_module


@pytest.mark.parametrize("mode", ["static", "timestep"])
def test_sites_say_who_writes_and_who_reads(graph, mode):
    sites = list(quantizer_sites(quantize(graph, mode)).values())
    assert {site.kind for site in sites} == {mode}
    assert [(site.writer, site.readers, site.bits) for site in sites] == [
        (None, ("first",), 8),
        ("first", ("second",), 8),
        ("second", (), 8),
        (None, ("to_q", "to_k"), 8),
        ("to_q", (), 8),
        ("to_k", (), 8),
    ]
    assert [site.key for site in sites] == [
        ("first", "input"),
        ("first", "output"),
        ("second", "output"),
        ("to_q", "input"),
        ("to_q", "output"),
        ("to_k", "output"),
    ]


@pytest.mark.parametrize("mode", ["static", "timestep"])
def test_a_narrower_pair_behind_an_output_is_a_site_of_its_own(graph, mode):
    sites = list(quantizer_sites(quantize(graph, mode, bits=4)).values())
    by_key = {site.key: site for site in sites}
    assert len(by_key) == len(sites) == 7
    narrow = by_key["second", "input"]
    assert (narrow.bits, narrow.readers, narrow.writer) == (4, ("second",), None)
    assert narrow.value is by_key["first", "output"].result


def test_dynamic_sites_belong_to_the_inputs(graph):
    result = quantize(graph, "dynamic", bits=6)
    sites = quantizer_sites(result)
    keys = [(site.key, site.bits, site.kind) for site in sites.values()]
    assert keys == [
        (("first", "input"), 6, "dynamic"),
        (("second", "input"), 6, "dynamic"),
        (("to_q", "input"), 6, "dynamic"),
    ]
    assert read_activations(result) == dict.fromkeys(NAMES, DynamicActivation(bits=6))


@pytest.mark.parametrize("mode", ["static", "timestep"])
def test_a_graph_whose_ranges_are_set_equals_one_that_was_made_with_them(graph, mode):
    result = quantize(graph, mode, bits=6)
    expected = {}
    for index, site in enumerate(quantizer_sites(result).values()):
        scales = [(1 + index + g) / 100 for g in range(3 if mode == "timestep" else 1)]
        ranges = [ActivationRange(scale=s, zero_point=index, bits=site.bits) for s in scales]
        set_site_ranges(result, site.node, ranges)
        expected[site.key] = scales
    result.recompile()
    activations = read_activations(result)
    assert activations.keys() == set(NAMES)
    for (name, side), scales in expected.items():
        activation = activations[name]
        groups = activation.groups if isinstance(activation, TimestepActivation) else (activation,)
        actual = [getattr(group, side).scale for group in groups]
        assert actual == torch.tensor(scales).tolist()
    again = QuantizeActivations(ranges=activations, noise_levels=LEVELS)(graph).graph_module
    assert torch.equal(again(**INPUTS), result(**INPUTS))


def test_setting_groups_leaves_other_copies_of_the_graph_alone(graph):
    result = quantize(graph, "timestep")
    twin = copy_graph_module(result)
    before = twin(**INPUTS)
    for site in quantizer_sites(result).values():
        set_site_ranges(result, site.node, [ActivationRange(scale=0.5, zero_point=3)] * 3)
    assert torch.equal(twin(**INPUTS), before)
    assert not torch.equal(result(**INPUTS), before)


@pytest.mark.parametrize("mode", ["static", "timestep"])
def test_a_quantizer_takes_as_many_ranges_of_its_width_and_kind_as_it_has(graph, mode):
    result = quantize(graph, mode)
    node, count = next(iter(quantizer_sites(result))), 3 if mode == "timestep" else 1
    wide = ActivationRange(scale=0.1, zero_point=0)
    narrow = ActivationRange(scale=0.1, zero_point=0, bits=4)
    fitted = ActivationRange(scale=0.1, zero_point=0, bits=4, levels=(-1, 0, 1))
    for wrong, words in (
        ([wide] * 2, "2 of 8 bits"),
        ([narrow] * count, f"{count} of 4 bits"),
        ([fitted] * count, f"{count} of 4 bits with fitted levels"),
    ):
        with pytest.raises(DialectError, match=f"has {count} of 8 bits, .* are {words}"):
            set_site_ranges(result, node, wrong)
    others = [node.args[0], *(user for user in node.users if mode == "static")]
    for other in others:  # what is quantized, and what restores it
        with pytest.raises(DialectError, match="no quantizer with a fixed range"):
            set_site_ranges(result, other, [wide])


def test_a_float_graph_has_no_sites_and_no_activations(graph):
    assert quantizer_sites(graph) == {}
    assert read_activations(graph) == {}
    assert find_noise_argument(graph).target == "timestep"


def test_an_unused_range_is_read_back_as_the_one_in_use(graph):
    ranges = {}
    for index, name in enumerate(NAMES):
        grid = ActivationRange(scale=2.0**-index, zero_point=index)
        ranges[name] = StaticActivation(input=grid, output=grid)
    activations = read_activations(QuantizeActivations(ranges=ranges)(graph).graph_module)
    assert activations["to_k"].input == ranges["to_q"].input
    assert activations["to_k"].output == ranges["to_k"].output
    assert activations["second"].input == ranges["first"].output


@pytest.mark.parametrize(
    ("module", "axes"),
    [
        (nn.Linear(2, 2), 1),
        (nn.Conv1d(2, 2, 1), 2),
        (nn.Conv2d(2, 2, 3), 3),
        (nn.Conv2d(2, 2, 1), (-3,)),
        (nn.Conv2d(2, 2, 1, padding="same"), (-3,)),
        (nn.Conv2d(2, 2, 1, dilation=2), (-3,)),
        (nn.Conv2d(2, 2, 1, stride=2), 3),
        (nn.Conv2d(2, 2, 1, padding=1), 3),
        (nn.Conv2d(2, 2, 1, groups=2), 3),
        (nn.Conv2d(2, 2, (1, 3)), 3),
        (nn.Conv3d(2, 2, 1), 4),
    ],
)
def test_a_dynamic_range_spans_a_row_a_pixel_or_a_sample(module, axes):
    assert row_axes(module) == axes


def test_layers_called_twice_have_one_key_for_both_calls():
    graph = trace(Twice(nn.Linear(4, 4)).eval(), {"x": torch.randn(3, 4)})
    ranges = placeholder_activations(dict.fromkeys(weight_layers(graph), 8), "static")
    sites = quantizer_sites(QuantizeActivations(ranges=ranges)(graph).graph_module).values()
    assert [site.key for site in sites] == [("layer", "input"), ("layer", "output")] * 2
