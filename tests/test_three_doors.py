"""One plan, four ways out: the same integers, bit for bit."""

import pytest
import torch
from small import tiny_unet, unet_calls
from torch.ao.quantization.backend_config import get_native_backend_config
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.composable_quantizer import ComposableQuantizer

from mpqdm_fx import MPQConfig, load, quantize, save
from mpqdm_fx.graph.layers import weight_layers


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
    mapping = quantized.plan.to_qconfig_mapping(quantized.rounded, engine=engine)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        prepared = prepare_fx(
            quantized.rounded, mapping, inputs, backend_config=get_native_backend_config()
        )
        prepared(*inputs)
        converted = convert_fx(prepared, backend_config=get_native_backend_config())
        found = {
            name: module.weight().int_repr()
            for name, module in converted.named_modules()
            if callable(getattr(module, "weight", None))
        }
    finally:
        torch.backends.quantized.engine = before
    assert found.keys() == codes.keys()
    assert all(torch.equal(found[name], codes[name]) for name in codes)


@pytest.mark.parametrize("composed", [False, True])
def test_stock_prepare_pt2e_and_convert_pt2e_keep_the_integers(quantized, codes, composed):
    inputs = _inputs(quantized)
    quantizer = quantized.plan.to_quantizer(quantized.rounded)
    if composed:
        quantizer = ComposableQuantizer([quantizer])
    exported = torch.export.export(quantized.rounded, inputs, strict=False).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(*inputs)
    converted = convert_pt2e(prepared)
    stored = [value for value in converted.state_dict().values() if value.dtype == torch.int8] + [
        value for value in converted.buffers() if value.dtype == torch.int8
    ]
    assert stored
    for name, expected in codes.items():
        assert any(torch.equal(expected, value) for value in stored), name


def test_our_own_files_keep_the_integers(quantized, codes, tmp_path):
    loaded = load(save(quantized, tmp_path / "packed"))
    assert all(torch.equal(loaded.codes(name), codes[name]) for name in codes)


def test_the_callers_graph_keeps_its_weights_through_both_doors(quantized, codes):
    for name, module in quantized.rounded.named_modules():
        if name in codes:
            shape = (-1,) + (1,) * (codes[name].dim() - 1)
            expected = codes[name].float() * module.weight_scale.reshape(shape)
            assert torch.equal(module.weight, expected)
