"""A run that starts from another one takes the layers of equal weights and solves the rest."""

import dataclasses
import functools
import json
import shutil

import pytest
import torch
from records import flip
from small import TinyDenoiser, denoiser_calls
from sweeps import recorded, settings_of, traced
from torch import nn

from mpqdm_fx.bits.allocate import Limits
from mpqdm_fx.bits.sensitivity_table import SensitivityTable
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.sweep.finish import finish
from mpqdm_fx.sweep.start import start_sweep
from mpqdm_fx.sweep.stored_run import shares_a_layer

TOUCHED = {"mix", "table"}
SETTINGS = settings_of(
    allocation="measured", effective_bits=4.5, activation_mode="measured", slowdown=2
)


class Model(TinyDenoiser):
    """With a linear layer and a table in the middle, and channels of very different sizes."""

    def __init__(self, rows=5):
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.table = nn.Embedding(rows, 8)
        self.register_buffer("gain", torch.logspace(-2, 2, 8))
        self.conv_out.weight.data /= self.gain[:, None, None]

    def forward(self, sample, timestep):
        time = self.time(torch.sin(timestep[:, None] / 100 + torch.arange(4)))
        hidden = self.act(self.conv_in(sample) + time[:, :, None, None]).movedim(1, -1)
        hidden = self.mix(hidden) + self.table(timestep // 200)[:, None, None]
        return self.conv_out((hidden * self.gain).movedim(-1, 1))


@functools.cache
def graph_of(kind):
    """A model's graph, which no sweep changes, and calls."""
    return traced(kind(), denoiser_calls(6))


def run_of(kind, settings, **folders):
    graph, calls = graph_of(kind)
    return finish(start_sweep(graph, recorded(calls), settings, run=RunOptions(**folders)))


def changed(names=TOUCHED):
    """The same model with a change of rank 2 on some layers."""
    model = Model()
    torch.manual_seed(7)
    for name in sorted(names):
        weight = model.get_submodule(name).weight
        rows, columns = weight.shape
        weight.data += 0.02 * torch.randn(rows, 2) @ torch.randn(2, columns)
    return model


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "run"
    return run_of(Model, SETTINGS, directory=folder), folder


@pytest.fixture(scope="module")
def started(stored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("started") / "run"
    return run_of(changed, SETTINGS, start_from=stored[1], directory=folder), folder


def _equal(first, second, name):
    layers = [result.rounded.get_submodule(name) for result in (first, second)]
    biases = [getattr(layer, "bias", None) for layer in layers]
    return (
        torch.equal(layers[0].weight_codes, layers[1].weight_codes)
        and torch.equal(layers[0].weight_scale, layers[1].weight_scale)
        and (biases[0] is None or torch.equal(*biases))
    )


def test_layers_of_equal_weights_are_taken_and_the_others_solved_at_their_bits(stored, started):
    names = set(weight_layers(stored[0].rounded, embeddings=True))
    differing = {name for name in names if not _equal(stored[0], started[0], name)}
    assert differing == TOUCHED
    assert started[0].taken == names - TOUCHED
    assert started[0].plan == stored[0].plan  # to the last channel: the budget holds
    assert started[0].choices == stored[0].choices
    assert any(choice.exponent for choice in stored[0].choices)  # channels are scaled alike


def test_what_was_decided_is_not_measured_again(stored, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("it was measured again")

    monkeypatch.setattr("mpqdm_fx.sweep.start.prepared_sweep", refuse)
    graph, calls = graph_of(changed)
    sweep = start_sweep(graph, recorded(calls), SETTINGS, run=RunOptions(start_from=stored[1]))
    solved = []
    original = sweep._solve_with
    sweep._solve_with = lambda layer, data: solved.append(layer.name) or original(layer, data)
    finish(sweep)
    assert set(solved) == TOUCHED - {"table"}  # which is rounded without data


def test_a_started_run_that_was_killed_goes_on_and_can_be_started_from(stored, started, tmp_path):
    graph, calls = graph_of(changed)
    run = RunOptions(start_from=stored[1], directory=tmp_path / "run")
    sweep = start_sweep(graph, recorded(calls), SETTINGS, run=run)
    for _ in sweep:
        if TOUCHED & set(sweep.solutions):
            break
    sweep.walk.close()
    resumed = dataclasses.replace(run, resume=True)
    result = finish(start_sweep(graph, recorded(calls), SETTINGS, run=resumed))
    assert all(_equal(result, started[0], layer.name) for layer in result.plan.layers)
    other = dataclasses.replace(resumed, start_from=started[1])
    with pytest.raises(ConfigError, match="start was"):
        start_sweep(graph, recorded(calls), SETTINGS, run=other)
    again = run_of(Model, SETTINGS, start_from=tmp_path / "run")
    assert len(again.taken) == len(again.plan.layers) - len(TOUCHED)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_run_without_measured_bits_is_started_from_too(tmp_path, rounding):
    settings = settings_of(
        allocation="omq" if rounding == "gptq" else "uniform", rounding=rounding, judge=True
    )
    first = run_of(Model, settings, directory=tmp_path / "run")
    second = run_of(changed, settings, start_from=tmp_path / "run")
    assert second.plan == first.plan
    assert len(second.taken) in (len(first.plan.layers) - len(TOUCHED), 0)  # 0: plain rounding won
    chosen = [judged.recipe for judged in second.judged if judged.chosen]
    assert bool(second.taken) == (chosen == ["the recipe"])


CODED = settings_of(
    allocation="measured", weight_storage="entropy", effective_bits=4.0, activation_mode="float"
)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coded") / "run"
    return run_of(Model, CODED, directory=folder), folder


def test_entropy_coded_layers_share_what_the_others_left(coded):
    first, folder = coded
    second = run_of(changed, CODED, start_from=folder)
    assert len(second.taken) == len(first.plan.layers) - len(TOUCHED)
    for layer in first.plan.layers:
        assert layer.name in TOUCHED or second.plan.layer(layer.name) == layer
    assert second.plan.effective_bits <= 4.0


def test_layers_off_the_budget_are_those_of_the_earlier_run(coded, monkeypatch):
    first, folder = coded
    few = Limits(fixed={"time": (8, "calls of few noise levels")}, skipped={})
    monkeypatch.setattr("mpqdm_fx.sweep.start.few_levels", lambda *_: few)
    second = run_of(changed, CODED, start_from=folder)
    assert second.plan.layer("time") == first.plan.layer("time")


def test_a_layer_whose_pitch_is_far_too_fine_is_rounded_within_what_is_left():
    def closed():
        model = Model()
        model.mix.weight.data.zero_()  # what layers before it do is nothing to the output
        return model

    result = run_of(closed, dataclasses.replace(CODED, effective_bits=5.0))
    assert result.plan.effective_bits <= 5.0
    assert result.plan.layer("conv_out").mean_bits > 5.0


def shrunk(names, factor, model=Model):
    """A model with layers of which next to nothing is left."""
    model = model()
    for name in names:
        model.get_submodule(name).weight.data *= factor
    return model


@pytest.mark.parametrize("factor", [0.0, 1e-6])
def test_what_a_layer_does_is_not_taken_from_where_it_did_nothing(tmp_path, factor):
    nearly = functools.partial(shrunk, ("table",), factor)
    run_of(nearly, CODED, directory=tmp_path / "run")
    message = r"table: its weights were next to nothing .* leave start_from out"
    with pytest.raises(ConfigError, match=message):
        run_of(functools.partial(changed, ("mix",)), CODED, start_from=tmp_path / "run")
    # where it stays so, it is taken
    stays = functools.partial(shrunk, ("table",), factor, functools.partial(changed, ("mix",)))
    assert "table" in run_of(stays, CODED, start_from=tmp_path / "run").taken


def test_a_layer_that_was_zero_has_codes_when_nothing_was_measured_of_it(tmp_path):
    settings = settings_of(allocation="uniform", activation_mode="float")
    run_of(functools.partial(shrunk, ("table",), 0.0), settings, directory=tmp_path / "run")
    result = run_of(functools.partial(changed, ("mix",)), settings, start_from=tmp_path / "run")
    assert bool(result.rounded.get_submodule("table").weight_codes.any())


@pytest.mark.parametrize("factor", [0.0, 1e-20])
def test_nothing_at_the_end_leaves_the_budget_to_the_others(factor):
    result = run_of(functools.partial(shrunk, ("conv_out",), factor), CODED)
    assert 3.8 <= result.plan.effective_bits <= 4.0


def test_the_energies_of_inputs_are_those_of_the_earlier_run(coded):
    graph, calls = graph_of(functools.partial(shrunk, ("mix",), 3.0))
    options = RunOptions(start_from=coded[1])
    second = start_sweep(graph, recorded(calls), CODED, run=options).prepared.budget.energy
    graph, calls = graph_of(Model)
    first = start_sweep(graph, recorded(calls), CODED).prepared.budget.energy
    assert dict(second) == pytest.approx(dict(first))


def test_other_settings_models_and_folders_are_refused_by_name(stored, tmp_path):
    folder = stored[1]
    with pytest.raises(ConfigError, match=r"other settings: settings\.effective_bits was 4\.5"):
        run_of(changed, dataclasses.replace(SETTINGS, effective_bits=5.0), start_from=folder)

    def strange():
        model = Model()
        for parameter in model.parameters():
            parameter.data += 0.01
        return model

    with pytest.raises(ConfigError, match="no layer has the weights that it had"):
        run_of(strange, SETTINGS, start_from=folder)
    assert not shares_a_layer(folder, strange())
    assert shares_a_layer(folder, changed())
    with pytest.raises(ArtifactError, match=r"holds no solved layers: sweep\.json is missing"):
        run_of(changed, SETTINGS, start_from=tmp_path)
    with pytest.raises(ConfigError, match=r"table: its weight is \[6, 8\], and \[5, 8\] in"):
        run_of(functools.partial(Model, rows=6), SETTINGS, start_from=folder)
    with pytest.raises(ConfigError, match="it has a layer mix, which is not here"):
        run_of(TinyDenoiser, SETTINGS, start_from=folder)


def test_a_damaged_or_unfinished_run_is_refused_before_anything_is_solved(stored, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(stored[1], copied)
    one = sorted(copied.glob("layer-*"))[3]
    flip(one, one.stat().st_size - 9)
    with pytest.raises(ArtifactError, match="run anew what it is of"):
        run_of(changed, SETTINGS, start_from=copied)
    one.unlink()
    with pytest.raises(ConfigError, match=r"was not finished: .* was not solved"):
        run_of(changed, SETTINGS, start_from=copied)
    (copied / "decisions.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"decisions\.safetensors is missing"):
        run_of(changed, SETTINGS, start_from=copied)


def test_options_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="leave `sensitivity` out"):
        RunOptions(start_from=tmp_path, sensitivity="file")
    with pytest.raises(ConfigError, match="give another folder"):
        RunOptions(start_from=tmp_path, directory=str(tmp_path))


def test_a_table_that_was_given_is_kept_with_the_run(tmp_path):
    file, folder = tmp_path / "table.safetensors", tmp_path / "run"
    settings = settings_of(allocation="measured", effective_bits=4.5)
    graph, calls = graph_of(Model)
    run = RunOptions(directory=folder, sensitivity=file)
    start_sweep(graph, recorded(calls), settings, run=run).walk.close()
    kept = SensitivityTable.load(folder / "sensitivity.safetensors")
    assert kept.fingerprint == SensitivityTable.load(file).fingerprint
    head = json.loads((folder / "sweep.json").read_text())
    assert head["settings"]["effective_bits"] == 4.5
