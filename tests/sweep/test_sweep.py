"""The sweep against its definition: rerun the model for every layer, solve, install, go on."""

import pytest
import torch
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls
from sweeps import quantized, recorded, settings_of, traced

from mpqdm_fx.bits.allocate import decide_layer, layer_limits
from mpqdm_fx.digits.bundled import load_digits_unet
from mpqdm_fx.graph.lanes import is_lane, twin_of
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.sweep import sweep as sweep_module
from mpqdm_fx.sweep.collect import rows_of_all_calls
from mpqdm_fx.sweep.finish import finish
from mpqdm_fx.sweep.shards import Shards
from mpqdm_fx.sweep.start import start_sweep
from mpqdm_fx.sweep.sweep import Sweep
from mpqdm_fx.testing.rerun import rerun_for_every_layer

SHORT = {"rounding": "nearest", "propagation": 0.0, "refinements": 0, "bias_correction": False}
"""Where nothing depends on how weights are rounded."""

MODELS = {"unet": (tiny_unet, unet_calls), "condition": (tiny_condition_unet, condition_calls)}


def _by_settings(graph_module, **settings):
    """Settings that the brute force takes: uniform bits, float activations, tables in float."""
    names = weight_layers(graph_module)
    rules = [{"pattern": name, "weight_bits": 3} for name in names]
    tables = set(weight_layers(graph_module, embeddings=True)) - set(names)
    rules += [{"pattern": name, "skip": True} for name in tables]
    return settings_of(weight_bits=3, activation_mode="float", overrides=rules, **settings)


def _assert_one_sweep_is_the_rerun(graph_module, calls, settings):
    sweep = start_sweep(graph_module, recorded(calls), settings)
    result = finish(sweep)
    weights = sweep.prepared.row_weights
    assert weights.energies  # so rows of some noise levels count more than others
    held_out = weights.groups.held_out(calls)
    expected = rerun_for_every_layer(graph_module, calls, settings, held_out, weights)
    for name, layer in weight_layers(result.rounded).items():
        counterpart = expected.get_submodule(name)
        assert torch.equal(layer.module.weight_codes, counterpart.weight_codes), name
        torch.testing.assert_close(layer.module.weight, counterpart.weight)
        if layer.module.bias is not None:
            torch.testing.assert_close(layer.module.bias, counterpart.bias)


@pytest.mark.parametrize("kind", ["unet", pytest.param("condition", marks=pytest.mark.matrix)])
def test_one_sweep_equals_rerunning_the_model_for_every_layer(kind):
    model, make_calls = MODELS[kind]
    graph_module, calls = traced(model(), make_calls())
    _assert_one_sweep_is_the_rerun(graph_module, calls, _by_settings(graph_module, max_rows=96))


@pytest.mark.matrix
def test_one_sweep_equals_rerunning_the_bundled_model_for_every_layer():
    torch.manual_seed(0)
    calls = [{**call, "sample": torch.randn(4, 1, 16, 16)} for call in unet_calls(4, batch=4)]
    graph_module, calls = traced(load_digits_unet(), calls)
    _assert_one_sweep_is_the_rerun(graph_module, calls, _by_settings(graph_module, max_rows=512))


@pytest.mark.parametrize(
    "mode", [pytest.param("static", marks=pytest.mark.matrix), "timestep", "dynamic", "float"]
)
def test_the_quantized_graph_computes_what_the_quantized_lane_did(mode):
    graph_module, calls = traced(tiny_unet(), unet_calls())
    sweep = start_sweep(
        graph_module,
        recorded(calls),
        # four bits with ranges by noise level: each input has a width, and fitted levels
        settings_of(
            activation_mode=mode,
            propagation=0.5,
            activation_bits=4 if mode == "timestep" else 8,
            timestep_groups=2,
        ),
    )
    result = finish(sweep)
    quantized_graph = result.rounded
    if mode != "float":
        quantized_graph = QuantizeActivations(
            ranges=result.activations, noise_levels=result.noise_levels
        )(result.rounded).graph_module
    with torch.no_grad():
        for call, (exact, noisy) in zip(calls, sweep.walk.outputs, strict=True):
            assert torch.equal(exact[0], graph_module(**call)[0])
            assert torch.equal(noisy[0], quantized_graph(**call)[0])
            assert not torch.equal(exact[0], noisy[0])


def test_every_node_runs_once_per_lane_and_call():
    graph_module, calls = traced(tiny_unet(), unet_calls())
    settings = settings_of(activation_mode="float")
    sweep = start_sweep(graph_module, recorded(calls), settings)
    finish(sweep)
    computing = [n for n in graph_module.graph.nodes if n.op.startswith("call")]
    lanes = [n for n in sweep.graph_module.graph.nodes if n.op.startswith("call")]
    shared = [n for n in lanes if not is_lane(n) and twin_of(sweep.graph_module, n) is None]
    assert len(lanes) == 2 * len(computing) - len(shared)
    assert sweep.walk.executions == len(lanes) * len(calls)
    assert len(shared) < len(computing) / 4  # the time embedding's sines, sizes


def test_a_sweep_can_be_stopped_looked_at_and_gone_on_with():
    graph_module, calls = traced(tiny_unet(), unet_calls())
    whole = quantized(graph_module, calls)
    sweep = start_sweep(graph_module, recorded(calls), settings_of())
    deltas = []
    for node in sweep:
        if node.name == "mid_block_resnets_0_conv1_hat":
            deltas = [sweep.delta(node.args[0])]
            break
    assert "mid_block.resnets.0.conv1" in sweep.solutions  # it is solved before it is executed
    assert "mid_block.resnets.0.conv2" not in sweep.solutions
    assert 0 < deltas[0] < 1
    result = finish(sweep)
    for name, layer in weight_layers(whole.rounded).items():
        counterpart = result.rounded.get_submodule(name)
        assert torch.equal(layer.module.weight_codes, counterpart.weight_codes)


def test_layers_whose_input_has_no_error_are_not_corrected():
    graph_module, calls = traced(tiny_condition_unet(), condition_calls())
    result = quantized(graph_module, calls, propagation="auto", activation_mode="float")
    strengths = {layer.name: layer.alpha for layer in result.layers}
    exact = [n for n in strengths if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert exact
    for name in ("conv_in", "time_embedding.linear_1", *exact):
        assert strengths[name] == 0
    assert max(strengths.values()) > 0


def test_no_layer_is_worse_than_its_base_on_held_out_calls():
    graph_module, calls = traced(tiny_unet(), unet_calls(6))
    result = quantized(graph_module, calls, weight_bits=2, propagation="auto")
    gains = [
        layer.sqnr_db - layer.base_sqnr_db for layer in result.layers if layer.sqnr_db is not None
    ]
    assert min(gains) >= 0
    assert max(gains) > 0


def test_a_skipped_layer_stays_in_float_with_its_activations():
    graph_module, calls = traced(tiny_unet(), unet_calls(2))
    rule = {"pattern": "mid_block.resnets.0.conv1", "skip": True}
    result = quantized(graph_module, calls, overrides=[rule], **SHORT)
    layer = result.rounded.get_submodule(rule["pattern"])
    assert layer is graph_module.get_submodule(rule["pattern"])
    assert rule["pattern"] not in result.activations


@pytest.mark.parametrize("mode", ["static", "timestep", "dynamic"])
def test_single_layers_have_their_own_bits_of_activations(mode):
    graph_module, calls = traced(tiny_unet(), unet_calls(2))
    rule = {"pattern": "*conv_shortcut*", "activation_bits": 8}
    result = quantized(
        graph_module,
        calls,
        overrides=[rule],
        activation_bits=4,
        activation_mode=mode,
        activation_allocation="uniform",
        **SHORT,
    )
    for name, activation in result.activations.items():
        first = activation.groups[0] if mode == "timestep" else activation
        bits = first.bits if mode == "dynamic" else first.input.bits
        assert bits == (8 if "conv_shortcut" in name else 4), name


def test_the_float_graph_is_left_as_it_was():
    graph_module, calls = traced(tiny_unet(), unet_calls(2))
    before = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    code = graph_module.code
    quantized(graph_module, calls)
    assert graph_module.code == code
    after = graph_module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_part_the_calls_and_gather_keeps_their_order():
    shards = [Shards(rank=rank, world=3, total=8) for rank in range(3)]
    assert sorted(i for s in shards for i in s.indices) == list(range(8))
    assert Shards.of(5).indices == range(5)
    assert Shards.of(5).gather(list("abcde")) == list("abcde")


def test_one_process_streams_without_holding_more_than_a_call():
    values = iter("abcde")
    stream = Shards.of(5).stream(values)
    assert next(stream) == "a"
    assert next(values) == "b"
    assert list(stream) == list("cde")


def test_how_many_rows_there_are_does_not_depend_on_which_call_is_looked_at():
    layer = torch.nn.Conv2d(3, 4, 3, padding=1)
    batches = [1, 16, 16, 7]
    counts = {
        rows_of_all_calls(layer, torch.zeros(batch, 3, 8, 8), batches, index, 512)
        for index, batch in enumerate(batches)
    }
    assert counts == {512}


def test_decisions_see_all_calls_alike(monkeypatch):
    graph_module, calls = traced(tiny_unet(), unet_calls(3))
    settings = settings_of(allocation="omq", max_rows=64)
    decided = {}

    def watched(layer, exact, rows, settings):
        decided[layer.name] = rows
        return decide_layer(layer, exact, rows, settings)

    monkeypatch.setattr(sweep_module, "decide_layer", watched)
    monkeypatch.setattr(sweep_module, "_DECISION_ROWS", 20)
    sweep = Sweep(graph_module, calls, settings, limits=layer_limits(graph_module, settings))
    data = {}
    original = sweep._solve_with
    sweep._solve_with = lambda layer, rows: data.update({layer.name: rows}) or original(layer, rows)
    sweep.run()
    assert decided
    for name, rows in decided.items():
        step = -(-len(data[name].train.inputs) // 20)
        assert len(rows) <= 20
        assert torch.equal(rows, data[name].train.inputs[::step]), name


def test_a_sweep_without_a_plan_decides_and_solves_every_layer():
    graph_module, calls = traced(tiny_unet(), unet_calls(1))
    settings = settings_of()
    sweep = Sweep(graph_module, calls, settings, limits=layer_limits(graph_module, settings))
    sweep.run()
    assert set(sweep.solutions) == set(weight_layers(graph_module, embeddings=True))
