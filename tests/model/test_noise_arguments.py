"""Noise levels by other names than `timestep`, from calibration to a loaded model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small import SIGMAS, TinyEDM, edm_calls

from mpqdm_fx import load, prepare, quantize, save
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.io.folders import OUTPUTS
from mpqdm_fx.model.feasibility import check_feasible
from mpqdm_fx.model.proof import proof_inputs
from mpqdm_fx.parity.rung_inputs import random_calls
from mpqdm_fx.records.activations import TimestepActivation
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.noise_levels import sqnr_by_noise_level

SETTINGS = MPQConfig(
    weight_bits=8, allocation="uniform", refinements=0, activation_mode="timestep",
    timestep_groups=5,
)  # fmt: skip


class LogSNR(TinyEDM):
    """The same model, told minus twice the logarithm of sigma."""

    def forward(self, noisy, how_clean, difficulty):
        return super().forward(noisy, torch.exp(-how_clean / 2), difficulty)


def log_snr_calls(calls=5):
    return [
        {
            "noisy": call["noisy"],
            "how_clean": -2 * call["sigma"].log(),
            "difficulty": call["difficulty"],
        }
        for call in edm_calls(calls)
    ]


@pytest.fixture(scope="module")
def by_sigma():
    return quantize(TinyEDM(), SETTINGS, edm_calls(15))


@pytest.fixture(scope="module")
def by_log_snr():
    settings = replace(SETTINGS, noise_argument="how_clean")
    return quantize(LogSNR(), settings, log_snr_calls(15))


def test_every_sigma_has_ranges_of_its_own(by_sigma):
    assert by_sigma.noise_levels.count == 5
    assert {type(activation) for activation in by_sigma.ranges.values()} == {TimestepActivation}
    groups = by_sigma.noise_levels.group_of(torch.tensor(SIGMAS))
    assert groups.tolist() == [4, 3, 2, 1, 0]


def test_the_same_noise_told_otherwise_gives_the_same_ranges(by_sigma, by_log_snr):
    assert by_log_snr.noise_levels.argument == "how_clean"
    levels = -2 * torch.tensor(SIGMAS).log()
    assert by_log_snr.noise_levels.group_of(levels).tolist() == [0, 1, 2, 3, 4]
    for name, activation in by_sigma.ranges.items():
        counterpart = by_log_snr.ranges[name]
        expected = [group.input.scale for group in activation.groups]
        scales = [group.input.scale for group in reversed(counterpart.groups)]
        assert expected == pytest.approx(scales, rel=1e-4)


@pytest.mark.parametrize("fixture", ["by_sigma", "by_log_snr"])
def test_a_saved_model_loads_with_its_argument_and_the_same_bits(request, fixture, tmp_path):
    quantized = request.getfixturevalue(fixture)
    calls = edm_calls() if fixture == "by_sigma" else log_snr_calls()
    save(quantized, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.noise_levels == quantized.noise_levels
    for call in calls:
        with torch.no_grad():
            assert torch.equal(loaded(**call), quantized(**call))


class Later(TinyEDM):
    """The same model with sigma behind further arguments."""

    def forward(self, noisy, difficulty, more, less, sigma):
        return super().forward(noisy, sigma, difficulty + more - less)


def test_inputs_of_the_proof_and_of_the_ladder_give_numbers(tmp_path):
    calls = [{**call, "more": torch.ones(2), "less": torch.ones(2)} for call in edm_calls(2)]
    quantized = quantize(Later(), replace(SETTINGS, activation_mode="float"), calls)
    assert float(proof_inputs(quantized.signature)["sigma"]) < 0, "which has no logarithm"
    save(quantized, tmp_path / "model")
    stored = load_file(tmp_path / "model" / OUTPUTS)
    assert all(bool(value.isfinite().all()) for value in stored.values())
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model")(**calls[0]), quantized(**calls[0]))
        for call in random_calls(quantized.signature):
            assert bool(quantized(**call).isfinite().all())


def test_a_wrong_name_is_refused_before_any_data():
    settings = replace(SETTINGS, noise_argument="sgima")
    with pytest.raises(ConfigError, match=r"'sgima' is no argument.*: sigma, difficulty$"):
        prepare(TinyEDM(), settings, edm_calls(1)[0])
    with pytest.raises(ConfigError, match=r"'sgima' is no argument"):
        check_feasible(TinyEDM(), edm_calls(1)[0], settings)


def test_a_model_whose_argument_has_an_unknown_name_is_told_to_name_it():
    with pytest.raises(CalibrationError, match=r"\(noisy, how_clean, difficulty\).*noise_argument"):
        quantize(LogSNR(), SETTINGS, log_snr_calls())


def test_the_error_is_told_by_noise_level(by_sigma, by_log_snr):
    model = TinyEDM()
    ratios = sqnr_by_noise_level(model, by_sigma, edm_calls(10, seed=3))
    assert [*ratios] == sorted(SIGMAS, reverse=True)
    with torch.no_grad():
        calls = [call for call in edm_calls(10, seed=3) if float(call["sigma"][0]) == 5.0]
        floats = torch.cat([model(**call) for call in calls])
        errors = torch.cat([by_sigma(**call) for call in calls]) - floats
    ratio = 10 * torch.log10(floats.square().sum() / errors.square().sum())
    assert ratios[5.0] == pytest.approx(float(ratio), abs=1e-3)
    named = sqnr_by_noise_level(LogSNR(), by_log_snr, log_snr_calls(), noise_argument="how_clean")
    assert len(named) == 5
    with pytest.raises(ConfigError, match=r"noise level.*noisy, how_clean, difficulty"):
        sqnr_by_noise_level(LogSNR(), by_log_snr, log_snr_calls())


def test_many_noise_levels_are_told_in_groups(by_sigma):
    call = edm_calls(1, batch=40)[0] | {"sigma": torch.logspace(-1, 1.9, 40)}
    ratios = sqnr_by_noise_level(TinyEDM(), by_sigma, [call], most=4)
    assert len(ratios) == 4
    assert all(0.1 < level < 80 for level in ratios)
