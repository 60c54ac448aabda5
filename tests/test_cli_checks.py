"""What cannot end well is refused before the first second of work, by every command."""

import json
import shutil
import sys

import pytest
import torch
from diffusers import DDIMScheduler
from small import tiny_unet
from typing_in import typed

from mpqdm_fx import cli_checks, workflow
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.folders import seal_folder
from mpqdm_fx.models.sources import load_source
from mpqdm_fx.result_folder import Form


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and a folder that was quantized from it."""
    root = tmp_path_factory.mktemp("made")
    tiny_unet().save_pretrained(root / "model")
    DDIMScheduler().save_pretrained(root / "model" / "scheduler")
    settings = MPQConfig(weight_bits=2, allocation="uniform", refinements=0, propagation=0.0)
    workflow.quantize_to_folder(
        load_source(str(root / "model")), settings, backend="packed", output=root / "out",
        trajectories=2, steps=2, samples=0,
    )  # fmt: skip
    return root


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """Copies to work on, a file that is in the way, and no work that could begin."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"text_encoder": ["transformers", "CLIPTextModel"]})
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


OUTPUTS = {
    "below a file": ("file/new", "file; give a path below a folder"),
    "in a folder of the system": ("/proc/new", "/proc cannot be written"),
    "the current folder": (".", "current folder"),
    "a folder that holds the current one": ("..", "current folder"),
    "too long a name": ("x" * 250, "cannot be written: File name too long"),
    "what is read": ("{read}", "which is read|what is read|is a folder|name that ends in"),
}
WRITERS = {
    "quantize": (["quantize", "model", "--output"], "model"),
    "distill": (["distill", "out", "--output"], "out"),
    "export": (["export", "model", "--output"], "model"),
    "sample": (["sample", "out", "--output"], "out"),
    "verify": (["verify", "out", "--output"], "out/mpqdm.json"),
    "sensitivity of quantize": (["quantize", "model", "--sensitivity"], "model/config.json"),
    "sensitivity of export": (["export", "model", "--sensitivity"], "model/config.json"),
}
FOLDER_WRITERS = ("quantize", "distill", "export")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_no_command_begins_if_its_output_cannot_be_written(
    place, monkeypatch, capsys, writer, output
):
    (words, read), (target, message) = WRITERS[writer], OUTPUTS[output]
    target = target.replace("{read}", read)
    if output.endswith("name") and writer == "sample":
        target = target[:246] + ".png"
    elif writer == "sample" and output != "what is read" and target not in (".", ".."):
        target += ".png"
    before = listed(place)
    status, out, err = typed(monkeypatch, capsys, *words, target)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    option = words[-1]
    assert f"{option} {target}: " in err
    if target in (".", "..") and writer not in FOLDER_WRITERS:
        message = "this is a folder"
    assert any(part in err for part in message.split("|")), err
    assert listed(place) == before


NEW = ["--backend", "packed", "--output", "new"]

CASES = [
    (["quantize", "model", "--backend", "packed"], "--overwrite"),
    # a folder and what lies in it, or what it lies in
    (["quantize", "model", "--output", "model/inside"], "one lies in the other"),
    (["distill", "out", "--output", "out/inside"], "one lies in the other"),
    (["export", ".", "--output", "exported"], "one lies in the other"),
    (["quantize", "model", "--sensitivity", "new/s", "--output", "new"], "replaced as a whole"),
    (["export", "model", "--sensitivity", "e.checkpoint/s", "--output", "e"], "as a whole"),
    # endings
    (["sample", "out", "--output", "grid.jpg"], "ends in .png"),
    (["sample", "out", "--output", "grid"], "ends in .png"),
    # devices that no machine has
    (["quantize", "model", "--device", "cuda:99"], "--device cuda:99: torch cannot compute there"),
    (["quantize", "model", "--device", "gpu"], "--device gpu: torch cannot compute there"),
    (["quantize", "model", "--device", "meta"], "--device meta: torch cannot compute there"),
    (["distill", "out", "--device", "cuda:99"], "--device cuda:99: torch cannot compute there"),
    (["export", "model", "--device", "cuda:99"], "--device cuda:99: torch cannot compute there"),
    # sizes and times
    (["quantize", "model", "--max-memory", "infGB"], "write a size such as 4GiB"),
    (["quantize", "model", "--max-memory", "nan"], "write a size such as 4GiB"),
    (["quantize", "model", "--max-memory", "0"], "write a size such as 4GiB"),
    (["quantize", "model", "--max-memory", "9e99GiB"], "write a size such as 4GiB"),
    (["plan", "model", "--max-memory", "-1GB"], "write a size such as 4GiB"),
    (["export", "model", "--max-memory", "much"], "write a size such as 4GiB"),
    (["distill", "out", "--budget", "9" * 400 + "h"], "write a time such as"),
    (["export", "model", "--size", "big"], "HEIGHTxWIDTH"),
    # settings that the graph does not bear out
    (["quantize", "model", *NEW, "--effective-bits", 1.0], "the smallest that"),
    (["quantize", "model", *NEW, "--weight-bytes", 9], "the smallest that can is"),
    (["quantize", "model", *NEW, "--max-memory", "1"], "the smallest limit that"),
    (["quantize", "model", *NEW, "--override", "convin=4"], "nearest names"),
    (["plan", "model", "--override", "convin=4"], "nearest names"),
    # folders that are not there
    (["distill", "nowhere"], "nowhere"),
    (["export", "nowhere"], "nowhere"),
    (["sample", "nowhere"], "nowhere"),
    (["evaluate", "nowhere"], "nowhere"),
    (["verify", "nowhere"], "nowhere"),
    (["inspect", "nowhere"], "nowhere"),
    (["doctor", "nowhere"], "nowhere"),
    (["trace", "nowhere"], "nowhere"),
    (["plan", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("words", "message"), CASES)
def test_no_command_begins_with_what_it_cannot_end_with(place, monkeypatch, capsys, words, message):
    monkeypatch.setattr(workflow, "calibration_of", None)  # whoever calibrates would call it
    before = listed(place)
    status, out, err = typed(monkeypatch, capsys, *words)
    # libraries that are imported meanwhile may say something of their own
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, out, len(told)) == (2, "", 1), err
    assert message in told[0]
    assert listed(place) == before


@pytest.mark.parametrize("command", ["distill", "evaluate"])
def test_a_folder_whose_float_model_is_gone_says_so_at_once(place, monkeypatch, capsys, command):
    (place / "out" / "source.json").write_text(json.dumps({"model": "gone", "subfolder": None}))
    seal_folder(place / "out")
    status, _, err = typed(monkeypatch, capsys, command, "out")
    assert status == 2
    assert "gone" in err
    assert "--model" in err


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["quantize", "model"], "executorch", "executorch"),
        (["export", "model"], "executorch", "executorch"),
        (["export", "."], "transformers", "pipelines"),
        (["doctor", "model"], "executorch", "executorch"),
        (["sample", "out", "--from", "pte"], "executorch", "executorch"),
        (["sample", "program"], "executorch", "executorch"),
        (["verify", "program"], "executorch", "executorch"),
        (["distill", "program"], "executorch", "executorch"),
        (["evaluate", "out", "--model", "digits"], "torchmetrics", "report"),
        (["evaluate", "out", "--model", "digits"], "sklearn", "report"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    place, monkeypatch, capsys, words, package, extra
):
    (place / "program").mkdir()
    (place / "program" / "unet.pte").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    output = [] if words[1] != "." else ["--output", str(place.parent / "elsewhere")]
    status, _, err = typed(monkeypatch, capsys, *words, *output)
    assert status == 2
    assert f"{package}, which is not installed" in err
    assert f'pip install "mpqdm-fx[{extra}]"' in err


@pytest.mark.parametrize(
    "words", [["quantize", "model", *NEW], ["distill", "out"], ["export", "model"]]
)
def test_a_disk_that_is_too_small_is_told_before(place, monkeypatch, capsys, words):
    monkeypatch.setattr(workflow, "calibration_of", None)
    used = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used)
    status, _, err = typed(monkeypatch, capsys, *words)
    assert status == 2
    assert "MiB are written at least" in err


def test_the_space_that_there_is_suffices(tmp_path):
    cli_checks.check_space(tmp_path / "a" / "b", 1)
    with pytest.raises(ConfigError, match=r"has .* MiB left"):
        cli_checks.check_space(tmp_path / "a" / "b", 2**62)


def start(place, *, resume=False, **changed):
    settings = MPQConfig(weight_bits=2, allocation="uniform", **changed)
    workflow.check_start(Form(backend="packed"), settings, place / "new", resume=resume)


def unfinished(place, settings):
    from mpqdm_fx.versions import versions

    solved = place / "new.checkpoint"
    solved.mkdir()
    header = {"settings": settings.to_dict(), "versions": versions(), "model": "abc"}
    (solved / "sweep.json").write_text(json.dumps(header))
    return solved


def test_an_unfinished_run_is_told_before_the_work(place):
    solved = unfinished(place, MPQConfig(weight_bits=2, allocation="uniform"))
    start(place)
    (solved / "layer-a.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="resume it, or delete it"):
        start(place)
    start(place, resume=True)
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        start(place, resume=True, seed=1)


def test_somebody_elses_folder_is_never_taken_for_an_unfinished_run(place):
    folder = place / "new.checkpoint"
    folder.mkdir()
    start(place)
    (folder / ".sweep.json.1234.part").write_text("")
    start(place)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="in the way and holds no unfinished run"):
        start(place)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("device", "available"),
    [
        (None, True),
        ("cpu", True),
        ("cuda", torch.cuda.is_available()),
        ("cuda:0", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
    ],
)
def test_a_device_is_taken_where_it_is_there(device, available):
    if available:
        cli_checks.check_device(device)
    else:
        with pytest.raises(ConfigError, match=f"--device {device}: torch cannot compute there"):
            cli_checks.check_device(device)
