"""Pictures of an export: both rows from one noise, and how far the programs are from float."""

import math

import pytest
import tiny_pipelines
import torch
from eager_programs import EagerPrograms, eager_export
from torch.utils import _pytree as pytree

from mpqdm_fx.pipelines.part_inputs import inputs_of
from mpqdm_fx.pipelines.pictures import FLOAT, PROGRAMS, draw_pictures
from mpqdm_fx.pipelines.program_files import ProgramFiles
from mpqdm_fx.report.reference_run import EVALUATION_SEED

KINDS = [
    "stable_diffusion", "stable_diffusion_xl", "inpainting", "ddpm", "ddim", "latent_diffusion",
]  # fmt: skip
RUNS = {"steps": 3, "guidance": 3.0, "trajectories": 4}


def exported(kind, tmp_path, monkeypatch, **options):
    """A folder in float, how its pipeline is called, and the methods that run as its programs."""
    pipeline, output = getattr(tiny_pipelines, kind)(tmp_path), tmp_path / "out"
    _, runner = eager_export(pipeline, output, monkeypatch, **RUNS, **options)
    inputs, _ = inputs_of(pipeline, None, prompts=("a cat", "a dog"), batch_size=8, seed=0, **RUNS)
    monkeypatch.setattr(ProgramFiles, "models", runner.models, raising=False)
    monkeypatch.setattr(ProgramFiles, "_load", EagerPrograms._load)
    return output, inputs, runner.models


@pytest.mark.parametrize(
    ("kind", "split"), [*((kind, False) for kind in KINDS), ("stable_diffusion", True)]
)
def test_what_is_exported_in_float_draws_what_the_pipeline_does(tmp_path, monkeypatch, kind, split):
    output, inputs, _ = exported(kind, tmp_path, monkeypatch, split=split, tabulate=split)
    drawn = draw_pictures(output, 3, prompts=inputs.prompts, inputs=inputs)
    assert list(drawn.samples) == list(drawn.images) == [FLOAT, PROGRAMS]
    assert all(len(row) == 3 for row in (*drawn.samples.values(), *drawn.images.values()))
    numbers = drawn.numbers()
    labels = () if drawn.prompts == () else ("a cat", "a dog", "a cat")
    assert (numbers.labels, numbers.seed, numbers.steps) == (labels, EVALUATION_SEED, 3)
    for ratio in (drawn.backend_sqnr_db, numbers.x0_sqnr_db, numbers.psnr_db, *numbers.by_picture):
        assert ratio > 80
    assert numbers.ssim > 0.999


class Louder(torch.nn.Module):
    """A method whose outputs are a tenth too large: an error of 20 dB."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, **call):
        return pytree.tree_map(lambda value: 1.1 * value, pytree.tree_leaves(self.method(**call)))


def test_the_denoisers_error_is_that_of_single_calls_on_the_float_runs(tmp_path, monkeypatch):
    output, inputs, models = exported("ddim", tmp_path, monkeypatch)
    models["denoiser.pte"]["forward"] = Louder(models["denoiser.pte"]["forward"])
    drawn = draw_pictures(output, 2, prompts=(), inputs=inputs)
    assert drawn.backend_sqnr_db == pytest.approx(20, abs=1e-3)
    numbers = drawn.numbers()
    assert math.isfinite(numbers.x0_sqnr_db)
    assert numbers.ssim < 1


def test_samples_are_compared_as_the_scheduler_leaves_them(tmp_path, monkeypatch):
    output, inputs, models = exported("stable_diffusion", tmp_path, monkeypatch)
    models["vae_decoder.pte"]["forward"] = Louder(models["vae_decoder.pte"]["forward"])
    drawn = draw_pictures(output, 2, prompts=inputs.prompts, inputs=inputs)
    numbers = drawn.numbers()
    assert numbers.x0_sqnr_db > 80  # latents, which no decoder has touched
    assert numbers.psnr_db < 60
    assert drawn.samples[FLOAT].shape == (2, 4, *(side // 2 for side in inputs.size))


def test_without_the_pipeline_programs_draw_alone(tmp_path, monkeypatch):
    output, inputs, _ = exported("stable_diffusion", tmp_path, monkeypatch)
    compared = draw_pictures(output, 2, prompts=inputs.prompts, inputs=inputs)
    alone = draw_pictures(output, 2, prompts=inputs.prompts, inputs=None)
    assert torch.equal(alone.images[PROGRAMS], compared.images[PROGRAMS])
    assert list(alone.images) == [PROGRAMS]
    numbers = alone.numbers()
    assert (numbers.x0_sqnr_db, numbers.psnr_db, numbers.by_picture) == (None, None, ())
    assert alone.backend_sqnr_db is None
