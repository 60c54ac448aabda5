"""What the runner cannot draw it says in one line, whichever library refuses it."""

import copy
import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from eager_programs import eager_export
from PIL import Image

from mpqdm_fx.pipelines import runner as runner_module
from mpqdm_fx.pipelines.runner import PipelineRunner, RunnerError, main

SCHEDULERS = sorted(
    name
    for names in diffusers.schedulers._import_structure.values()
    for name in names
    if name.endswith("Scheduler")
)
DRAWN = {
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "TCDScheduler", "UniPCMultistepScheduler",
}  # fmt: skip


def _made(root, pipeline):
    with pytest.MonkeyPatch.context() as patch:
        return eager_export(pipeline, root / "out", patch, steps=3, guidance=5.0)[1]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd")
    return _made(root, tiny_pipelines.stable_diffusion(root))


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    root = tmp_path_factory.mktemp("inpainting")
    return _made(root, tiny_pipelines.inpainting(root))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_diffusers_draws_or_is_refused(runner, name):
    refused = ""
    try:
        assert np.isfinite(runner.sample("a cat", scheduler=name)).all()
    except RunnerError as error:
        refused = str(error)
    assert not refused or (name not in DRAWN and "cheduler" in refused)
    assert "\n" not in refused


def test_schedulers_of_flow_matching_are_refused_for_models_of_noise(runner):
    message = r"^FlowMatchEuler.* is no scheduler of noise or v-prediction.*the folder's own"
    with pytest.raises(RunnerError, match=message):
        runner.sample("a cat", scheduler="FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2000}, "DDIMScheduler has no schedule of 2000 steps: ValueError: .*1000"),
        ({"steps": -1}, "steps is -1; give at least 1"),
        ({"steps": 10**12, "scheduler": "EulerDiscreteScheduler"}, "at most 16384"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; .*less than 2\*\*64"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
        ({"guidance": float("nan")}, "guidance is nan; give a finite number"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"guidance": 1e200}, r"not a number \(NaN\)"),
        ({"height": 0}, "no program for 0x16 pixels"),
        ({"width": -16}, "no program for 16x-16 pixels"),
        ({"scheduler": ""}, "no scheduler class ''"),
        ({"scheduler": 3}, "3 is no scheduler; give one of diffusers"),
        ({"steps": 2.5}, "steps is 2.5; give a whole number"),
        ({"seed": "1"}, "seed is '1'; give a whole number"),
        ({"guidance": "3"}, "guidance is '3'; give a number"),
        ({"negative": ["a", "dog"]}, r"negative is \['a', 'dog'\]; give one text"),
        ({"scheduler": "UNet2DConditionModel"}, "no scheduler class 'UNet2DConditionModel'"),
    ],
)
def test_numbers_and_names_that_nothing_can_be_drawn_with_are_refused(runner, options, message):
    with pytest.raises(RunnerError, match=message):
        runner.sample("a cat", **options)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_the_outermost_seeds_draw(runner, seed):
    assert np.isfinite(runner.sample("a cat", seed=seed, steps=1)).all()


def test_a_prompt_that_the_tokenizer_cannot_read_is_refused(runner):
    with pytest.raises(RunnerError, match=r"^the tokenizer cannot read the prompt: "):
        runner.sample("a \udcff cat")  # a byte on the command line that is no UTF-8


def test_a_program_that_fails_is_named(runner):
    broken = copy.copy(runner)
    broken.programs = copy.copy(runner.programs)

    def load(entry):
        raise RuntimeError("method->execute() failed\nwith error 0x12")

    broken.programs._load = load
    with pytest.raises(RunnerError, match=r"^text_encoder: its program does not run: .*failed$"):
        broken.sample("a cat")


LIBRARIES = {
    "executorch.runtime": r"pip install --upgrade executorch$",
    "transformers": r"^the tokenizer cannot read the prompt: .*pip install --upgrade transformers$",
    "diffusers.schedulers": r"^the scheduler cannot be made: .*pip install --upgrade diffusers$",
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_not_installed_is_named(runner, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RunnerError, match=LIBRARIES[library]):
        PipelineRunner(runner.folder).sample("a cat")


# -- the command line ----------------------------------------------------------------------------


@pytest.fixture
def command(runner, monkeypatch, caplog):
    """Calls the command line; returns exit status and error messages."""

    def call(*words, of=runner):
        caplog.clear()
        monkeypatch.setattr(runner_module, "PipelineRunner", lambda folder: of)
        status = main([str(word) for word in words])
        errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        return status, errors

    return call


def _one_line(result, message):
    status, errors = result
    assert status == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert "\n" not in errors[0]


def test_a_picture_is_written(command, tmp_path):
    assert command("a cat", "--steps", 1, "--output", tmp_path / "cat.png") == (0, [])
    assert np.asarray(Image.open(tmp_path / "cat.png")).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("cat.xyz", "its ending names no format"),
        ("cat", "its ending names no format"),
        ("none/cat.png", "its folder is not there"),
        ("folder.png", "is a folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_drawing(
    command, tmp_path, output, message, monkeypatch
):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(PipelineRunner, "sample", lambda *_, **__: pytest.fail("it draws"))
    _one_line(command("a cat", "--output", tmp_path / output), message)
    assert not (tmp_path / output).is_file()


def test_a_disk_that_is_full_is_told(command, tmp_path, monkeypatch):
    def save(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    output = tmp_path / "cat.png"
    _one_line(
        command("a cat", "--steps", 1, "--output", output), f"{output} cannot be written: OSE"
    )


def test_pillow_that_is_not_installed_is_named(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    _one_line(command("a cat"), "pip install --upgrade pillow")


def test_a_file_that_is_no_picture_is_refused_by_name(command, inpainting, tmp_path):
    (tmp_path / "text.png").write_text("dear")
    Image.new("RGB", (8, 8)).save(tmp_path / "whole.png")
    broken = bytearray((tmp_path / "whole.png").read_bytes())
    broken[12:16] = b"ABCD"  # the first chunk's name
    (tmp_path / "broken.png").write_bytes(broken)
    words = ["a cat", "--output", tmp_path / "cat.png", "--mask", tmp_path / "whole.png", "--image"]
    for name in ("text.png", "broken.png", "none.png"):
        outcome = command(*words, tmp_path / name, of=inpainting)
        _one_line(outcome, f"{tmp_path / name} cannot be read as a picture")
    assert command(*words, tmp_path / "whole.png", "--steps", 1, of=inpainting) == (0, [])
    _one_line(command(*words[:3], "--mask", "m.png", of=inpainting), "needs image and mask")


def test_errors_of_torch_are_one_line(command, runner, monkeypatch):
    def randn(*_, **__):
        raise RuntimeError("no memory\nsecond line")

    monkeypatch.setattr(torch, "randn", randn)
    _one_line(command("a cat"), "error: no memory")


def test_the_copied_runner_refuses_without_the_package_and_without_a_traceback(runner, tmp_path):
    # an import of the package would fail: a file of its name stands in its way
    (tmp_path / "mpqdm_fx.py").write_text("raise ImportError('the package is not here')")
    words = ["run.py", "a cat", "--steps", "2000", "--output", str(tmp_path / "cat.png")]
    run = subprocess.run(
        [sys.executable, *words],
        cwd=runner.folder, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: DDIMScheduler has no schedule of 2000 steps: ")
    assert "Traceback" not in run.stderr
