"""`MODEL` and `--inputs` as functions: a stranger's model on the command line, from end to end."""

import json

import pytest
import torch
from small import TinyEDM, edm_calls
from test_cli import run

from mpqdm_fx import load

FILE = """
from small import TinyEDM, edm_calls

def model():
    return TinyEDM()

def calls():
    return edm_calls(8)

def fresh():
    return edm_calls(5, seed=9)

def unet_calls():
    from small import unet_calls
    return unet_calls(4)
"""
OPTIONS = ["--weights", 8, "--allocation", "uniform", "--refinements", 0, "--backend", "packed"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "stranger_functions.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def folder(file):
    output = file.parent / "out"
    status, text = run(
        "quantize", f"{file}:model", "--inputs", f"{file}:calls", "--held-out", 3, *OPTIONS,
        "--activation-mode", "timestep", "--noise-argument", "sigma", "--output", output,
    )  # fmt: skip
    assert status == 0, text
    return output


def test_a_model_of_a_function_is_quantized_on_the_calls_of_another(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "parity.json", "source.json", "summary.json"} <= names
    assert not {"samples.png", "scheduler"} & names
    quantized = load(folder)
    assert quantized.settings.noise_argument == "sigma"
    assert quantized.noise_levels.count == 5
    with torch.no_grad():
        for call in edm_calls():
            assert bool(quantized(**call).isfinite().all())


def test_the_folder_is_evaluated_on_calls_that_are_given(folder, file):
    status, text = run(
        "evaluate", folder, "--model", f"{file}:model", "--inputs", f"{file}:fresh", "--json"
    )
    assert status == 0, text
    metrics = json.loads(text)
    assert metrics["epsilon_sqnr"] > 20
    assert "epsilon_sqnr_at_sigma_80" in metrics
    assert len(metrics) == 6


def test_no_function_is_called_on_a_folders_word(folder, file):
    for command in ("evaluate", "distill"):
        status, text = run(
            command, folder, *(["--output", file.parent / "d"][: 2 * (command == "distill")])
        )
        assert status == 2
        assert "only if you say so: --model" in text


def test_the_folder_is_verified(folder):
    status, text = run("verify", folder)
    assert status == 0, text


def test_a_function_alone_is_refused_with_what_is_missing(file, folder):
    status, text = run("quantize", f"{file}:model", *OPTIONS, "--output", file.parent / "none")
    assert status == 2
    assert "give calls with --inputs" in text
    status, text = run("distill", folder, "--model", f"{file}:model", "--output", file.parent / "d")
    assert status == 2
    assert "a loop of your own" in text
    for command in ("plan", "trace", "doctor"):
        status, text = run(command, f"{file}:model")
        assert status == 2
        assert "give calls with --inputs" in text
    assert run("quantize", "digits", "--held-out", 2, "--backend", "packed")[0] == 2
    status, text = run("sample", folder, "--output", file.parent / "grid.png")
    assert status == 2
    assert "no scheduler to draw with" in text


def test_a_function_is_traced_with_the_calls_of_another(file):
    status, text = run("trace", f"{file}:model", "--inputs", f"{file}:calls")
    assert status == 0
    assert "%sigma" in text


def test_a_plan_counts_the_calls_that_are_given(file):
    status, text = run("plan", f"{file}:model", "--inputs", f"{file}:calls", "--json")
    assert status == 0, text
    assert json.loads(text)["calls"] == 8


@pytest.mark.matrix
def test_a_diffusers_model_is_calibrated_on_calls_of_its_users(file, tmp_path):
    from small import tiny_unet

    tiny_unet().save_pretrained(tmp_path / "unet")
    status, text = run(
        "quantize", tmp_path / "unet", "--inputs", f"{file}:unet_calls", *OPTIONS,
        "--samples", 0, "--output", tmp_path / "out", "--steps", 2, "--json",
    )  # fmt: skip
    assert status == 0, text
    report = load(tmp_path / "out").report
    assert report.calibration_calls == 4


def test_held_out_calls_are_not_fitted_to(file):
    from mpqdm_fx.sources.functions import calls_of
    from mpqdm_fx.sources.sources import load_source

    source = load_source(f"{file}:model")
    assert isinstance(source.model, TinyEDM)
    assert not source.model.training
    joined = source.with_calls(calls_of(f"{file}:calls", source.model, 3))
    assert joined.calls.held_out_calls == range(5, 8)
    assert joined.sample_shape == (2, 6, 10)
