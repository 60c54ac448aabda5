"""A LoRA that is given by its file is in the weights of what is exported, and nowhere else."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from eager_programs import eager_export
from test_runner_loop import TOLERANCE, diffusers_image

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.adapters import Lora, adapter_layers, fused


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_what_is_drawn_is_what_diffusers_draws_with_the_lora(tmp_path, monkeypatch, lora, scale):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    _, runner = eager_export(
        pipeline, tmp_path / "out", monkeypatch, steps=2, guidance=3.0,
        lora=Lora(file=lora, scale=scale),
    )  # fmt: skip
    after = pipeline.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    drawn = runner.sample("a cat")
    plain = diffusers_image(pipeline, "a cat", num_inference_steps=2, guidance_scale=3.0)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    expected = diffusers_image(
        pipeline, "a cat", num_inference_steps=2, guidance_scale=3.0,
        cross_attention_kwargs={"scale": scale},
    )  # fmt: skip
    assert np.abs(drawn - expected).max() <= 5 * TOLERANCE
    assert np.abs(plain - expected).max() > 100 * TOLERANCE


def test_a_fused_pipeline_has_no_adapter_left(tmp_path, lora):
    changed = fused(tiny_pipelines.stable_diffusion(tmp_path), Lora(file=lora))
    assert not adapter_layers(changed.unet)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file"), (b"no tensors", "cannot be fused into this Stable")],
)
def test_files_that_are_no_lora_are_refused(tmp_path, content, message):
    file = tmp_path / "style.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        fused(tiny_pipelines.stable_diffusion(tmp_path), Lora(file=file))
