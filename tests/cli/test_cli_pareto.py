"""`mpqdm-fx pareto` as typed: several budgets of one model in one run."""

import json
import math

import pytest
import torch
from small import plain_unet
from test_cli import run

import mpqdm_fx
from mpqdm_fx.io.files import checkpoint_of
from mpqdm_fx.io.folders import check_target
from mpqdm_fx.io.sealed import read_json, verified
from mpqdm_fx.jobs import pareto as job
from mpqdm_fx.jobs.budgets import read_point
from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.jobs.pareto import PARETO, budget_settings
from mpqdm_fx.jobs.presets import read_recipe
from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.pareto_page import render_pareto
from mpqdm_fx.sources.sources import load_source
from mpqdm_fx.sweep import measured_bits

QUICK = ["--backend", "packed", "--refinements", 0, "--propagation", 0, "--trajectories", 2]
QUICK += ["--steps", 3, "--num", 4, "--samples", 0]
ASKED = ["--bits", "3,2", "--pick", "epsilon_sqnr>=1"]


class Killed(BaseException):
    """Ends a run as a signal does."""


class Counted:
    """Counts the calls of a module's function; one call more than `most` ends the run."""

    def __init__(self, function, monkeypatch, most=None, module=job):
        self.calls, self._function, self._most = 0, function, most
        monkeypatch.setattr(module, function.__name__, self)

    def __call__(self, *arguments, **options):
        if self.calls == self._most:
            raise Killed
        self.calls += 1
        return self._function(*arguments, **options)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from diffusers import DDIMScheduler

    root = tmp_path_factory.mktemp("model")
    plain_unet().save_pretrained(root)
    DDIMScheduler().save_pretrained(root / "scheduler")
    return root


@pytest.fixture(scope="module")
def curve(model_folder, tmp_path_factory):
    """A run that was killed in its second budget and went on, and what was seen of it."""
    output = tmp_path_factory.mktemp("cli") / "curve"
    outcome = {}
    tables = pytest.MonkeyPatch()
    measuring = Counted(measured_bits.measure_sensitivity, tables, module=measured_bits)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Counted(job.convert, monkeypatch, most=1)
        other = ["--backend", "torch_ao", "--samples", 1]  # of which no budget depends
        with pytest.raises(Killed):
            run("pareto", model_folder, *QUICK, *ASKED, *other, "--output", output)
    assert not output.exists()
    outcome["left"] = {path.name for path in checkpoint_of(output).iterdir()}
    outcome["without"] = run("pareto", model_folder, *QUICK, *ASKED, "--output", output)
    changed = ["--output", output, "--resume", "--seed", 1]
    outcome["other"] = run("pareto", model_folder, *QUICK, *ASKED, *changed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        converted = Counted(job.convert, monkeypatch)
        outcome["status"], outcome["text"] = run(
            "pareto", model_folder, *QUICK, *ASKED, "--output", output, "--resume"
        )
        outcome["converted"] = converted.calls
    tables.undo()
    outcome["tables"] = measuring.calls
    return output, outcome


def test_a_run_that_was_killed_goes_on_with_the_budgets_that_are_left(curve):
    _, outcome = curve
    assert outcome["left"] >= {"bits-2", "sensitivity.safetensors", "sweep.json"}
    assert "bits-3" not in outcome["left"]
    assert (outcome["status"], outcome["converted"]) == (0, 1), outcome["text"]


def test_a_killed_run_is_not_taken_for_another_one(curve):
    _, outcome = curve
    status, text = outcome["without"]
    assert (status, "resume it, or delete it" in text) == (2, True)
    status, text = outcome["other"]
    assert (status, "settings.seed was 0, is 1" in text or "seed was 0, is 1" in text) == (2, True)


def test_the_folder_is_whole_and_its_numbers_are_those_of_the_budgets(curve):
    output, outcome = curve
    assert {path.name for path in output.iterdir()} == {
        "bits-2", "bits-3", "picked", "pareto.html", "pareto.json", "strip.png",
    }  # fmt: skip
    record = verified(read_json(output / PARETO), output)
    assert [point["bits"] for point in record["points"]] == [2.0, 3.0]
    assert record["picked"] == 2.0
    small, large = (point["metrics"] for point in record["points"])
    assert small["parameter_bytes"] < large["parameter_bytes"]
    assert small["epsilon_sqnr"] < large["epsilon_sqnr"]
    assert small["bytes"] == (output / "bits-2" / "model.safetensors").stat().st_size
    assert {"x0_sqnr", "psnr", "ssim", "effective_bits", "seconds"} <= set(small)
    assert "*2" in outcome["text"]
    assert f"picked: {output / 'picked'}" in outcome["text"]
    assert not checkpoint_of(output).exists()
    assert check_target(output, PARETO, overwrite=True) == output


def test_every_budget_has_the_codes_of_a_run_of_its_own(curve, model_folder):
    output, _ = curve
    source = load_source(str(model_folder))
    settings = MPQConfig(weight_bits=2, refinements=0, propagation=0.0)
    data = calibration_of(source, trajectories=2, steps=3, seed=0)
    alone = mpqdm_fx.quantize(source.model, settings, data)
    for folder in ("picked", "bits-2"):
        loaded = mpqdm_fx.load(output / folder)
        assert loaded.plan == alone.plan
        assert all(
            torch.equal(loaded.codes(p.name), alone.codes(p.name)) for p in alone.plan.layers
        )


def test_what_was_picked_is_a_result_like_any_other(curve):
    output, _ = curve
    status, text = run("inspect", output / "picked", "--json")
    assert status == 0
    assert json.loads(text)["layers"]
    assert read_recipe(output / "picked").weight_bits == 2
    status, text = run("evaluate", output / "bits-3", "--num", 4, "--steps", 2, "--json")
    assert (status, json.loads(text)["epsilon_sqnr"] > 1) == (0, True)


def test_the_command_of_a_budget_is_that_of_the_run_that_made_the_folder(curve):
    output, _ = curve
    told = [point["command"] for point in read_json(output / PARETO)["points"]]
    kept = [read_point(output / folder).command for folder in ("bits-2", "bits-3")]
    assert told == kept
    assert read_json(output / "picked" / "summary.json")["command"] == told[0]
    for command in told:
        assert "--backend packed" in command
        assert "--samples 0" in command
    assert open_folder(output / "bits-2").files.check() is None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_chart_without_a_point_says_so(curve, value):
    record = read_json(curve[0] / PARETO)
    for point in record["points"]:
        point["metrics"]["epsilon_sqnr"] = value
    page = render_pareto(record, {})
    assert f"none of them can be drawn (2 bits {value} dB; 3 bits {value} dB)." in page


def test_the_page_holds_every_chart_and_a_row_of_pictures_for_each_budget(curve):
    page = (curve[0] / "pareto.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<svg") == 2 * 2  # two metrics, for wide and for narrow screens
    for phrase in (
        "2 bits",
        "3 bits",
        "2 bits is the smallest budget that reaches epsilon_sqnr&gt;=1",
    ):
        assert phrase in page
    assert "mpqdm-fx quantize" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert len(page) < 5e6


def test_sensitivities_are_measured_once_for_all_budgets(curve):
    assert curve[1]["tables"] == 1  # before the run was killed; the second half read them


def test_without_a_budget_that_is_good_enough_none_is_picked(model_folder, tmp_path):
    output = tmp_path / "out"
    options = ["--bits", "2.5", "--pick", "epsilon_sqnr>=900", "--output", output]
    status, text = run("pareto", model_folder, *QUICK, *options)
    assert (status, "no budget reaches epsilon_sqnr>=900" in text) == (1, True), text
    assert not (output / "picked").exists()
    record = read_json(output / PARETO)
    assert record["picked"] is None
    assert record["points"][0]["metrics"]["effective_bits"] == pytest.approx(2.5, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "two"], "write numbers from 1 to 8"),
        (["--bits", ""], "write numbers from 1 to 8"),
        (["--bits", "2,9"], "write numbers from 1 to 8"),
        (["--bits", "nan"], "write numbers from 1 to 8"),
        (["--bits", "2,3,2.0"], "a budget is there twice"),
        (["--bits", "2.5", "--allocation", "uniform"], "is a budget for"),
        (["--pick", "beauty>=1"], "--pick 'beauty>=1': there is no metric beauty"),
        (["--pick", "ms<=1"], "--pick ms<=1ms: ms (one call of the backend, batch 1) is not"),
        (["--backend", "xnnpack", "--activations", 4, "--pick", "ssim>=0"], "of 8 bits, not 4"),
    ],
)
def test_what_cannot_end_well_is_refused_before_any_work(
    model_folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "prepare_on", None)  # whoever begins would call it
    status, text = run("pareto", model_folder, "--backend", "packed", *options)
    assert (status, message in text) == (2, True), text
    assert list(tmp_path.iterdir()) == []


def test_whole_bits_are_those_of_weights_and_others_those_of_effective_bits():
    assert budget_settings(MPQConfig(), 3) == MPQConfig(weight_bits=3)
    assert budget_settings(MPQConfig(), 2.5) == MPQConfig(effective_bits=2.5)


@pytest.mark.parametrize("budget", [{"weight_bytes": 900}, {"effective_bits": 3.5}])
@pytest.mark.parametrize("bits", [2, 2.5])
def test_a_budget_of_a_recipe_does_not_stand_in_the_way(budget, bits):
    assert budget_settings(MPQConfig(**budget), bits) == budget_settings(MPQConfig(), bits)
