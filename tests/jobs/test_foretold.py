"""The stages that a job has are those that are foretold, in that order."""

import pytest
import torch
from diffusers import DDIMScheduler
from reporters import Told
from small import tiny_unet

from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.io.progress import reporting
from mpqdm_fx.jobs.distill import distill_folder
from mpqdm_fx.jobs.foretold import pareto_stages, quantize_stages
from mpqdm_fx.jobs.quantize import quantize_to_folder
from mpqdm_fx.jobs.result_folder import ProgramForm
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sources.sources import load_source


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_unet().save_pretrained(folder)
    DDIMScheduler().save_pretrained(folder / "scheduler")
    return str(folder)


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """A folder, and what its reporter was told."""
    output, reporter = tmp_path_factory.mktemp("out") / "out", Told()
    config = MPQConfig(activation_mode="dynamic", weight_bits=3)
    source = load_source(model, None, None)
    with reporting(reporter):
        quantize_to_folder(
            source, config, backend="packed", output=output,
            trajectories=4, steps=2, samples=2,
        )  # fmt: skip
    return output, reporter


def outer(reporter):
    """Names of the stages that lie in no other one, each run of equal ones once."""
    names = reporter.outer_names
    return [name for index, name in enumerate(names) if names[index - 1 : index] != [name]]


def test_quantizing_has_the_stages_that_are_foretold(quantized):
    _, reporter = quantized
    assert outer(reporter) == list(reporter.expectations[0])
    assert not reporter.failed_names
    assert all(stage.total in (None, pytest.approx(stage.done)) for stage in reporter.stages)


def test_what_is_measured_on_the_way_is_of_stages_that_are_foretold(quantized):
    first, *later = quantized[1].expectations
    assert len(later) == 2  # once the graph is there, and once it is rounded
    assert {"rounding", "rounding errors", "sensitivities"} <= set(later[0])
    assert {"lowering", "comparing forms", "measuring"} <= set(later[1])
    assert all(seconds >= 0 for expectation in later for seconds in expectation.values())
    assert later[0]["rounding"] != first["rounding"]


def test_the_result_has_what_libraries_printed_in_its_list(quantized):
    from mpqdm_fx.model.folder import open_folder

    assert open_folder(quantized[0]).files.entries["log.txt"].bytes == len("said")


@pytest.mark.matrix
def test_training_has_the_stages_that_are_foretold(quantized, tmp_path):
    reporter = Told()
    config = DistillConfig(updates=3, trajectories=4, steps=2, batch_size=4, keep_better=False)
    with reporting(reporter), torch.random.fork_rng():
        distill_folder(quantized[0], config, output=tmp_path / "out", samples=2)
    names = [name for name in outer(reporter) if name in reporter.expectations[0]]
    assert names == list(reporter.expectations[0])
    training = next(stage for stage in reporter.stages if stage.name == "training")
    assert training.done == pytest.approx(1.0)
    assert "update 3" in training.note


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"allocation": "uniform"}, {"rounding errors"}),
        ({"activation_mode": "float"}, {"channels"}),
        ({"judge": False}, {"judging"}),
    ],
)
def test_what_settings_leave_out_is_not_foretold(model, options, missing):
    source = load_source(model, None, None)
    config = MPQConfig(**{"activation_mode": "dynamic", **options})
    stages = quantize_stages(source, MPQConfig(activation_mode="dynamic"), "xnnpack", 4)
    assert set(stages) - set(quantize_stages(source, config, "xnnpack", 4)) == missing
    assert "lowering" not in quantize_stages(source, config, "packed", 4)
    assert "drawing" not in quantize_stages(source, config, "packed", 0)


def test_of_several_budgets_the_first_one_measures(model):
    source = load_source(model, None, None)
    budgets = {bits: MPQConfig(weight_bits=bits, activation_mode="dynamic") for bits in (2, 3)}
    stages = pareto_stages(source, budgets, ProgramForm(backend="packed"), samples=None)
    assert list(stages)[-3:] == ["2 bits", "3 bits", "page"]
    assert stages["2 bits"] > stages["3 bits"] > 0
    picked = pareto_stages(source, budgets, ProgramForm(backend="packed"), samples=2)
    assert list(picked)[len(stages) - 1] == "comparing forms"
    assert list(picked)[-1] == "page"
