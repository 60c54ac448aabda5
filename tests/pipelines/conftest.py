"""A pipeline, its denoiser quantized on its prompts, and itself exported; made once a process."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_pipelines
import torch
from conditioned import CHEAP, PROMPTS, RUNS, run, unmeasure
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from mpqdm_fx.cli import app as cli
from mpqdm_fx.jobs import export as export_job
from mpqdm_fx.pipelines.export import ExportResult


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    pipe = tiny_pipelines.stable_diffusion(root)
    pipe.save_pretrained(root / "sd")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return pipe, root / "sd"


@pytest.fixture(scope="session")
def quantized(pipeline, tmp_path_factory):
    output = tmp_path_factory.mktemp("quantized") / "out"
    words = ["--prompts", pipeline[1].parent / "prompts.txt", "--guidance", 3, "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        unmeasure(patch)
        status, text = run("quantize", pipeline[1], *CHEAP, *RUNS, *words)
    assert status == 0, text
    return output


@pytest.fixture(scope="session")
def lora(tmp_path_factory):
    """The file of a LoRA for the attention of the tiny UNet, with random weights."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    root = tmp_path_factory.mktemp("lora")
    unet = tiny_pipelines.stable_diffusion(root).unet
    torch.manual_seed(5)
    settings = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    unet.add_adapter(settings)
    StableDiffusionPipeline.save_lora_weights(
        root, unet_lora_layers=get_peft_model_state_dict(unet), weight_name="style.safetensors"
    )
    return root / "style.safetensors"


@pytest.fixture
def unmeasured(monkeypatch):
    unmeasure(monkeypatch)


class Exported(NamedTuple):
    """A pipeline's folder that was exported by the command line, and what that did."""

    pipeline: StableDiffusionPipeline
    source: Path
    result: ExportResult
    printed: dict[str, Any]
    status: int


EXPORT: dict[str, Any] = {
    "allocation": "uniform",
    "levels": "uniform",
    "rounding": "nearest",
    "refinements": 0,
    "propagation": 0,
    "slowdown": 1,
    "steps": 3,
    "guidance": 3,
    "trajectories": 4,
    "minimum-sqnr": 40,
}
GATES = ("bytes<=40MB", "ms<=3600s", "psnr>=5", "x0_sqnr>=900")  # all but the last are kept


@pytest.fixture(
    scope="session", params=["static", pytest.param("dynamic", marks=pytest.mark.matrix)]
)
def export_run(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    pipeline = tiny_pipelines.stable_diffusion(root)
    pipeline.save_pretrained(root / "sd")
    results = []
    real = export_job.export_pipeline

    def record(*arguments, **options):
        results.append(real(*arguments, **options))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_job, "export_pipeline", record)
        (root / "prompts.txt").write_text("a cat\n\na dog\nthree pears on a table\na map\n")
        words = ["export", root / "sd", "--output", root / "out", "--json"]
        words += ["--prompts", root / "prompts.txt"]
        words += ["--activation-mode", request.param]
        words += [word for name, value in EXPORT.items() for word in (f"--{name}", value)]
        words += [word for gate in GATES for word in ("--gate", gate)]
        run = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert results, run.output
    return Exported(pipeline, root / "sd", results[0], json.loads(run.stdout), run.exit_code)


@pytest.fixture
def exported(export_run):
    return export_run.pipeline, export_run.result
