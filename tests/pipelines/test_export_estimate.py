"""What an export takes is told before it, and what it is compared with is the pipeline itself."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny_pipelines
from eager_programs import eager_export
from pipeline_kinds import pixels
from test_runner_loop import diffusers_image
from typer.testing import CliRunner

from mpqdm_fx import MPQConfig
from mpqdm_fx.cli import app as cli
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.model.feasibility import weights_of
from mpqdm_fx.pipelines import estimate
from mpqdm_fx.pipelines.estimate import ExportEstimate, PartEstimate, estimate_export
from mpqdm_fx.pipelines.export import export_pipeline
from mpqdm_fx.pipelines.layout import layout_of
from mpqdm_fx.pipelines.part_inputs import PipelineInputs, inputs_of
from mpqdm_fx.pipelines.part_seconds import lower_seconds
from mpqdm_fx.pipelines.recorded import ModuleParts
from mpqdm_fx.pipelines.runner import PipelineRunner
from mpqdm_fx.records.run_options import RunOptions

KINDS = [
    "stable_diffusion", "stable_diffusion_xl", "inpainting", "ddpm", "ddim", "latent_diffusion",
]  # fmt: skip
RUNS = {"steps": 3, "guidance": 3.0, "trajectories": 4}


@pytest.mark.parametrize(
    ("kind", "tabulate"), [*((kind, False) for kind in KINDS), ("stable_diffusion", True)]
)
def test_what_programs_are_compared_with_draws_as_diffusers_does(
    tmp_path, monkeypatch, kind, tabulate
):
    pipeline = getattr(tiny_pipelines, kind)(tmp_path)
    output = tmp_path / "out"
    eager_export(pipeline, output, monkeypatch, tabulate=tabulate, split=tabulate, **RUNS)
    inputs, _ = inputs_of(pipeline, None, prompts=("a cat",), batch_size=8, seed=0, **RUNS)
    runner = PipelineRunner(output)
    parts = ModuleParts(inputs.layout, runner.manifest["timesteps"])
    prompt = ["a cat"] if inputs.takes_text else []
    guided = {"guidance_scale": 3.0} if prompt else {}
    runner_call, pipeline_call = pixels(runner)
    expected = diffusers_image(pipeline, *prompt, num_inference_steps=3, **guided, **pipeline_call)
    actual = runner.draw(runner.request(*prompt, **runner_call), parts)
    assert np.abs(actual - expected).max() < 1e-4


@pytest.fixture
def no_work(monkeypatch):
    """Neither runs of the float model, nor files."""

    def begun(self):
        raise AssertionError("the work was begun")

    monkeypatch.setattr(PipelineInputs, "runs", property(begun))


@pytest.mark.usefixtures("no_work")
def test_a_dry_run_tells_every_part_and_writes_nothing(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    pipeline.save_pretrained(tmp_path / "sd")
    before = sorted(tmp_path.rglob("*"))
    run = dry_run(tmp_path / "sd", "--output", tmp_path / "out", "--json")
    assert sorted(tmp_path.rglob("*")) == before
    estimate = json.loads(run.stdout)
    assert list(estimate["parts"]) == ["text_encoder", "denoiser", "vae_decoder"]
    unet = sum(value.numel() for value in pipeline.unet.parameters())
    assert estimate["parts"]["denoiser"]["parameters"] == unet
    assert estimate["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)
    assert estimate["bytes"] == sum(part["program_bytes"] for part in estimate["parts"].values())
    works = ("quantize_seconds", "lower_seconds", "measure_seconds")
    spent = sum(part[work] for part in estimate["parts"].values() for work in works)
    assert estimate["seconds"] == pytest.approx(spent + estimate["draw_seconds"])


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("in_float", [True, False])
def test_a_disk_that_does_not_hold_the_export_is_refused_before_it(tmp_path, monkeypatch, in_float):
    pipeline = tiny_pipelines.latent_diffusion(tmp_path)
    settings = None if in_float else tiny_pipelines.cheap_settings()
    told = estimated(pipeline, settings)
    if not in_float:  # solved layers of all parts, of a VAE's half, lie there until the end
        layers = weights_of(pipeline.unet) + weights_of(pipeline.vqvae)
        layers -= weights_of(pipeline.vqvae.encoder) + weights_of(pipeline.vqvae.quant_conv)
        assert told.disk_bytes == pytest.approx(told.bytes + layers, rel=1e-3)
    free, output = told.disk_bytes // 4, tmp_path / "out"  # of which graphs, too, are a part
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=free))
    with pytest.raises(ConfigError, match=rf"output='{output}': .* and {free} bytes\)"):
        export_pipeline(pipeline, settings, output, **RUNS)
    kept = RunOptions(directory=tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"directory='{kept.directory}': .* needed there"):
        export_pipeline(pipeline, settings, output, run=kept, **RUNS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_work")
def test_a_dry_run_prints_a_table_that_fits_eighty_columns_and_what_the_disk_lacks(
    tmp_path, monkeypatch
):
    tiny_pipelines.latent_diffusion(tmp_path).save_pretrained(tmp_path / "p")
    used = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used)
    output = tmp_path / "out"
    *lines, lack = dry_run(tmp_path / "p", "--output", output, "--float").stdout.splitlines()
    assert lack.startswith(f"--output {output}: ")
    assert "MiB are needed there" in lack
    assert "and 1000 bytes); free some" in lack
    assert max(map(len, lines)) <= 80
    rows = ("time in all", "peak memory", "disk while it runs", "free there")
    for words in ("denoiser", "vae_decoder", *rows):
        assert sum(words in line for line in lines) == 1


def dry_run(*words):
    run = CliRunner().invoke(cli.app, ["export", *map(str, words), "--dry-run"])
    assert run.exit_code == 0, run.output
    return run


def estimated(pipeline, config=None, **options):
    return estimate_export(pipeline, config, **{**RUNS, "prompts": ["a cat"], **options})


@pytest.mark.usefixtures("no_work")
def test_what_is_asked_for_is_what_costs(tmp_path):
    pipeline = tiny_pipelines.latent_diffusion(tmp_path)
    plain, quantized = estimated(pipeline), estimated(pipeline, tiny_pipelines.cheap_settings())
    for name, part in quantized.parts.items():
        assert part.program_bytes < plain.parts[name].program_bytes
        assert part.quantize_seconds > plain.parts[name].quantize_seconds == 0
    larger = estimated(pipeline, sizes=[(16, 16), (24, 16)], samples=0, measure=False)
    for name, part in larger.parts.items():
        assert part.lower_seconds == 2 * plain.parts[name].lower_seconds
        assert part.measure_seconds == 0 < plain.parts[name].measure_seconds
    assert larger.draw_seconds == 0 < plain.draw_seconds


def test_a_dry_run_refuses_what_the_export_refuses(tmp_path):
    pipeline = tiny_pipelines.latent_diffusion(tmp_path)
    with pytest.raises(ConfigError, match="activations of 8 bits, not"):
        estimated(pipeline, tiny_pipelines.cheap_settings(activation_bits=4))
    with pytest.raises(ConfigError, match="at least one prompt"):
        estimated(pipeline, prompts=[])
    budget = MPQConfig(effective_bits=1.0, activation_mode="dynamic")
    with pytest.raises(ConfigError, match="effective_bits"):
        estimated(pipeline, budget)


@pytest.mark.usefixtures("no_work")
def test_tables_take_the_place_of_the_time_branch(tmp_path):
    pipeline = tiny_pipelines.ddpm(tmp_path)
    options = {"prompts": None, "guidance": None, "measure": False}
    told = estimated(pipeline, tabulate=True, steps=500, **options).parts["denoiser"]
    unet = pipeline.unet
    rows = sum(m.out_features for n, m in unet.named_modules() if n.endswith("time_emb_proj"))
    numbers = sum(v.numel() for n, v in unet.named_parameters() if "time_emb" not in n)
    layers = round(told.lower_seconds / lower_seconds(1, 0))
    stored = 4 * (numbers + 500 * rows) + layers * estimate._LAYER_BYTES
    assert told.program_bytes == pytest.approx(stored, rel=1e-3)
    assert told.parameters == sum(v.numel() for v in unet.parameters())


def test_a_half_of_a_vae_counts_its_own_parameters(tmp_path):
    pipeline = tiny_pipelines.inpainting(tmp_path)
    parts = layout_of(pipeline).parts
    total = sum(value.numel() for value in pipeline.vae.parameters())
    assert parts["vae_encoder"].parameters + parts["vae_decoder"].parameters == total


def part_of(**numbers):
    names = [field.name for field in dataclasses.fields(PartEstimate)]
    return PartEstimate(**{**dict.fromkeys(names, 0), **numbers})


def test_the_peak_counts_what_earlier_parts_leave_behind():
    encoder = part_of(held_bytes=10, peak_bytes=35, kept_bytes=3)
    denoiser = part_of(held_bytes=20, peak_bytes=45, kept_bytes=7)

    def peak(*parts):
        named = {str(index): part for index, part in enumerate(parts)}
        return ExportEstimate(parts=named, draw_seconds=0, disk_bytes=0).peak_bytes

    assert peak(encoder, denoiser) == 30 + 3 + 25
    assert peak(denoiser, encoder) == 30 + 7 + 25
    small = part_of(held_bytes=10, peak_bytes=10, kept_bytes=10)
    assert peak(small, small) == 40  # when all are made, before a picture is drawn


@pytest.mark.xnnpack
def test_what_a_finished_part_keeps_is_foretold(export_run):
    told = estimate_export(export_run.pipeline, MPQConfig(weight_bits=4), measure=False, **RUNS)
    for name, quantized in export_run.result.quantized.items():
        tensors = quantized.rounded.state_dict().values()
        kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert told.parts[name].kept_bytes == pytest.approx(kept, rel=0.1), name
