"""Exported programs in other forms than one plain file: placed, expanded, and run by the runner."""

import json
import shutil

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from records import flip
from small import plain_unet
from test_pipeline_resume import RESUMING, export, manifest
from typer.testing import CliRunner

import mpqdm_fx.pipelines.export as export_module
from mpqdm_fx import ConfigError
from mpqdm_fx.backends.compressed import expand_program
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.cli import app as cli
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.folders import listed_files
from mpqdm_fx.io.sealed import seal
from mpqdm_fx.pipelines.runner import PipelineRunner


@pytest.fixture
def pipeline(tmp_path):
    return tiny_pipelines.stable_diffusion(tmp_path)


def test_a_resumed_export_may_compress_what_was_finished(pipeline, tmp_path, monkeypatch):
    output = tmp_path / "out"
    export(pipeline, output, monkeypatch, dies_at="vae_decoder.pte")
    with pytest.raises(ConfigError, match=r"program form was .* is "):
        export(pipeline, output, monkeypatch, run=RESUMING, external_weights=True)
    written = export(pipeline, output, monkeypatch, run=RESUMING, compress=True)
    assert written == ["vae_decoder.pte"]
    files = {"text_encoder.pte.xz", "denoiser.pte.xz", "vae_decoder.pte.xz"}
    assert {path.name for path in output.iterdir() if ".pte" in path.name} == files
    assert {entry["file"] for entry in manifest(output)["methods"]} == files
    assert files <= set(manifest(output)["files"])
    for name in files:
        plain = expand_program(output / name)
        assert plain.read_bytes() == name.removesuffix(".xz").encode()  # what the stand-in wrote


def test_every_program_is_lowered_in_the_form_that_was_asked_for(pipeline, tmp_path, monkeypatch):
    calls = []

    def write(part, *_, four_bit, external_weights, **__):
        calls.append((part.name, four_bit, external_weights))
        raise ConfigError("enough")

    monkeypatch.setattr(export_module, "write_programs", write)
    config = tiny_pipelines.cheap_settings(activation_mode="dynamic")
    options = {"steps": 2, "trajectories": 4, "four_bit": "split", "external_weights": True}
    with pytest.raises(ConfigError, match="enough"):
        export_module.export_pipeline(pipeline, config, tmp_path / "out", **options)
    assert calls == [("text_encoder", "split", True)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An unconditional pipeline of few nodes, weights apart, all compressed."""
    root = tmp_path_factory.mktemp("forms")
    DDPMPipeline(plain_unet(), DDPMScheduler()).save_pretrained(root / "ddpm")
    words = ["export", root / "ddpm", "--output", root / "out", "--weights", 4, "--levels", "int4"]
    words += ["--allocation", "uniform", "--refinements", 0, "--steps", 2, "--trajectories", 2]
    words += ["--external-weights", "--compress"]
    run = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    return root / "out", run.output


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported[0], tmp_path / "out")


@pytest.mark.matrix
@pytest.mark.xnnpack
def test_the_folder_and_its_manifest_name_both_files(exported):
    output, text = exported
    names = {path.name for path in output.iterdir() if "denoiser" in path.name}
    # though the programs were drawn with and measured
    assert names == {"denoiser.pte.xz", "denoiser.ptd.xz"}
    (entry,) = manifest(output)["methods"]
    assert (entry["file"], entry["weights"]) == ("denoiser.pte.xz", "denoiser.ptd.xz")
    assert entry["four_bit_layers"] > 0
    files = manifest(output)["files"]
    size = sum(files[name]["bytes"] for name in names)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["bytes"] == summary["parts"]["denoiser"]["bytes"] == size
    assert f" {size / 2**20:,.2f} " in text
    PipelineRunner(output, verify=True)


@pytest.mark.matrix
@pytest.mark.xnnpack
def test_images_are_those_of_the_plain_files(folder, tmp_path):
    image = PipelineRunner(folder).sample(steps=2, seed=3)
    expanded = sorted(path.name for path in folder.glob(".denoiser.*"))
    assert len(expanded) == 2
    assert np.array_equal(PipelineRunner(folder).sample(steps=2, seed=3), image)
    assert sorted(path.name for path in folder.glob(".denoiser.*")) == expanded
    # the package finds the same expansions: both name them by content
    assert {expand_program(folder / f"denoiser.{kind}.xz").name for kind in ("pte", "ptd")} == set(
        expanded
    )
    data = manifest(folder)
    (entry,) = data["methods"]
    for key in ("file", "weights"):
        packed = folder / entry[key]
        entry[key] = packed.stem
        shutil.copyfile(expand_program(packed), folder / packed.stem)
    data["files"] = listed_files(folder, "pipeline.json")
    (folder / "pipeline.json").write_text(json.dumps(seal(data)))
    assert np.array_equal(PipelineRunner(folder).sample(steps=2, seed=3), image)
    shapes = [spec["shape"] for spec in entry["inputs"]]
    inputs = [torch.ones(shape) for shape in shapes]
    (expected,) = XnnpackRunner(folder / "denoiser.pte", entry["method"])(*inputs)
    named = {spec["name"]: value for spec, value in zip(entry["inputs"], inputs, strict=True)}
    actual = PipelineRunner(folder).programs.run("denoiser", (8, 8), named)["noise_pred"]
    assert torch.equal(actual, expected)


@pytest.mark.matrix
@pytest.mark.xnnpack
@pytest.mark.parametrize("name", ["denoiser.pte.xz", "denoiser.ptd.xz"])
def test_a_damaged_compressed_file_is_refused_and_leaves_nothing_behind(folder, name):
    flip(folder / name)
    with pytest.raises(ArtifactError, match="checksum"):
        PipelineRunner(folder, verify=True)
    with pytest.raises(ArtifactError, match=f"{name} is corrupted"):
        PipelineRunner(folder).sample(steps=2)
    sibling = "denoiser.ptd" if name == "denoiser.pte.xz" else "denoiser.pte"
    assert all(path.name.startswith(f".{sibling}.") for path in folder.glob(".denoiser.*"))
