"""The torch.ao door: integers as planned, numbers as in the fake-quantized graph."""

import logging

import pytest
import torch
from rounded_nets import Attention, Residual, Tied, measured_ranges, round_to_grid, rounded
from torch import nn

from mpqdm_fx.backends import ao
from mpqdm_fx.backends.torch_ao import ENGINES, lower_torch_ao, set_ranges, to_qconfig_mapping
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ConfigError, LoweringError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import ActivationRange, StaticActivation

NETS = [Residual, Attention]


@pytest.fixture(params=NETS, ids=lambda net: net.__name__)
def case(request):
    return rounded(request.param())


def run(graph, inputs):
    with torch.no_grad():
        return graph(**inputs)


@pytest.mark.parametrize("engine", ENGINES)
def test_lowered_modules_hold_the_planned_integers_and_scales(case, engine):
    graph, ranges, inputs = case
    lowered = lower_torch_ao(graph, ranges, inputs, engine)
    for name in ranges:
        module, planned = lowered.get_submodule(name), graph.get_submodule(name)
        assert type(module).__name__ in ("Conv2d", "Linear")
        assert type(module).__module__.startswith("torch.ao.nn.quantized")
        assert torch.equal(module.weight().int_repr(), planned.weight_codes)
        scales = module.weight().q_per_channel_scales().float()
        assert torch.equal(scales, planned.weight_scale)


@pytest.mark.parametrize("engine", ["onednn", "fbgemm"])
def test_onednn_and_fbgemm_are_bit_equal_to_the_fake_quantized_graph(case, engine):
    graph, ranges, inputs = case
    expected = run(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    assert torch.equal(run(lower_torch_ao(graph, ranges, inputs, engine), inputs), expected)


def test_qnnpack_is_as_close_to_the_float_graph_as_the_fake_quantized_one(case):
    # it rounds in fixed point: single codes differ, and every later rounding spreads them
    graph, ranges, inputs = case
    exact = run(graph, inputs)
    fake = run(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    actual = run(lower_torch_ao(graph, ranges, inputs, "qnnpack"), inputs)
    assert sqnr_db(exact, actual) >= sqnr_db(exact, fake) - 1.0


SINGLE_LAYERS = {
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 9)),
    "strided": (lambda: nn.Conv2d(6, 8, 3, stride=2), (2, 6, 7, 9)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 7, 9)),
    "dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2), (2, 6, 7, 9)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 11)),
    "linear": (lambda: nn.Linear(6, 8), (2, 5, 6)),
    "no bias": (lambda: nn.Linear(6, 8, bias=False), (4, 6)),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", SINGLE_LAYERS)
def test_one_layer_differs_by_one_step_and_only_where_the_exact_output_is_a_tie(kind, engine, seed):
    torch.manual_seed(seed)
    make, shape = SINGLE_LAYERS[kind]
    inputs = {"input": torch.randn(shape)}
    graph = round_to_grid(trace(nn.Sequential(make()).eval(), inputs), bits=4)
    ranges = measured_ranges(graph, inputs)
    expected = run(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    actual = run(lower_torch_ao(graph, ranges, inputs, engine), inputs)
    output = ranges["0"].output
    steps = (actual - expected).abs() / output.scale
    assert steps.max() <= 1.001
    if engine != "qnnpack":  # sums of integers are exact there, the scales are multiplied in float
        read = ranges["0"].input
        codes = torch.quantize_per_tensor(inputs["input"], read.scale, read.zero_point, torch.qint8)
        exact = graph.double()(codes.dequantize().double()) / output.scale
        from_tie = (exact - exact.floor() - 0.5).abs()
        assert bool((from_tie[steps > 0.5] < 1e-4).all())


@pytest.mark.parametrize("engine", ENGINES)
def test_channel_of_zero_weights_keeps_its_bias(engine):
    # The scale of such a channel is the smallest there is, its bias in steps of it is endless.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()
    model[0].weight.data[1] = 0.0
    model[0].bias.data[1] = 0.5
    inputs = {"input": torch.randn(2, 3, 6, 8)}
    graph = round_to_grid(trace(model, inputs), bits=3)
    ranges = measured_ranges(graph, inputs)
    expected = run(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    actual = run(lower_torch_ao(graph, ranges, inputs, engine), inputs)
    assert (actual - expected).abs().max() <= 1.001 * ranges["2"].output.scale


def test_program_runs_on_its_engine_whatever_the_global_setting_is(case):
    graph, ranges, inputs = case
    for engine in ENGINES:
        lowered = lower_torch_ao(graph, ranges, inputs, engine)
        here = run(lowered, inputs)
        for ambient in ENGINES:
            with ao.quantized_engine(ambient):
                assert torch.equal(run(lowered, inputs), here)


def test_global_engine_and_the_callers_graph_are_left_alone(case):
    graph, ranges, inputs = case
    engine, code = torch.backends.quantized.engine, graph.code
    modules = {name: (id(m), set(vars(m))) for name, m in graph.named_modules()}
    lower_torch_ao(graph, ranges, inputs, "fbgemm")
    assert torch.backends.quantized.engine == engine
    assert graph.code == code
    assert {name: (id(m), set(vars(m))) for name, m in graph.named_modules()} == modules


def test_other_batch_sizes_run_too():
    graph, ranges, inputs = rounded(Residual())
    lowered = lower_torch_ao(graph, ranges, inputs)
    five = Residual.inputs(batch=5)
    expected = run(QuantizeActivations(ranges=ranges)(graph).graph_module, five)
    assert torch.equal(run(lowered, five), expected)


def test_layers_without_a_range_stay_in_float():
    graph, ranges, inputs = rounded(Residual())
    partial = {name: ranges[name] for name in ("conv1", "conv_out")}
    lowered = lower_torch_ao(graph, partial, inputs)
    assert type(lowered.get_submodule("down")) is nn.Conv2d
    expected = run(QuantizeActivations(ranges=partial)(graph).graph_module, inputs)
    assert torch.equal(run(lowered, inputs), expected)


def test_relu_behind_a_layer_stays_between_its_two_pairs():
    torch.manual_seed(0)
    inputs = {"input": torch.randn(2, 3, 6, 8)}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    graph = round_to_grid(trace(model, inputs))
    ranges = measured_ranges(graph, inputs)
    lowered = lower_torch_ao(graph, ranges, inputs)
    assert type(lowered.get_submodule("1")) is nn.ReLU
    expected = run(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    assert torch.equal(run(lowered, inputs), expected)


def test_tied_layer_is_lowered_under_both_names():
    graph, ranges, inputs = rounded(Tied())
    assert list(ranges) == list(weight_layers(graph))
    lowered = lower_torch_ao(graph, ranges, inputs)
    expected = run(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    assert torch.equal(run(lowered, inputs), expected)


def test_mapping_has_one_qconfig_per_layer_and_none_for_the_rest():
    graph, ranges, _ = rounded(Residual())
    mapping = to_qconfig_mapping(graph, "observe")
    assert set(mapping.module_name_qconfigs) == set(ranges)
    assert mapping.global_qconfig is None
    observer = mapping.module_name_qconfigs["conv1"].activation()
    assert (observer.quant_min, observer.quant_max, observer.reduce_range) == (0, 255, False)


def test_converting_before_the_ranges_are_set_is_refused():
    graph, ranges, inputs = rounded(Residual())
    mapping = to_qconfig_mapping(graph, ranges)
    with ao.quiet():
        prepared = ao.prepare_fx(graph, mapping, tuple(inputs.values()))
        with pytest.raises(ConfigError, match="set_ranges"):
            ao.convert_fx(prepared)


def test_ranges_can_be_set_in_the_stock_flow():
    graph, ranges, inputs = rounded(Residual())
    expected = run(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    with ao.quiet(), ao.quantized_engine("onednn"):
        mapping = to_qconfig_mapping(graph, ranges)
        prepared = ao.prepare_fx(graph, mapping, tuple(inputs.values()))
        set_ranges(prepared, ranges)
        converted = ao.convert_fx(prepared)
    assert torch.equal(run(converted, inputs), expected)


def test_setting_ranges_of_other_layers_is_refused():
    graph, ranges, inputs = rounded(Residual())
    mapping = to_qconfig_mapping(graph, ranges)
    with ao.quiet():
        prepared = ao.prepare_fx(graph, mapping, tuple(inputs.values()))
    with pytest.raises(ConfigError, match="belongs to no layer"):
        set_ranges(prepared, {"conv1": ranges["conv1"]})


def test_narrow_activations_are_refused_with_layer_and_bits():
    graph, ranges, inputs = rounded(Residual())
    narrow = ActivationRange(scale=0.1, zero_point=0, bits=6)
    ranges["conv1"] = StaticActivation(input=narrow, output=ranges["conv1"].output)
    with pytest.raises(LoweringError, match="conv1: its input range has 6 bits"):
        lower_torch_ao(graph, ranges, inputs)


def test_bad_names_engines_and_empty_ranges_are_refused():
    graph, ranges, inputs = rounded(Residual())
    with pytest.raises(ConfigError, match="'no_layer'"):
        lower_torch_ao(graph, {"no_layer": ranges["conv1"]}, inputs)
    with pytest.raises(ConfigError, match="choose one of onednn, fbgemm, qnnpack"):
        lower_torch_ao(graph, ranges, inputs, "x86_64")
    with pytest.raises(ConfigError, match=r'no activation ranges.*activation_mode="static"'):
        lower_torch_ao(graph, {}, inputs)


@pytest.mark.parametrize(
    ("layer", "shape", "engine", "message"),
    [
        (nn.Conv3d(2, 3, 1), (1, 2, 3, 4, 5), "qnnpack", "no Conv3d"),
        (
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            (1, 2, 4, 5),
            "onednn",
            "circular",
        ),
    ],
)
def test_kernels_that_do_not_exist_are_named(layer, shape, engine, message):
    inputs = {"input": torch.randn(shape)}
    graph = round_to_grid(trace(nn.Sequential(layer).eval(), inputs))
    with pytest.raises(LoweringError, match=message):
        lower_torch_ao(graph, measured_ranges(graph, inputs), inputs, engine)


def test_fbgemm_without_vnni_is_warned_of(monkeypatch, caplog):
    graph, _, _ = rounded(Attention())
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with caplog.at_level(logging.WARNING):
        to_qconfig_mapping(graph, "observe", engine="fbgemm")
    assert "saturate" in caplog.text


def test_a_model_of_ends_alone_is_told_why_it_has_no_ranges():
    graph, _, inputs = rounded(Residual())
    with pytest.raises(ConfigError, match="nor have its end layers"):
        lower_torch_ao(graph, {}, inputs)
