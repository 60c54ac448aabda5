"""One command makes programs whose images are those of the pipeline with the quantized parts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_runner_loop import diffusers_image

from mpqdm_fx.backends.xnnpack.convert import converted_graph, decomposed, quantized_graph
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.pipelines.parts import ImageDecoder
from mpqdm_fx.pipelines.runner import PipelineRunner
from mpqdm_fx.report.reference_run import EVALUATION_SEED

pytestmark = pytest.mark.xnnpack

# Programs and converted graphs agree but for single int8 steps next to ties, which guidance and the
# loop magnify.
TOLERANCE_DB = 40.0


class Converted(torch.nn.Module):
    """A quantized part as it was lowered.

    Static: the converted graph, with int8 weights, int32 biases and q/dq ops. Dynamic: the graph
    with ranges as XNNPACK's kernels choose them, because the converted one has a range per tensor.
    """

    def __init__(self, quantized):
        super().__init__()
        self.quantized = [quantized]
        self.config, self.dtype, self.device = quantized.config, quantized.dtype, quantized.device
        plain, runnable, _ = decomposed(quantized.rounded, quantized.ranges)
        example = example_inputs(quantized.signature, batch_size=1)
        if quantized.settings.activation_mode == "dynamic":
            self.graph = quantized_graph(plain, runnable)
        else:
            self.graph = converted_graph(plain, runnable, self.ordered(example))

    def ordered(self, call):
        (quantized,) = self.quantized
        arguments = quantized.signature.normalize((), call)
        nodes = quantized.rounded.graph.find_nodes(op="placeholder")
        return tuple(arguments[str(node.target)] for node in nodes)

    def forward(self, **call):
        output = self.graph(*self.ordered(call))
        return output[0] if isinstance(output, tuple) else output


class ConvertedUNet(Converted):
    """In a pipeline: batches of guidance one by one, timesteps as floats, as the programs run."""

    def forward(self, sample, timestep, encoder_hidden_states, **_):
        rows = [
            super(ConvertedUNet, self).forward(
                sample=sample[i : i + 1],
                timestep=timestep.float().reshape(1),
                encoder_hidden_states=encoder_hidden_states[i : i + 1],
            )
            for i in range(len(sample))
        ]
        return (torch.cat(rows),)


def converted_image(pipeline, quantized, *prompt, **options):
    """What the pipeline draws with the converted denoiser and decoder."""
    unet = pipeline.unet
    try:
        pipeline.unet = ConvertedUNet(quantized["denoiser"])
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(options.pop("seed", 0))
        latents = pipeline(*prompt, generator=generator, output_type="latent", **options).images
    finally:
        pipeline.unet = unet
    decoder = ImageDecoder(pipeline.vae)
    if "vae_decoder" in quantized:
        decoder = Converted(quantized["vae_decoder"])
    with torch.no_grad():
        image = decoder(latents=latents)
    return (image / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()


def decibels(expected, actual):
    return sqnr_db(torch.from_numpy(expected), torch.from_numpy(actual))


def test_the_folder_is_whole_and_nothing_else_is_left(exported):
    _, result = exported
    names = {path.name for path in result.directory.iterdir()}
    assert names - {"log.txt"} == {  # which is there if libraries said something
        "classes.py",
        "conventions.py",
        "denoiser.pte",
        "errors.py",
        "expansion.py",
        "kernel_library.py",
        "loop.py",
        "medium.py",
        "picture_files.py",
        "pipeline.json",
        "program_files.py",
        "prompted.py",
        "report.html",
        "report.json",
        "run.py",
        "samples.png",
        "scheduler",
        "schedules.py",
        "sealed.py",
        "summary.json",
        "text_encoder.pte",
        "text_to_image.py",
        "tokenizer",
        "vae_decoder.pte",
    }
    assert not list(result.directory.parent.glob(".out-*"))
    assert not (result.directory.parent / "out.checkpoint").exists()
    PipelineRunner(result.directory, verify=True)


def test_the_picture_has_the_pipelines_own_images_above_those_of_the_programs(exported):
    pipeline, result = exported
    image = np.asarray(Image.open(result.directory / "samples.png"))
    prompts, side, zoom = result.summary["prompts"], 16, 4
    assert prompts == ["a cat", "a dog", "three pears on a table", "a map"]
    margin, row_height, width = 8, zoom * (side + 2), zoom * (4 * (side + 1) + 1)
    assert image.shape[0] == 2 * row_height + 2 * margin
    label_width = image.shape[1] - width - margin
    runner = PipelineRunner(result.directory)
    for index, prompt in enumerate(prompts):
        seed = EVALUATION_SEED + index
        numbers = {"num_inference_steps": 3, "guidance_scale": 3.0, "seed": seed}
        expected = diffusers_image(pipeline, prompt, **numbers), runner.sample(prompt, seed=seed)
        for row, drawn in enumerate(expected):
            top = margin + row * row_height + zoom
            left = label_width + zoom * (1 + (side + 1) * index)
            picture = image[top : top + zoom * side, left : left + zoom * side]
            picture = picture[::zoom, ::zoom].astype(np.float32) / 255
            assert np.abs(picture - drawn).max() < 0.6 / 255 + 1e-4


def test_the_summary_has_sizes_times_and_peaks_of_every_part(exported):
    _, result = exported
    summary = json.loads((result.directory / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    sizes = {path.name: path.stat().st_size for path in result.directory.iterdir()}
    for name, part in summary["parts"].items():
        assert part["bytes"] == sizes[f"{name}.pte"]
        assert part["precision"] == result.manifest["parts"][name]["precision"]
        assert all(value > 0 for value in part["milliseconds"].values())
        peaks = part["peak_memory_bytes"]
        assert part["bytes"] < peaks["program"] < peaks["float"]
    assert summary["bytes"] == sum(part["bytes"] for part in summary["parts"].values())
    unet = result.summary["parts"]["denoiser"]
    parameters = sum(value.numel() for value in exported[0].unet.parameters())
    assert (unet["parameters"], unet["float32_bytes"]) == (parameters, 4 * parameters)
    step = summary["milliseconds_per_step"]
    assert step["program"] == 2 * unet["milliseconds"]["program"]
    assert summary["denoiser_sqnr_db"] == result.manifest["parts"]["denoiser"]["quantized_sqnr_db"]


def test_parts_below_the_bound_stay_in_float_and_the_manifest_says_so(exported):
    _, result = exported
    parts = result.manifest["parts"]
    assert set(result.quantized) == {name for name in parts if parts[name]["precision"] == "int8"}
    assert parts["denoiser"]["precision"] == "int8"
    for name in ("text_encoder", "vae_decoder"):
        good = parts[name]["quantized_sqnr_db"] >= 40
        assert parts[name]["precision"] == ("int8" if good else "float")
    assert parts["text_encoder"]["precision"] == "float"
    assert {parts[name]["precision"] for name in ("denoiser", "vae_decoder")} == {"int8"}


def test_the_denoiser_is_one_file_with_a_method_for_the_prompt_and_one_for_the_step(exported):
    _, result = exported
    mode = result.manifest["quantization"]["activation_mode"]
    entries = [e for e in result.manifest["methods"] if e["part"] == "denoiser"]
    assert [(e["file"], e["method"]) for e in entries] == [
        ("denoiser.pte", "encode_prompt"), ("denoiser.pte", "denoise"),
    ]  # fmt: skip
    assert result.manifest["parts"]["denoiser"]["activation_mode"] == mode
    assert all(entry["subgraphs"] <= 3 for entry in entries)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize(("steps", "guidance"), [(2, 4.0), (5, 1.0)])
def test_images_are_those_of_the_pipeline_with_the_quantized_parts(
    exported, scheduler, steps, guidance
):
    pipeline, result = exported
    runner = PipelineRunner(result.directory)
    numbers = {"num_inference_steps": steps, "guidance_scale": guidance, "seed": 5}
    original = pipeline.scheduler
    try:
        pipeline.scheduler = runner.scheduler(scheduler)
        plain = diffusers_image(pipeline, "a cat", negative_prompt="dog", **numbers)
        numbers["negative_prompt"] = "dog"
        expected = converted_image(pipeline, result.quantized, "a cat", **numbers)
    finally:
        pipeline.scheduler = original
    actual = runner.sample(
        "a cat", negative="dog", steps=steps, guidance=guidance, seed=5, scheduler=scheduler
    )
    assert decibels(expected, actual) >= TOLERANCE_DB
    assert 15 < decibels(plain, actual) < decibels(expected, actual)


def test_the_copied_runner_draws_without_the_package(exported, tmp_path):
    _, result = exported
    words = ["run.py", "a cat", "--negative", "dog", "--seed", "7", "--steps", "2"]
    words += ["--guidance", "2", "--height", "16", "--width", "16", "--output"]
    # an import of the package would fail: a file of its name stands in its way
    (tmp_path / "mpqdm_fx.py").write_text("raise ImportError('the package is not here')")
    run = subprocess.run(
        [sys.executable, *words, str(tmp_path / "cat.png")],
        cwd=result.directory, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    image = np.asarray(Image.open(tmp_path / "cat.png"))
    runner = PipelineRunner(result.directory)
    expected = runner("a cat", negative="dog", seed=7, steps=2, guidance=2.0)
    assert np.array_equal(image, expected)
