"""Metrics of pictures are of the pictures that the pipeline's VAE makes of latents."""

import json
import math
import shutil

import pytest
import tiny_pipelines
import torch
from conditioned import CHEAP, PROMPTS, RUNS, run, source_in

import mpqdm_fx
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.jobs.budgets import BudgetJudge
from mpqdm_fx.jobs.evaluate import check_gates
from mpqdm_fx.jobs.evaluation import Evaluation, check_networks, evaluated_metrics
from mpqdm_fx.report.gates import parse_gates
from mpqdm_fx.report.networks import Networks

FEW = ["--num", 3, "--steps", 2]


def decoded(vae, latents):
    """Pictures in 0..1 by the pipeline's own VAE, without anything of the package."""
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return (images.double() / 2 + 0.5).clamp(0, 1)


def peak_ratio(vae, expected, actual):
    error = (decoded(vae, expected) - decoded(vae, actual)).square().mean()
    return -10 * math.log10(error)


def without_vae(folder, target):
    shutil.copytree(folder, target)
    shutil.rmtree(target / "vae")
    return target


def test_evaluate_measures_decoded_pictures_of_the_folders_prompts(pipeline, quantized):
    pipe, folder = pipeline
    status, text = run("evaluate", quantized, *FEW, "--json")
    assert status == 0, text
    metrics = json.loads(text)
    source = source_in(folder, prompts=PROMPTS, guidance=3.0)
    evaluation = Evaluation.of(source, num=3, steps=2, seed=90_000)
    images = evaluation.draw(mpqdm_fx.load(quantized))
    assert images.shape[1] == 4
    expected = peak_ratio(pipe.vae, evaluation.run.images, images)
    assert metrics["psnr"] == pytest.approx(expected, abs=1e-3)
    assert 0 < metrics["ssim"] <= 1


def test_networks_are_shown_decoded_pictures(quantized, tmp_path):
    class Sizes(torch.nn.Module):
        def forward(
            self, images: torch.Tensor, resize_images: bool = False, return_lpips: bool = False
        ) -> torch.Tensor:
            assert images.shape[1:] == (3, 16, 16)
            return images.flatten(1) / 255

    torch.jit.script(Sizes()).save(str(tmp_path / "vgg16.pt"))
    words = ["--lpips", tmp_path / "vgg16.pt", "--json"]
    status, text = run("evaluate", quantized, *FEW, *words)
    assert status == 0, text
    assert json.loads(text)["lpips"] > 0


def test_latents_of_three_channels_are_no_pictures_before_they_are_decoded(tmp_path):
    pipe = tiny_pipelines.latent_diffusion(tmp_path)
    pipe.save_pretrained(tmp_path / "p")
    source = source_in(tmp_path / "p")
    evaluation = Evaluation.of(source, num=2, steps=2, seed=1)
    noisy = evaluation.run.images + 0.3
    metrics = evaluation.measure(source.model, noisy)
    expected = peak_ratio(pipe.vqvae, evaluation.run.images, noisy)
    assert metrics.psnr == pytest.approx(expected, abs=1e-3)
    shutil.rmtree(tmp_path / "p" / "vqvae")
    bare = source_in(tmp_path / "p")
    assert bare.pictures(noisy) is None
    assert "psnr" not in evaluated_metrics(bare)
    assert Evaluation.of(bare, num=2, steps=2, seed=1).measure(bare.model, noisy).psnr is None


def test_a_vae_that_is_gone_is_named_where_pictures_are_asked_for(pipeline, quantized, tmp_path):
    bare = without_vae(pipeline[1], tmp_path / "bare")
    words = [quantized, *FEW, "--model", bare]
    status, text = run("evaluate", *words, "--gate", "psnr>=1")
    assert (status, "StableDiffusionPipeline's folder lacks its vae" in text) == (2, True), text
    source = source_in(bare)
    with pytest.raises(ConfigError, match=r"lpips: the .* lacks its vae; leave the networks out"):
        check_networks(Networks(perceptual=torch.nn.Identity()), source, inputs=None)
    status, text = run("evaluate", *words, "--json")
    assert (status, "psnr" in json.loads(text)) == (0, False)


def test_a_vae_of_another_width_is_not_used(pipeline, tmp_path):
    shutil.copytree(pipeline[1], tmp_path / "sd")
    config = json.loads((tmp_path / "sd" / "vae" / "config.json").read_text())
    (tmp_path / "sd" / "vae" / "config.json").write_text(
        json.dumps(config | {"latent_channels": 8})
    )
    assert "vae does not decode 4 channels" in source_in(tmp_path / "sd").no_pictures


def test_gates_and_budgets_judge_decoded_pictures(pipeline, quantized):
    source = source_in(pipeline[1], prompts=PROMPTS, guidance=3.0)
    check_gates(parse_gates(["psnr>=20", "ssim>=0.5"]), source, "packed")
    judge = BudgetJudge(source, {"num": 3, "steps": 2, "seed": 90_000})
    measured, images = judge.measure(mpqdm_fx.load(quantized))
    floats = judge.evaluation.run.images
    assert measured["psnr"] == pytest.approx(peak_ratio(pipeline[0].vae, floats, images), abs=1e-3)


@pytest.mark.usefixtures("unmeasured")
def test_quantize_judges_a_gate_on_decoded_pictures(pipeline, tmp_path):
    gates = ["--gate", "psnr>=500", "--gate", "ssim>=0.01"]
    status, text = run("quantize", pipeline[1], *CHEAP, *RUNS, *gates, "--output", tmp_path / "out")
    assert status == 1, text
    assert (text.count("passed"), text.count("FAILED")) == (1, 1)


def test_without_torchmetrics_the_other_metrics_are_there(quantized, monkeypatch):
    for module in ("jobs.evaluation", "report.metrics"):
        monkeypatch.setattr(f"mpqdm_fx.{module}.measures_pictures", lambda: False)
    status, text = run("evaluate", quantized, *FEW, "--json")
    assert status == 0, text
    assert {"x0_sqnr", "psnr"} & json.loads(text).keys() == {"x0_sqnr"}
