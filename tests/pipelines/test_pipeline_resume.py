"""An export that was killed goes on with what was finished; nothing half-made is ever seen."""

import json

import pytest
import tiny_pipelines
from eager_programs import eager_writer

from mpqdm_fx import ArtifactError, ConfigError, export_pipeline

SIZES = [(16, 16), (24, 16)]
OPTIONS = {"sizes": SIZES, "steps": 2, "trajectories": 4, "prompts": ["a cat", "a dog"]}


class Killed(BaseException):
    """Stands for a signal: nothing but the interpreter catches it."""


@pytest.fixture
def pipeline(tmp_path):
    return tiny_pipelines.stable_diffusion(tmp_path)


def writer_that_dies_at(name, written):
    write = eager_writer({})

    def die(part, quantized, inputs, path):
        if path.name == name:
            raise Killed
        written.append(path.name)
        return write(part, quantized, inputs, path)

    return die


def export(pipeline, output, monkeypatch, *, dies_at=None, **options):
    """Export in float or with cheap settings; return names of the programs that were written."""
    written = []
    monkeypatch.setattr(
        "mpqdm_fx.pipelines.export.write_program", writer_that_dies_at(dies_at, written)
    )
    settings = {"config": None, **OPTIONS, **options}
    if dies_at is None:
        export_pipeline(pipeline, settings.pop("config"), output, **settings)
    else:
        with pytest.raises(Killed):
            export_pipeline(pipeline, settings.pop("config"), output, **settings)
    return written


def manifest(folder):
    return json.loads((folder / "pipeline.json").read_text())


@pytest.mark.parametrize(
    ("dies_at", "before"),
    [
        ("text_encoder.pte", []),
        ("denoiser-24x16.pte", ["text_encoder.pte", "denoiser-16x16.pte"]),
    ],
)
def test_finished_programs_are_not_made_again(pipeline, tmp_path, monkeypatch, dies_at, before):
    output = tmp_path / "out"
    assert export(pipeline, output, monkeypatch, dies_at=dies_at) == before
    assert not output.exists()
    rest = export(pipeline, output, monkeypatch, resume=True)
    every = ["text_encoder.pte"] + [
        f"{p}-{s}.pte" for p in ("denoiser", "vae_decoder") for s in ("16x16", "24x16")
    ]
    assert before + rest == every
    assert not output.with_name("out.checkpoint").exists()
    export(pipeline, tmp_path / "whole", monkeypatch)
    assert manifest(output) == manifest(tmp_path / "whole")


def test_a_quantized_run_goes_on_with_its_solved_layers(pipeline, tmp_path, monkeypatch):
    output, config = tmp_path / "out", tiny_pipelines.cheap_settings()
    export(pipeline, output, monkeypatch, dies_at="denoiser-24x16.pte", config=config)
    solved = output.with_name("out.checkpoint") / "denoiser"
    times = {path.name: path.stat().st_mtime_ns for path in solved.glob("layer-*")}
    assert times
    again = {"config": config, "resume": True}
    export(pipeline, output, monkeypatch, dies_at="vae_decoder-16x16.pte", **again)
    assert times == {path.name: path.stat().st_mtime_ns for path in solved.glob("layer-*")}
    export(pipeline, output, monkeypatch, **again)
    export(pipeline, tmp_path / "whole", monkeypatch, config=config)
    assert manifest(output) == manifest(tmp_path / "whole")


def test_an_unfinished_run_is_neither_forgotten_nor_mixed_with_another(
    pipeline, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    export(pipeline, output, monkeypatch, dies_at="denoiser-24x16.pte")
    with pytest.raises(ConfigError, match="was not finished; resume it"):
        export(pipeline, output, monkeypatch)
    with pytest.raises(ConfigError, match="with other numbers"):
        export(pipeline, output, monkeypatch, resume=True, steps=3)
    pipeline.unet.conv_in.weight.data += 1
    with pytest.raises(ConfigError, match="with other models"):
        export(pipeline, output, monkeypatch, resume=True)
    header = output.with_name("out.checkpoint") / "export.json"
    header.write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        export(pipeline, output, monkeypatch, resume=True)
    header.unlink()
    with pytest.raises(ArtifactError, match="in the way"):
        export(pipeline, output, monkeypatch, resume=True)


def test_an_older_export_is_replaced_whole(pipeline, tmp_path, monkeypatch):
    output = tmp_path / "out"
    export(pipeline, output, monkeypatch)
    export(pipeline, output, monkeypatch, sizes=[(24, 16)])
    assert not (output / "denoiser-16x16.pte").exists()
    assert manifest(output)["sizes"] == [[24, 16]]
