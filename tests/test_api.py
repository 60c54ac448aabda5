import pytest
import torch
from small import (
    TinyNet,
    condition_calls,
    net_calls,
    tiny_condition_unet,
    tiny_unet,
    unet_calls,
)
from torch import nn

import mpqdm_fx
from mpqdm_fx import MPQConfig, RunOptions, convert, lower, prepare, quantize
from mpqdm_fx.errors import CalibrationError, ConfigError, LoweringError, TraceError
from mpqdm_fx.numerics.metrics import sqnr_db


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def quantized(model):
    return quantize(model, MPQConfig(weight_bits=4), unet_calls())


def test_the_quantized_model_is_called_exactly_like_the_model(model, quantized):
    call = unet_calls(1, seed=3)[0]
    by_keyword = quantized(**call)
    assert type(by_keyword) is type(model(**call))
    by_position = quantized(call["sample"], call["timestep"], call["class_labels"])
    assert torch.equal(by_keyword.sample, by_position.sample)
    as_tuple = quantized(**call, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], by_keyword.sample)
    one_time = quantized(call["sample"], 10, class_labels=call["class_labels"])
    spelled = quantized(call["sample"], torch.full((3,), 10), class_labels=call["class_labels"])
    assert torch.equal(one_time.sample, spelled.sample)
    assert quantized.config.in_channels == 1
    assert quantized.dtype == torch.float32


def test_a_batch_beyond_the_traced_range_runs_in_parts(model, quantized):
    call = unet_calls(1, batch=70, seed=4)[0]
    whole = quantized(**call).sample
    parts = [
        quantized(**{name: value[rows] for name, value in call.items()}).sample
        for rows in (slice(0, 63), slice(63, 70))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_prepare_call_convert_equals_quantize(model, quantized):
    prepared = prepare(model, MPQConfig(weight_bits=4), unet_calls(1)[0])
    for call in unet_calls():
        # Not bit-equal: a split skip concatenation sums in another order.
        assert sqnr_db(model(**call).sample, prepared(**call).sample) > 110
    assert len(prepared.records) == 4
    again = convert(prepared)
    assert again.plan == quantized.plan
    assert again.ranges == quantized.ranges
    call = unet_calls(1, seed=8)[0]
    assert torch.equal(again(**call).sample, quantized(**call).sample)


def test_the_callers_model_is_never_changed():
    model = tiny_unet(seed=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantize(model, MPQConfig(weight_bits=2, refinements=1), unet_calls(2))
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.matrix
def test_more_bits_give_a_better_model(model, tmp_path):
    call = unet_calls(1, seed=3)[0]
    expected = model(**call).sample
    found = []
    for bits in (2, 4, 8):
        config = MPQConfig(weight_bits=bits, activation_mode="float", refinements=1)
        run = RunOptions(sensitivity=tmp_path / "sensitivity")
        test = quantize(model, config, unet_calls(), run=run)
        found.append(sqnr_db(expected, test(**call).sample))
    assert found[0] + 6 < found[1] < found[2] - 6


@pytest.mark.matrix
def test_a_text_conditioned_unet_goes_the_same_road():
    model = tiny_condition_unet()
    config = MPQConfig(weight_bits=8, allocation="uniform", refinements=1)
    quantized = quantize(model, config, condition_calls())
    call = condition_calls(1, seed=3)[0]
    assert sqnr_db(model(**call).sample, quantized(**call).sample) > 18
    names = {layer.name for layer in quantized.plan.layers}
    assert any(name.endswith(("_gate", "_value")) for name in names)  # GEGLU was split
    for layer in quantized.report.layers:
        assert layer.sqnr_db is None or layer.sqnr_db >= layer.base_sqnr_db


def test_every_part_of_the_report_is_about_a_planned_layer(quantized):
    assert [layer.name for layer in quantized.report.layers] == [
        layer.name for layer in quantized.plan.layers
    ]
    for entry, layer in zip(quantized.report.layers, quantized.plan.layers, strict=True):
        assert entry.bytes * 8 == sum(layer.storage)
    assert quantized.report.calibration_calls == 4


def test_effective_bits_are_close_to_the_average_and_above_it(quantized):
    plan = quantized.plan
    pinned = sum(la.num_weights * 8 for la in plan.layers if la.reason)
    codes = sum(la.num_weights * la.mean_bits for la in plan.layers if la.reason is None)
    overhead = plan.effective_bits * plan.num_weights / (codes + pinned)
    assert 1.02 < overhead < 1.8  # short rows: scales and tables weigh


def test_a_model_without_weight_layers_is_refused():
    with pytest.raises(ConfigError, match="no layer to quantize"):
        quantize(nn.Sequential(nn.SiLU()), MPQConfig(), [{"input": torch.randn(2, 3)}])


def test_an_override_without_a_layer_is_refused_before_calibration(model):
    config = MPQConfig(overrides=[{"pattern": "mid_block.resnet.0", "weight_bits": 2}])
    with pytest.raises(ConfigError, match=r"nearest names: .*mid_block\.resnets\.0"):
        prepare(model, config, unet_calls(1)[0])


def test_inputs_that_the_model_rejects_are_refused_in_one_error(model):
    call = unet_calls(1)[0]
    with pytest.raises(TraceError):
        prepare(model, MPQConfig(), {**call, "sample": torch.randn(2, 5, 8, 8)})
    with pytest.raises(TraceError, match="class_label"):
        prepare(model, MPQConfig(), {**call, "class_label": call["class_labels"]})


def test_empty_or_broken_calibration_is_refused(model):
    with pytest.raises(CalibrationError, match="empty"):
        quantize(model, MPQConfig(), [])
    bad = unet_calls(2)
    bad[1]["sample"][0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"'sample'.*NaN"):
        quantize(model, MPQConfig(), bad)
    prepared = prepare(model, MPQConfig(), unet_calls(1)[0])
    with pytest.raises(CalibrationError, match="no calibration data"):
        convert(prepared)


def test_lower_refuses_what_it_cannot_do(quantized, tmp_path):
    with pytest.raises(ConfigError, match="'torch_ao', 'xnnpack', 'lowbit' or 'packed'"):
        lower(quantized, "tensorrt")
    with pytest.raises(ConfigError, match="output"):
        lower(quantized, "xnnpack")
    narrow = quantize(TinyNet(), MPQConfig(activation_bits=6), net_calls())
    with pytest.raises(LoweringError, match="activation_bits=8"):
        lower(narrow, "xnnpack", output=tmp_path / "unet.pte")
    assert not (tmp_path / "unet.pte").exists()


@pytest.mark.parametrize("engine", ["onednn", "fbgemm", "qnnpack"])
def test_torch_ao_runs_the_plans_integers(model, quantized, engine):
    lowered = lower(quantized, "torch_ao", engine=engine)
    call = unet_calls(1, batch=2, seed=3)[0]
    inputs = quantized.signature.normalize((), call)
    output = lowered(*inputs.values())
    output = output[0] if isinstance(output, tuple) else output
    assert sqnr_db(quantized(**call).sample, output) > 25


def test_the_public_names_are_there():
    for name in mpqdm_fx.__all__:
        assert getattr(mpqdm_fx, name).__doc__


def test_sensitivities_are_kept_for_another_budget(monkeypatch, tmp_path):
    path = tmp_path / "sensitivity.safetensors"
    calls, run = net_calls(), RunOptions(sensitivity=path)
    first = quantize(TinyNet(), MPQConfig(effective_bits=5.0), calls, run=run)
    assert path.exists()
    monkeypatch.setattr(
        "mpqdm_fx.sweep.measured_bits.measure_sensitivity", None
    )  # not called again
    second = quantize(TinyNet(), MPQConfig(effective_bits=4.0), calls, run=run)
    assert second.plan.effective_bits <= 4.0 < first.plan.effective_bits <= 5.0


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("torch_ao", {"output": "x"}, "backend='torch_ao' takes no output; it takes engine"),
        ("torch_ao", {"max_delegates": 1}, "takes no max_delegates"),
        ("packed", {"output": "x", "batch_size": 2}, "backend='packed' takes no batch_size"),
        ("xnnpack", {"output": "x", "engine": "onednn"}, "backend='xnnpack' takes no engine"),
        ("packed", {}, "give `output`"),
    ],
)
def test_an_option_that_a_backend_would_ignore_is_an_error(quantized, backend, options, message):
    with pytest.raises(ConfigError, match=message):
        lower(quantized, backend, **options)
