"""A pipeline's denoiser is calibrated and shown as the pipeline draws."""

import json
import shutil

import pytest
import tiny_pipelines
import torch
from conditioned import CHEAP, PROMPTS, RUNS, count_of, run, source_in, states_of
from PIL import Image

import mpqdm_fx
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.nested import concatenate, take_rows, tensor_leaves
from mpqdm_fx.jobs.calibration import calibration_of, held_out_of
from mpqdm_fx.pipelines.components import in_pipeline
from mpqdm_fx.pipelines.layout import layout_of
from mpqdm_fx.pipelines.part_inputs import PipelineInputs
from mpqdm_fx.report.images import save_grid, save_rows
from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.sources.denoisers import draw, pictures, zoom_of
from mpqdm_fx.sources.functions import GivenCalls
from mpqdm_fx.sources.sources import load_source


def without_encoder(folder, target, **entries):
    """A copy without the (first) text encoder, whose index says other things."""
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text())
    index |= {"text_encoder": [None, None], "tokenizer": [None, None], **entries}
    (target / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(target / "text_encoder")
    return target


# -- calibration ---------------------------------------------------------------------------------


def test_every_run_is_calibrated_on_its_prompts_embeddings_and_on_the_empty_ones(pipeline):
    pipe, folder = pipeline
    source = source_in(folder, prompts=PROMPTS)
    calls = list(calibration_of(source, trajectories=4, steps=3, seed=0))
    rows = torch.cat([call["encoder_hidden_states"] for call in calls])
    assert len(rows) == 4 * 3 * 2
    for state in states_of(pipe, PROMPTS[:4]):
        assert count_of(state, rows) == 3
    assert count_of(states_of(pipe, [""])[0], rows) == 4 * 3


def test_guidance_doubles_the_rows_and_none_leaves_the_prompts_alone(pipeline):
    folder, sizes = pipeline[1], {}
    for guidance in (1.0, 3.0):
        source = source_in(folder, prompts=PROMPTS, guidance=guidance)
        calls = list(calibration_of(source, trajectories=4, steps=3, seed=0))
        sizes[guidance] = sum(len(call["sample"]) for call in calls)
    assert sizes == {1.0: 4 * 3, 3.0: 2 * 4 * 3}


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl"])
def numbered(calls):
    """Rows of all but the noise, by timestep and then by what they are conditioned on."""
    rows = concatenate([{**call, "timestep": call["timestep"].float()} for call in calls])
    del rows["sample"]
    weights = torch.arange(1, 10_000, dtype=torch.float64)
    keys = [rows["timestep"].tolist()]
    for _, tensor in tensor_leaves(rows):
        flat = tensor.flatten(1).double() if tensor.ndim > 1 else tensor[:, None].double()
        keys.append((flat @ weights[: flat.shape[1]]).tolist())
    order = sorted(range(len(keys[0])), key=lambda row: [round(key[row], 1) for key in keys])
    return take_rows(rows, torch.tensor(order))


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_denoiser_alone_is_calibrated_on_the_conditions_of_an_export(tmp_path, kind):
    pipeline = getattr(tiny_pipelines, kind)(tmp_path)
    pipeline.save_pretrained(tmp_path / "p")
    layout = layout_of(pipeline)
    exported = PipelineInputs(
        layout=layout, size=layout.default_size, prompts=PROMPTS, steps=3, guidance=4.0,
        trajectories=4, batch_size=16, seed=0,
    )  # fmt: skip
    source = source_in(tmp_path / "p", prompts=PROMPTS, guidance=4.0)
    alone = list(calibration_of(source, trajectories=4, steps=3, seed=0))
    whole = list(exported.runs.calls("denoiser"))
    assert len(alone) == len(whole)
    torch.testing.assert_close(numbered(alone), numbered(whole))


def test_what_judges_has_prompts_that_were_not_calibrated_on(pipeline):
    pipe, folder = pipeline
    source = source_in(folder, prompts=PROMPTS, guidance=1.0)
    rows = torch.cat(
        [call["encoder_hidden_states"] for call in held_out_of(source, steps=2, seed=9)]
    )
    counts = [count_of(state, rows) for state in states_of(pipe, PROMPTS)]
    assert counts == [0, 0, 2, 2, 2, 2]


def test_the_guidance_is_the_pipelines_own_if_none_is_given(pipeline, tmp_path):
    assert source_in(pipeline[1]).runs(1, 0)["guidance_scale"] == 7.5
    tiny_pipelines.stable_diffusion_xl(tmp_path).save_pretrained(tmp_path / "xl")
    assert source_in(tmp_path / "xl").runs(1, 0)["guidance_scale"] == 5.0


def test_embedded_guidance_is_that_of_the_runs_and_calls_once(tmp_path):
    tiny_pipelines.stable_diffusion(tmp_path, time_cond_proj_dim=6).save_pretrained(tmp_path / "p")
    runs = source_in(tmp_path / "p", guidance=4.0).runs(2, 0)
    assert runs.keys() == {"conditions"}
    embeddings = runs["conditions"]["timestep_cond"]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(
        embeddings,
        source_in(tmp_path / "p", guidance=5.0).runs(2, 0)["conditions"]["timestep_cond"],
    )


def test_calls_of_ones_own_stay_what_they_are(pipeline):
    source = load_source(str(pipeline[1]), "unet")
    calls = [{**source.example_inputs, "encoder_hidden_states": torch.ones(2, 5, 16)}]
    joined = in_pipeline(source.with_calls(GivenCalls(calls, held_out=0)))
    assert joined.example_inputs is calls[0]
    assert calibration_of(joined, trajectories=2, steps=2, seed=0) is joined.calls
    assert joined.remarks == ()


# -- without a text encoder ----------------------------------------------------------------------


@pytest.mark.usefixtures("unmeasured")
def test_a_pipeline_without_an_encoder_warns_and_says_so_in_its_summary(pipeline, tmp_path, caplog):
    folder = without_encoder(pipeline[1], tmp_path / "bare")
    status, text = run("quantize", folder, *CHEAP, *RUNS, "--output", tmp_path / "out")
    assert status == 0, text
    words = (
        "seeded random numbers as encoder_hidden_states: the StableDiffusionPipeline has no text"
    )
    assert words in caplog.text
    remarks = json.loads((tmp_path / "out" / "summary.json").read_text())["remarks"]
    assert sum(words in remark for remark in remarks) == 1


def test_a_pipeline_with_an_encoder_has_nothing_to_remark(quantized):
    assert json.loads((quantized / "summary.json").read_text())["remarks"] == []


@pytest.mark.parametrize("option", [["--guidance", 2], ["--prompts", "prompts"]])
def test_prompts_and_guidance_are_refused_where_nothing_encodes_them(
    pipeline, tmp_path, option, monkeypatch
):
    folder = without_encoder(pipeline[1], tmp_path / "bare")
    (tmp_path / "prompts").write_text("a cat\n")
    monkeypatch.chdir(tmp_path)
    status, text = run("quantize", folder, *CHEAP, *option, "--output", tmp_path / "out")
    assert status == 2, text
    assert "has no text encoder; leave prompts and guidance out" in text
    status, text = run("quantize", "digits", *option, "--output", tmp_path / "out")
    assert (status, "no pipeline with a text encoder" in text) == (2, True), text
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_is_not_whole_is_an_error_and_no_random_numbers(pipeline, tmp_path):
    shutil.copytree(pipeline[1], tmp_path / "sd")
    next((tmp_path / "sd" / "text_encoder").glob("*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match="text_encoder"):
        source_in(tmp_path / "sd")


def test_a_folder_that_lacks_its_encoder_is_told(pipeline, tmp_path):
    shutil.copytree(pipeline[1], tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "text_encoder")
    assert "folder lacks its text_encoder; what" in source_in(tmp_path / "sd").remarks[0]


def test_an_encoder_of_another_width_is_told_and_not_used(pipeline, tmp_path):
    shutil.copytree(pipeline[1], tmp_path / "sd")
    torch.manual_seed(0)
    tiny_pipelines._unet(cross_attention_dim=24).save_pretrained(tmp_path / "sd" / "unet")
    source = source_in(tmp_path / "sd")
    assert "embeddings of [16] numbers, the denoiser takes [24]" in source.remarks[0]


def test_the_refiner_is_told_its_scores_beside_the_second_encoders_text(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion_xl(tmp_path)
    pipeline.save_pretrained(tmp_path / "p")
    entries = {"requires_aesthetics_score": True}
    entries["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
    folder = without_encoder(tmp_path / "p", tmp_path / "refiner", **entries)
    tiny_pipelines._unet(
        cross_attention_dim=24, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 24,
    ).save_pretrained(folder / "unet")  # fmt: skip
    runs = source_in(folder, prompts=PROMPTS).runs(2, 0)
    scores = [
        runs[half]["added_cond_kwargs"]["time_ids"] for half in ("conditions", "unconditional")
    ]
    assert scores[0].tolist() == [[64, 64, 0, 0, 6.0]] * 2
    assert scores[1].tolist() == [[64, 64, 0, 0, 2.5]] * 2
    _, _, pooled, _ = pipeline.encode_prompt(PROMPTS[0], device="cpu")
    torch.testing.assert_close(runs["conditions"]["added_cond_kwargs"]["text_embeds"][:1], pooled)


# -- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl", "latent_diffusion"])
def test_pictures_are_what_the_pipelines_vae_makes_of_the_latents(tmp_path, kind):
    pipe = getattr(tiny_pipelines, kind)(tmp_path)
    pipe.save_pretrained(tmp_path / "p")
    latents = torch.randn(5, *source_in(tmp_path / "p").sample_shape)
    images = pictures(latents, source_in(tmp_path / "p"))
    vae = getattr(pipe, "vae", None) or pipe.vqvae
    scaled = latents / vae.config.scaling_factor
    if vae.config.get("latents_mean") is not None:
        mean, std = (
            torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1)
            for name in ("mean", "std")
        )
        scaled = scaled * std + mean
    with torch.no_grad():
        torch.testing.assert_close(images, vae.decode(scaled, return_dict=False)[0])
    assert images.shape == (5, 3, 16, 16)


def test_pictures_of_pixels_are_the_samples(tmp_path):
    tiny_pipelines.ddpm(tmp_path).save_pretrained(tmp_path / "p")
    samples = torch.randn(2, 1, 8, 8)
    assert torch.equal(pictures(samples, source_in(tmp_path / "p")), samples)


def test_the_grid_of_a_folder_shows_its_prompts_as_the_pipeline_draws_them(
    pipeline, quantized, tmp_path
):
    model = mpqdm_fx.load(quantized)
    source = source_in(pipeline[1], prompts=PROMPTS, guidance=3.0)
    drawn = {"num": 2, "steps": 2, "seed": EVALUATION_SEED}
    images = pictures(draw(source, model, **drawn), source)
    floats = pictures(draw(source, source.model, **drawn), source)
    save_rows([("float", floats), ("quantized", images)], tmp_path / "rows.png")
    rows = Image.open(tmp_path / "rows.png")
    assert Image.open(quantized / "samples.png").tobytes() == rows.tobytes()
    save_grid(images, tmp_path / "grid.png", columns=1, zoom=zoom_of(images))
    expected = Image.open(tmp_path / "grid.png")
    words = ["--num", 2, "--steps", 2, "--seed", EVALUATION_SEED]
    words += ["--output", tmp_path / "sample.png"]
    status, text = run("sample", quantized, *words)
    assert status == 0, text
    assert Image.open(tmp_path / "sample.png").tobytes() == expected.tobytes()


def test_other_prompts_and_guidance_draw_other_pictures(quantized, tmp_path):
    (tmp_path / "prompts").write_text("a house on a hill\n")
    drawn = {}
    for name, options in {
        "own": [], "prompts": ["--prompts", tmp_path / "prompts"], "guidance": ["--guidance", 1],
    }.items():  # fmt: skip
        words = ["--num", 1, "--steps", 2, "--output", tmp_path / f"{name}.png", *options]
        status, text = run("sample", quantized, *words)
        assert status == 0, text
        drawn[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert len(set(drawn.values())) == 3
