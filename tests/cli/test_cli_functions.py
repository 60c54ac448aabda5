"""`MODEL` and `--inputs` as functions: a stranger's model on the command line, from end to end."""

import json
from pathlib import Path

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


ONE_TIME = """
import torch
from test_single_times import Waved, calls as timed_calls

def model():
    return Waved().eval()

def calls():
    return timed_calls(size=8, times=(0.1, 0.4, 0.9, 0.2))
"""


@pytest.mark.xnnpack
def test_a_model_that_computes_with_one_time_goes_all_the_way(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "capture")
    own = tmp_path / "one_time_functions.py"
    own.write_text(ONE_TIME)
    given = ["--inputs", f"{own}:calls"]
    settings = ["--weights", 8, "--activation-mode", "static", "--held-out", 1]
    status, text = run("quantize", f"{own}:model", *given, *settings, "--output", tmp_path / "out")
    assert status == 0, text
    (part,) = json.loads((tmp_path / "out" / "report.json").read_text())["parts"]
    assert [point["level"] for point in part["levels"]] == [0.2]
    status, text = run("verify", tmp_path / "out", "--model", f"{own}:model")
    assert status == 0, text
    status, text = run("evaluate", tmp_path / "out", "--model", f"{own}:model", *given, "--json")
    assert status == 0, text
    levels = [name for name in json.loads(text) if "_at_t_" in name]
    assert levels == [f"epsilon_sqnr_at_t_{time}" for time in (0.9, 0.4, 0.2, 0.1)]
