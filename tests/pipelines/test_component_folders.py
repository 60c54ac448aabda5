"""Folders of a pipeline's denoiser are judged, trained and gone on with on its prompts."""

import json

import pytest
import torch
from conditioned import CHEAP, PROMPTS, RUNS, count_of, run, states_of, unmeasure

import mpqdm_fx
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.jobs import distill as distill_job
from mpqdm_fx.jobs import quantize as quantize_job
from mpqdm_fx.jobs.evaluate import evaluate_folder
from mpqdm_fx.pipelines.components import as_recorded, in_pipeline
from mpqdm_fx.sources.denoisers import source_of
from mpqdm_fx.sources.sources import load_source


class Killed(BaseException):
    """Stands for a signal: nothing but the interpreter catches it."""


# -- folders -------------------------------------------------------------------------------------


def test_a_folder_remembers_prompts_and_guidance(quantized, pipeline):
    origin = json.loads((quantized / "source.json").read_text())
    assert (tuple(origin["prompts"]), origin["guidance"]) == (PROMPTS, 3.0)
    source = as_recorded(source_of(quantized), quantized)
    assert source.runs(1, 0)["guidance_scale"] == 3.0


def test_a_folder_is_judged_on_prompts(quantized, monkeypatch):
    rows = []
    real = mpqdm_fx.QuantizedModel.forward

    def record(self, **call):
        rows.append(call["encoder_hidden_states"])
        return real(self, **call)

    monkeypatch.setattr(mpqdm_fx.QuantizedModel, "forward", record)
    metrics = evaluate_folder(quantized, num=2, steps=2, seed=1).metrics
    assert metrics["epsilon_sqnr"] > 15
    source = as_recorded(source_of(quantized), quantized)
    states = source.runs(6, 0)["conditions"]["encoder_hidden_states"]
    embeddings = torch.cat(rows)
    assert all(count_of(state, embeddings) for state in states)


def test_where_the_pipeline_is_gone_folders_draw_from_random_numbers_and_say_so(
    pipeline, quantized, tmp_path, caplog
):
    words = ["sample", quantized, "--num", 1, "--steps", 2, "--output", tmp_path / "grid.png"]
    moved = pipeline[1].rename(pipeline[1].with_name("moved"))
    try:
        status, text = run(*words)
        refused = run(*words, "--guidance", 2, "--overwrite")
    finally:
        moved.rename(pipeline[1])
    assert status == 0, text
    assert "seeded random numbers as encoder_hidden_states" in caplog.text
    assert refused[0] == 2
    assert "no pipeline with a text encoder" in refused[1]


# -- training ------------------------------------------------------------------------------------

TRAIN = {
    "updates": 1,
    "trajectories": 4,
    "steps": 2,
    "batch_size": 4,
    "effect_runs": 2,
    "held_out": 2,
}


@pytest.mark.usefixtures("unmeasured")
def test_training_has_the_prompts_and_the_guidance_of_the_calibration(
    pipeline, quantized, tmp_path, monkeypatch
):
    arguments = {}
    real = distill_job.distill

    def recorded(model, teacher, config, **options):
        arguments.update(options, config=config)
        return real(model, teacher, config, **options)

    monkeypatch.setattr(distill_job, "distill", recorded)
    config = DistillConfig(**TRAIN)
    result = distill_job.distill_folder(quantized, config, output=tmp_path / "out", samples=1)
    judged = result.source.components  # gates draw with what was trained on, and not at random
    assert (judged.prompts, judged.guidance) == (PROMPTS, 3.0)
    assert arguments["config"].guidance_scale == 3.0
    states = arguments["conditions"]["encoder_hidden_states"]
    torch.testing.assert_close(states, states_of(pipeline[0], PROMPTS[:4]))
    empty = arguments["unconditional"]["encoder_hidden_states"]
    torch.testing.assert_close(empty, states_of(pipeline[0], [""] * 4))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["distilled"]["settings"]["guidance_scale"] == 3.0
    origins = [json.loads((f / "source.json").read_text()) for f in (quantized, tmp_path / "out")]
    assert origins[0] == origins[1]


@pytest.mark.matrix
def test_training_without_guidance_has_the_prompts_alone(quantized, tmp_path, monkeypatch):
    arguments = {}

    def stop(model, teacher, config, **options):
        arguments.update(options, config=config)
        raise Killed

    monkeypatch.setattr(distill_job, "distill", stop)
    config = DistillConfig(**TRAIN, guidance_scale=1.0)
    with pytest.raises(Killed):
        distill_job.distill_folder(quantized, config, output=tmp_path / "out")
    assert arguments["config"].guidance_scale is None
    assert arguments["unconditional"] is None
    assert len(arguments["conditions"]["encoder_hidden_states"]) == 4


# -- going on ------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_a_resumed_run_gives_the_same_bits_and_is_refused_other_prompts(
    pipeline, quantized, tmp_path, monkeypatch
):
    output, prompts = tmp_path / "out", pipeline[1].parent / "prompts.txt"
    words = ["quantize", pipeline[1], *CHEAP, *RUNS, "--guidance", 3, "--output", output]

    def die(*arguments, **options):
        raise Killed

    monkeypatch.setattr(quantize_job, "write_folder", die)
    with pytest.raises(Killed):
        run(*words, "--prompts", prompts)
    monkeypatch.undo()
    unmeasure(monkeypatch)
    assert not output.exists()
    (tmp_path / "others.txt").write_text("a house\n")
    status, text = run(*words, "--resume", "--prompts", tmp_path / "others.txt")
    assert (status, "calibration" in text) == (2, True), text
    status, text = run(*words, "--resume", "--prompts", prompts)
    assert status == 0, text
    for name in ("model.safetensors", "samples.png", "source.json"):
        assert (output / name).read_bytes() == (quantized / name).read_bytes()


def test_prompts_without_a_pipeline_are_refused_in_python(tmp_path):
    with pytest.raises(ConfigError, match="no pipeline with a text encoder"):
        in_pipeline(load_source("digits"), prompts=["a cat"])
