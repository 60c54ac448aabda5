"""An export that starts from a kept run: what did not change is taken, the rest solved."""

import dataclasses
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

OPTIONS = {"steps": 2, "trajectories": 2, "prompts": ["a cat", "a dog"], **UNMEASURED}
CHEAP = tiny_pipelines.cheap_settings()
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
        return export_pipeline(pipeline, config, output, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    pipeline = tiny_pipelines.stable_diffusion(root)
    result = export(pipeline, root / "out", run=RunOptions(directory=root / "run"))
    return Kept(pipeline, result, RunOptions(start_from=root / "run"))


@pytest.fixture(scope="module")
def started(base, lora, tmp_path_factory):
    output = tmp_path_factory.mktemp("started") / "out"
    return export(base.pipeline, output, lora=Lora(file=lora), run=base.run)


def codes(result):
    graph = result.quantized["denoiser"].rounded
    layers = weight_layers(graph, embeddings=True)
    return {name: layer.module.weight_codes for name, layer in layers.items()}


def test_what_the_lora_left_alone_is_taken_and_the_rest_is_solved(base, started):
    before, after = codes(base.result), codes(started)
    assert before.keys() == after.keys()
    touched = {name for name in before if name.endswith(ATTENTION)}
    assert touched == {name for name in before if not torch.equal(before[name], after[name])}
    assert all(before[name].shape == after[name].shape for name in touched)
    assert started.quantized.keys() == {"denoiser"}
    assert started.quantized["denoiser"].plan == base.result.quantized["denoiser"].plan
    parts = started.summary["parts"]
    assert parts["denoiser"]["layers_solved"] == len(touched)
    assert parts["denoiser"]["layers_taken"] == len(before) - len(touched)
    for name in ("text_encoder", "vae_decoder"):
        assert (parts[name]["layers_solved"], parts[name]["layers_taken"] > 0) == (0, True)
        assert parts[name]["bytes"] == base.result.summary["parts"][name]["bytes"]
    assert (
        0
        < started.summary["seconds_to_quantize"]
        == pytest.approx(started.quantized["denoiser"].report.seconds)
    )
    assert not started.directory.with_name("out.checkpoint").exists()
    report = (started.directory / "report.json").read_text()
    assert f"{len(touched)} of {len(before)} layers were solved" in report
    assert "taken whole from an earlier export" in report
    assert "layers_taken" not in base.result.summary["parts"]["denoiser"]


def _refused(base, tmp_path, error, message, pipeline=None, **options):
    output, run = tmp_path / "out", options.pop("run", base.run)
    with pytest.raises(error, match=message):
        export(pipeline or base.pipeline, output, options.pop("config", CHEAP), run=run, **options)
    assert not output.exists()
    assert not output.with_name("out.checkpoint").exists()


def test_a_run_with_other_settings_or_of_another_model_is_refused_by_name(base, lora, tmp_path):
    refused = (base, tmp_path, ConfigError)
    _refused(*refused, r"other settings: numbers\.steps was 2, is 3", steps=3)
    six = dataclasses.replace(CHEAP, weight_bits=6)
    _refused(*refused, r"settings\.weight_bits was 8, is 6", config=six)
    _refused(*refused, "program form was", external_weights=True)
    other = tiny_pipelines.stable_diffusion(tmp_path)
    for parameter in other.unet.parameters():
        parameter.data += 1
    _refused(*refused, "no layer of denoiser has the weights that it had", other)
    wider = tiny_pipelines.stable_diffusion(tmp_path, block_out_channels=(24,))
    shape = r"of denoiser the shape of conv_in\.bias was \[16\], is \[24\]"
    _refused(*refused, shape, wider)
    heads = tiny_pipelines.stable_diffusion(tmp_path)
    heads.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads = 1
    _refused(*refused, "same shapes and other settings", heads)


def test_a_folder_that_is_no_finished_run_is_refused(base, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    run = RunOptions(start_from=empty)
    _refused(base, tmp_path, ArtifactError, r"export\.json is missing", run=run)
    copied = tmp_path / "run"
    shutil.copytree(base.run.start_from, copied)
    run = RunOptions(start_from=copied)
    flip(copied / "denoiser" / "decisions.safetensors")
    other = tiny_pipelines.stable_diffusion(tmp_path)
    other.unet.conv_in.bias.data += 1
    _refused(base, tmp_path, ArtifactError, r"decisions\.safetensors", other, run=run)
    (copied / "finished.json").unlink()
    _refused(base, tmp_path, ArtifactError, "was not finished; go on|was not finished: ", run=run)


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
def test_a_started_export_that_was_killed_goes_on_and_can_be_started_from(base, lora, tmp_path):
    run = dataclasses.replace(base.run, directory=tmp_path / "run")
    options = {"lora": Lora(file=lora), "run": run}
    with pytest.raises(Killed):
        export(base.pipeline, tmp_path / "out", dies_at="denoiser.pte", **options)
    assert not (tmp_path / "out").exists()
    options["run"] = dataclasses.replace(run, resume=True)
    result = export(base.pipeline, tmp_path / "out", **options)
    whole = export(base.pipeline, tmp_path / "whole", lora=Lora(file=lora), run=base.run)
    first, second = codes(result), codes(whole)
    assert all(torch.equal(first[name], second[name]) for name in first)
    back = export(base.pipeline, tmp_path / "back", run=RunOptions(start_from=tmp_path / "run"))
    before = codes(base.result)
    assert all(torch.equal(value, before[name]) for name, value in codes(back).items())


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_started_export_is_about_as_good_as_one_from_nothing(lora, tmp_path, mode):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    config = MPQConfig(weight_bits=4, activation_mode=mode)
    options = {"trajectories": 8, "steps": 4}
    export(pipeline, tmp_path / "base", config, run=RunOptions(directory=tmp_path / "r"), **options)
    options["lora"] = Lora(file=lora, scale=0.3)
    run = RunOptions(start_from=tmp_path / "r")
    started = export(pipeline, tmp_path / "started", config, run=run, **options)
    whole = export(pipeline, tmp_path / "whole", config, **options)
    ratios = [result.summary["denoiser_sqnr_db"] for result in (started, whole)]
    assert ratios[0] >= ratios[1] - 1.0
    bits = [result.quantized["denoiser"].plan.effective_bits for result in (started, whole)]
    assert bits[0] == pytest.approx(bits[1], rel=0.01)
