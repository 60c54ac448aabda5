"""One plan, four ways out: the same integers, bit for bit."""

import pytest
import torch
from small import tiny_unet, unet_calls
from torch.ao.quantization.backend_config import get_native_backend_config
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.composable_quantizer import ComposableQuantizer

from mpqdm_fx import MPQConfig, load, quantize, save
from mpqdm_fx.backends.pt2e import to_quantizer
from mpqdm_fx.backends.torch_ao import set_ranges, to_qconfig_mapping
from mpqdm_fx.errors import ConfigError, LoweringError
from mpqdm_fx.graph.editing import copy_graph_module
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.passes.quantize.assign_qconfigs import QCONFIG, AssignQConfigs
from mpqdm_fx.records.activations import (
    ActivationRange,
    DynamicActivation,
    StaticActivation,
    TimestepActivation,
)

_PLAIN = MPQConfig(
    allocation="uniform", weight_bits=8, rounding="nearest", propagation=0, bias_correction=False
)


@pytest.fixture(scope="module")
def quantized():
    """Mixed widths and both kinds of levels, so that a plain rounding would show."""
    config = MPQConfig(
        weight_bits=3,
        allocation="omq",
        levels="codebook",
        overrides=[{"pattern": "*conv2", "weight_bits": 1}, {"pattern": "*to_k", "weight_bits": 6}],
    )
    return quantize(tiny_unet(), config, unet_calls())


@pytest.fixture(scope="module")
def codes(quantized):
    return {name: quantized.codes(name) for name in weight_layers(quantized.rounded)}


def _inputs(quantized):
    call = unet_calls(1, batch=2, seed=4)[0]
    return tuple(quantized.signature.normalize((), call).values())


@pytest.mark.parametrize("engine", ["onednn", "fbgemm", "qnnpack"])
def test_stock_prepare_fx_and_convert_fx_keep_the_integers(quantized, codes, engine):
    inputs = _inputs(quantized)
    mapping = to_qconfig_mapping(quantized.rounded, "observe", engine=engine)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        prepared = prepare_fx(
            quantized.rounded, mapping, inputs, backend_config=get_native_backend_config()
        )
        prepared(*inputs)
        converted = convert_fx(prepared, backend_config=get_native_backend_config())
        actual = {
            name: module.weight().int_repr()
            for name, module in converted.named_modules()
            if callable(getattr(module, "weight", None))
        }
    finally:
        torch.backends.quantized.engine = before
    assert actual.keys() == codes.keys()
    assert all(torch.equal(actual[name], codes[name]) for name in codes)


@pytest.mark.parametrize("composed", [False, True])
def test_stock_prepare_pt2e_and_convert_pt2e_keep_the_integers(quantized, codes, composed):
    inputs = _inputs(quantized)
    quantizer = to_quantizer(quantized.rounded, quantized.ranges)
    if composed:
        quantizer = ComposableQuantizer([quantizer])
    exported = torch.export.export(quantized.rounded, inputs, strict=False).module()
    converted = convert_pt2e(prepare_pt2e(exported, quantizer))
    stored = [value for value in converted.state_dict().values() if value.dtype == torch.int8] + [
        value for value in converted.buffers() if value.dtype == torch.int8
    ]
    assert stored
    assert len(quantized.ranges) > len(codes) / 2
    for name in quantized.ranges:
        assert any(torch.equal(codes[name], value) for value in stored), name


def _through_prepare_fx(quantized, inputs):
    mapping = to_qconfig_mapping(quantized.rounded)  # what the graph says of its layers
    prepared = prepare_fx(quantized.rounded, mapping, inputs)
    return convert_fx(set_ranges(prepared, quantized.ranges))


def _through_prepare_pt2e(quantized, inputs):
    exported = torch.export.export(quantized.rounded, inputs, strict=False).module()
    quantizer = to_quantizer(quantized.rounded)
    return convert_pt2e(prepare_pt2e(exported, quantizer))


@pytest.mark.parametrize("door", [_through_prepare_fx, _through_prepare_pt2e])
def test_the_stock_doors_have_the_decibels_of_the_fake_quantized_graph(wide, door):
    """The ranges found by calibration go along: no observer sees a single call and guesses."""
    inputs = _inputs(wide)
    with torch.no_grad():
        converted = door(wide, inputs)
        actual, fake = converted(*inputs)[0], wide.graph_module(*inputs)[0]
        weights_alone = wide.rounded(*inputs)[0]
    measured, expected = sqnr_db(weights_alone, actual), sqnr_db(weights_alone, fake)
    assert expected > 20
    assert abs(measured - expected) < 0.5
    assert sqnr_db(fake, actual) > expected


@pytest.fixture(scope="module")
def wide():
    """Ranges by all calls; the inputs of the test alone would give others."""
    return quantize(tiny_unet(), _PLAIN, unet_calls())


@pytest.mark.parametrize("door", [to_qconfig_mapping, to_quantizer])
def test_a_door_goes_by_what_the_graph_says_and_refuses_one_that_says_nothing(quantized, door):
    for given in ("static", 8):
        with pytest.raises(ConfigError, match=r"`QuantizedModel\.ranges`.*\"observe\""):
            door(quantized.rounded, given)
    with pytest.raises(ConfigError, match=r'activation_mode="static"'):
        door(quantized.rounded, {})
    silent = copy_graph_module(quantized.rounded)
    for node in silent.graph.nodes:
        node.meta.pop(QCONFIG, None)
    with pytest.raises(ConfigError, match=r"run `passes\.AssignQConfigs`"):
        door(silent)
    annotated = AssignQConfigs(activations=quantized.ranges)(silent).graph_module
    assert door(annotated) is not None


def test_a_mapping_refuses_what_a_qconfig_cannot_say(quantized):
    name = next(iter(quantized.ranges))
    narrow = ActivationRange(scale=1.0, zero_point=0, bits=6)
    static = StaticActivation(input=narrow, output=ActivationRange(scale=1.0, zero_point=0))
    for activation in (DynamicActivation(), TimestepActivation(groups=(static,)), static):
        with pytest.raises(LoweringError, match=name):
            to_qconfig_mapping(quantized.rounded, {name: activation})
    with pytest.raises(LoweringError, match=name):
        to_quantizer(quantized.rounded, {name: TimestepActivation(groups=(static,))})


def test_converting_without_the_ranges_is_refused(wide):
    mapping = to_qconfig_mapping(wide.rounded, wide.ranges)
    prepared = prepare_fx(wide.rounded, mapping, _inputs(wide))
    with pytest.raises(ConfigError, match="set_ranges"):
        convert_fx(prepared)


def test_our_own_files_keep_the_integers(quantized, codes, tmp_path):
    loaded = load(save(quantized, tmp_path / "packed"))
    assert all(torch.equal(loaded.codes(name), codes[name]) for name in codes)


def test_the_callers_graph_keeps_its_weights_through_both_doors(quantized, codes):
    for name, module in quantized.rounded.named_modules():
        if name in codes:
            shape = (-1,) + (1,) * (codes[name].dim() - 1)
            expected = codes[name].float() * module.weight_scale.reshape(shape)
            assert torch.equal(module.weight, expected)
