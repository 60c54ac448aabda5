"""A pipeline's denoiser with prompts and guidance: what its tests share."""

import tiny_pipelines
import torch
from typer.testing import CliRunner

from mpqdm_fx.cli import app as cli
from mpqdm_fx.errors import MPQError
from mpqdm_fx.jobs import result_folder
from mpqdm_fx.pipelines.components import in_pipeline
from mpqdm_fx.sources.sources import load_source

PROMPTS = ("a cat", "a dog", "pears", "a map", "a key", "a bee")
CHEAP = ["--weights", 8, "--allocation", "uniform", "--levels", "uniform", "--rounding", "nearest"]
CHEAP += ["--refinements", 0, "--propagation", 0, "--slowdown", 1]
CHEAP += ["--backend", "packed", "--subfolder", "unet"]
RUNS = ["--trajectories", 4, "--steps", 2, "--samples", 2]


def run(*words):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if isinstance(result.exception, MPQError):
        return 2, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout if result.exit_code == 0 else result.output


def unmeasure(monkeypatch):
    """Leave out the processes that measure peaks of memory, which take the longest."""
    monkeypatch.setattr(result_folder, "peak_memory", lambda *_: None)


def source_in(folder, **options):
    return in_pipeline(load_source(str(folder), "unet"), **options)


def states_of(pipeline, prompts):
    """What the text encoder itself says, without anything of the package or of the pipeline."""
    ids = pipeline.tokenizer(
        list(prompts), padding="max_length", max_length=tiny_pipelines.LENGTH, truncation=True,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    with torch.no_grad():
        return torch.cat([pipeline.text_encoder(row[None])[0] for row in ids])


def count_of(row, rows):
    return sum(torch.allclose(row, candidate, atol=1e-6) for candidate in rows)
