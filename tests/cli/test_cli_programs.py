"""Programs in other forms than one plain file: the command line writes, runs and checks them."""

import json
import re
import shutil

import pytest
from diffusers import DDIMScheduler
from records import flip
from small import plain_unet
from test_cli import run

import mpqdm_fx
from mpqdm_fx.backends.xnnpack.convert import decomposed
from mpqdm_fx.backends.xnnpack.doctor import Diagnosis
from mpqdm_fx.backends.xnnpack.four_bit import four_bit_layers
from mpqdm_fx.jobs import doctor as doctor_job
from mpqdm_fx.jobs import quantize as quantize_job
from mpqdm_fx.model.folder import open_folder

pytestmark = pytest.mark.xnnpack


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    plain_unet().save_pretrained(root)
    DDIMScheduler().save_pretrained(root / "scheduler")
    return root


@pytest.fixture(scope="module")
def written(model_folder, tmp_path_factory):
    """Weights apart, both files compressed, no weights at four bits where some could be."""
    output = tmp_path_factory.mktemp("cli") / "out"
    options = ["--levels", "int4", "--allocation", "uniform", "--refinements", 0]
    options += ["--trajectories", 2, "--steps", 2, "--samples", 1]
    options += ["--four-bit", "never", "--external-weights", "--compress"]
    status, text = run("quantize", model_folder, *options, "--output", output)
    assert status == 0, text
    return output, text


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "out")


def sample(folder, picture, *options):
    words = ["--num", 2, "--steps", 2, "--output", picture, "--overwrite", *options]
    return run("sample", folder, *words)


def test_the_folder_has_both_files_compressed_and_nothing_expanded(written):
    output, text = written
    names = {path.name for path in output.iterdir() if path.is_file()}
    assert {name for name in names if "unet" in name} == {"unet.pte.xz", "unet.ptd.xz"}
    summary = json.loads((output / "summary.json").read_text())
    sizes = {
        name: (output / name).stat().st_size
        for name in names
        if name not in ("summary.json", "mpqdm.json")
    }
    assert summary["files"] == sizes
    assert re.search(r"unet\.\w+\.xz \+ unet\.\w+\.xz\s+[\d.]+ KiB", text)
    expanded = summary["program"]
    assert sizes["unet.ptd.xz"] < expanded["weights_bytes"]
    assert sizes["unet.pte.xz"] < expanded["bytes"]


def test_no_weight_is_at_four_bits_if_none_is_to_be(written):
    output, _ = written
    summary = json.loads((output / "summary.json").read_text())
    program = open_folder(output).manifest.program.model_dump(exclude_none=True)
    expanded = {name: entry["bytes"] for name, entry in program.pop("expanded").items()}
    assert expanded == {
        "unet.pte.xz": summary["program"]["bytes"],
        "unet.ptd.xz": summary["program"]["weights_bytes"],
    }
    assert program == {"four_bit": "never", "external_weights": True, "compress": True}
    assert summary["program"]["four_bit_layers"] == []
    quantized = mpqdm_fx.load(output)
    plain, runnable, _ = decomposed(quantized.rounded, quantized.ranges)
    assert four_bit_layers(plain, runnable)[0]


def test_sample_runs_the_program_and_expands_it_once(folder, tmp_path):
    pictures, times = [], []
    for options in (["--from", "pte"], []):
        status, text = sample(folder, tmp_path / "grid.png", *options)
        assert status == 0, text
        pictures.append((tmp_path / "grid.png").read_bytes())
        times.append({path.name: path.stat().st_mtime_ns for path in folder.glob(".unet.*")})
    assert pictures[0] == pictures[1]
    assert len(times[0]) == 2
    assert times[0] == times[1]


def test_a_program_without_its_weights_or_with_damaged_ones_is_refused(folder, tmp_path):
    weights = folder / "unet.ptd.xz"
    flip(weights)
    status, text = sample(folder, tmp_path / "grid.png")
    assert (status, "unet.ptd.xz is corrupted" in text) == (2, True)
    status, text = run("verify", folder)
    assert (status, "unet.ptd.xz is corrupted" in text) == (2, True)
    weights.unlink()
    status, text = sample(folder, tmp_path / "grid.png")
    assert (status, "unet.ptd.xz does not exist" in text) == (2, True)
    status, text = run("verify", folder)
    assert (status, "unet.ptd.xz does not exist" in text) == (2, True)
    assert not (tmp_path / "grid.png").exists()


def test_verify_passes_on_the_same_graphs_that_were_lowered(folder):
    status, text = run("verify", folder, "--json")
    assert status == 0, text
    ladder = json.loads(text)
    assert ladder["passed"] is True
    assert [rung["name"] for rung in ladder["rungs"]][-1] == "pte"
    assert not [note for note in ladder["notes"] if "no longer in the graph" in note]


def test_evaluate_inspect_and_doctor_take_the_folder(folder, monkeypatch):
    status, text = run("evaluate", folder, "--num", 2, "--steps", 2, "--json")
    assert status == 0, text
    assert json.loads(text)["epsilon_sqnr"] > 5
    status, text = run("inspect", folder)
    assert (status, "unet.ptd.xz" in text) == (0, True)
    calls = []

    def diagnose(*_, **options):
        calls.append(options)
        return Diagnosis(delegates=1, delegated=1, outside=())

    monkeypatch.setattr(doctor_job, "diagnose", diagnose)
    assert run("doctor", folder)[0] == 0
    assert calls == [{"four_bit": "never"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "digits", "--four-bit", "half"], "choose one of 'never', 'whole', 'split'"),
        (["quantize", "digits", "--four-bit", "split", "--activation-mode", "static"], "static"),
        (["quantize", "digits", "--backend", "packed", "--compress"], "--backend xnnpack"),
        (["quantize", "digits", "--backend", "packed", "--four-bit", "split"], "packed writes no"),
        (["quantize", "digits", "--backend", "torch_ao", "--external-weights"], "torch_ao writes"),
        (["export", "nowhere", "--four-bit", "half"], "choose one of 'never', 'whole', 'split'"),
        (["export", "nowhere", "--four-bit", "split", "--activation-mode", "static"], "static"),
        (["export", "nowhere", "--four-bit", "split", "--float"], "these are float"),
        (["export", "nowhere", "--float", "--weights", "4"], "--float and --weights: nothing is"),
        (["export", "nowhere", "--float", "--preset", "quick"], "--float and --preset: nothing is"),
        (["export", "nowhere", "--float", "--sensitivity", "s"], "--float and --sensitivity: noth"),
        (["export", "nowhere", "--float", "--max-memory", "1GB"], "--float and --max-memory: noth"),
        (["export", "nowhere", "--float", "--minimum-sqnr", "40"], "--float and --minimum-sqnr: "),
        (["export", "nowhere", "--float", "--trajectories", "2"], "--float and --trajectories: no"),
        (["export", "nowhere", "--float", "--encoder-bits", "4"], "--float and --encoder-bits: no"),
        (["doctor", "digits", "--float", "--four-bit", "split"], "these are float"),
        (["doctor", "digits", "--float", "--levels", "int4"], "--float and --levels: nothing is"),
        (["export", "nowhere", "--lora-scale", "0.5"], "--lora-scale needs --fuse-lora"),
        (["export", "nowhere", "--size", "\u00b2x8"], "write HEIGHTxWIDTH"),
    ],
)
def test_conflicts_are_said_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize_job, "calibration_of", None)  # whoever calibrates would call it
    status, text = run(*arguments)
    assert (status, message in text) == (2, True), text
    assert list(tmp_path.iterdir()) == []
