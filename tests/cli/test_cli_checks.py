"""What cannot end well is refused before the first second of work, by every command."""

import json
import re
import shutil
import sys

import pytest
import torch
from diffusers import DDIMScheduler
from small import plain_unet
from torch import nn
from typing_in import typed

from mpqdm_fx.cli import checks
from mpqdm_fx.cli.boundary import INTERNAL
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.folders import holds_result, seal_folder
from mpqdm_fx.jobs import distill as distill_job
from mpqdm_fx.jobs import export as export_job
from mpqdm_fx.jobs import quantize as quantize_job
from mpqdm_fx.jobs.result_folder import ProgramForm
from mpqdm_fx.model.feasibility import weights_of
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sources.sources import load_source


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A model, and a folder that was quantized from it."""
    root = tmp_path_factory.mktemp("made")
    plain_unet().save_pretrained(root / "model")
    DDIMScheduler().save_pretrained(root / "model" / "scheduler")
    settings = MPQConfig(
        weight_bits=2, allocation="uniform", rounding="nearest", propagation=0.0, slowdown=1,
        row_weights="plain", judge=False,
    )  # fmt: skip
    quantize_job.quantize_to_folder(
        load_source(str(root / "model")), settings, backend="packed", output=root / "out",
        trajectories=2, steps=2, samples=0,
    )  # fmt: skip
    return root


#: Results that are no quantized model, by the file and its format by which they are known.
OTHER_RESULTS = {
    "programs": ("pipeline.json", "mpqdm_fx.pipeline"),
    "pareto": ("pareto.json", "mpqdm-fx pareto"),
}


@pytest.fixture
def place(results, tmp_path, monkeypatch):
    """Copies to work on, a file that is in the way, and no work that could begin."""
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    (tmp_path / "file").write_text("mine")
    for name, manifest in OTHER_RESULTS.items():
        (tmp_path / name).mkdir()
        file, form = manifest
        (tmp_path / name / file).write_text(json.dumps({"format": form}))
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
    "too long a name": ("x" * 250, "cannot be written: File name too long|give a name of at most"),
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
    # a folder that is replaced as a whole, and files in a result, which would not be its own
    (["verify", ".", "--store"], "current folder"),
    (["verify", "..", "--store"], "current folder"),
    (["verify", "out", "--output", "out/verify.json"], "out holds a result and no other files"),
    (["verify", "model", "--output", "out/verify.json"], "out holds a result and no other files"),
    (["report", "programs", "--output", "programs/r.html"], "programs holds a result and no other"),
    (["report", "out", "--output", "pareto/a/r.html"], "pareto holds a result and no other files"),
    (["sample", "out", "--output", "out/a/grid.png"], "out holds a result and no other files"),
    (["quantize", "model", *NEW, "--sensitivity", "out/s"], "out holds a result and no other"),
    # endings
    (["sample", "out", "--output", "grid.gif"], "ends in .png or .jpg"),
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
    monkeypatch.setattr(quantize_job, "calibration_of", None)  # whoever calibrates would call it
    before = listed(place)
    status, out, err = typed(monkeypatch, capsys, *words)
    # libraries that are imported meanwhile may say something of their own
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, out, len(errors)) == (2, "", 1), err
    assert message in errors[0]
    assert listed(place) == before


OLDER = [
    (["quantize", "model", "--backend", "packed", "--output", "out", "--overwrite"], "move it, or"),
    (["verify", "out", "--store"], "does not list all of its files; it is left as it is"),
    (["sample", "out"], "which lists no source.json; quantize the model again"),
    (["evaluate", "out"], "which lists no source.json; quantize the model again"),
    (["distill", "out"], "which lists no summary.json; quantize the model again"),
]


@pytest.mark.parametrize(("words", "message"), OLDER)
def test_a_folder_of_an_older_version_is_told_as_one(place, monkeypatch, capsys, words, message):
    path = place / "out" / "mpqdm.json"
    manifest = json.loads(path.read_text())
    manifest = {key: manifest[key] for key in manifest if key not in ("digest", "proof")}
    files = {name: manifest["files"][name] for name in ("model.safetensors", "config.json")}
    path.write_text(json.dumps({**manifest, "version": 2, "files": files}))
    before = listed(place)
    status, _, err = typed(monkeypatch, capsys, *words)
    errors = [line for line in err.splitlines() if line.startswith("error: out ")]
    assert (status, len(errors)) == (2, 1), err
    assert "was written by an older version" in errors[0]
    assert message in errors[0]
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


def test_packed_weights_draw_where_a_program_cannot_run(place, monkeypatch, capsys):
    (place / "out" / "unet.pte").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "executorch", None)
    words = ["sample", "out", "--num", 1, "--steps", 1, "-o", "new.png"]
    status, out, err = typed(monkeypatch, capsys, *words)
    assert (status, out) == (0, "1 images written to new.png\n"), err
    assert "drawing from its packed weights" in err
    assert (place / "new.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [["quantize", "model", *NEW], ["distill", "out"]])
def test_a_disk_that_is_too_small_is_told_before(place, monkeypatch, capsys, words):
    monkeypatch.setattr(quantize_job, "calibration_of", None)
    used = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used)
    status, _, err = typed(monkeypatch, capsys, *words)
    assert status == 2
    assert re.search(r"--output \S+: .* MiB are needed there, .* and 1000 bytes\); free some", err)


def test_a_dry_run_says_what_the_disk_lacks(place, monkeypatch, capsys):
    used = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used)
    status, out, _ = typed(monkeypatch, capsys, "quantize", "model", *NEW, "--dry-run")
    assert status == 0
    assert "free on the disk of --output" in out
    assert re.search(r"--output \S+: .* MiB are needed there, .* and 1000 bytes\); free some", out)


def test_a_disk_that_may_do_is_not_refused(place, monkeypatch, capsys):
    """Hidden expansions, variants that are not loaded and layers that are solved cost nothing."""
    begun = []
    for module, name in [
        (quantize_job, "quantize_to_folder"),
        (distill_job, "distill_folder"),
        (export_job, "export_to_folder"),
    ]:
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: begun.append(name))
    (place / "out" / ".unet.pte.0123456789abcdef").write_bytes(bytes(10**6))
    (place / "model" / "diffusion_pytorch_model.bin").write_bytes(bytes(10**6))
    weights = (place / "out" / "model.safetensors").stat().st_size
    used = shutil.disk_usage(place)
    free = {"distill out": weights, f"quantize model {' '.join(NEW)} --resume": 0}
    for words, enough in free.items():
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=enough: used._replace(free=n))
        assert typed(monkeypatch, capsys, *words.split())[0] == 0
    assert typed(monkeypatch, capsys, "export", "model")[0] == INTERNAL  # nothing to print
    assert begun == ["distill_folder", "quantize_to_folder", "export_to_folder"]


TAKERS = {
    "evaluate": ["--gate", "bytes<=1MB"], "inspect": [], "verify": [], "doctor": [], "trace": [],
    "sample": ["-o", "new.png"], "distill": ["--budget", "1m", "-o", "new"], "quantize": NEW,
    "plan": [], "pareto": ["--bits", "2", "--backend", "packed", "-o", "new"],
}  # fmt: skip


@pytest.mark.parametrize("command", TAKERS)
def test_a_result_of_another_kind_is_one_line_that_says_what_takes_it(
    place, monkeypatch, capsys, command
):
    before = listed(place)
    remedies = {
        "programs": "is an exported pipeline, which keeps its programs alone: draw with python "
        "programs/run.py, read its numbers with mpqdm-fx report programs, judge it with the "
        "gates of mpqdm-fx export",
        "pareto": "holds the budgets of mpqdm-fx pareto; give pareto/picked",
    }
    for name, remedy in remedies.items():
        status, _, err = typed(monkeypatch, capsys, command, name, *TAKERS[command])
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (status, f"{name} {remedy}" in line) == (2, True), err
    assert listed(place) == before


def test_a_file_of_a_results_name_makes_no_result(place, monkeypatch, capsys):
    """`pipeline.json` is a name that other programs use too."""
    (place / "model" / "pipeline.json").write_text('{"format": "theirs"}')
    (place / "model" / "pareto.json").write_text("no JSON")
    assert typed(monkeypatch, capsys, "trace", "model", "--json")[0] == 0
    assert not holds_result(place / "model")


def test_weights_that_layers_share_take_space_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(3, 5), "c": nn.Conv2d(2, 2, 1)})
    assert weights_of(model) == 34
    model["b"].weight = model["a"].weight
    assert weights_of(model) == 19


def start(place, *, resume=False, **changed):
    settings = MPQConfig(weight_bits=2, allocation="uniform", **changed)
    quantize_job.check_start(ProgramForm(backend="packed"), settings, place / "new", resume=resume)


def unfinished(place, settings):
    from mpqdm_fx.io.versions import versions

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
    (folder / ".sweep.json.0123abcd.part").mkdir()
    start(place)
    (folder / "notes.part").write_text("mine, by another program's ending")
    with pytest.raises(ArtifactError, match=r"in the way: it holds no sweep\.json"):
        start(place)
    (folder / "notes.part").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"in the way: it holds no sweep\.json"):
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
        checks.check_device(device)
    else:
        with pytest.raises(ConfigError, match=f"--device {device}: torch cannot compute there"):
            checks.check_device(device)
