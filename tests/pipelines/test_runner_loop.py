"""The runner draws what the diffusers pipeline draws, with the parts themselves as programs."""

import shutil

import numpy as np
import pytest
import tiny_pipelines
import torch
from eager_programs import eager_export
from manifests import edit_manifest
from PIL import Image

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.pipelines.loops.text_to_image import guidance_embedding
from mpqdm_fx.pipelines.runner import PipelineRunner, RunnerError

# The same floating-point operations but for the halves of guidance in two calls instead of a batch.
TOLERANCE = 2e-5


def diffusers_image(pipeline, *arguments, seed=0, **options):
    """What the pipeline draws, float [H, W, C] in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(*arguments, generator=generator, output_type="np", **options).images
    return images[0]


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd")
    pipeline = tiny_pipelines.stable_diffusion(root, kl=True)
    with pytest.MonkeyPatch.context() as patch:
        _, runner = eager_export(
            pipeline, root / "out", patch, sizes=[(16, 16), (24, 16)], steps=3, guidance=5.0,
            split=True,
        )  # fmt: skip
    return pipeline, runner


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "TCDScheduler"]
)
@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_images_equal_the_pipelines_for_schedulers_steps_and_guidance(
    stable_diffusion, scheduler, steps, guidance
):
    pipeline, runner = stable_diffusion
    original = pipeline.scheduler
    try:
        pipeline.scheduler = runner.scheduler(scheduler)
        expected = diffusers_image(
            pipeline, "a cat", num_inference_steps=steps, guidance_scale=guidance, seed=3
        )
    finally:
        pipeline.scheduler = original
    actual = runner.sample("a cat", steps=steps, guidance=guidance, seed=3, scheduler=scheduler)
    assert actual.shape == (16, 16, 3)
    assert np.abs(actual - expected).max() <= TOLERANCE


def test_negative_prompts_and_other_sizes_are_the_pipelines(stable_diffusion):
    pipeline, runner = stable_diffusion
    options = {"height": 24, "width": 16}
    expected = diffusers_image(
        pipeline,
        "a cat",
        negative_prompt="dog",
        num_inference_steps=3,
        guidance_scale=5.0,
        **options,
    )
    actual = runner.sample("a cat", negative="dog", **options)
    assert actual.shape == (24, 16, 3)
    assert np.abs(actual - expected).max() <= TOLERANCE
    assert np.abs(actual - runner.sample("a cat", **options)).max() > 100 * TOLERANCE


@pytest.fixture
def exported_copy(stable_diffusion, tmp_path):
    return shutil.copytree(stable_diffusion[1].folder, tmp_path / "copy")


def test_defaults_are_those_of_the_export_and_bytes_are_rounded_floats(stable_diffusion):
    _, runner = stable_diffusion
    floats = runner.sample("a cat", steps=3, guidance=5.0, height=16, width=16, seed=0)
    image = runner("a cat")
    assert image.dtype == np.uint8
    assert np.array_equal(image, (floats * 255).round().astype(np.uint8))


def test_prompts_are_encoded_once_and_each_step_runs_once_or_twice(stable_diffusion):
    _, runner = stable_diffusion
    methods = runner.models["denoiser.pte"]
    assert set(methods) == {"encode_prompt", "denoise", "denoise_24x16"}
    calls = []
    handles = [
        method.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, method in methods.items()
    ]
    try:
        runner("a cat", steps=4, guidance=1.0)
        assert calls == ["encode_prompt", *["denoise"] * 4]
        calls.clear()
        runner("a cat", steps=4, guidance=2.0, height=24)
        assert calls == ["encode_prompt"] * 2 + ["denoise_24x16"] * 8
    finally:
        for handle in handles:
            handle.remove()


def test_steps_take_no_prompt_where_it_is_encoded_once(stable_diffusion):
    _, runner = stable_diffusion
    entries = {e["method"]: e for e in runner.manifest["methods"] if e["part"] == "denoiser"}
    once = [spec["name"] for spec in entries["encode_prompt"]["outputs"]]
    assert [spec["name"] for spec in entries["encode_prompt"]["inputs"]] == [
        "encoder_hidden_states"
    ]
    assert len(once) == 2
    assert all(name.endswith(("attn2_to_k", "attn2_to_v")) for name in once)
    for name, size in [("denoise", [16, 16]), ("denoise_24x16", [24, 16])]:
        assert [s["name"] for s in entries[name]["inputs"]] == ["sample", "timestep", *once]
        assert entries[name]["size"] == size
        assert entries[name]["file"] == "denoiser.pte"


def test_steps_are_told_to_the_callback_and_schedulers_can_be_objects(stable_diffusion):
    pipeline, runner = stable_diffusion
    progress = []
    runner(
        "a cat", steps=2, callback=lambda *step: progress.append(step), scheduler=pipeline.scheduler
    )
    assert progress == [(1, 2), (2, 2)]


def test_models_that_predict_velocity_need_nothing_but_their_scheduler(tmp_path, monkeypatch):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path, prediction_type="v_prediction")
    result, runner = eager_export(pipeline, tmp_path / "out", monkeypatch, guidance=3.0, steps=3)
    expected = diffusers_image(pipeline, "a dog", num_inference_steps=3, guidance_scale=3.0)
    assert np.abs(runner.sample("a dog") - expected).max() <= TOLERANCE
    assert result.manifest["settings"]["prediction_type"] == "v_prediction"


def test_words_of_textual_inversions_have_all_their_vectors(tmp_path, monkeypatch):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    for token, vectors in (("<x>", 3), ("<y>", 1)):
        pipeline.load_textual_inversion({token: 3 * torch.randn(vectors, 16)}, token=token)
    _, runner = eager_export(pipeline, tmp_path / "out", monkeypatch, steps=2, trajectories=2)
    expected = diffusers_image(pipeline, "a <x> by <y>", num_inference_steps=2, guidance_scale=3.0)
    actual = runner.sample("a <x> by <y>", guidance=3.0)
    assert np.abs(actual - expected).max() <= TOLERANCE


def test_distilled_guidance_is_an_input_and_one_call(tmp_path, monkeypatch):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path, time_cond_proj_dim=32)
    _, runner = eager_export(pipeline, tmp_path / "out", monkeypatch, split=True)
    once = runner.models["denoiser.pte"]["encode_prompt"]
    assert {n.target for n in once.graph.find_nodes(op="placeholder")} == {
        "encoder_hidden_states", "timestep_cond",
    }  # fmt: skip
    expected = diffusers_image(pipeline, "a dog", num_inference_steps=4, guidance_scale=8.5)
    actual = runner.sample("a dog", steps=4, guidance=8.5, scheduler="DDIMScheduler")
    assert np.abs(actual - expected).max() <= TOLERANCE


@pytest.mark.parametrize("width", [32, 33])
def test_the_guidance_embedding_is_diffusers(width, tmp_path):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    expected = pipeline.get_guidance_scale_embedding(torch.tensor([6.5]), width)
    assert torch.allclose(guidance_embedding(7.5, width), expected, atol=1e-5)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    root = tmp_path_factory.mktemp("xl")
    pipeline = tiny_pipelines.stable_diffusion_xl(root)
    with pytest.MonkeyPatch.context() as patch:
        _, runner = eager_export(pipeline, root / "out", patch, sizes=[(16, 24)], split=True)
    return pipeline, runner


@pytest.mark.parametrize("negative", [None, "", "dog"])
def test_xl_has_both_encoders_added_conditions_and_zeroed_negatives(xl, negative):
    pipeline, runner = xl
    expected = diffusers_image(
        pipeline, "a cat", negative_prompt=negative, num_inference_steps=3, guidance_scale=5.0,
        height=16, width=24,
    )  # fmt: skip
    actual = runner.sample("a cat", negative=negative, steps=3, guidance=5.0)
    assert actual.shape == (16, 24, 3)
    assert np.abs(actual - expected).max() <= TOLERANCE


def test_xl_embeds_sizes_and_pooled_text_once(xl):
    _, runner = xl
    entries = {e["method"]: e for e in runner.manifest["methods"] if e["part"] == "denoiser"}
    assert {spec["name"] for spec in entries["encode_prompt"]["inputs"]} == {
        "encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids",
    }  # fmt: skip
    assert not [s for s in entries["denoise"]["inputs"] if s["name"].startswith("added_cond")]


def test_tables_draw_with_the_timesteps_of_the_export_alone(tmp_path, monkeypatch):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    options = {"split": True, "steps": 3, "guidance": 5.0, "tabulate": True}
    result, runner = eager_export(pipeline, tmp_path / "out", monkeypatch, **options)
    expected = diffusers_image(pipeline, "a cat", num_inference_steps=3, guidance_scale=5.0)
    assert np.abs(runner.sample("a cat") - expected).max() <= TOLERANCE
    assert result.manifest["timesteps"] == [667.0, 334.0, 1.0]
    names = runner.models["denoiser.pte"]["denoise"].state_dict()
    assert not [name for name in names if name.startswith("time_embedding")]
    with pytest.raises(RunnerError, match=r"751 is not in this folder's tables.* 3 timesteps"):
        runner.sample("a cat", steps=4)


@pytest.mark.parametrize("vae", [tiny_pipelines.kl_vae, tiny_pipelines.tiny_vae])
def test_inpainting_paints_where_the_mask_says_from_the_masked_image(tmp_path, monkeypatch, vae):
    pipeline = tiny_pipelines.inpainting(tmp_path, vae=vae())
    _, runner = eager_export(pipeline, tmp_path / "out", monkeypatch)
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[3:9, 5:14] = 255
    expected = diffusers_image(
        pipeline, "a cat", image=Image.fromarray(image), mask_image=Image.fromarray(mask),
        num_inference_steps=3, guidance_scale=4.0, height=16, width=16, seed=2,
    )  # fmt: skip
    actual = runner.sample("a cat", image=image, mask=mask, steps=3, guidance=4.0, seed=2)
    assert np.abs(actual - expected).max() <= TOLERANCE
    with pytest.raises(RunnerError, match="needs image and mask"):
        runner("a cat", image=image)
    with pytest.raises(RunnerError, match="mask has shape"):
        runner("a cat", image=image, mask=mask[:8])


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "latent_diffusion"])
def test_unconditional_pipelines_take_no_prompt(tmp_path, monkeypatch, kind):
    pipeline = getattr(tiny_pipelines, kind)(tmp_path)
    _, runner = eager_export(pipeline, tmp_path / "out", monkeypatch, steps=3)
    expected = diffusers_image(pipeline, num_inference_steps=3, seed=1)
    actual = runner.sample(seed=1)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE
    with pytest.raises(RunnerError, match="takes no prompt"):
        runner("a cat")


def test_what_cannot_be_drawn_is_refused(stable_diffusion):
    _, runner = stable_diffusion
    for options, message in [
        ({"height": 32}, "no program for 32x16 pixels.*16x16, 24x16"),
        ({"steps": 0}, "at least 1"),
        ({"scheduler": "NoSuchScheduler"}, "no scheduler class 'NoSuchScheduler'"),
        ({"mask": np.zeros((16, 16))}, "takes no mask"),
    ]:
        with pytest.raises(RunnerError, match=message):
            runner("a cat", **options)
    with pytest.raises(RunnerError, match="needs a prompt"):
        runner()


def test_damaged_folders_are_refused(tmp_path, monkeypatch):
    output = tmp_path / "out"
    eager_export(tiny_pipelines.stable_diffusion(tmp_path), output, monkeypatch)
    program = output / "text_encoder.pte"
    content = program.read_bytes()
    program.write_bytes(content[:-1] + b"?")
    with pytest.raises(ArtifactError, match="checksum"):
        PipelineRunner(output, verify=True)
    with pytest.raises(ArtifactError, match=r"text_encoder.pte is corrupted"):
        PipelineRunner(output)("a cat")
    program.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="bytes"):
        PipelineRunner(output)
    program.write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be loaded by ExecuTorch"):
        PipelineRunner(output)("a cat")  # the stand-in wrote no program
    (output / "tokenizer" / "added_tokens.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"added_tokens.json is not listed"):
        PipelineRunner(output)("a cat")
    (output / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer_config.json does not exist"):
        PipelineRunner(output)
    (output / "pipeline.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        PipelineRunner(output)
    with pytest.raises(ArtifactError, match="not written by mpqdm-fx export"):
        PipelineRunner(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 99}, "update mpqdm-fx"),
        ({"version": 3}, "its own run.py"),
        ({"version": "5"}, "no manifest of an export"),
        ({"format": "other"}, "no manifest of an export"),
        ({"sizes": []}, "out of range"),
        ({"sizes": [[16]]}, "its sizes are none of its kind"),
        ({"sizes": [[16, 16, 16]]}, "out of range"),
        ({"sizes": [[16, 16], [16]]}, "out of range"),
        ({"sizes": [[1 << 30]]}, "out of range"),
        ({"sizes": [[16, True]]}, "'sizes'"),
        ({"latents": {"channels": 10**9, "scale": 1}}, "out of range"),
        ({"defaults": {"steps": 0, "guidance": 1.0, "numbers": {}}}, "out of range"),
        ({"defaults": {"steps": 1, "guidance": 1.0, "numbers": {"a": "b"}}}, "out of range"),
        ({"methods": [{}]}, "'methods'"),
        ({"files": {}}, "lists no"),
        ({"files": {"../unet.pte": {"bytes": 1, "sha256": "0" * 64}}}, "no file's name"),
        ({"more": 1}, "'more'"),
    ],
)
def test_a_manifest_with_a_value_out_of_range_is_refused(exported_copy, change, reason):
    edit_manifest(exported_copy, lambda manifest: manifest.update(change), name="pipeline.json")
    with pytest.raises(ArtifactError, match=reason):
        PipelineRunner(exported_copy)


def test_a_manifest_that_was_changed_is_refused(exported_copy):
    path = exported_copy / "pipeline.json"
    path.write_text(path.read_text().replace('"steps": 3', '"steps": 4'))
    with pytest.raises(ArtifactError, match="digest"):
        PipelineRunner(exported_copy)
