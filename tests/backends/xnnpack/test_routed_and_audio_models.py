"""Models that were refused, or ran in float, go the whole road: quantized, lowered, compared."""

import pytest
from zoo_rare_transformers import RARE_TRANSFORMERS

from mpqdm_fx import MPQConfig, lower, quantize
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.metrics import sqnr_db

CASES = {case.name: case for case in RARE_TRANSFORMERS}

#: Delegates, and some of the layers that run as int8.
EXPECTED = {
    "HiDreamImageTransformer2DModel": (3, {"double_stream_blocks.0.block.ff_i.experts.3.w2"}),
    "OmniGenTransformer2DModel": (1, {"layers.0.mlp.gate_up_proj_value"}),
    "AutoencoderOobleck": (1, {"decoder.block.0.conv_t1", "encoder.block.1.conv1"}),
}


@pytest.mark.matrix
@pytest.mark.xnnpack
@pytest.mark.parametrize("name", EXPECTED)
def test_eight_bits_weights_and_inputs(name, tmp_path):
    delegates, layers = EXPECTED[name]
    model = CASES[name].model()
    calls = [CASES[name].inputs(1, t) for t in (1, 100, 300, 500, 700, 999)]
    config = MPQConfig(weight_bits=8, activation_mode="dynamic")
    quantized = quantize(model, config, calls)
    expected, actual = (m(**calls[0]).sample for m in (model, quantized))
    assert sqnr_db(expected, actual) > 35
    assert layers <= quantized.ranges.keys() <= weight_layers(quantized.rounded).keys()
    program = lower(quantized, "xnnpack", output=tmp_path / "model.pte")
    assert (program.subgraphs, program.float_layers) == (delegates, {})
    assert program.sqnr_db > 60  # a neighbouring code here and there
