"""An export that starts from a kept run: what did not change is taken, the rest solved."""

import copy
import dataclasses
import json
import shutil
from typing import NamedTuple

import pytest
import tiny_pipelines
import torch
from eager_programs import UNMEASURED, eager_writer
from records import flip

from mpqdm_fx import ArtifactError, ConfigError, MPQConfig, RunOptions, export_pipeline
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.pipelines.adapters import Lora
from mpqdm_fx.pipelines.export import ExportResult
from mpqdm_fx.report.export_tables import layers_line

OPTIONS = {"steps": 2, "trajectories": 2, "prompts": ["a cat", "a dog"], **UNMEASURED}
CHEAP = tiny_pipelines.cheap_settings(slowdown=1)
CHANGED = {"down_blocks.0.resnets.0.conv2", "up_blocks.1.resnets.0.conv1"}
ATTENTION = ("to_q", "to_v")  # what the LoRA changes


class Killed(BaseException):
    """Stands for a signal: nothing but the interpreter catches it."""


class Kept(NamedTuple):
    """An export and its run."""

    pipeline: object
    result: ExportResult
    run: RunOptions


def export(pipeline, output, config=CHEAP, *, dies_at=None, **options):
    """Export with programs that are not lowered."""
    write = eager_writer({})

    def die(part, quantized, examples, path, **settings):
        if path.name == dies_at:
            raise Killed
        return write(part, quantized, examples, path, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpqdm_fx.pipelines.export.write_programs", die)
        patch.setattr("mpqdm_fx.pipelines.report.can_render", lambda: False)  # its page takes long
        return export_pipeline(pipeline, config, output, **{**OPTIONS, **options})


def changed(pipeline, names):
    """A copy of a pipeline with other weights in some layers of its UNet."""
    other = copy.deepcopy(pipeline)
    for name, module in other.unet.named_modules():
        if name in names:
            module.weight.data = module.weight.data.flip(0)
    return other


def kept(pipeline, root, config=CHEAP, **options):
    """An export whose run is kept."""
    run = RunOptions(directory=root / "run")
    result = export(pipeline, root / "out", config, run=run, **options)
    return Kept(pipeline, result, RunOptions(start_from=root / "run"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    return kept(tiny_pipelines.ddim(root), root)


@pytest.fixture(scope="module")
def drawn_by_text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return kept(tiny_pipelines.stable_diffusion(root), root)


def codes(result):
    graph = result.quantized["denoiser"].rounded
    layers = weight_layers(graph, embeddings=True)
    return {name: layer.module.weight_codes for name, layer in layers.items()}


def check_started(before, started, touched):
    """Codes, plan, summary and report of an export that solved `touched` of its denoiser."""
    old, new = codes(before.result), codes(started)
    assert touched == {name for name in old if not torch.equal(old[name], new[name])}
    assert all(old[name].shape == new[name].shape for name in old)
    assert started.quantized.keys() == {"denoiser"}  # the others were taken whole
    assert started.quantized["denoiser"].plan == before.result.quantized["denoiser"].plan
    counts = [started.summary["parts"]["denoiser"][f"layers_{key}"] for key in ("taken", "solved")]
    assert counts == [len(old) - len(touched), len(touched)]
    report = (started.directory / "report.json").read_text()
    assert f"{len(touched)} of {len(old)} layers were solved" in report
    assert not started.directory.with_name(f"{started.directory.name}.checkpoint").exists()


def test_layers_of_other_weights_are_solved_and_the_rest_is_taken(base, tmp_path):
    started = export(changed(base.pipeline, CHANGED), tmp_path / "out", run=base.run)
    names = set(codes(started))
    check_started(base, started, {n for n in names if n.partition("_part")[0] in CHANGED})
    assert "layers_taken" not in base.result.summary["parts"]["denoiser"]
    assert layers_line(started.summary).startswith("layers: 2 solved, ")
    assert layers_line(base.result.summary) == ""


def test_a_part_that_did_not_change_is_taken_whole(base, tmp_path, monkeypatch):
    monkeypatch.setattr("mpqdm_fx.pipelines.export.quantize", None)  # nothing is quantized
    started = export(base.pipeline, tmp_path / "out", run=base.run)
    before, after = base.result, started
    assert not after.quantized
    assert after.summary["seconds_to_quantize"] == 0 < before.summary["seconds_to_quantize"]
    assert after.summary["parts"]["denoiser"]["layers_solved"] == 0
    assert after.summary["denoiser_sqnr_db"] == before.summary["denoiser_sqnr_db"]
    programs = [
        (folder / "denoiser.pte").read_bytes() for folder in (before.directory, after.directory)
    ]
    assert programs[0] == programs[1]
    assert "taken whole from an earlier export" in (after.directory / "report.json").read_text()


def _refused(base, tmp_path, error, message, pipeline=None, **options):
    output, run = tmp_path / "out", options.pop("run", base.run)
    with pytest.raises(error, match=message):
        export(pipeline or base.pipeline, output, options.pop("config", CHEAP), run=run, **options)
    assert not output.exists()
    assert not output.with_name("out.checkpoint").exists()


def test_a_run_with_other_settings_or_of_another_model_is_refused_by_name(base, tmp_path):
    refused = (base, tmp_path, ConfigError)
    _refused(*refused, r"other settings: numbers\.steps was 2, is 3", steps=3)
    six = dataclasses.replace(CHEAP, weight_bits=6)
    _refused(*refused, r"settings\.weight_bits was 8, is 6", config=six)
    _refused(*refused, "program form was", external_weights=True)
    other = copy.deepcopy(base.pipeline)
    for parameter in other.unet.parameters():
        parameter.data += 1
    _refused(*refused, "no layer of denoiser has the weights that it had", other)
    narrow = copy.deepcopy(base.pipeline)
    narrow.unet.time_embedding.linear_1 = torch.nn.Linear(16, 32)
    narrow.unet.time_embedding.linear_2 = torch.nn.Linear(32, 64)
    shape = r"of denoiser the shape of time_embedding\.linear_1\.bias was \[64\], is \[32\]"
    _refused(*refused, shape, narrow)
    other = copy.deepcopy(base.pipeline)
    other.unet.conv_norm_out.eps = 1e-3
    _refused(*refused, "same shapes and other settings", other)


def test_a_folder_that_is_no_finished_run_is_refused(base, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    run = RunOptions(start_from=empty)
    _refused(base, tmp_path, ArtifactError, r"export\.json is missing", run=run)
    copied = tmp_path / "run"
    shutil.copytree(base.run.start_from, copied)
    run = RunOptions(start_from=copied)
    flip(copied / "denoiser" / "decisions.safetensors")
    other = changed(base.pipeline, CHANGED)
    _refused(base, tmp_path, ArtifactError, r"decisions\.safetensors", other, run=run)
    shutil.rmtree(copied / "denoiser")
    _refused(base, tmp_path, ArtifactError, "has no solved layers of denoiser", other, run=run)
    flip(copied / "denoiser.pte")
    again = r"denoiser\.json and resume the export that keeps its run there"
    _refused(base, tmp_path, ArtifactError, again, run=run)
    (copied / "denoiser.json").unlink()
    _refused(base, tmp_path, ArtifactError, "has no denoiser that is finished", run=run)
    header = json.loads((copied / "export.json").read_text())
    for cut in ({}, {**header, "numbers": header["numbers"][1:]}, {**header, "models": {}}):
        (copied / "export.json").write_text(json.dumps(cut))
        _refused(base, tmp_path, (ArtifactError, ConfigError), "run anew|other settings", run=run)
    (copied / "finished.json").unlink()
    _refused(base, tmp_path, ArtifactError, "that was not finished", run=run)


def test_folders_that_are_in_one_another_are_refused_and_a_kept_run_is_not_written_over(
    base, tmp_path
):
    inside = RunOptions(directory=tmp_path / "out" / "run")
    _refused(base, tmp_path, ConfigError, "it lies in output", run=inside)
    there = RunOptions(directory=base.run.start_from)
    _refused(
        base,
        tmp_path,
        ConfigError,
        "holds the run of an export whose parts are finished",
        run=there,
    )


@pytest.mark.matrix
def test_what_a_lora_left_alone_is_taken_and_the_rest_is_solved(drawn_by_text, lora, tmp_path):
    before = drawn_by_text
    started = export(before.pipeline, tmp_path / "out", lora=Lora(file=lora), run=before.run)
    check_started(before, started, {n for n in codes(started) if n.endswith(ATTENTION)})
    for name in ("text_encoder", "vae_decoder"):
        part, old = (r.summary["parts"][name] for r in (started, before.result))
        assert part["layers_solved"] == 0 < part["layers_taken"]
        assert part["quantized_sqnr_db"] == old["quantized_sqnr_db"]


@pytest.mark.matrix
def test_a_started_export_that_was_killed_goes_on_and_can_be_started_from(base, tmp_path):
    other = changed(base.pipeline, CHANGED)
    run = dataclasses.replace(base.run, directory=tmp_path / "run")
    with pytest.raises(Killed):
        export(other, tmp_path / "out", dies_at="denoiser.pte", run=run)
    assert not (tmp_path / "out").exists()
    result = export(other, tmp_path / "out", run=dataclasses.replace(run, resume=True))
    whole = codes(export(other, tmp_path / "whole", run=base.run))
    assert all(torch.equal(value, whole[name]) for name, value in codes(result).items())
    further = RunOptions(start_from=tmp_path / "run")
    back = codes(export(base.pipeline, tmp_path / "back", run=further))
    assert all(torch.equal(value, back[name]) for name, value in codes(base.result).items())


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_started_export_is_about_as_good_as_one_from_nothing(lora, tmp_path, mode):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    config = MPQConfig(weight_bits=4, activation_mode=mode)
    options = {"trajectories": 8, "steps": 4}
    before = kept(pipeline, tmp_path, config, **options)
    options["lora"] = Lora(file=lora, scale=0.3)
    started = export(pipeline, tmp_path / "started", config, run=before.run, **options)
    whole = export(pipeline, tmp_path / "whole", config, **options)
    ratios = [result.summary["denoiser_sqnr_db"] for result in (started, whole)]
    assert ratios[0] >= ratios[1] - 1.5
    bits = [result.quantized["denoiser"].plan.effective_bits for result in (started, whole)]
    assert bits[0] == pytest.approx(bits[1], rel=0.01)
