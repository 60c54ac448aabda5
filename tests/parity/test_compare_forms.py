"""The ladder's numbers are those of a direct computation, and a damaged layer is named."""

import math
from types import SimpleNamespace

import pytest
import torch
from parity_folders import quantized_net
from small import net_calls
from torch import Tensor, nn

from mpqdm_fx.backends.pt2e import convert_pt2e_graph
from mpqdm_fx.backends.xnnpack.reference import CLOSE_DB
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.editing import copy_graph_module
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.parity.compare_forms import ModelForm, measure
from mpqdm_fx.parity.ladder import Ladder
from mpqdm_fx.parity.sites import sites
from mpqdm_fx.parity.thresholds import MEASURED_MARGIN_DB, Thresholds

LAYERS = ["conv_in", "body", "mix", "conv_out"]


class TwoLayers(nn.Module):
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.second = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.fixture(scope="module")
def two_layers():
    """A net, the same with other weights, calls, and their ladder."""
    nets = [TwoLayers(seed).requires_grad_(False) for seed in (0, 1)]
    calls = [(torch.randn(1, 6, generator=torch.Generator().manual_seed(n)),) for n in range(3)]
    graphs = [trace(net, {"x": torch.randn(2, 6)}) for net in nets]
    forms = [ModelForm(name=n, graph=g) for n, g in zip(("a", "b"), graphs, strict=True)]
    return SimpleNamespace(nets=nets, calls=calls, rung=measure(forms, calls).ladder.rung("b"))


def test_sqnr_of_a_layer_is_that_of_a_direct_computation(two_layers):
    a, b = two_layers.nets
    x = torch.cat([call[0] for call in two_layers.calls])
    expected = {
        "first": (sqnr_db(a.first(x), b.first(x)), sqnr_db(a.first(x), b.first(x))),
        "second": (sqnr_db(a(x), b(x)), sqnr_db(a(x), b.second(a.first(x)))),
    }
    for node in two_layers.rung.layers:
        assert (node.sqnr_db, node.own_db) == pytest.approx(expected[node.site.module], abs=1e-4)
        assert node.shape == (1, {"first": 7, "second": 5}[node.site.module])
    assert [node.site.module for node in two_layers.rung.nodes] == ["first", "second"]


def test_sqnr_of_the_outputs_is_that_of_a_direct_computation(two_layers):
    a, b = two_layers.nets
    x = torch.cat([call[0] for call in two_layers.calls])
    expected = sqnr_db(a(x), b(x))
    assert two_layers.rung.previous_db == pytest.approx(expected, abs=1e-4)
    assert two_layers.rung.float_db == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def graphs():
    """A rounded net, its fake-quantized and its converted form, and inputs."""
    model, inputs = quantized_net(), net_calls(1)[0]
    converted = convert_pt2e_graph(model.rounded, model.ranges, inputs)
    return SimpleNamespace(
        rounded=model.rounded, quantized=model.graph_module, converted=converted, inputs=inputs
    )


def ladder_of(graphs, converted, thresholds: Thresholds | None = None) -> tuple[Ladder, Thresholds]:
    forms = [
        ModelForm(name="float", graph=graphs.rounded),
        ModelForm(name="quantized", graph=graphs.quantized),
        ModelForm(name="converted", graph=converted),
    ]
    measured = measure(forms, [tuple(graphs.inputs.values())], stability=thresholds is None)
    thresholds = thresholds or Thresholds.of(measured, {})
    return thresholds.judge(measured.ladder), thresholds


def test_a_converted_graph_is_equal_at_every_layer_and_passes(graphs):
    ladder, _ = ladder_of(graphs, graphs.converted)
    rung = ladder.rung("converted")
    assert ladder.passed
    assert ladder.first_divergence is None
    assert [node.site.module for node in rung.layers] == LAYERS
    assert {node.sqnr_db for node in rung.layers} == {math.inf}
    assert (rung.previous_db, rung.unmatched) == (math.inf, ())
    quantized = ladder.rung("quantized")
    for node in quantized.layers:
        expected = min(CLOSE_DB, node.sqnr_db - MEASURED_MARGIN_DB)
        assert node.wanted_db == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("layer", LAYERS)
def test_one_changed_weight_in_the_converted_graph_is_found_and_its_layer_named(graphs, layer):
    _, thresholds = ladder_of(graphs, graphs.converted)
    ladder, _ = ladder_of(graphs, damaged(graphs.converted, layer), thresholds)
    first = ladder.first_divergence
    assert ladder.passed is False
    assert (first.rung, first.against, first.node.site.module) == ("converted", "quantized", layer)
    assert f"rung `converted` falls short: {layer}: {first.node.site.op} [2, " in str(first)
    # behind it all layers read other values; alone, only the damaged one computes others
    assert [n.site.module for n in ladder.rung("converted").nodes if n.short_alone] == [layer]


def damaged(converted, layer):
    """The graph with the sign of one weight of a layer changed."""
    result = copy_graph_module(converted)
    call = next(n for s, n in sites(result).items() if s.module == layer)
    source = call.args[1]
    while source.op != "get_attr":
        source = source.args[0]
    owner, _, name = str(source.target).rpartition(".")
    weight = result.get_submodule(owner)._parameters.get(name)
    weight = result.get_buffer(str(source.target)) if weight is None else weight
    changed = weight.detach().clone()
    changed.flatten()[3] *= -1
    fresh = f"damaged_{name}"
    result.register_buffer(fresh, changed)
    source.target = fresh
    result.recompile()
    return result


def test_a_form_without_a_graph_is_compared_by_its_outputs(graphs):
    def run(_, inputs):
        return [graphs.quantized(*inputs) * 1.01]

    forms = [
        ModelForm(name="float", graph=graphs.rounded),
        ModelForm(name="quantized", graph=graphs.quantized),
        ModelForm(name="pte", run=run),
        ModelForm(name="other", run=run, against="quantized"),
    ]
    ladder = measure(forms, [tuple(graphs.inputs.values())]).ladder
    assert ladder.rung("pte").nodes == ()
    assert ladder.rung("pte").previous_db == pytest.approx(40.0, abs=1e-3)
    assert ladder.rung("other").previous_db == ladder.rung("pte").previous_db
    assert ladder.passed is None


def test_a_layer_without_its_like_is_reported(graphs):
    changed = copy_graph_module(graphs.rounded)
    next(n for n in changed.graph.nodes if n.target == "mix").meta["nn_module_stack"] = {}
    forms = [ModelForm(name="float", graph=graphs.rounded), ModelForm(name="other", graph=changed)]
    ladder = measure(forms, [tuple(graphs.inputs.values())]).ladder
    assert ladder.rung("other").unmatched == ("mix",)
