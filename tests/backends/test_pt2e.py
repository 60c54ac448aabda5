"""The PT2E door: integers as planned, numbers bit-equal to the fake-quantized graph."""

import dataclasses

import pytest
import torch
from rounded_nets import (
    Attention,
    MovedOutput,
    Residual,
    SharedOutput,
    Tied,
    measured_ranges,
    round_to_grid,
    rounded,
    widen_inputs,
)
from torch import nn

from mpqdm_fx.backends import ao
from mpqdm_fx.backends.pt2e import WEIGHT_OPS, convert_pt2e_graph, export_graph, to_quantizer
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.editing import replace_module
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.activations import ActivationRange, StaticActivation


def outputs(graph, inputs):
    with torch.no_grad():
        return graph(*inputs.values())


def integer_weights(converted):
    """int8 weight of each aten weight op, by layer name, read off the converted graph."""
    weights = {}
    for node in converted.graph.nodes:
        if node.target in WEIGHT_OPS:
            name = next(entry[0] for entry in reversed(node.meta["nn_module_stack"].values()))
            dequantize = node.args[1]
            assert "dequantize_per_channel" in str(dequantize.target)
            weights[name] = getattr(converted, dequantize.args[0].target)
    return weights


CASES = {
    "residual": (Residual, ()),
    "attention": (Attention, ()),
    "shared output": (SharedOutput, ()),
    "cat": (lambda: MovedOutput("cat"), ("after",)),
    "view": (lambda: MovedOutput("view"), ("after",)),
}


@pytest.mark.parametrize("bits", [8, 1])
@pytest.mark.parametrize("name", CASES)
def test_converted_graph_is_bit_equal_to_the_fake_quantized_one(name, bits):
    make, wide = CASES[name]
    graph, ranges, inputs = rounded(make(), bits)
    ranges = widen_inputs(ranges, wide)
    converted = convert_pt2e_graph(graph, ranges, inputs)
    expected = outputs(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    assert torch.equal(outputs(converted, inputs), expected)
    weights = integer_weights(converted)
    assert set(weights) == set(ranges)
    for layer, codes in weights.items():
        assert codes.dtype == torch.int8
        assert torch.equal(codes, graph.get_submodule(layer).weight_codes)


@pytest.mark.parametrize("input_bits", [8, 6, 4])
def test_narrow_inputs_are_bit_equal_too(input_bits):
    graph, ranges, inputs = rounded(Residual())
    narrow = measured_ranges(graph, inputs, bits=input_bits)
    mixed = {
        name: StaticActivation(input=narrow[name].input, output=ranges[name].output)
        for name in ranges
    }
    expected = outputs(QuantizeActivations(ranges=mixed)(graph).graph_module, inputs)
    assert torch.equal(outputs(convert_pt2e_graph(graph, mixed, inputs), inputs), expected)


def test_layers_without_a_range_keep_a_float_weight():
    graph, ranges, inputs = rounded(Residual())
    partial = {name: ranges[name] for name in ("conv1", "conv_out")}
    converted = convert_pt2e_graph(graph, partial, inputs)
    expected = outputs(QuantizeActivations(ranges=partial)(graph).graph_module, inputs)
    assert torch.equal(outputs(converted, inputs), expected)


def test_tied_layer_is_quantized_under_both_names():
    graph, ranges, inputs = rounded(Tied())
    expected = outputs(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    assert torch.equal(outputs(convert_pt2e_graph(graph, ranges, inputs), inputs), expected)


@pytest.mark.parametrize("mode", ["circular", "reflect", "same"])
def test_padding_that_is_a_node_of_its_own_changes_nothing(mode):
    torch.manual_seed(0)
    same = {"padding": "same"} if mode == "same" else {"padding": 1, "padding_mode": mode}
    inputs = {"input": torch.randn(2, 3, 6, 8)}
    graph = round_to_grid(trace(nn.Sequential(nn.Conv2d(3, 4, 3, **same)).eval(), inputs))
    ranges = measured_ranges(graph, inputs)
    expected = outputs(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    assert torch.equal(outputs(convert_pt2e_graph(graph, ranges, inputs), inputs), expected)


def test_callers_graph_is_left_alone():
    graph, ranges, inputs = rounded(Residual())
    code = graph.code
    metas = {node.name: set(node.meta) for node in graph.graph.nodes}
    convert_pt2e_graph(graph, ranges, inputs)
    assert graph.code == code
    assert {node.name: set(node.meta) for node in graph.graph.nodes} == metas


class OnlySums:
    """Makes a quantizer that annotates additions, in the plain way of torchao's examples."""

    @staticmethod
    def make():
        class SumQuantizer(ao.Quantizer):
            def annotate(self, model):
                spec = ao.QuantizationSpec(
                    dtype=torch.int8,
                    observer_or_fake_quant_ctr=ao.PT2EHistogramObserver,
                    quant_min=-128,
                    quant_max=127,
                    qscheme=torch.per_tensor_affine,
                )
                for node in model.graph.nodes:
                    if node.target is torch.ops.aten.add.Tensor:
                        node.meta[ao.Q_ANNOTATION_KEY] = ao.QuantizationAnnotation(
                            output_qspec=spec, _annotated=True
                        )
                return model

            def validate(self, model):
                pass

        return SumQuantizer()


@pytest.mark.parametrize("ours_first", [True, False])
def test_works_inside_a_composable_quantizer(ours_first):
    graph, ranges, inputs = rounded(Residual())
    quantizers = [to_quantizer(graph, ranges), OnlySums.make()]
    composed = ao.ComposableQuantizer(quantizers if ours_first else quantizers[::-1])
    prepared = ao.prepare_pt2e(export_graph(graph, inputs).module(), composed)
    outputs(prepared, inputs)
    converted = ao.convert_pt2e(prepared)
    weights = integer_weights(converted)
    assert all(torch.equal(weights[n], graph.get_submodule(n).weight_codes) for n in ranges)
    sums = [n for n in converted.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(sums) == 2
    assert all("quantize_per_tensor" in str(user.target) for n in sums for user in n.users)
    exact, actual = outputs(graph, inputs), outputs(converted, inputs)
    assert (exact - actual).abs().max() < 0.1 * exact.abs().max()


def test_annotation_of_another_quantizer_is_not_overwritten():
    graph, ranges, inputs = rounded(Residual())
    exported = export_graph(graph, inputs).module()
    taken = next(n for n in exported.graph.nodes if n.target is torch.ops.aten.conv2d.default)
    mark = ao.QuantizationAnnotation(_annotated=True)
    taken.meta[ao.Q_ANNOTATION_KEY] = mark
    to_quantizer(graph, ranges).annotate(exported)
    assert taken.meta[ao.Q_ANNOTATION_KEY] is mark


def test_without_ranges_an_observer_calibrates():
    graph, _, inputs = rounded(Residual())
    prepared = ao.prepare_pt2e(export_graph(graph, inputs).module(), to_quantizer(graph, "observe"))
    outputs(prepared, inputs)
    converted = ao.convert_pt2e(prepared)
    weights = integer_weights(converted)
    assert all(torch.equal(weights[n], graph.get_submodule(n).weight_codes) for n in weights)
    exact, actual = outputs(graph, inputs), outputs(converted, inputs)
    assert (exact - actual).abs().max() < 0.1 * exact.abs().max()


def test_batch_norm_folded_into_a_rounded_weight_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].running_var.fill_(2.0)
    inputs = {"input": torch.randn(2, 3, 6, 8)}
    graph = round_to_grid(trace(model, inputs))
    ranges = measured_ranges(graph, inputs)
    with pytest.raises(ConfigError, match=r"^0: .*batch-norm folding"):
        convert_pt2e_graph(graph, ranges, inputs)


def test_exported_graph_without_the_layers_names_is_refused():
    graph, ranges, inputs = rounded(Residual())
    stranger = trace(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), {"input": inputs["x"]})
    exported = torch.export.export(stranger, (inputs["x"],), strict=False).module()
    with pytest.raises(ConfigError, match="export the rounded graph itself"):
        to_quantizer(graph, ranges).annotate(exported)


def test_bad_ranges_are_refused():
    graph, ranges, _ = rounded(Residual())
    with pytest.raises(ConfigError, match="`ranges` is empty"):
        to_quantizer(graph, {})
    with pytest.raises(ConfigError, match="'no_layer'"):
        to_quantizer(graph, {"no_layer": ranges["conv1"]})


def test_weight_shared_by_a_layer_called_twice_is_stored_once():
    graph, ranges, inputs = rounded(Attention())
    converted = convert_pt2e_graph(graph, ranges, inputs)
    integers = [t for t in converted.state_dict().values() if t.dtype == torch.int8]
    assert sum(t.numel() for t in integers) == sum(
        graph.get_submodule(name).weight.numel() for name in ranges
    )


def test_scale_that_no_float32_holds_is_the_same_through_both_doors():
    graph, ranges, inputs = rounded(Residual())
    odd = {
        name: StaticActivation(
            input=dataclasses.replace(a.input, scale=a.input.scale * (1 + 1e-9)),
            output=dataclasses.replace(a.output, scale=a.output.scale * (1 + 1e-9)),
        )
        for name, a in ranges.items()
    }
    expected = outputs(QuantizeActivations(ranges=odd)(graph).graph_module, inputs)
    assert torch.equal(outputs(convert_pt2e_graph(graph, odd, inputs), inputs), expected)


def test_embedding_on_its_grid_stays_in_float():
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(5, 6), nn.Linear(6, 4)

        def forward(self, y):
            return self.mix(self.table(y))

    inputs = {"y": torch.tensor([1, 4, 2])}
    model = Classes().eval()
    codes = torch.randint(-127, 128, (5, 6), dtype=torch.int8)
    graph = round_to_grid(trace(model, inputs))
    table = install_codes(model.table, codes, torch.full((5,), 0.0625))
    replace_module(graph, "table", table)
    grid = ActivationRange(scale=0.1, zero_point=0)
    ranges = {"mix": StaticActivation(input=grid, output=grid)}
    converted = convert_pt2e_graph(graph, ranges, inputs)
    (lookup,) = (n for n in converted.graph.nodes if "embedding" in str(n.target))
    assert lookup.args[0].op == "get_attr"
    expected = outputs(QuantizeActivations(ranges=ranges)(graph).graph_module, inputs)
    assert torch.equal(outputs(converted, inputs), expected)
