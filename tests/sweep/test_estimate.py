import json

import pytest
import torch
from small import TinyNet, net_calls, tiny_unet, unet_calls
from sweeps import recorded, settings_of, traced

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.sweep.estimate import estimate
from mpqdm_fx.sweep.finish import finish
from mpqdm_fx.sweep.start import start_sweep


@pytest.fixture(scope="module")
def net():
    return traced(TinyNet(), net_calls())


def test_activations_take_what_was_foretold(net):
    graph, calls = net
    settings = settings_of(rounding="nearest", propagation=0)
    forecast = estimate(graph, calls, settings)
    sweep = start_sweep(graph, recorded(calls), settings)
    finish(sweep)
    assert forecast.activation_bytes == sweep.walk.peak_bytes
    assert forecast.smallest_limit <= forecast.activation_bytes <= forecast.peak_bytes


def test_the_smallest_limit_is_the_one_that_the_sweep_names(net):
    graph, calls = net
    settings = settings_of()
    limit = estimate(graph, calls, settings).smallest_limit
    start_sweep(graph, recorded(calls), settings, run=RunOptions(activation_memory=limit))
    with pytest.raises(CalibrationError, match=f"smallest limit that can is {limit} bytes"):
        start_sweep(graph, recorded(calls), settings, run=RunOptions(activation_memory=limit - 1))


def test_a_limit_moves_bytes_from_memory_to_disk(net):
    graph, calls = net
    settings = settings_of()
    free = estimate(graph, calls, settings)
    tight = estimate(graph, calls, settings, max_memory=free.activation_bytes // 2)
    assert tight.activation_bytes == free.activation_bytes // 2
    moved = free.activation_bytes - tight.activation_bytes
    assert tight.disk_bytes - free.disk_bytes == moved
    assert free.peak_bytes - tight.peak_bytes == moved


def test_more_work_is_expected_to_take_longer(net):
    graph, calls = net
    fewer, more = (
        estimate(graph, calls, settings_of(refinements=n, max_rows=2048, slowdown=1))
        for n in (0, 40)
    )
    assert more.solve_seconds > fewer.solve_seconds
    assert fewer.sensitivity_seconds == 0
    measured = estimate(graph, calls, settings_of(allocation="measured"))
    assert measured.sensitivity_seconds > 0
    assert measured.seconds > measured.sensitivity_seconds + measured.forward_seconds


def test_estimates_go_to_json(net):
    graph, calls = net
    forecast = estimate(graph, calls, settings_of())
    read = json.loads(json.dumps(forecast.to_dict()))
    assert read["peak_bytes"] == forecast.peak_bytes
    assert read["seconds"] == forecast.seconds


def test_noise_levels_need_no_timesteps_of_the_calls(caplog):
    graph, calls = traced(tiny_unet(), unet_calls(1))
    zeroed = [{**calls[0], "timestep": torch.zeros_like(calls[0]["timestep"])}]
    with caplog.at_level("WARNING"):
        forecast = estimate(graph, zeroed, settings_of(activation_mode="timestep"))
    assert forecast.seconds > 0
    assert not caplog.records
