"""Whole UNets as `.pte`: int8 where planned, the integers of the fake-quantized graph."""

import itertools

import pytest
import torch
from diffusers import UNet2DModel
from node_values import node_values
from rounded_nets import measured_ranges, round_to_grid
from small import tiny_condition_unet, tiny_sdxl_unet

from mpqdm_fx.backends.fit_channels import round_biases
from mpqdm_fx.backends.torch_ao import ENGINES, lower_torch_ao
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.digits.network import build_unet
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import DynamicActivation

pytestmark = [pytest.mark.xnnpack, pytest.mark.matrix]


def digits():
    """The architecture of the bundled model, untrained."""
    return build_unet(), {
        "sample": torch.randn(1, 1, 16, 16),
        "timestep": torch.tensor([10]),
        "class_labels": torch.tensor([3]),
    }


def oblong():
    """Batch 2, height and width different, no number of channels equal to either."""
    model = UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 40),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return model, {"sample": torch.randn(2, 3, 12, 20), "timestep": torch.tensor([10, 900])}


def condition():
    """Cross-attention, layer norms and GEGLU, batch 2, height and width different."""
    model, text = tiny_condition_unet(), torch.randn(2, 7, 12)
    return model, {
        "sample": torch.randn(2, 4, 10, 14),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": text,
    }


def sdxl():
    """Added conditions, linear projections in and out of the attention, blocks of unequal depth."""
    # the thresholds were measured with sizes embedded in four numbers each
    return tiny_sdxl_unet(size_embedding=4), {
        "sample": torch.randn(2, 4, 10, 14),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 10),
            "time_ids": torch.tensor([[10.0, 14, 0, 0, 10, 14]]).repeat(2, 1),
        },
    }


FORMS = ("float", "static", "dynamic", "mixed")


def traced(make):
    torch.manual_seed(0)
    model, inputs = make()
    return Pipeline(passes=NORMALIZE)(trace(model.eval(), inputs)).graph_module, inputs


def rounded_as(form, graph, inputs):
    """The rounded graph and its activations: of one kind, or both kinds and all widths."""
    if form != "mixed":
        graph = round_to_grid(graph, bits=4)
        ranges = measured_ranges(graph, inputs)
        return graph, dict.fromkeys(ranges, DynamicActivation()) if form == "dynamic" else ranges
    widths = itertools.cycle((2, 4, 3, 8))
    graph = round_to_grid(graph, bits={name: next(widths) for name in weight_layers(graph)})
    ranges = measured_ranges(graph, inputs)
    dynamic = dict.fromkeys(list(ranges)[1::3], DynamicActivation())
    return graph, {**ranges, **dynamic}


def lowered(form, graph, inputs, path):
    if form == "float":
        return lower_xnnpack_float(graph, inputs, path)
    graph, ranges = rounded_as(form, graph, inputs)
    assert set(ranges) == set(weight_layers(graph))
    return lower_xnnpack(graph, ranges, inputs, path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [digits, oblong, condition, sdxl], ids=lambda make: make.__name__)
def test_unet_is_one_delegate_and_computes_the_graph(make, form, tmp_path):
    graph, inputs = traced(make)
    program = lowered(form, graph, inputs, tmp_path / "unet.pte")
    # integers are outside XNNPACK: the timestep's cast, and the look-up of a class
    assert set(program.refusals) <= {
        "dim_order_ops__to_dim_order_copy_default",
        "aten_embedding_default",
    }
    assert program.subgraphs == 1
    # XNNPACK has no dynamic kernel for a convolution of one input channel
    assert set(program.float_layers) <= ({"conv_in"} if make is digits else set())
    if form == "float":
        assert program.sqnr_db > 100
        return
    assert program.reference_sqnr_db > (10 if form == "mixed" else 15)
    # XNNPACK sums norms and softmax in another order; where a code falls to the other side of a
    # tie, the layers behind spread it, up to another draw of the same rounding noise (3 dB more).
    assert program.sqnr_db > program.reference_sqnr_db - 3.5
    # but it is no worse a draw: what counts is the distance from the graph without rounding noise
    graph, _ = rounded_as(form, graph, inputs)
    (output,) = XnnpackRunner(program.path)(*inputs.values())
    with torch.no_grad():
        assert sqnr_db(graph(**inputs)[0], output) > program.reference_sqnr_db - 1


def arguments(graph, inputs):
    return [inputs[str(node.target)] for node in graph.graph.find_nodes(op="placeholder")]


def calls(graph, names):
    nodes = graph.graph.find_nodes(op="call_module")
    return {node.name: node for node in nodes if node.target in names}


@pytest.mark.parametrize("make", [digits, oblong, condition, sdxl], ids=lambda make: make.__name__)
@pytest.mark.parametrize("engine", ENGINES)
def test_layers_of_torch_ao_have_the_integers_of_the_fake_quantized_graph(make, engine):
    # layer by layer: the norms between sum floats in an order that depends on layout and CPU, and
    # one code on the other side of a tie changes all behind it
    graph, inputs = traced(make)
    graph, ranges = rounded_as("static", graph, inputs)
    graph = round_biases(graph, ranges)
    fake = QuantizeActivations(ranges=ranges)(graph).graph_module
    engine_graph = lower_torch_ao(graph, ranges, inputs, engine)
    before, after = (node_values(g, arguments(g, inputs)) for g in (fake, engine_graph))
    expected, actual = calls(fake, ranges), calls(engine_graph, ranges)
    assert expected.keys() == actual.keys()
    for name, call in actual.items():
        like = after[call.args[0]]
        layer = engine_graph.get_submodule(call.target)
        read = before[expected[name].args[0]]
        codes = torch.quantize_per_tensor(read, like.q_scale(), like.q_zero_point(), like.dtype)
        (quantize,) = expected[name].users
        (dequantize, *_) = quantize.users
        assert torch.equal(codes.dequantize(), read)
        written = layer(codes).dequantize()
        step = quantize.args[1]
        steps = (before[expected[name]] - written).abs() / step
        assert steps[written != before[dequantize]].sub(0.5).abs().le(1e-4).all(), name
        assert (written - before[dequantize]).abs().max() < 1.5 * step, name
