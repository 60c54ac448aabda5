"""What `print(quantized)` shows."""

import pytest
from small import TinyDenoiser, denoiser_calls

from mpqdm_fx import MPQConfig, Override, quantize


@pytest.fixture(scope="module")
def quantized():
    config = MPQConfig(
        weight_bits=3, allocation="uniform", refinements=0,
        overrides=[Override(pattern="conv_out", skip=True)],
    )  # fmt: skip
    return quantize(TinyDenoiser(), config, denoiser_calls(calls=4))


def test_a_quantized_model_prints_as_ten_lines_of_at_most_eighty_columns(quantized):
    lines = quantized.summary().splitlines()
    assert len(lines) == 10
    assert max(map(len, lines)) <= 80
    assert str(quantized) == quantized.summary() == repr(quantized)


def test_the_lines_tell_the_models_own_numbers(quantized):
    text, plan = quantized.summary(), quantized.plan
    assert text.startswith(f"TinyDenoiser, quantized: {len(plan.layers)} layers\n")
    assert f"{plan.num_weights:,}, {plan.mean_bits:.2f} bits over the budget" in text
    assert f"{plan.weight_bytes + plan.float_bytes:,} of {4 * plan.num_parameters:,}" in text
    assert "conv_out" in text  # what is left in float is said
    worst = min((la for la in quantized.report.layers if la.sqnr_db), key=lambda la: la.sqnr_db)
    assert f"{worst.name} {worst.sqnr_db:.1f} dB" in text
