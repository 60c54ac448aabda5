"""Every family draws what its diffusers pipeline draws, with the parts themselves as programs."""

import importlib

import numpy as np
import pytest
import tiny_pipelines
import tiny_transformers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from eager_programs import eager_export
from PIL import Image
from test_runner_loop import TOLERANCE, diffusers_image

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.nested import tensors_of
from mpqdm_fx.pipelines import recorded
from mpqdm_fx.pipelines import runner as runner_module
from mpqdm_fx.pipelines.families import registry
from mpqdm_fx.pipelines.families.stable_diffusion import StableDiffusion
from mpqdm_fx.pipelines.loops.loop import loop_class
from mpqdm_fx.pipelines.part_inputs import inputs_of
from mpqdm_fx.pipelines.picture_files import picture_of, read_picture
from mpqdm_fx.pipelines.runner import PipelineRunner, RunnerError

SIDE = 16


def picture():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def expected_and_drawn(
    pipeline, folder, monkeypatch, runner_call, pipeline_call, *, steps=3, side=SIDE
):
    """What diffusers draws and what the runner draws; both get seed 3."""
    _, runner = eager_export(
        pipeline, folder, monkeypatch, steps=steps, trajectories=2, sizes=[(side, side)]
    )
    expected = diffusers_image(
        pipeline, "a cat", num_inference_steps=steps, seed=3, **pipeline_call
    )
    return expected, runner.sample("a cat", seed=3, **runner_call)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_latent_consistency_models_are_told_their_guidance(tmp_path, monkeypatch, guidance):
    pipeline = tiny_pipelines.latent_consistency(tmp_path)
    expected, drawn = expected_and_drawn(
        pipeline, tmp_path / "out", monkeypatch,
        {"guidance": guidance}, {"guidance_scale": guidance},
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= TOLERANCE


@pytest.mark.parametrize("strength", [0.4, 0.8, 1.0])
@pytest.mark.parametrize("kl", [True, False])
def test_image_to_image_starts_where_the_strength_says(tmp_path, monkeypatch, kl, strength):
    pipeline = tiny_pipelines.image_to_image(tmp_path, kl=kl)
    expected, drawn = expected_and_drawn(
        pipeline, tmp_path / "out", monkeypatch,
        {"image": picture(), "strength": strength, "guidance": 4.0},
        {"image": Image.fromarray(picture()), "strength": strength, "guidance_scale": 4.0},
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),  # the pipeline's own strength and guidance
        ({"strength": 0.7, "guidance": 4.0}, {"strength": 0.7, "guidance_scale": 4.0}),
    ],
)
def test_image_to_image_of_xl_normalises_latents_both_ways(tmp_path, monkeypatch, ours, theirs):
    pipeline = tiny_pipelines.image_to_image_xl(tmp_path)
    expected, drawn = expected_and_drawn(
        pipeline, tmp_path / "out", monkeypatch, {"image": picture(), **ours},
        {"image": Image.fromarray(picture()), **theirs}, steps=4,
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= 2 * TOLERANCE


@pytest.mark.parametrize(("guidance", "calls"), [(7.5, 3), (1.0, 1)])
def test_instructions_are_guided_by_text_and_picture(tmp_path, monkeypatch, guidance, calls):
    pipeline = tiny_pipelines.instruct_pix2pix(tmp_path)
    folder, image = tmp_path / "out", picture()
    _, runner = eager_export(pipeline, folder, monkeypatch, steps=3, trajectories=2)
    numbers = {"guidance_scale": guidance, "image_guidance_scale": 2.0}
    expected = diffusers_image(
        pipeline, "a cat", Image.fromarray(image), num_inference_steps=3, **numbers
    )
    seen = []
    with runner.models["denoiser.pte"]["forward"].register_forward_hook(lambda *_: seen.append(1)):
        drawn = runner.sample("a cat", image=image, guidance=guidance, image_guidance=2.0)
    assert np.abs(drawn - expected).max() <= TOLERANCE
    assert len(seen) == 3 * calls


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_control_networks_add_their_residuals(tmp_path, monkeypatch, scale):
    pipeline = tiny_pipelines.controlnet(tmp_path)
    expected, drawn = expected_and_drawn(
        pipeline, tmp_path / "out", monkeypatch,
        {"image": picture(), "conditioning_scale": scale, "guidance": 4.0},
        {
            "image": Image.fromarray(picture()), "controlnet_conditioning_scale": scale,
            "guidance_scale": 4.0,
        },
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= TOLERANCE


def test_a_file_is_read_upright_and_resized_as_diffusers_does(tmp_path):
    sideways = Image.Exif()
    sideways[0x0112] = 6  # of a phone that was held upright
    large = np.random.default_rng(1).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    Image.fromarray(large).save(tmp_path / "in.png", exif=sideways)
    read = load_image(str(tmp_path / "in.png"))
    expected = VaeImageProcessor(vae_scale_factor=2).preprocess(read, height=SIDE, width=SIDE)
    actual = picture_of(read_picture(tmp_path / "in.png", "RGB", (SIDE, SIDE)), (SIDE, SIDE))
    torch.testing.assert_close(actual * 2 - 1, expected)


def test_a_control_picture_changes_what_is_drawn(tmp_path, monkeypatch):
    pipeline = tiny_pipelines.controlnet(tmp_path)
    _, runner = eager_export(pipeline, tmp_path / "out", monkeypatch, steps=2, trajectories=2)
    first = runner.sample("a cat", image=picture())
    other = runner.sample("a cat", image=255 - picture())
    assert np.abs(first - other).max() > 100 * TOLERANCE


def test_the_control_network_and_the_denoiser_are_calibrated_on_what_they_meet(tmp_path):
    inputs, _ = inputs_of(
        tiny_pipelines.controlnet(tmp_path), None, prompts=("a cat", "a dog"), steps=3,
        guidance=4.0, trajectories=4, batch_size=6, seed=0,
    )  # fmt: skip
    control, denoiser = (inputs.runs.calls(part) for part in ("controlnet", "denoiser"))
    assert len(control) == len(denoiser) == 4
    assert len(denoiser.held_out_calls) == 1
    network = inputs.layout.parts["controlnet"].module
    for given, met in zip(control, denoiser, strict=True):
        with torch.no_grad():
            *down, middle = network(**given)
        torch.testing.assert_close(middle, met["mid_block_additional_residual"])
        assert [t.shape for t in down] == [t.shape for t in met["down_block_additional_residuals"]]


def test_large_calls_are_kept_sparsely_and_of_every_step(tmp_path, monkeypatch):
    settings = {"prompts": ("a cat",), "steps": 4, "guidance": 1.0, "batch_size": 1, "seed": 0}
    inputs, _ = inputs_of(tiny_pipelines.controlnet(tmp_path), None, trajectories=8, **settings)
    large = sum(t.nbytes for t in tensors_of(dict(inputs.example("denoiser", inputs.size))))
    monkeypatch.setattr(recorded, "_MEMORY", 8 * 4 * large // 3)
    monkeypatch.setattr(recorded, "_LONG", 4)
    calls = list(inputs.runs.calls("denoiser"))
    kept = sum(t.nbytes for call in calls for t in tensors_of(dict(call)))
    assert large < kept <= recorded._MEMORY
    assert len(calls) < 8 * 4
    assert len({float(call["timestep"]) for call in calls}) == 4


@pytest.fixture(scope="module")
def started_from_a_picture(tmp_path_factory):
    root = tmp_path_factory.mktemp("image_to_image")
    with pytest.MonkeyPatch.context() as patch:
        pipeline = tiny_pipelines.image_to_image(root)
        return eager_export(pipeline, root / "out", patch, steps=3, trajectories=2)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs image"),
        ({"image": 0, "mask": 0}, "takes no mask"),
        ({"image": 0, "strength": 1.5}, "strength is 1.5; give at least 0 and at most 1"),
        ({"image": 0, "strength": float("nan")}, "strength is nan"),
        ({"image": 0, "strength": "much"}, "strength is 'much'; give a number"),
        ({"image": picture().astype(np.float32)}, "image has values from 0 to 255; give bytes"),
        ({"image": np.full((SIDE, SIDE, 3), np.nan)}, "image has values from nan"),
        ({"image": 0, "strength": 0.1}, "strength 0.1 of 3 steps is no step"),
        ({"image": 0, "image_guidance": 2.0}, "takes no image_guidance; it takes strength"),
    ],
)
def test_requests_that_do_not_fit_the_family_are_refused(started_from_a_picture, options, message):
    given = {name: picture() if type(value) is int else value for name, value in options.items()}
    with pytest.raises(RunnerError, match=message):
        started_from_a_picture.sample("a cat", **given)


def test_the_folder_has_its_own_loop_and_what_that_is_made_from(started_from_a_picture):
    folder = started_from_a_picture.folder
    loops = {"loop.py", "prompted.py", "text_to_image.py", "image_to_image.py"}
    assert loops <= {path.name for path in folder.glob("*.py")}
    assert not (folder / "controlnet.py").exists()
    assert PipelineRunner(folder).loop.__name__ == "ImageToImage"


@pytest.mark.parametrize(("alpha", "guidance"), [(False, 1.0), (False, 4.5), (True, 4.5)])
def test_pixart_is_told_which_tokens_are_padding(tmp_path, monkeypatch, alpha, guidance):
    pipeline = tiny_transformers.pixart_sigma(tmp_path, alpha=alpha)
    expected, drawn = expected_and_drawn(
        pipeline, tmp_path / "out", monkeypatch, {"guidance": guidance, "negative": "a dog"},
        {
            "guidance_scale": guidance, "negative_prompt": "a dog", "height": SIDE, "width": SIDE,
            "use_resolution_binning": False, "clean_caption": False,
        },
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("long", "scheduler"), [(True, {}), (False, {}), (False, {"use_dynamic_shifting": True})]
)
def test_stable_diffusion_3_draws_with_t5_and_without(tmp_path, monkeypatch, long, scheduler):
    pipeline = tiny_transformers.stable_diffusion_3(tmp_path, long=long, **scheduler)
    expected, drawn = expected_and_drawn(
        pipeline, tmp_path / "out", monkeypatch, {"guidance": 5.0, "negative": "a dog"},
        {"guidance_scale": 5.0, "negative_prompt": "a dog", "height": SIDE, "width": SIDE},
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= TOLERANCE


SANA_CALL = {"height": 32, "width": 32, "use_resolution_binning": False, "clean_caption": False}


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_sana_puts_its_instruction_before_the_prompt_alone(tmp_path, monkeypatch, guidance):
    pipeline = tiny_transformers.sana(tmp_path)
    expected, drawn = expected_and_drawn(
        pipeline, tmp_path / "out", monkeypatch, {"guidance": guidance, "negative": "a dog"},
        {"guidance_scale": guidance, "negative_prompt": "a dog", **SANA_CALL}, side=32,
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= 2 * TOLERANCE


@pytest.mark.parametrize("steps", [1, 2])
def test_sana_sprint_is_told_its_guidance(tmp_path, monkeypatch, steps):
    pipeline = tiny_transformers.sana(tmp_path, sprint=True)
    intermediate = {} if steps == 2 else {"intermediate_timesteps": None}
    expected, drawn = expected_and_drawn(
        pipeline, tmp_path / "out", monkeypatch, {"guidance": 3.0},
        {"guidance_scale": 3.0, **SANA_CALL, **intermediate}, steps=steps, side=32,
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= 2 * TOLERANCE


@pytest.mark.parametrize("told", [True, False])
def test_flux_steps_on_tokens(tmp_path, monkeypatch, told):
    pipeline = tiny_transformers.flux(tmp_path, told=told)
    expected, drawn = expected_and_drawn(
        pipeline, tmp_path / "out", monkeypatch, {"guidance": 3.0},
        {"guidance_scale": 3.0, "height": SIDE, "width": SIDE},
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= TOLERANCE


OWN_LOOP = """
from mpqdm_fx.pipelines.loops.text_to_image import TextToImage


class Doubled(TextToImage):
    def combine(self, outputs, request):
        return 2 * super().combine(outputs, request)
"""


def test_a_family_of_ones_own_is_exported_with_its_loop(tmp_path, monkeypatch):
    (tmp_path / "doubled_noise.py").write_text(OWN_LOOP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    loop = importlib.import_module("doubled_noise").Doubled
    family = type("Family", (StableDiffusion,), {"loop": loop})()
    with pytest.raises(ConfigError, match="StableDiffusionPipeline has a family already"):
        registry.register_family("StableDiffusionPipeline", family)
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    kind = type("OtherPipeline", (type(pipeline),), {})
    other = kind(**pipeline.components, requires_safety_checker=False)
    registry.register_family("OtherPipeline", family)
    _, runner = eager_export(other, tmp_path / "out", monkeypatch, steps=2, trajectories=2)
    assert "class Doubled" in (tmp_path / "out" / "doubled_noise.py").read_text()
    assert runner.loop is loop
    drawn = runner.sample("a cat")
    assert np.abs(drawn - diffusers_image(pipeline, "a cat", num_inference_steps=2)).max() > 1e-2


@pytest.mark.parametrize("kind", ["loop", "os", "../loop", "antigravity", ""])
def test_a_manifest_imports_no_other_module(kind):
    with pytest.raises(RunnerError, match="nothing here draws"):
        loop_class(kind)


def test_the_command_line_has_the_numbers_of_the_family(
    started_from_a_picture, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runner_module, "PipelineRunner", lambda folder: started_from_a_picture)
    Image.fromarray(picture()).save(tmp_path / "in.png")
    words = ["a cat", "--image", str(tmp_path / "in.png"), "--output", str(tmp_path / "out.png")]
    assert runner_module.main([*words, "--strength", "0.4"]) == 0
    drawn = np.asarray(Image.open(tmp_path / "out.png"))
    assert np.array_equal(drawn, started_from_a_picture("a cat", image=picture(), strength=0.4))
    with pytest.raises(SystemExit, match="2"):
        runner_module.main([*words, "--image-guidance", "2"])
    assert "--image-guidance" in capsys.readouterr().err
