import pytest
import torch
from small import TinyNet, net_calls, tiny_unet, unet_calls

from mpqdm_fx.calibration.allocate import allocate, measure_layers, search_ranges
from mpqdm_fx.calibration.pinning import pinned_layers
from mpqdm_fx.calibration.statistics import collect_statistics
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import weight_layers, weight_rows
from mpqdm_fx.graph.trace import trace
from mpqdm_fx.passes.round_weights import RoundWeights


@pytest.fixture(scope="module")
def unet_graph():
    calls = unet_calls()
    graph = trace(tiny_unet(), calls[0])
    return graph, collect_statistics(graph, calls)


def _decide(graph, statistics, **settings):
    config = MPQConfig(**settings)
    ranges = search_ranges(graph, statistics, config)
    plan, importance = allocate(graph, statistics, ranges, config)
    return plan, importance, ranges


def test_rows_times_weight_are_the_layers_outputs():
    graph = trace(TinyNet(), net_calls()[0])
    statistics = collect_statistics(graph, net_calls())
    layer = weight_layers(graph)["body"]
    bias = layer.module.bias.detach()
    outputs = statistics["body"].rows[:, 0] @ weight_rows(layer.module).T + bias
    seen = statistics["body"].output
    assert outputs.min() >= seen.minimum - 1e-4
    assert outputs.max() <= seen.maximum + 1e-4
    assert float(outputs.std()) == pytest.approx(float(seen.samples.std()), rel=0.2)


def test_statistics_depend_on_the_seed_alone(unet_graph):
    graph, statistics = unet_graph
    again = collect_statistics(graph, unet_calls())
    other = collect_statistics(graph, unet_calls(), seed=1)
    name = "mid_block.resnets.0.conv1"
    assert torch.equal(statistics[name].rows, again[name].rows)
    assert not torch.equal(statistics[name].rows, other[name].rows)


def test_layers_that_read_one_value_share_one_range(unet_graph):
    graph, statistics = unet_graph
    ranges = search_ranges(graph, statistics, MPQConfig())
    attention = "mid_block.attentions.0"
    inputs = {ranges[f"{attention}.to_{part}"].input for part in "qkv"}
    assert len(inputs) == 1
    assert ranges[f"{attention}.to_q"].output != ranges[f"{attention}.to_k"].output


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_omq_keeps_the_average_exactly_and_promotes_as_many_as_it_demotes(unet_graph, bits):
    graph, statistics = unet_graph
    plan, _, _ = _decide(graph, statistics, weight_bits=bits, allocation="omq", levels="uniform")
    assert plan.mean_bits == bits
    assert any(layer.fraction > 0 for layer in plan.layers)
    for layer in plan.layers:
        if layer.reason is None:
            assert layer.mean_bits == bits
            assert set(layer.bits) <= {bits - 1, bits, bits + 1}


def test_omq_is_never_worse_than_uniform_bits_on_any_layers_calibration_output(unet_graph):
    graph, statistics = unet_graph
    result = {}
    for allocation in ("uniform", "omq"):
        plan, importance, ranges = _decide(
            graph, statistics, weight_bits=2, allocation=allocation, levels="uniform"
        )
        rounded = RoundWeights(plan=plan, importance=importance)(graph).graph_module
        result[allocation] = measure_layers(graph, rounded, statistics, ranges)
    for name, sqnr in result["omq"].items():
        assert sqnr >= result["uniform"][name] - 1e-3  # a fraction of 0 is a candidate


@pytest.mark.parametrize("bits", [1, 8])
def test_at_the_ends_of_the_scale_no_channel_moves(unet_graph, bits):
    graph, statistics = unet_graph
    plan, _, _ = _decide(graph, statistics, weight_bits=bits, allocation="omq")
    assert all(len(set(layer.bits)) == 1 for layer in plan.layers)


def test_first_last_time_and_class_layers_are_pinned_with_their_reason(unet_graph):
    graph, statistics = unet_graph
    reasons = pinned_layers(graph)
    assert reasons == {
        "conv_in": "first layer",
        "conv_out": "last layer",
        "time_embedding.linear_1": "time or class embedding",
        "time_embedding.linear_2": "time or class embedding",
        "class_embedding": "time or class embedding",
    }
    plan, _, _ = _decide(graph, statistics, weight_bits=2)
    assert {layer.name for layer in plan.layers if set(layer.bits) == {8}} == set(reasons)


def test_an_override_unpins_pins_or_skips(unet_graph):
    graph, statistics = unet_graph
    rules = [
        {"pattern": "conv_in", "weight_bits": 3},
        {"pattern": "mid_block.attentions.*", "skip": True},
    ]
    plan, _, _ = _decide(graph, statistics, weight_bits=2, overrides=rules)
    assert set(plan.layer("conv_in").bits) == {3}
    assert "mid_block.attentions.0.to_q" not in plan
    left = {tensor.name: tensor for tensor in plan.floats if tensor.is_weight}
    assert "override" in left["mid_block.attentions.0.to_q.weight"].reason


def test_a_codebook_is_kept_only_where_it_lowers_the_error_and_its_table_is_short(unet_graph):
    graph, statistics = unet_graph
    measured, plans = {}, {}
    for levels in ("uniform", "codebook"):
        plan, importance, ranges = _decide(graph, statistics, weight_bits=3, levels=levels)
        rounded = RoundWeights(plan=plan, importance=importance)(graph).graph_module
        measured[levels] = measure_layers(graph, rounded, statistics, ranges)
        plans[levels] = plan
    kept = 0
    for layer in plans["codebook"].layers:
        if layer.reason is None:
            gain = measured["codebook"][layer.name] - measured["uniform"][layer.name]
            assert gain > -1e-3 if layer.levels == "codebook" else abs(gain) < 1e-6
            assert layer.storage.tables <= layer.storage.codes
            kept += layer.levels == "codebook"
    assert 0 < kept < len(plans["codebook"].layers)  # wide rows have one, short ones do not


def test_activations_that_turn_infinite_are_refused_with_the_layer():
    model = TinyNet()
    with torch.no_grad():
        model.norm.weight.fill_(1e38)
    graph = trace(model, net_calls()[0])
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        collect_statistics(graph, [{"x": call["x"] * 1e3} for call in net_calls()])


def test_non_finite_weights_are_refused_with_layer_and_count():
    model = tiny_unet()
    with torch.no_grad():
        model.class_embedding.weight[3, :2] = float("inf")
    calls = unet_calls(1)
    calls[0]["class_labels"].zero_()
    graph = trace(model, calls[0])
    statistics = collect_statistics(graph, calls)
    with pytest.raises(CalibrationError, match=r"class_embedding.*2 of 640"):
        _decide(graph, statistics)


def test_the_layer_that_reads_the_noisy_sample_keeps_float_activations(unet_graph):
    graph, statistics = unet_graph
    ranges = search_ranges(graph, statistics, MPQConfig())
    assert set(statistics) - set(ranges) == {"conv_in"}


def test_no_data_is_refused():
    graph = trace(TinyNet(), net_calls()[0])
    with pytest.raises(CalibrationError, match="no calibration data"):
        collect_statistics(graph, [])
