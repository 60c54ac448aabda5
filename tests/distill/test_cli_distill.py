"""The command `mpqdm-fx distill`, as typed."""

import json

import pytest
import torch
from diffusers import DDIMScheduler
from interruption import kill_at
from small import plain_unet
from typer.testing import CliRunner

import mpqdm_fx
from mpqdm_fx.cli import app as cli
from mpqdm_fx.cli.boundary import tell
from mpqdm_fx.cli.options import seconds_of
from mpqdm_fx.cli.usage import USAGE_ERROR
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.errors import ArtifactError, ConfigError, MPQError
from mpqdm_fx.jobs.distill import distill_folder
from mpqdm_fx.jobs.quantize import quantize_to_folder
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sources.sources import load_source

SHORT = ["--trajectories", "4", "--steps", "3", "--batch-size", "4", "--samples", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    plain_unet().save_pretrained(root / "pipeline" / "unet")
    DDIMScheduler().save_pretrained(root / "pipeline" / "scheduler")
    index = json.dumps({"_class_name": "DDIMPipeline"})
    (root / "pipeline" / "model_index.json").write_text(index)
    settings = MPQConfig(
        weight_bits=2, allocation="uniform", levels="codebook", refinements=0, propagation=0.0,
        slowdown=1, row_weights="plain", judge=False,
    )  # fmt: skip
    quantize_to_folder(
        load_source(str(root / "pipeline"), "unet"), settings, backend="packed",
        output=root / "out", trajectories=4, steps=3, samples=0, subfolder="unet",
    )  # fmt: skip
    return root / "out"


def run(*arguments):
    places = {}
    typed = ["distill", *map(str, arguments)]
    result = CliRunner().invoke(cli.app, typed, obj=places, standalone_mode=False)
    if isinstance(result.exception, MPQError | USAGE_ERROR):
        refusal = tell(result.exception, places)
        return refusal.status, refusal.line
    if result.exception is not None:
        raise result.exception
    status = result.return_value or result.exit_code
    return status, result.stdout if status == 0 else result.output


def test_a_folder_that_holds_other_files_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")

    def begun(*arguments, **options):
        raise AssertionError("the work was begun")

    monkeypatch.setattr("mpqdm_fx.jobs.quantize.quantize", begun)
    with pytest.raises(ArtifactError, match="holds other files"):
        quantize_to_folder(
            load_source("digits"), MPQConfig(), backend="packed", output=tmp_path, samples=0
        )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_guidance_is_refused_where_no_text_is_encoded(folder, tmp_path):
    config = DistillConfig(updates=1, guidance_scale=3.0)
    with pytest.raises(ConfigError, match="takes no text; leave prompts and guidance out"):
        distill_folder(folder, config, output=tmp_path / "trained")


def test_training_writes_a_folder_like_the_one_it_read(folder, tmp_path):
    output = tmp_path / "trained"
    status, text = run(folder, "--updates", 20, *SHORT, "--output", output)
    assert status == 0, text
    assert "20 updates in " in text
    assert {path.name for path in output.iterdir()} == {path.name for path in folder.iterdir()}
    old, new = (json.loads((f / "summary.json").read_text()) for f in (folder, output))
    for same in ("effective_bits", "weight_bytes", "float_remainder_bytes", "backend"):
        assert new[same] == old[same]
    assert new["files"]["model.safetensors"] == old["files"]["model.safetensors"]
    assert new["distilled"]["error_after"] < new["distilled"]["error_before"]
    assert new["distilled"]["epsilon_sqnr_db_before"] == old["epsilon_sqnr_db"]
    assert list(tmp_path.iterdir()) == [output]
    before, after = (mpqdm_fx.load(f) for f in (folder, output))
    names = [layer.name for layer in before.plan.layers]
    assert any(not torch.equal(before.codes(name), after.codes(name)) for name in names)


@pytest.mark.matrix
def test_training_that_does_not_help_gives_a_copy_and_its_budget_counts_all(
    folder, tmp_path, monkeypatch
):
    def lowered(*arguments, **options):
        raise AssertionError("the same model was lowered and measured again")

    monkeypatch.setattr("mpqdm_fx.jobs.distill.write_folder", lowered)
    output = tmp_path / "trained"
    config = DistillConfig(
        updates=3, seconds=1000.0, trajectories=4, steps=3, batch_size=4, weight_rate=50.0,
        scale_rate=1.0, ema=0.0,
    )  # fmt: skip
    estimates = []
    result = distill_folder(folder, config, output=output, samples=0, foretold=estimates.append)
    assert result.summary["distilled"]["improved"] is False
    assert list(tmp_path.iterdir()) == [output]
    old, new = (json.loads((f / "summary.json").read_text()) for f in (folder, output))
    trained = new.pop("distilled")
    assert trained["updates"] == 3
    assert "distilled" not in old
    rewritten = {"report.html", "report.json"}
    for summary in (old, new):
        summary.pop("command")
        for name in rewritten:
            summary["files"].pop(name)
    assert new == old
    same = {path.name for path in folder.iterdir()} - {"summary.json", "mpqdm.json"}
    for name in same - {"scheduler"} - rewritten:
        assert (output / name).read_bytes() == (folder / name).read_bytes()
    report = json.loads((output / "report.json").read_text())
    assert report["parts"][0]["trained"]["updates"] == 3
    assert report["command"] is None  # no option asks for these rates
    assert "It did not help: the model is as before." in (output / "report.html").read_text()
    before, after = (mpqdm_fx.load(f) for f in (folder, output))
    for layer in before.plan.layers:
        assert torch.equal(before.codes(layer.name), after.codes(layer.name))
    (times,) = estimates
    assert times.seconds == pytest.approx(sum(times.stages.values()))
    assert "in all" in str(times)
    # the budget is for all of the job: what the rest takes comes off it
    assert 0 < trained["settings"]["seconds"] < 1000 - times.others
    assert times.training_seconds <= 1000 - times.others


@pytest.mark.matrix
def test_a_killed_run_goes_on_with_resume_and_not_without(folder, tmp_path, monkeypatch):
    output = tmp_path / "trained"
    kill_at(monkeypatch, 2)
    status, _ = run(folder, "--updates", 4, *SHORT, "--output", output)
    assert status != 0
    monkeypatch.undo()
    assert not output.exists()
    status, text = run(folder, "--updates", 4, *SHORT, "--output", output)
    assert (status, "resume it, or delete it" in text) == (2, True)
    status, text = run(folder, "--updates", 4, *SHORT, "--output", output, "--resume", "--json")
    assert status == 0, text
    assert json.loads(text[text.index("{") :])["distilled"]["updates"] == 4
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["{folder}", "--budget", "soon"], "90s, 5m or 1.5h"),
        (["{folder}", "--relation", "cosine"], "choose one of 'none', 'trd', 'queue', 'feature'"),
        (["{folder}", "--updates", "1", "--output", "{file}"], "is a file"),
        (["{folder}", "--budget", "1s", *SHORT], "--budget 1 leaves nothing for training"),
    ],
)
def test_bad_input_gets_one_clear_error_and_nothing_is_written(
    folder, tmp_path, arguments, message
):
    file = tmp_path / "file"
    file.write_text("mine")
    filled = [a.replace("{folder}", str(folder)).replace("{file}", str(file)) for a in arguments]
    status, text = run(*filled)
    assert (status, message in text) == (2, True), text
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("5m", 300.0), ("1.5h", 5400.0), ("300", 300.0)]
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "-5m", "5 minutes", "m"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ConfigError, match="--budget"):
        seconds_of(text)
