"""`--gate` as typed: what is judged, what is refused before any work, what is printed."""

import json

import pytest
import torch
from small import plain_unet
from test_cli import run
from typing_in import typed

import mpqdm_fx
from mpqdm_fx.cli.options import console
from mpqdm_fx.jobs import evaluate as evaluate_job
from mpqdm_fx.jobs import export as export_job
from mpqdm_fx.jobs import quantize as quantize_job
from mpqdm_fx.jobs.evaluate import gate_stages
from mpqdm_fx.report.evaluation_tables import evaluation_table, gate_table
from mpqdm_fx.report.export_metrics import EXPORTED
from mpqdm_fx.report.gates import METRICS, judge, parse_gates
from mpqdm_fx.sources.sources import load_source

QUICK = ["--backend", "packed", "--allocation", "uniform", "--refinements", 0]
QUICK += ["--trajectories", 2, "--steps", 3, "--samples", 0]
EVALUATE = ["--num", 4, "--steps", 2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from diffusers import DDIMScheduler

    root = tmp_path_factory.mktemp("model")
    plain_unet().save_pretrained(root)
    DDIMScheduler().save_pretrained(root / "scheduler")
    return root


@pytest.fixture(scope="module")
def quantized(model_folder, tmp_path_factory):
    """A folder that kept two gates of three, and what was printed."""
    output = tmp_path_factory.mktemp("cli") / "out"
    gates = ["--gate", "x0_sqnr>=1", "--gate", "bytes<=2 MB", "--gate", "bytes<=1B"]
    status, text = run("quantize", model_folder, *QUICK, *gates, "--output", output)
    assert status == 1, text
    return output, text


def test_quantize_judges_its_result_and_leaves_it_where_a_gate_fails(quantized):
    output, text = quantized
    assert "x0_sqnr" in text
    assert "2,000,000 B" in text
    assert text.count("passed") == 2
    assert text.count("FAILED") == 1
    assert f"{(output / 'model.safetensors').stat().st_size:,} B" in text
    assert f"written to {output}" in text
    assert f"error: {output}: not reached: bytes<=1bytes" in text


@pytest.mark.matrix
def test_gates_are_a_stage_of_the_run(model_folder, tmp_path, monkeypatch, capfd):
    gates = ["--gate", "ssim>=0", "--output", tmp_path / "out"]
    status, _, errors = typed(monkeypatch, capfd, "quantize", model_folder, *QUICK, *gates)
    assert status == 0, errors
    lines = [line for line in errors.splitlines() if line.startswith("[")]
    place, last = lines[-1].partition("]")[0].removeprefix("[").split("/")
    assert (place, lines[-1].split(",")[0]) == (last, f"[{last}/{last}] gates")
    source = load_source(str(model_folder))
    assert gate_stages(parse_gates(["ms<=1"]), source) == {}
    small, large = (gate_stages(parse_gates([g]), source) for g in ("epsilon_sqnr>=1", "ssim>=0"))
    assert 0 < small["gates"] < large["gates"]


def test_evaluate_judges_what_it_measures_and_what_the_folder_tells(quantized):
    gates = ["--gate", "epsilon_sqnr>=5", "--gate", "ms<=3600s"]
    status, text = run("evaluate", quantized[0], *EVALUATE, *gates)
    assert status == 0, text
    assert text.count("passed") == 2
    status, text = run("evaluate", quantized[0], *EVALUATE, "--gate", "x0_sqnr>=900", "--json")
    assert status == 1
    result = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert (result["passed"], result["gates"][0]["wanted"]) == (False, 900.0)
    assert result["x0_sqnr"] == result["gates"][0]["measured"]


def test_evaluate_says_what_its_numbers_mean(quantized):
    status, text = run("evaluate", quantized[0], *EVALUATE)
    assert status == 0
    assert any(word in text for word in ("very close", "close", "rough"))
    assert "psnr" in text
    assert "4 samples of the same noise, 2 steps, seed 90000" in text


def test_a_folder_that_does_not_say_its_float_model_is_told_it(quantized, model_folder, tmp_path):
    mpqdm_fx.save(mpqdm_fx.load(quantized[0]), tmp_path / "saved")
    words = ["--model", model_folder, "--json"]
    status, text = run("evaluate", tmp_path / "saved", *EVALUATE, *words)
    assert status == 0, text
    expected = run("evaluate", quantized[0], *EVALUATE, "--json")[1]
    assert json.loads(text) == json.loads(expected)


def test_networks_from_the_disk_give_their_metrics(quantized, tmp_path):
    class Flat(torch.nn.Module):
        def forward(
            self, images: torch.Tensor, resize_images: bool = False, return_lpips: bool = False
        ) -> torch.Tensor:
            return images.flatten(1) / 255

    path = tmp_path / "vgg16.pt"
    torch.jit.script(Flat()).save(str(path))
    status, text = run("evaluate", quantized[0], *EVALUATE, "--lpips", path, "--json")
    assert status == 0, text
    assert json.loads(text)["lpips"] > 0


@pytest.mark.parametrize("command", ["quantize", "evaluate", "distill"])
@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("beauty>=1", "there is no metric beauty; metrics: epsilon_sqnr"),
        ("ms>=1", "of ms less is better"),
        ("ms<=1dB", "ms has no unit dB"),
        ("accuracy>=90%", "accuracy (samples that show their class (digits)) is not measured of"),
    ],
)
def test_a_wrong_gate_is_refused_before_any_work(
    quantized, model_folder, tmp_path, monkeypatch, command, gate, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize_job, "calibration_of", None)  # whoever calibrates would call it
    monkeypatch.setattr(evaluate_job, "load", None)
    model = model_folder if command == "quantize" else quantized[0]
    options = ["--output", "new"] if command != "evaluate" else []
    packed = ["--backend", "packed"] if command == "quantize" else []
    status, text = run(command, model, "--gate", gate, *options, *packed)
    assert (status, message in text) == (2, True), text
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_are_called_as_options_are_not_told_as_options(quantized, monkeypatch, capfd):
    status, _, errors = typed(monkeypatch, capfd, "evaluate", quantized[0], "--gate", "lpips<=1")
    assert (status, "effective_bits" in errors, "--effective-bits" in errors) == (2, True, False)
    gate = "effective_bits>=1"
    status, _, errors = typed(monkeypatch, capfd, "evaluate", quantized[0], "--gate", gate)
    assert (status, "write effective_bits<=1" in errors) == (2, True), errors


@pytest.mark.parametrize("command", ["quantize", "evaluate", "distill", "export"])
def test_help_names_every_metric(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    status, text = run(command, "--help")
    assert status == 0
    assert all(name in text for name in METRICS)


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_the_catalogue_is_printed_without_a_folder(command):
    status, text = run(command, "--metrics")
    assert status == 0
    assert all(f"  {name} " in text for name in METRICS)
    assert all(f"  {name:<25} {meaning}" in text for name, meaning in EXPORTED.items())
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("beauty>=1", "there is no metric beauty; metrics: epsilon_sqnr"),
        ("ms>=1", "of ms less is better"),
        (
            "accuracy>=90%",
            "accuracy (samples that show their class (digits)) is not measured of an",
        ),
        ("parameter_bytes<=1MB", "is not measured of an export; measured are: epsilon_sqnr"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_wrong_gate_of_an_export_is_refused_before_any_work(
    model_folder, tmp_path, monkeypatch, gate, message, more
):
    monkeypatch.setattr(export_job, "export_pipeline", None)  # whoever works would call it
    monkeypatch.chdir(tmp_path)
    status, text = run("export", model_folder, "--gate", gate, "--output", "new", *more)
    assert (status, message in text) == (2, True), text
    assert list(tmp_path.iterdir()) == []


def test_both_tables_fit_80_columns():
    metrics = {name: -1234.5678 if metric.unit == "dB" else 1.0 for name, metric in METRICS.items()}
    verdicts = judge(
        parse_gates(["bytes<=123456789012B", "inception_kernel_distance<=1e-9"]), metrics
    )
    shown = console()
    shown.width = 80
    with shown.capture() as printed:
        shown.print(
            evaluation_table({**metrics, "num_samples": 256, "num_inference_steps": 20, "seed": 9})
        )
        shown.print(gate_table(verdicts))
    text = printed.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "-1234.57 dB" in text
    assert "123,456,789,012 B" in text
