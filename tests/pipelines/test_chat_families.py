"""Families whose prompts are messages to a language model: Z-Image and Flux.2 klein."""

import numpy as np
import pytest
import tiny_transformers
import torch
from eager_programs import eager_export
from test_runner_loop import TOLERANCE, diffusers_image
from torch.utils import _pytree as pytree
from transformers import Qwen3ForCausalLM

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.families.chat_template import around_prompts
from mpqdm_fx.pipelines.folder import load_part
from mpqdm_fx.pipelines.layout import layout_of
from mpqdm_fx.pipelines.memory import COMPONENTS, as_part
from mpqdm_fx.pipelines.part_inputs import inputs_of
from mpqdm_fx.pipelines.runner import RunnerError

SIDE = 16
LONG = "a cat that sits on a mat and looks at a dog"


@pytest.mark.parametrize(
    ("guidance", "shifted"), [pytest.param(0.0, False, marks=pytest.mark.matrix), (0.5, True)]
)
def test_z_image_reads_prompts_of_any_length(tmp_path, monkeypatch, guidance, shifted):
    options = {"use_dynamic_shifting": True} if shifted else {}
    pipeline = tiny_transformers.z_image(tmp_path, **options)
    pipeline.save_pretrained(tmp_path / "source")
    sizes = [(SIDE, SIDE), (2 * SIDE, SIDE)]  # with tokens that fill up the picture and without
    _, runner = eager_export(
        tmp_path / "source", tmp_path / "out", monkeypatch, steps=3, trajectories=2, sizes=sizes,
        split=True, tabulate=not shifted,
    )  # fmt: skip
    steps = [entry for entry in runner.manifest["methods"] if "denoise" in entry["method"]]
    times = {spec["dtype"] for entry in steps for spec in entry["inputs"] if spec["name"] == "t"}
    assert times == {"float32" if shifted else "int64"}  # a row of tables
    for (height, width), prompt in zip(sizes, ("a cat", LONG), strict=True):
        call = {"height": height, "width": width}
        expected = diffusers_image(
            pipeline, prompt, num_inference_steps=3, seed=3, guidance_scale=guidance,
            negative_prompt=LONG[::-1], **call,
        )  # fmt: skip
        drawn = runner.sample(prompt, seed=3, guidance=guidance, negative=LONG[::-1], **call)
        assert np.abs(drawn - expected).max() <= 2 * TOLERANCE


def test_z_images_of_other_patches_or_too_few_places_are_refused(tmp_path):
    pipeline = tiny_transformers.z_image(tmp_path)
    pipeline.transformer.register_to_config(axes_lens=[64, 16, 16])
    with pytest.raises(ConfigError, match="no places for prompts of 512 tokens"):
        layout_of(pipeline)
    pipeline.transformer.register_to_config(all_patch_size=(4,))
    with pytest.raises(ConfigError, match=r"patches \[4\] by \[1\]"):
        layout_of(pipeline)


def test_pictures_larger_than_the_table_of_places_are_refused(tmp_path, monkeypatch):
    pipeline = tiny_transformers.z_image(tmp_path)
    with pytest.raises(ConfigError, match="a picture of 17 columns of tokens is larger"):
        eager_export(
            pipeline, tmp_path / "out", monkeypatch, steps=1, trajectories=1,
            sizes=[(16, 17 * 4)],
        )  # fmt: skip


@pytest.mark.parametrize("distilled", [False, True])
def test_flux_2_reads_padding_too_and_guides_what_is_not_distilled(
    tmp_path, monkeypatch, distilled
):
    pipeline = tiny_transformers.flux_2_klein(tmp_path, distilled=distilled)
    pipeline.save_pretrained(tmp_path / "source")
    sizes = [(SIDE, SIDE), (2 * SIDE, SIDE)]
    _, runner = eager_export(
        tmp_path / "source", tmp_path / "out", monkeypatch, steps=3, trajectories=1, sizes=sizes
    )
    seen = []
    for (height, width), prompt in zip(sizes, ("a cat", LONG), strict=True):
        call = {"height": height, "width": width}
        expected = diffusers_image(
            pipeline, prompt=prompt, num_inference_steps=3, seed=3, guidance_scale=3.0, **call
        )
        method = runner.models["denoiser.pte"]["forward"]
        with method.register_forward_hook(lambda *_: seen.append(1)):
            drawn = runner.sample(prompt, seed=3, guidance=3.0, **call)
        assert np.abs(drawn - expected).max() <= 2 * TOLERANCE
    assert len(seen) == 2 * 3 * (1 if distilled else 2)
    with pytest.raises(RunnerError, match="takes no negative prompt"):
        runner.sample("a cat", negative="a dog")


def test_text_encoders_with_too_few_layers_for_flux_2_are_refused(tmp_path):
    pipeline = tiny_transformers.flux_2_klein(tmp_path)
    pipeline.text_encoder = tiny_transformers.qwen3(Qwen3ForCausalLM, layers=26)
    with pytest.raises(ConfigError, match="has 26 layers, and the states behind layer 27"):
        layout_of(pipeline)


@pytest.mark.parametrize("kind", ["z_image", "flux_2_klein"])
def test_float_peaks_are_measured_on_what_the_parts_are_called_with(tmp_path, kind):
    getattr(tiny_transformers, kind)(tmp_path).save_pretrained(tmp_path)
    inputs, _ = inputs_of(
        tmp_path, [(SIDE, SIDE)], prompts=("a cat",), steps=1, guidance=1.0, trajectories=1,
        batch_size=1, seed=0,
    )  # fmt: skip
    for name, part in inputs.layout.parts.items():
        component = next(c for c in COMPONENTS[name] if (tmp_path / c).is_dir())
        example = inputs.example(name, (SIDE, SIDE))
        module = as_part(name, load_part(tmp_path, component), example)
        with torch.no_grad():
            expected, actual = (
                pytree.tree_leaves(model(**example))[0] for model in (part.module, module)
            )
        # for a peak, one layer's states do for all that are read, and unshifted latents too
        width = tiny_transformers.T5_WIDTH if name == "text_encoder" else expected.shape[-1]
        assert actual.shape == (*expected.shape[:-1], width)


@pytest.mark.parametrize("thinking", [True, False])
def test_the_text_around_prompts_is_the_templates(thinking):
    tokens = tiny_transformers.chat_tokenizer()
    around = around_prompts(tokens, thinking=thinking)
    thoughts = "" if thinking else "<think></think>"
    assert around == {"before": "<s>user ", "after": f"</s><s>me {thoughts}"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template that can be rendered"),
        ("{{ messages[0].content | trim }}", "changes prompts"),
        ("{{ messages[0].content | length }}{{ messages[0].content }}", "what stands around them"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "changes prompts"),
        ("{{ raise_exception('no user') }}", "rendered: no user"),
    ],
)
def test_templates_that_are_no_fixed_text_are_refused(template, message):
    tokens = tiny_transformers.chat_tokenizer()
    tokens.chat_template = template
    with pytest.raises(ConfigError, match=message):
        around_prompts(tokens, thinking=True)
