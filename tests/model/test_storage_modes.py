"""Activations of every kind survive saving and loading, and only what can run them takes them."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from manifests import edit_manifest
from small import TinyNet, net_calls

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.lower import lower
from mpqdm_fx.backends.pt2e import to_quantizer
from mpqdm_fx.backends.torch_ao import to_qconfig_mapping
from mpqdm_fx.errors import ArtifactError, CalibrationError, LoweringError
from mpqdm_fx.io.folders import MANIFEST
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.records.activations import (
    ActivationRange,
    DynamicActivation,
    NoiseLevels,
    StaticActivation,
    TimestepActivation,
    placeholder_activations,
)
from mpqdm_fx.records.config import MPQConfig

KINDS = {"timestep": TimestepActivation, "dynamic": DynamicActivation, "static": StaticActivation}
SETTINGS = MPQConfig(
    allocation="uniform",
    rounding="nearest",
    propagation=0,
    refinements=0,
    levels="uniform",
    bias_correction=False,
    activation_mode="timestep",
    timestep_groups=2,
)


class TimedNet(TinyNet):
    """A `TinyNet` that is told a timestep."""

    def forward(self, x, timestep):
        return super().forward(x * torch.cos(timestep / 300).view(-1, 1, 1, 1))


def timed_calls(calls: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {**call, "timestep": torch.randint(1000, (2,), generator=generator)}
        for call in net_calls(calls, seed=seed)
    ]


CALLS = timed_calls(3)


@pytest.fixture(scope="module")
def by_level():
    return quantize(TimedNet(), SETTINGS, CALLS)


@pytest.mark.parametrize("mode", ["timestep", "static"])
def test_widths_and_levels_of_inputs_are_kept_with_what_they_cost(tmp_path, mode):
    settings = replace(SETTINGS, activation_bits=3, activation_mode=mode, judge=False)
    model = quantize(TimedNet(), settings, CALLS)
    widths = {name: c.bits for c in model.report.activations for name in c.layers}
    ranges = {n: a.groups[0] if mode == "timestep" else a for n, a in model.ranges.items()}
    assert {name: pair.input.bits for name, pair in ranges.items()}.items() <= widths.items()
    assert any(pair.input.levels for pair in ranges.values())
    loaded = load(save(model, tmp_path / "model"))
    assert loaded.ranges == model.ranges
    assert loaded.report.activations == model.report.activations
    call = timed_calls(1, seed=5)[0]
    assert torch.equal(loaded(**call), model(**call))
    quantized = [c for c in model.report.activations if c.kind != "float"]
    work = sum(c.multiply_adds for c in quantized)
    mean = sum(c.bits * c.multiply_adds for c in quantized) / work
    assert f"3 bits on average ({mean:.2f} by multiply-adds)" in loaded.summary()
    with pytest.raises(LoweringError, match=r"activation_bits=8|keep the model in packed form"):
        to_quantizer(loaded.rounded, loaded.ranges)


def in_mode(model: QuantizedModel, mode: str) -> QuantizedModel:
    """The same weights with activations of another kind, in some range."""
    ranges = placeholder_activations(dict.fromkeys(model.ranges, 8), mode)
    return model.with_graph(model.rounded, ranges=ranges, noise_levels=None)


@pytest.fixture(scope="module")
def static(by_level):
    return in_mode(by_level, "static")


@pytest.fixture(scope="module", params=["timestep", "dynamic"])
def quantized(request, by_level):
    return by_level if request.param == "timestep" else in_mode(by_level, request.param)


def test_loading_gives_equal_activations_and_bit_equal_outputs(quantized, static, tmp_path):
    loaded = load(save(quantized, tmp_path / "model"), model=TimedNet(seed=7))
    assert loaded.ranges == quantized.ranges
    assert {type(activation) for activation in loaded.ranges.values()} <= set(KINDS.values())
    assert loaded.noise_levels == quantized.noise_levels
    call = timed_calls(1, seed=5)[0]
    output = loaded(**call)
    assert torch.equal(output, quantized(**call))
    assert not torch.equal(output, static(**call))


def test_static_backend_refuses_other_modes_and_says_what_runs(quantized, tmp_path):
    with pytest.raises(LoweringError, match='activation_mode="static"'):
        lower(quantized, "torch_ao")
    with pytest.raises(LoweringError, match='activation_mode="static"'):
        to_qconfig_mapping(quantized.rounded, quantized.ranges)


def test_xnnpack_and_pt2e_refuse_ranges_by_noise_level(by_level, tmp_path):
    with pytest.raises(LoweringError, match='activation_mode="static" or "dynamic"'):
        lower(by_level, "xnnpack", output=tmp_path / "model.pte")
    assert not list(tmp_path.iterdir())
    with pytest.raises(LoweringError, match='activation_mode="static" or "dynamic"'):
        to_quantizer(by_level.rounded, by_level.ranges)


@pytest.mark.xnnpack
def test_xnnpack_runs_a_quantized_model_with_dynamic_and_with_mixed_activations(
    by_level, static, tmp_path
):
    quantized = in_mode(by_level, "dynamic")
    layer = next(iter(quantized.ranges))
    # a static range that was measured nowhere: wide, so that the program has numbers to compare
    wide = ActivationRange(scale=0.05, zero_point=0)
    mixed = {**quantized.ranges, layer: StaticActivation(input=wide, output=wide)}
    for name, ranges in {"dynamic": quantized.ranges, "mixed": mixed}.items():
        model = by_level.with_graph(by_level.rounded, ranges=ranges, noise_levels=None)
        program = lower(model, "xnnpack", output=tmp_path / f"{name}.pte", batch_size=2)
        assert program.sqnr_db > program.reference_sqnr_db + 10, name
        assert program.inputs[0].shape[0] == 2


def test_packed_takes_every_mode(quantized, tmp_path):
    folder = lower(quantized, "packed", output=tmp_path / "model")
    assert load(folder, model=TimedNet()).ranges == quantized.ranges


def test_a_folder_of_format_version_one_loads(static, tmp_path):
    folder = save(static, tmp_path / "model")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["noise_levels"], manifest["digest"]
    manifest["version"] = 1
    manifest["ranges"] = {name: asdict(entry) for name, entry in static.ranges.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    loaded = load(folder, model=TimedNet())
    assert loaded.ranges == static.ranges
    assert loaded.noise_levels is None


@pytest.mark.parametrize("levels", [5, "soon", {"a": 1}, [3.0, 2.0], [1.0, 2.0, 3.0], None])
def test_damaged_noise_levels_are_refused(by_level, tmp_path, levels):
    folder = save(by_level, tmp_path / "model")
    edit_manifest(folder, lambda manifest: manifest.update(noise_levels=levels))
    with pytest.raises(ArtifactError, match=MANIFEST):
        load(folder, model=TimedNet())


def test_quantize_takes_the_mode_from_the_settings(by_level):
    assert {type(activation) for activation in by_level.ranges.values()} == {TimestepActivation}
    timesteps = torch.cat([call["timestep"] for call in CALLS])
    assert by_level.noise_levels == NoiseLevels.of(timesteps, 2)
    quantized = quantize(TinyNet(), replace(SETTINGS, activation_mode="dynamic"), net_calls())
    assert {type(activation) for activation in quantized.ranges.values()} == {DynamicActivation}
    assert quantized.noise_levels is None


def test_a_model_without_a_timestep_refuses_noise_levels():
    with pytest.raises(CalibrationError, match="'static' or 'dynamic'"):
        quantize(TinyNet(), SETTINGS, net_calls())
