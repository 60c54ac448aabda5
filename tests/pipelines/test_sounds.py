"""Sounds: what the runner makes of Stable Audio's folder is what diffusers' pipeline makes."""

import importlib.util
import json
import wave

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import tiny_transformers
import torch
from eager_programs import EagerPrograms, eager_export
from PIL import Image
from pipeline_kinds import diffusers_sound

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines import runner as runner_module
from mpqdm_fx.pipelines.layout import layout_of
from mpqdm_fx.pipelines.part_inputs import inputs_of
from mpqdm_fx.pipelines.pictures import FLOAT, PROGRAMS, draw_pictures, write_samples
from mpqdm_fx.pipelines.program_files import ProgramFiles
from mpqdm_fx.pipelines.prompts import SOUND_PROMPTS
from mpqdm_fx.pipelines.runner import RunnerError, main
from mpqdm_fx.pipelines.spectrograms import spectrogram

# Sounds are about 0.5 loud; guidance is two calls in the place of a batch.
TOLERANCE = 2e-6
HAS_TORCHSDE = importlib.util.find_spec("torchsde") is not None
RUNS = {"steps": 3, "guidance": 3.0, "trajectories": 4}


def _exported(root, pipeline, **options):
    with pytest.MonkeyPatch.context() as patch:
        return eager_export(pipeline, root / "out", patch, **RUNS, **options)[1]


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """A pipeline, and the runner of what became of its folder."""
    root = tmp_path_factory.mktemp("sounds")
    pipeline = tiny_transformers.stable_audio(root)
    pipeline.save_pretrained(root / "pipeline")
    return pipeline, _exported(root, root / "pipeline")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"seconds": 1.3}, {"audio_end_in_s": 1.3}),
        ({"negative": "low", "guidance": 5.0}, {"negative_prompt": "low", "guidance_scale": 5.0}),
        ({"guidance": 1.0, "seed": 3}, {"guidance_scale": 1.0, "seed": 3}),
    ],
)
def test_sounds_are_the_pipelines(audio, ours, theirs):
    pipeline, runner = audio
    expected = diffusers_sound(
        pipeline, "a cat", num_inference_steps=3, **{"guidance_scale": 3.0, **theirs}
    )
    made = runner.sample("a cat", **ours)
    assert made.shape == (int(32 * ours.get("seconds", 2)), 2)
    assert np.abs(made - expected).max() <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        pytest.param(
            "CosineDPMSolverMultistepScheduler",
            marks=pytest.mark.skipif(not HAS_TORCHSDE, reason="torchsde is not installed"),
        ),
    ],
)
def test_with_other_schedulers_too(tmp_path, name):
    scheduler = getattr(diffusers, name)(prediction_type="v_prediction")
    pipeline = tiny_transformers.stable_audio(tmp_path, scheduler=scheduler)
    expected = diffusers_sound(pipeline, "a cat", num_inference_steps=3, guidance_scale=3.0)
    made = _exported(tmp_path, pipeline).sample("a cat")
    assert np.abs(made - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())


def test_prompt_seconds_and_noise_are_heard(audio):
    _, runner = audio
    options = [{}, {"prompt": "a dog"}, {"seconds": 0.5}, {"seed": 1}]
    made = [runner.sample(**{"prompt": "a cat", **each})[:16] for each in options]
    for index, other in enumerate(made[1:], 1):
        assert np.abs(made[0] - other).max() > 50 * TOLERANCE, options[index]


def test_the_projection_may_be_an_identity(tmp_path):
    pipeline = tiny_transformers.stable_audio(tmp_path, width=tiny_transformers.T5_WIDTH)
    expected = diffusers_sound(pipeline, "a cat", num_inference_steps=3, guidance_scale=3.0)
    assert np.abs(_exported(tmp_path, pipeline).sample("a cat") - expected).max() <= TOLERANCE


def test_the_shortest_programs_that_hold_the_seconds_run(tmp_path):
    pipeline = tiny_transformers.stable_audio(tmp_path)
    runner = _exported(tmp_path, pipeline, sizes=[(64,), (32,)])
    assert runner.manifest["sizes"] == [[64], [32]]
    methods = {tuple(e["size"]) for e in runner.manifest["methods"] if e["part"] == "denoiser"}
    assert methods == {(64,), (32,)}
    asked = {None: 64, 2.0: 64, 1.04: 64, 1.0: 32, 0.1: 32}
    assert {s: runner.size({"seconds": s})[0] for s in asked} == asked
    assert runner.sample("a cat", seconds=0.5).shape == (16, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 2.1}, r"seconds is 2.1; give at least 0.031 and at most 2, the longest"),
        ({"seconds": 0.0}, r"seconds is 0.0; give at least"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"height": 16}, "this StableAudioPipeline takes no height"),
        ({"image": np.zeros((4, 4, 3))}, "this StableAudioPipeline takes no image"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "no scheduler of noise or v-prediction"),
    ],
)
def test_what_no_sound_can_be_made_of_is_refused(audio, options, message):
    with pytest.raises(RunnerError, match=message):
        audio[1].sample("a cat", **options)


def test_pictures_have_no_seconds(tmp_path):
    runner = _exported(tmp_path, tiny_pipelines.stable_diffusion(tmp_path))
    with pytest.raises(RunnerError, match="StableDiffusionPipeline takes no seconds"):
        runner.sample("a cat", seconds=1.0)


@pytest.mark.skipif(HAS_TORCHSDE, reason="torchsde is installed")
def test_a_scheduler_whose_package_is_missing_names_it(audio):
    with pytest.raises(RunnerError, match="needs torchsde, which is not installed: pip install"):
        audio[1].sample("a cat", scheduler="CosineDPMSolverMultistepScheduler")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(64, 64)], "size 64x64: a StableAudioPipeline's size is the samples of a channel"),
        ([(30,)], "size 30: its length must be a multiple of 4"),
        ([(128,)], "32 latents is longer than this transformer's sample_size 16; export shorter"),
    ],
)
def test_lengths_that_no_program_has_are_refused(tmp_path, sizes, message):
    with pytest.raises(ConfigError, match=message):
        _exported(tmp_path, tiny_transformers.stable_audio(tmp_path), sizes=sizes)


def test_pipelines_that_diffusers_itself_cannot_draw_with_are_refused(tmp_path):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = tiny_transformers.stable_audio(tmp_path, scheduler=scheduler)
    with pytest.raises(AttributeError, match="init_noise_sigma"):
        diffusers_sound(pipeline, "a cat", num_inference_steps=3)
    with pytest.raises(ConfigError, match="cannot draw with FlowMatchEulerDiscreteScheduler"):
        layout_of(pipeline)
    pipeline = tiny_transformers.stable_audio(tmp_path)
    pipeline.vae.register_to_config(decoder_input_channels=8)
    with pytest.raises(ConfigError, match="makes 4 channels of latents, and the vae decodes 8"):
        layout_of(pipeline)


def test_parts_are_calibrated_on_sounds_of_several_lengths(tmp_path):
    inputs, sizes = inputs_of(
        tiny_transformers.stable_audio(tmp_path), None, prompts=None, batch_size=8, seed=0, **RUNS
    )
    assert sizes == ((64,),)
    assert "a dog barking twice" in inputs.prompts
    seconds = torch.cat([call["seconds"] for call in inputs.calls("duration_encoder")])
    assert set(seconds.flatten().tolist()) == {0.5, 1.0, 1.5, 2.0}
    told = torch.cat([call["global_hidden_states"] for call in inputs.runs.calls("denoiser")])
    assert len(told.unique(dim=0)) == 4


def test_prompts_of_sounds_are_plain_and_all_different():
    assert len(set(SOUND_PROMPTS)) == len(SOUND_PROMPTS) == 32
    assert all(prompt == prompt.strip() for prompt in SOUND_PROMPTS)


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture
def command(audio, monkeypatch, caplog):
    """Calls the command line; returns exit status and error messages."""

    def call(*words):
        monkeypatch.setattr(runner_module, "PipelineRunner", lambda folder: audio[1])
        status = main([str(word) for word in words])
        return status, [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]

    return call


def test_a_wav_file_of_16_bits_is_written(audio, command, tmp_path):
    words = ("a cat", "--seconds", 1.5, "--seed", 2, "--steps", 2, "--guidance", 2)
    assert command(*words, "--output", tmp_path / "cat.wav") == (0, [])
    with wave.open(str(tmp_path / "cat.wav")) as file:
        assert file.getparams()[:4] == (2, 2, 32, 48)
        codes = np.frombuffer(file.readframes(48), "<i2").reshape(48, 2)
    made = audio[1].sample("a cat", seconds=1.5, seed=2, steps=2, guidance=2.0)
    assert np.abs(codes / 32767 - made).max() <= 0.5 / 32767 + 1e-7


def test_what_is_louder_than_full_scale_is_clipped(audio):
    codes = audio[1].medium.codes(np.array([[1.5, -1.5], [1.0, 0.25]], np.float32))
    assert codes.tolist() == [[32767, -32767], [32767, 8192]]


@pytest.mark.parametrize(
    ("output", "message"),
    [("cat.png", "give a name with .wav"), ("none/cat.wav", "its folder is not there")],
)
def test_an_output_that_is_no_sound_is_refused(command, tmp_path, output, message):
    status, errors = command("a cat", "--output", tmp_path / output)
    assert status == 2
    assert message in errors[0]


def test_a_folder_keeps_sounds_and_their_spectrograms(tmp_path, monkeypatch):
    pipeline = tiny_transformers.stable_audio(tmp_path)
    runner = _exported(tmp_path, pipeline)
    monkeypatch.setattr(ProgramFiles, "models", runner.models, raising=False)
    monkeypatch.setattr(ProgramFiles, "_load", EagerPrograms._load)
    inputs, _ = inputs_of(pipeline, None, prompts=("a cat", "a dog"), batch_size=8, seed=0, **RUNS)
    drawn = draw_pictures(tmp_path / "out", 2, prompts=inputs.prompts, inputs=inputs)
    numbers = drawn.numbers()
    assert numbers.x0_sqnr_db > 80
    assert numbers.psnr_db is numbers.ssim is None  # of spectrograms they would say little
    write_samples(tmp_path / "out", drawn)
    names = [f"{row}-{index}.wav" for row in (FLOAT, PROGRAMS) for index in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "out" / "samples").iterdir()) == names
    assert Image.open(tmp_path / "out" / "samples.png").size > (64, 16)
    assert "WAV files in the folder samples" in drawn.note
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]) == {
        "text_encoder", "duration_encoder", "denoiser", "vae_decoder",
    }  # fmt: skip


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_spectrogram_is_white_where_a_sine_of_full_scale_is(place):
    samples = torch.arange(60000)
    sine = torch.sin(samples * torch.pi * place) * (samples >= 30000)
    picture = spectrogram(torch.stack([sine, sine]))
    assert picture.shape[1] == 128
    assert picture.shape[2] <= 256
    half = picture.shape[2] // 2
    assert (picture[0, :, : half - 4] == -1).all()
    loudest = picture[0, :, half + 4 :].argmax(dim=0)
    assert ((loudest - 128 * (1 - place)).abs() <= 1.5).all()
    assert 0.7 < picture.max() <= 1


@pytest.mark.parametrize("samples", [1, 7, 64, 4097])
def test_sounds_of_any_length_have_a_spectrogram(samples):
    picture = spectrogram(torch.zeros(1, samples))
    assert picture.ndim == 3
    assert (picture == -1).all()
