"""Each part computes what the pipeline computes, and is calibrated on what the pipeline meets."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch

from mpqdm_fx import MPQConfig, RunOptions
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.pipelines.layout import layout_of
from mpqdm_fx.pipelines.part_inputs import PipelineInputs
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.programs import quantize_part, side_settings

PROMPTS = ("a cat", "a dog", "three pears on a table")


def inputs_of(pipeline, **options):
    layout = layout_of(pipeline)
    settings = {
        "size": layout.default_size, "prompts": PROMPTS, "steps": 3, "guidance": 4.0,
        "trajectories": 4, "batch_size": 6, "seed": 0,
    }  # fmt: skip
    return PipelineInputs(layout=layout, **{**settings, **options})


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl"])
def test_encoders_give_the_pipelines_embeddings_and_trace_bit_equal(tmp_path, kind):
    pipeline = getattr(tiny_pipelines, kind)(tmp_path)
    inputs = inputs_of(pipeline)
    layout = inputs.layout
    states, pooled = [], []
    with torch.no_grad():
        expected = pipeline.encode_prompt(
            prompt="a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        for name in layout.tokenizers:
            part = layout.parts[name.replace("tokenizer", "text_encoder")]
            call = inputs.calls(part.name)[0]
            outputs = part.module(**call)
            graph = trace(part.module, call)
            traced = graph(**graph.meta["signature"].normalize((), call))
            outputs, traced = (v if isinstance(v, tuple) else (v,) for v in (outputs, traced))
            assert len(outputs) == len(part.outputs)
            assert all(torch.equal(a, b) for a, b in zip(outputs, traced, strict=True))
            states.append(outputs[0][1:2])
            pooled += [value[1:2] for value in outputs[1:]]
    torch.testing.assert_close(torch.cat(states, dim=-1), expected[0])
    if pooled:
        torch.testing.assert_close(pooled[0], expected[2])


def test_layers_behind_the_state_that_is_taken_are_not_quantized(tmp_path):
    part = layout_of(tiny_pipelines.stable_diffusion_xl(tmp_path)).parts["text_encoder"]
    calls = [{"input_ids": torch.randint(50, (4, tiny_pipelines.LENGTH))} for _ in range(4)]
    quantized = quantize_part(part, calls, MPQConfig(), bound=0.0, run=RunOptions()).quantized
    assert any("layers.0." in name for name in quantized.ranges)
    assert not any("layers.1." in name for name in quantized.ranges)
    assert not any("layers.1." in layer.name for layer in quantized.plan.layers)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("stable_diffusion", ["text_encoder", "denoiser", "vae_decoder"]),
        ("stable_diffusion_xl", ["text_encoder", "text_encoder_2", "denoiser", "vae_decoder"]),
        ("inpainting", ["vae_encoder", "text_encoder", "denoiser", "vae_decoder"]),
        ("latent_diffusion", ["denoiser", "vae_decoder"]),
        ("ddpm", ["denoiser"]),
    ],
)
def test_example_inputs_of_every_part_fit_it_at_any_size(tmp_path, kind, names):
    inputs = inputs_of(getattr(tiny_pipelines, kind)(tmp_path))
    assert list(inputs.layout.parts) == names
    for name, part in inputs.layout.parts.items():
        with torch.no_grad():
            part.module(**inputs.example(name, (16, 24)))


def test_the_denoiser_is_calibrated_on_both_halves_of_guidance_with_float_timesteps(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    calls = inputs_of(pipeline).runs.calls("denoiser")
    batches = list(calls)
    rows = torch.cat([batch["encoder_hidden_states"] for batch in batches])
    assert len(rows) == 4 * 3 * 2
    with torch.no_grad():
        _, empty = pipeline.encode_prompt("a cat", "cpu", 1, True)
    assert sum(torch.allclose(row, empty[0], atol=1e-6) for row in rows) == 4 * 3
    assert all(batch["timestep"].dtype == torch.float32 for batch in batches)
    held_out = [batches[index] for index in calls.held_out_calls]
    assert sum(len(batch["sample"]) for batch in held_out) == 3 * 2


def test_without_guidance_the_denoiser_is_calibrated_on_prompts_alone(tmp_path):
    inputs = inputs_of(tiny_pipelines.stable_diffusion(tmp_path), guidance=1.0)
    calls = inputs.runs.calls("denoiser")
    assert sum(len(batch["sample"]) for batch in calls) == 4 * 3


def test_inpainting_is_calibrated_on_nine_channels_with_masks_of_zeros_and_ones(tmp_path):
    inputs = inputs_of(tiny_pipelines.inpainting(tmp_path))
    samples = torch.cat([call["sample"] for call in inputs.runs.calls("denoiser")])
    assert samples.shape[1:] == (9, 8, 8)
    assert set(samples[:, 4].unique().tolist()) == {0.0, 1.0}
    assert {call["image"].shape for call in inputs.calls("vae_encoder")} == {(1, 3, 16, 16)}


def test_there_may_be_more_prompts_than_runs_where_pictures_are_shown(tmp_path):
    inputs = inputs_of(tiny_pipelines.inpainting(tmp_path), trajectories=2)
    assert sum(len(call["input_ids"]) for call in inputs.calls("text_encoder")) == 1 + len(PROMPTS)


def test_the_decoder_is_calibrated_on_what_the_runs_end_with(tmp_path):
    inputs = inputs_of(tiny_pipelines.stable_diffusion(tmp_path))
    latents = torch.cat([call["latents"] for call in inputs.calls("vae_decoder")])
    assert torch.equal(latents, inputs.runs.final_samples)


@pytest.mark.parametrize(("side", "rows"), [(64, range(16)), (512, (3, 7, 11, 15)), (4096, None)])
def test_few_large_pictures_show_the_decoder_as_much_as_many_small_ones(tmp_path, side, rows):
    inputs = replace(inputs_of(tiny_pipelines.stable_diffusion(tmp_path)), size=(side, side))
    vars(inputs)["runs"] = SimpleNamespace(final_samples=torch.arange(16.0).reshape(16, 1, 1, 1))
    shown = [int(call["latents"]) for call in inputs.calls("vae_decoder")]
    assert shown == list(rows or (3, 7, 11, 15))
    assert inputs.vae_call_count(3) == 3


def test_half_precision_and_training_pipelines_are_copied_and_left_as_they_are(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    pipeline.unet.half().train()
    part = layout_of(pipeline).parts["denoiser"].module
    assert part.dtype == torch.float32
    assert not part.training
    assert pipeline.unet.dtype == torch.float16
    assert pipeline.unet.training
    assert layout_of(pipeline).parts["vae_decoder"].module.vae is pipeline.vae


def test_a_part_is_kept_in_int8_only_above_the_bound(tmp_path, caplog):
    inputs = inputs_of(tiny_pipelines.stable_diffusion(tmp_path))
    part = inputs.layout.parts["vae_decoder"]
    calls = inputs.calls("vae_decoder")
    good = quantize_part(part, calls, MPQConfig(), bound=10.0, run=RunOptions())
    assert good.quantized is not None
    assert good.sqnr_db > 10
    bad = quantize_part(part, calls, MPQConfig(), bound=good.sqnr_db + 1, run=RunOptions())
    assert bad.quantized is None
    assert bad.sqnr_db == good.sqnr_db
    assert "vae_decoder stays in float" in caplog.text


def test_text_encoders_and_vae_take_the_denoisers_activation_mode_and_eight_bits():
    settings = side_settings(MPQConfig(weight_bits=3, activation_mode="dynamic", seed=7))
    assert (settings.weight_bits, settings.activation_mode, settings.seed) == (8, "dynamic", 7)


def test_a_part_is_known_again_in_whatever_order_a_set_gave_its_settings(tmp_path):
    first, second = (tiny_pipelines.stable_diffusion(tmp_path).unet for _ in range(2))
    unset = list(second.config["_use_default_values"])
    assert len(unset) > 1
    reversed_ = {**second.config, "_use_default_values": unset[::-1]}
    second._internal_dict = type(second.config)(reversed_)
    parts = [Part(name="denoiser", module=m, outputs=(), sized=True) for m in (first, second)]
    assert parts[0].digest == parts[1].digest
    assert parts[0].settings_digest == parts[1].settings_digest
