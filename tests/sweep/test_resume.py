"""A sweep that was stopped goes on with the same bits; another run's folder is refused."""

import dataclasses
import json

import pytest
import torch
from small import TinyNet, net_calls, tiny_unet, unet_calls
from sweeps import recorded, settings_of, traced

from mpqdm_fx.bits.sensitivity_table import SensitivityTable
from mpqdm_fx.errors import ArtifactError, CalibrationError, ConfigError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.sweep.finish import finish
from mpqdm_fx.sweep.identity import calls_digest
from mpqdm_fx.sweep.start import start_sweep


@pytest.fixture(scope="module")
def unet():
    return traced(tiny_unet(), unet_calls())


def _same(first, second):
    for name, layer in weight_layers(first.rounded, embeddings=True).items():
        counterpart = second.rounded.get_submodule(name)
        assert torch.equal(layer.module.weight_codes, counterpart.weight_codes), name
        assert torch.equal(layer.module.weight_scale, counterpart.weight_scale), name
        if getattr(layer.module, "bias", None) is not None:
            assert torch.equal(layer.module.bias, counterpart.bias), name
    assert first.activations == second.activations
    assert first.plan == second.plan


@pytest.mark.parametrize(
    "allocation", ["uniform", pytest.param("measured", marks=pytest.mark.matrix)]
)
def test_a_run_that_was_killed_resumes_to_the_same_bits(unet, tmp_path, allocation):
    graph, calls = unet
    settings = settings_of(allocation=allocation)
    whole = finish(start_sweep(graph, recorded(calls), settings))
    sweep = start_sweep(graph, recorded(calls), settings, run=RunOptions(directory=tmp_path))
    for _ in sweep:
        if len(sweep.solutions) == 9:
            break
    sweep.walk.close()  # what a kill leaves: nine layers' files
    assert len(list(tmp_path.glob("layer-*.safetensors"))) == 9
    again = start_sweep(
        graph, recorded(calls), settings, run=RunOptions(directory=tmp_path, resume=True)
    )
    solved = []
    original = again._solve_with
    again._solve_with = lambda layer, data: solved.append(layer.name) or original(layer, data)
    result = finish(again)
    _same(whole, result)
    assert not set(solved) & set(sweep.solutions)  # not one of the nine was solved again
    assert [layer.sqnr_db for layer in whole.layers] == [layer.sqnr_db for layer in result.layers]


def test_resuming_with_other_settings_is_refused_and_the_difference_is_named(unet, tmp_path):
    graph, calls = unet
    run = RunOptions(directory=tmp_path)
    start_sweep(graph, recorded(calls), settings_of(weight_bits=4), run=run)
    run = RunOptions(directory=tmp_path, resume=True)
    with pytest.raises(ConfigError, match=r"settings\.weight_bits was 4, is 3"):
        start_sweep(graph, recorded(calls), settings_of(weight_bits=3), run=run)
    with pytest.raises(ConfigError, match="calibration was"):
        start_sweep(graph, recorded(calls[:2]), settings_of(weight_bits=4), run=run)


@pytest.mark.parametrize("skew", [1e4, 1 + 1e-9])
def test_resuming_with_other_sensitivities_is_refused_whatever_bits_they_give(unet, tmp_path, skew):
    graph, calls = unet
    settings = settings_of(allocation="measured", effective_bits=4.5)
    path = tmp_path / "table.safetensors"
    run = RunOptions(directory=tmp_path / "run", sensitivity=path)
    sweep = start_sweep(graph, recorded(calls), settings, run=run)
    for _ in sweep:
        if len(sweep.solutions) == 9:
            break
    sweep.walk.close()
    table = SensitivityTable.load(path)
    skewed = dataclasses.replace(
        table,
        layers=tuple(
            dataclasses.replace(layer, sensitivity=layer.sensitivity * skew ** (index % 2))
            for index, layer in enumerate(table.layers)
        ),
    )
    skewed_file = skewed.save(tmp_path / "other.safetensors")
    again = dataclasses.replace(run, resume=True)
    other = dataclasses.replace(again, sensitivity=skewed_file)
    with pytest.raises(ConfigError, match="give the sensitivity file of the run that was killed"):
        start_sweep(graph, recorded(calls), settings, run=other)
    start_sweep(graph, recorded(calls), settings, run=again)
    start_sweep(graph, recorded(calls), settings, run=dataclasses.replace(again, sensitivity=None))


def test_resuming_with_activations_of_other_precision_is_refused(unet, tmp_path):
    graph, calls = unet
    whole = RunOptions(directory=tmp_path / "whole")
    halved = RunOptions(directory=tmp_path / "half", half=True)
    for run in (whole, halved):
        start_sweep(graph, recorded(calls), settings_of(), run=run)
        start_sweep(graph, recorded(calls), settings_of(), run=run)
        other = dataclasses.replace(run, half=not run.half)
        with pytest.raises(ConfigError, match="half was"):
            start_sweep(graph, recorded(calls), settings_of(), run=other)


@pytest.mark.parametrize(
    ("first", "second"),
    [({"x": 1.0}, {"x": 2.0}), ({"x": [None, 1]}, {"x": [1, None]}), ({"x": 1}, {"y": 1})],
)
def test_constants_and_names_of_inputs_tell_calls_apart(first, second):
    """Tensors beside them are the same."""
    image = torch.zeros(2, 3)
    assert calls_digest([{**first, "image": image}]) != calls_digest([{**second, "image": image}])
    assert calls_digest([{"first": image}]) != calls_digest([{"second": image}])


@pytest.mark.parametrize("seed", [2**24, 20260101, 2**62 - 1])
def test_large_seeds_are_taken(seed):
    graph, calls = traced(TinyNet(), net_calls())
    finish(start_sweep(graph, recorded(calls), settings_of(seed=seed, allocation="measured")))


def test_an_unfinished_run_is_not_overwritten(unet, tmp_path):
    graph, calls = unet
    sweep = start_sweep(graph, recorded(calls), settings_of(), run=RunOptions(directory=tmp_path))
    while not sweep.solutions:
        next(sweep)
    with pytest.raises(ConfigError, match="not finished; resume it, or delete it"):
        start_sweep(graph, recorded(calls), settings_of(), run=RunOptions(directory=tmp_path))


@pytest.mark.parametrize("damage", ["layer", "header"])
def test_damaged_files_are_refused_by_name(unet, tmp_path, damage):
    graph, calls = unet
    sweep = start_sweep(graph, recorded(calls), settings_of(), run=RunOptions(directory=tmp_path))
    while not sweep.solutions:
        next(sweep)
    if damage == "layer":
        path = next(tmp_path.glob("layer-*.safetensors"))
        path.write_bytes(path.read_bytes()[:40])
    else:
        path = tmp_path / "sweep.json"
        path.write_text(path.read_text()[:20])

    def resume():
        run = RunOptions(directory=tmp_path, resume=True)
        finish(start_sweep(graph, recorded(calls), settings_of(), run=run))

    with pytest.raises(ArtifactError, match=path.name):
        resume()


def test_the_header_says_what_the_run_is(unet, tmp_path):
    graph, calls = unet
    start_sweep(graph, recorded(calls), settings_of(seed=5), run=RunOptions(directory=tmp_path))
    header = json.loads((tmp_path / "sweep.json").read_text())
    assert header["settings"]["seed"] == 5
    assert header["held_out"] == [3]
    assert set(header) == {"settings", "model", "calibration", "held_out", "versions"}


def test_spilled_activations_change_nothing(unet):
    graph, calls = unet
    settings = settings_of(propagation=0.5)
    free = finish(start_sweep(graph, recorded(calls), settings))
    sweep = start_sweep(graph, recorded(calls), settings, run=RunOptions(activation_memory=70_000))
    tight = finish(sweep)
    assert sweep.walk.spilled > 0
    assert sweep.walk.peak_bytes <= 70_000
    _same(free, tight)


def test_a_memory_limit_that_cannot_hold_is_refused_with_the_smallest_that_can(unet):
    graph, calls = unet
    with pytest.raises(CalibrationError, match=r"smallest limit that can is (\d+) bytes"):
        start_sweep(graph, recorded(calls), settings_of(), run=RunOptions(activation_memory=1000))
