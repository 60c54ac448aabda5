"""`--backend lowbit`: a folder whose program calls own kernels, and life without their library."""

import json
import shutil

import pytest
from diffusers import DDIMScheduler
from kernel_package import kernels_installed, kernels_missing
from small import plain_unet
from test_cli import run

from mpqdm_fx.model.folder import open_folder

pytestmark = pytest.mark.xnnpack

REFUSAL = "calls mpqdm::{} whose kernels are in the library mpqdm_kernels, which cannot be loaded"
REMEDY = 'pip install "mpqdm-fx[kernels]"'
QUICK = ["--preset", "quick", "--trajectories", 2, "--steps", 2, "--samples", 1]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    plain_unet().save_pretrained(root)
    DDIMScheduler().save_pretrained(root / "scheduler")
    return root


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    with kernels_installed(tmp_path_factory.mktemp("kernels")):
        yield


@pytest.fixture(scope="module")
def written(installed, model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("lowbit") / "out"
    options = ["--backend", "lowbit", "--kernels", "memory", "--compress"]
    status, text = run("quantize", model_folder, *QUICK, *options, "--output", output)
    assert status == 0, text
    return output, text


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "out")


def test_without_the_library_nothing_is_begun(model_folder, tmp_path):
    output = tmp_path / "out"
    for command in (["quantize"], ["pareto", "--pick", "epsilon_sqnr>=1"]):
        words = [*command, model_folder, "--backend", "lowbit", "--output", output]
        with kernels_missing():
            status, text = run(*words)
        assert status == 2
        assert REFUSAL.format("conv2d_mixed,") in text
        assert REMEDY in text
        assert "quantizing" not in text
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernels", "memory"], "--kernels memory: xnnpack has no own kernels"),
        (["--cpu", "vnni", "--backend", "packed"], "--cpu vnni: packed has no own kernels"),
        (
            ["--backend", "lowbit", "--kernels", "xnnpack", "--cpu", "vnni"],
            "--cpu vnni: only --kernels auto asks",
        ),
        (
            ["--backend", "lowbit", "--kernels", "xnnpack", "--activation-mode", "timestep"],
            "lowbit does not run --activation-mode timestep; choose --activation-mode measured or",
        ),
        (
            ["--backend", "lowbit", "--kernels", "xnnpack", "--activations", 6],
            "lowbit runs activations of 8 bits, not 6",
        ),
        (["--backend", "lowbit", "--kernels", "fast"], "--kernels fast: choose one of"),
    ],
)
def test_options_that_would_change_nothing_or_do_not_fit_are_refused(
    model_folder, tmp_path, options, message
):
    status, text = run("quantize", model_folder, *options, "--output", tmp_path / "out")
    assert status == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_the_folder_says_what_own_kernels_run(written):
    output, text = written
    program = open_folder(output).manifest.program
    assert (program.kernels, program.cpu, program.compress) == ("memory", "avx2", True)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["backend"] == "lowbit"
    told = summary["program"]
    assert told["executed"] is True
    assert told["own_layers"]
    assert sum(told["own_operators"].values()) >= len(told["own_layers"])
    assert told["crossings"] > 0
    assert summary["settings"]["activation_mode"] == "dynamic"
    line = f"{len(told['own_layers'])} layers, {len(told['left_layers'])} left to XNNPACK"
    assert line in text
    assert "--kernels memory" in summary["command"]
    status, text = run("inspect", output)
    assert status == 0, text
    assert f"crossings between the two {told['crossings']}" in " ".join(text.split())
    (part,) = json.loads((output / "report.json").read_text())["parts"]
    assert part["program"]["own_layers"] == told["own_layers"]
    assert "In own kernels" in (output / "report.html").read_text(encoding="utf-8")


def test_verify_holds_the_program_to_the_operators_in_python(folder):
    status, text = run("verify", folder, "--json")
    assert status == 0, text
    rungs = json.loads(text)["rungs"]
    assert [rung["name"] for rung in rungs] == ["float", "quantized", "decomposed", "mixed", "pte"]
    assert rungs[-1]["against"] == "mixed"
    own = set(json.loads((folder / "summary.json").read_text())["program"]["own_layers"])
    inside = {node["module"] for node in rungs[-1]["nodes"]}
    assert own <= inside


@pytest.mark.matrix
def test_the_doctor_judges_a_folder_as_it_was_made_or_is_asked(folder):
    told = json.loads((folder / "summary.json").read_text())["program"]
    with kernels_missing():  # nothing is run
        status, text = run("doctor", folder, "--json")
        assert status == 0, text
        same = json.loads(text[text.index("{") :])
        assert same["own_layers"] == told["own_layers"]
        assert same["crossings"] == told["crossings"]
        status, text = run("doctor", folder, "--kernels", "xnnpack")
        assert status == 0, text
        assert "0 layers in own kernels" in text
        assert 'kernels="xnnpack" leaves all layers there' in text.replace("--kernels xnnpack", "")
        status, text = run("doctor", folder, "--backend", "xnnpack", "--kernels", "memory")
        assert (status, "xnnpack has no own kernels" in text) == (2, True)
        status, text = run("doctor", "digits", "--float", "--backend", "lowbit")
        assert (status, "a float program has no layers for own kernels" in text) == (2, True)


@pytest.mark.parametrize("command", ["sample", "verify"])
def test_a_program_is_refused_where_the_library_is_missing(folder, tmp_path, command):
    options = ["--num", 1, "--steps", 1, "--output", tmp_path / "grid.png"]
    with kernels_missing():
        status, text = run(command, folder, *(options if command == "sample" else []))
    assert status == 2
    assert "the weights of " in text  # of a compressed program, which is not run before it is read
    assert REMEDY in text
    assert not (tmp_path / "grid.png").exists()


def test_samples_are_drawn_with_the_library(folder, tmp_path):
    picture = tmp_path / "grid.png"
    words = ["--from", "pte", "--num", 1, "--steps", 2, "--output", picture]
    status, text = run("sample", folder, *words)
    assert status == 0, text
    assert picture.stat().st_size
