"""An export that was killed goes on with what was finished; nothing half-made is ever seen."""

import json
import re

import pytest
import tiny_pipelines
from eager_programs import UNMEASURED, eager_writer

from mpqdm_fx import ArtifactError, ConfigError, RunOptions, export_pipeline

SIZES = [(16, 16), (24, 16)]
TIMED = {"summary.json", "report.json", "report.html"}
OPTIONS = {"sizes": SIZES, "steps": 2, "trajectories": 4, "prompts": ["a cat", "a dog"]}
RESUMING = RunOptions(resume=True)


class Killed(BaseException):
    """Stands for a signal: nothing but the interpreter catches it."""


@pytest.fixture
def pipeline(tmp_path):
    return tiny_pipelines.stable_diffusion(tmp_path)


def writer_that_dies_at(name, written):
    write = eager_writer({})

    def die(part, quantized, examples, path, **options):
        if path.name == name:
            raise Killed
        written.append(path.name)
        return write(part, quantized, examples, path, **options)

    return die


def export(pipeline, output, monkeypatch, *, dies_at=None, **options):
    """Export in float or with cheap settings; return names of the programs that were written."""
    written = []
    monkeypatch.setattr(
        "mpqdm_fx.pipelines.export.write_programs", writer_that_dies_at(dies_at, written)
    )
    settings = {"config": None, **OPTIONS, **UNMEASURED, **options}
    if dies_at is None:
        export_pipeline(pipeline, settings.pop("config"), output, **settings)
    else:
        with pytest.raises(Killed):
            export_pipeline(pipeline, settings.pop("config"), output, **settings)
    return written


def manifest(folder):
    """A folder's manifest, but for files that tell times."""
    content = json.loads((folder / "pipeline.json").read_text())
    assert content.pop("digest")
    assert {content["files"].pop(name) and name for name in TIMED} == TIMED
    return content


def numbers(folder):
    """What the report says, but for times and the folder's name."""
    text = (folder / "report.json").read_text()
    return json.loads(re.sub(r'"(seconds\w*)": [\d.e-]+', r'"\1": 0', text))


@pytest.mark.parametrize(
    ("dies_at", "before"),
    [
        ("text_encoder.pte", []),
        ("vae_decoder.pte", ["text_encoder.pte", "denoiser.pte"]),
    ],
)
def test_finished_programs_are_not_made_again(pipeline, tmp_path, monkeypatch, dies_at, before):
    output = tmp_path / "out"
    assert export(pipeline, output, monkeypatch, dies_at=dies_at) == before
    assert not output.exists()
    rest = export(pipeline, output, monkeypatch, run=RESUMING)
    assert before + rest == ["text_encoder.pte", "denoiser.pte", "vae_decoder.pte"]
    assert not output.with_name("out.checkpoint").exists()
    export(pipeline, tmp_path / "whole", monkeypatch)
    assert manifest(output) == manifest(tmp_path / "whole")


def test_a_quantized_run_goes_on_with_its_solved_layers(pipeline, tmp_path, monkeypatch):
    output, config = tmp_path / "out", tiny_pipelines.cheap_settings()
    export(pipeline, output, monkeypatch, dies_at="denoiser.pte", config=config)
    solved = output.with_name("out.checkpoint") / "denoiser"
    times = {path.name: path.stat().st_mtime_ns for path in solved.glob("layer-*")}
    assert times
    again = {"config": config, "run": RESUMING}
    export(pipeline, output, monkeypatch, dies_at="vae_decoder.pte", **again)
    assert times == {path.name: path.stat().st_mtime_ns for path in solved.glob("layer-*")}
    export(pipeline, output, monkeypatch, **again)
    export(pipeline, tmp_path / "whole", monkeypatch, config=config)
    assert manifest(output) == manifest(tmp_path / "whole")
    report = numbers(output)
    assert report == numbers(tmp_path / "whole")
    assert "denoiser" in [part["name"] for part in report["parts"]]  # whose model the end never saw


def test_an_unfinished_run_is_neither_forgotten_nor_mixed_with_another(
    pipeline, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    export(pipeline, output, monkeypatch, dies_at="denoiser.pte")
    with pytest.raises(ConfigError, match="was not finished; resume it"):
        export(pipeline, output, monkeypatch)
    with pytest.raises(ConfigError, match="with other settings: numbers was"):
        export(pipeline, output, monkeypatch, run=RESUMING, steps=3)
    before = pipeline.scheduler
    pipeline.scheduler = before.from_config(before.config, beta_end=0.03)
    with pytest.raises(ConfigError, match=r"with other settings: scheduler\.beta_end was"):
        export(pipeline, output, monkeypatch, run=RESUMING)
    pipeline.scheduler = before
    pipeline.unet.conv_in.weight.data += 1
    with pytest.raises(ConfigError, match=r"with other settings: models\.denoiser was"):
        export(pipeline, output, monkeypatch, run=RESUMING)
    header = output.with_name("out.checkpoint") / "export.json"
    header.write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        export(pipeline, output, monkeypatch, run=RESUMING)
    header.unlink()
    with pytest.raises(ArtifactError, match="in the way"):
        export(pipeline, output, monkeypatch, run=RESUMING)


def test_an_older_export_is_replaced_whole(pipeline, tmp_path, monkeypatch):
    output = tmp_path / "out"
    export(pipeline, output, monkeypatch)
    export(pipeline, output, monkeypatch, sizes=[(24, 16)], overwrite=True)
    assert manifest(output)["sizes"] == [[24, 16]]
