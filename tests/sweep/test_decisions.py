import pytest
import torch
from small import tiny_unet, unet_calls
from sweeps import quantized as quantized_fully
from sweeps import traced

from mpqdm_fx.bits.pinning import pinned_layers
from mpqdm_fx.errors import CalibrationError


def quantized(graph, calls, **settings):
    """Decisions do not depend on how weights are rounded; nearest is quick."""
    return quantized_fully(graph, calls, **{"rounding": "nearest", "propagation": 0, **settings})


@pytest.fixture(scope="module")
def unet():
    return traced(tiny_unet(), unet_calls())


def test_layers_that_read_one_value_share_one_range(unet):
    activations = quantized(*unet).activations
    attention = "mid_block.attentions.0"
    inputs = {activations[f"{attention}.to_{part}"].input for part in "qkv"}
    assert len(inputs) == 1
    assert activations[f"{attention}.to_q"].output != activations[f"{attention}.to_k"].output


@pytest.mark.parametrize("bits", [2, 3])
def test_omq_keeps_the_average_exactly_and_promotes_as_many_as_it_demotes(unet, bits):
    plan = quantized(*unet, weight_bits=bits, allocation="omq", levels="uniform").plan
    assert plan.mean_bits == bits
    assert any(layer.fraction > 0 for layer in plan.layers)
    for layer in plan.layers:
        if layer.reason is None:
            assert layer.mean_bits == bits
            assert set(layer.bits) <= {bits - 1, bits, bits + 1}


@pytest.mark.parametrize("bits", [1, 8])
def test_at_the_ends_of_the_scale_no_channel_moves(unet, bits):
    plan = quantized(*unet, weight_bits=bits, allocation="omq").plan
    assert all(len(set(layer.bits)) == 1 for layer in plan.layers)


def test_first_last_time_and_class_layers_are_pinned_with_their_reason(unet):
    reasons = pinned_layers(unet[0])
    assert reasons == {
        "conv_in": "first layer",
        "conv_out": "last layer",
        "time_embedding.linear_1": "time or class embedding",
        "time_embedding.linear_2": "time or class embedding",
        "class_embedding": "time or class embedding",
    }
    plan = quantized(*unet, weight_bits=2).plan
    assert {layer.name for layer in plan.layers if set(layer.bits) == {8}} == set(reasons)


def test_an_override_unpins_pins_or_skips(unet):
    rules = [
        {"pattern": "conv_in", "weight_bits": 3},
        {"pattern": "mid_block.attentions.*", "skip": True},
    ]
    plan = quantized(*unet, weight_bits=2, overrides=rules).plan
    assert set(plan.layer("conv_in").bits) == {3}
    assert "mid_block.attentions.0.to_q" not in plan
    left = {tensor.name: tensor for tensor in plan.floats if tensor.is_weight}
    assert "override" in left["mid_block.attentions.0.to_q.weight"].reason


def test_codebooks_are_kept_where_their_table_is_short(unet):
    plan = quantized(*unet, weight_bits=3, levels="codebook").plan
    kinds = {layer.levels for layer in plan.layers if layer.reason is None}
    assert kinds == {"uniform", "codebook"}  # wide rows have one, short ones do not
    for layer in plan.layers:
        assert layer.storage.tables <= layer.storage.codes


@pytest.mark.parametrize(
    ("mode", "floats"), [("static", {"conv_in", "conv_out"}), ("dynamic", {"conv_in"})]
)
def test_the_ends_of_the_model_keep_float_activations(unet, mode, floats):
    result = quantized(*unet, activation_mode=mode, slowdown=1)
    planned = {layer.name for layer in result.plan.layers}
    assert planned - set(result.activations) == {*floats, "class_embedding"}


def test_non_finite_weights_are_refused_with_layer_and_count():
    model = tiny_unet()
    with torch.no_grad():
        model.class_embedding.weight[3, :2] = float("inf")
    calls = unet_calls(1)
    calls[0]["class_labels"].zero_()
    graph, normalized = traced(model, calls)
    with pytest.raises(CalibrationError, match=r"class_embedding.*2 of 640"):
        quantized(graph, normalized)


@pytest.mark.parametrize("slowdown", [1, 1.1])
def test_activations_that_turn_infinite_are_refused_with_the_layer(slowdown):
    model = tiny_unet()
    with torch.no_grad():
        model.down_blocks[0].resnets[0].norm2.weight.fill_(1e38)
        model.down_blocks[0].resnets[0].conv2.weight.fill_(1e10)
    with pytest.raises(CalibrationError, match=r"down_blocks\.0\.resnets\.0\.conv2"):
        quantized(*traced(model, unet_calls(2)), slowdown=slowdown)


def test_no_data_is_refused(unet):
    with pytest.raises(CalibrationError, match="no calibration data"):
        quantized(unet[0], [])
