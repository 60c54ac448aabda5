import math

import pytest
import torch
from small import TinyDenoiser, denoiser_calls

from mpqdm_fx.api import quantize
from mpqdm_fx.graph.calling import example_call
from mpqdm_fx.model.stages import in_form_of
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.comparison import compare
from mpqdm_fx.report.layer_levels import running_sqnr, sqnr_by_layer


@pytest.fixture(scope="module")
def measured():
    model, calls = TinyDenoiser(), denoiser_calls(calls=4)
    config = MPQConfig(weight_bits=3, allocation="uniform", refinements=0, activation_mode="float")
    quantized = quantize(model, config, calls)
    floats = in_form_of(quantized, model, example_call(quantized.signature))
    names = [layer.name for layer in quantized.plan.layers]
    levels = compare(model, quantized, calls).levels
    by_layer = sqnr_by_layer(floats, quantized.graph_module, names, calls, levels)
    return model, quantized, calls, levels, names, by_layer


def test_every_layer_has_a_ratio_at_every_noise_level(measured):
    *_, levels, names, by_layer = measured
    assert sorted(by_layer) == sorted(names)
    assert {len(ratios) for ratios in by_layer.values()} == {len(levels)}


def test_the_last_layers_ratios_are_the_outputs(measured):
    *_, levels, _, by_layer = measured
    assert by_layer["conv_out"] == pytest.approx([point.sqnr_db for point in levels], abs=1e-3)


def test_a_layer_is_compared_as_the_running_models_have_it(measured):
    model, quantized, calls, levels, _, by_layer = measured
    outputs = {}
    for name, network in (("float", model), ("quantized", quantized.graph_module)):
        hook = network.conv_in.register_forward_hook(
            lambda *args, n=name: outputs.update({n: args[2]})
        )
        network(**calls[0])
        hook.remove()
    timesteps = calls[0]["timestep"].double()
    nearest = [min(levels, key=lambda point, t=t: abs(point.level - t)) for t in timesteps.tolist()]
    alone = [levels.index(point) for point in nearest if point.samples == 1]
    rows = [nearest.index(levels[index]) for index in alone]
    assert rows
    for index, row in zip(alone, rows, strict=True):
        expected = sqnr_db(outputs["float"][row], outputs["quantized"][row])
        assert by_layer["conv_in"][index] == pytest.approx(expected, abs=1e-3)


def test_a_layer_has_one_ratio_where_no_noise_level_is_told(measured):
    model, quantized, calls, _, names, _ = measured
    floats = in_form_of(quantized, model, example_call(quantized.signature))
    by_layer = running_sqnr(floats, quantized.graph_module, names, calls)
    assert sorted(by_layer) == sorted(names)
    rows = {name: torch.cat([call[name] for call in calls[:2]]) for name in calls[0]}
    assert len(rows["sample"]) == 4
    with torch.no_grad():
        expected = sqnr_db(model(**rows), quantized(**rows))
    assert by_layer["conv_out"] == pytest.approx(expected, abs=1e-3)


def test_a_model_against_itself_is_exact_everywhere(measured):
    model, quantized, calls, levels, names, _ = measured
    floats = in_form_of(quantized, model, example_call(quantized.signature))
    with torch.no_grad():
        by_layer = sqnr_by_layer(floats, floats, names, calls, levels)
    assert all(math.isinf(ratio) for ratios in by_layer.values() for ratio in ratios)
