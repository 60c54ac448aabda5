"""Entropy-coded weights: the budget holds, files have the bytes that are told, runs go on."""

import dataclasses
import functools
import json

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls
from sweeps import recorded, settings_of, traced

from mpqdm_fx import MPQConfig, RunOptions, load, quantize, save
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.distillation import distill
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.model.packed import Layout, read_packed, write_packed
from mpqdm_fx.report.gather import PartMeasurements, part_of
from mpqdm_fx.report.page.details import layer_rows
from mpqdm_fx.sweep.finish import finish
from mpqdm_fx.sweep.start import start_sweep

CODED = {"allocation": "measured", "weight_storage": "entropy", "activation_mode": "float"}
"""Weights alone."""


@pytest.fixture(scope="module")
def swept():
    graph_module, calls = traced(tiny_condition_unet(), condition_calls())

    @functools.cache
    def run(bits, rule=None):
        rules = [] if rule is None else [{"pattern": rule, "weight_bits": 5}]
        settings = settings_of(effective_bits=bits, overrides=rules, judge=True, **CODED)
        return finish(start_sweep(graph_module, recorded(calls), settings))

    return run


@pytest.mark.parametrize("bits", [2.6, 4.0])
def test_the_budget_holds_and_is_used(swept, bits):
    plan = swept(bits).plan
    assert all(layer.coded for layer in plan.layers)
    assert 0.93 * bits <= plan.effective_bits <= bits
    stored = sum(layer.coded + 2 * layer.shape[0] for layer in plan.layers)
    assert plan.weight_bytes == stored + sum(t.numel * t.bits // 8 for t in plan.float_weights)
    assert 1.0 < plan.mean_bits < plan.effective_bits


def test_more_bits_give_less_error(swept):
    few, many = (swept(bits).judged[0].error for bits in (2.6, 4.0))
    assert many < 0.4 * few


def test_a_small_last_layer_does_not_bear_what_a_large_one_takes_too_much():
    graph_module, calls = traced(tiny_condition_unet(), condition_calls())
    settings = settings_of(effective_bits=4.0, **CODED)
    budget = start_sweep(graph_module, recorded(calls), settings).prepared.budget
    names = list(budget.sensitivity)
    *others, large, last = names
    for name in others:
        budget.take(name, budget.foretold(name))
    fair = budget.foretold(last)
    assert budget.allows(large, budget.foretold(large))
    too_much = budget.foretold(large) + 0.5 * fair
    assert not budget.allows(large, too_much)
    assert budget.allows(large, too_much, in_need=True)


def test_a_rule_for_a_layer_gives_it_a_fixed_width(swept):
    plan = swept(3.5, "conv_in").plan
    assert plan.layer("conv_in").coded is None
    assert set(plan.layer("conv_in").bits) == {5}
    assert plan.layer("conv_out").coded
    assert plan.effective_bits <= 3.5


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({"allocation": "uniform"}, "allocation='measured'"),
        ({"rounding": "nearest"}, "rounding='gptq'"),
        ({"levels": "int4"}, "levels='uniform'"),
    ],
)
def test_settings_that_ask_for_widths_or_levels_are_refused(changes, needs):
    with pytest.raises(ConfigError, match=needs):
        MPQConfig(weight_storage="entropy", **changes)


@pytest.fixture(scope="module")
def quantized():
    settings = MPQConfig(weight_bits=3, judge=False, slowdown=1, **CODED)
    return quantize(tiny_unet(), settings, unet_calls())


def test_a_folder_has_the_bytes_that_the_plan_says_and_gives_the_same_model(quantized, tmp_path):
    folder = save(quantized, tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    assert len(stored["codes"]) == sum(layer.coded for layer in quantized.plan.layers)
    loaded = load(folder)
    assert loaded.plan == quantized.plan
    assert "entropy-coded" in loaded.summary()
    call = unet_calls(1, seed=3)[0]
    assert torch.equal(loaded(**call).sample, quantized(**call).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"coded": -2}, "conv_out: codes: .*corrupted"), ({"bits": -4}, "conv_out is entropy-coded")],
)
def test_a_layout_that_lies_is_refused_by_the_layers_name(quantized, tmp_path, change, message):
    layout = write_packed(tmp_path / "weights", quantized.rounded, quantized.plan)
    last = layout["layers"][-1]
    assert last["name"] == "conv_out"
    for key, difference in change.items():
        last[key] += difference
    with pytest.raises(ArtifactError, match=message):
        read_packed(tmp_path / "weights", Layout.model_validate_json(json.dumps(layout)))


def test_a_report_tells_no_width_where_there_is_none(quantized):
    part = part_of(
        "unet", "UNet", plan=quantized.plan, report=quantized.report, settings={},
        measured=PartMeasurements(),
    )  # fmt: skip
    for row, planned in zip(layer_rows(part), quantized.plan.layers, strict=True):
        coded = planned.coded is not None
        assert row.layer.bits == ({} if coded else {"8": planned.shape[0]})
        assert ("Entropy-coded: its channels have no fixed width." in row.missing) == coded
        assert ("Channels by their bits" in dict(row.drawings)) != coded


def test_training_keeps_codes_and_bytes(quantized, tmp_path):
    few = DistillConfig(
        updates=2, trajectories=4, steps=3, batch_size=4, effect_runs=2, held_out=2,
        keep_better=False, ema=0.0, scale_rate=0.05,
    )  # fmt: skip
    labels = {"class_labels": torch.arange(4)}
    result = distill(quantized, tiny_unet(), few, scheduler=DDIMScheduler(), conditions=labels)
    trained = result.quantized
    assert trained.plan == quantized.plan
    moved = []
    for layer in trained.plan.layers:
        assert torch.equal(trained.codes(layer.name), quantized.codes(layer.name))
        before, after = (
            model.rounded.get_submodule(layer.name).weight_scale for model in (quantized, trained)
        )
        moved.append(not torch.equal(before, after))
    assert any(moved)
    assert load(save(trained, tmp_path / "trained")).plan == quantized.plan


@pytest.mark.matrix
def test_a_run_that_was_killed_goes_on_to_the_same_bits(quantized, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    settings = dataclasses.replace(quantized.settings)
    solved = []

    def stop_at_the_fifth(solution):
        solved.append(solution)
        if len(solved) == 5:
            raise KeyboardInterrupt

    from mpqdm_fx.sweep.checkpoint import Checkpoint

    save_layer = Checkpoint.save
    monkeypatch.setattr(
        Checkpoint, "save", lambda self, s: (save_layer(self, s), stop_at_the_fifth(s))[0]
    )
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_unet(), settings, unet_calls(), run=RunOptions(directory=folder))
    monkeypatch.undo()
    options = RunOptions(directory=folder, resume=True)
    again = quantize(tiny_unet(), settings, unet_calls(), run=options)
    assert again.plan == quantized.plan
    for layer in again.plan.layers:
        assert torch.equal(again.codes(layer.name), quantized.codes(layer.name))
