"""Time layers keep 8 bits where the calls have few noise levels."""

import pytest
import torch
from small import tiny_unet, unet_calls
from sweeps import traced

from mpqdm_fx import MPQConfig, convert, prepare
from mpqdm_fx.bits.allocate import FEW_LEVELS, few_levels, layer_limits
from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.calibration.trajectories import digits_trajectories
from mpqdm_fx.digits.bundled import load_digits_scheduler, load_digits_unet
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.report.metrics import epsilon_sqnr

TIME = {"time_embedding.linear_1", "time_embedding.linear_2"}


@pytest.fixture(scope="module")
def graph():
    return traced(tiny_unet(), unet_calls())[0]


def groups_of(count, argument="timestep"):
    return NoiseGroups(levels=NoiseLevels.of(torch.arange(count), count, argument=argument))


def fixed(graph, groups, **settings):
    config = MPQConfig(**settings)
    return few_levels(layer_limits(graph, config), graph, config, groups).fixed


def test_time_layers_have_eight_bits_and_say_why(graph):
    found = fixed(graph, groups_of(4))
    reason = "time or class embedding, calibrated at 4 noise levels"
    assert found == dict.fromkeys(TIME, (8, reason))


@pytest.mark.parametrize(
    ("groups", "settings"),
    [
        (groups_of(FEW_LEVELS), {}),
        (NoiseGroups.one(), {}),
        (groups_of(4), {"effective_bits": 3.0}),
        (groups_of(4), {"weight_bytes": 100_000}),
    ],
)
def test_many_levels_no_told_level_and_budgets_leave_all_layers_to_the_budget(
    graph, groups, settings
):
    assert fixed(graph, groups, **settings) == {}


def test_overrides_win(graph):
    rules = [
        {"pattern": "time_embedding.linear_1", "weight_bits": 3},
        {"pattern": "time_embedding.linear_2", "skip": True},
    ]
    found = fixed(graph, groups_of(4), overrides=rules)
    assert {name: bits for name, (bits, _) in found.items()} == {"time_embedding.linear_1": 3}


@pytest.mark.matrix
def test_a_model_of_few_steps_draws_with_many():
    model, scheduler = load_digits_unet(), load_digits_scheduler()
    few, many = (
        list(
            digits_trajectories(
                model, scheduler, seed=seed, num_trajectories=8, num_inference_steps=steps,
                rows_per_timestep=None,
            )
        )
        for seed, steps in ((0, 4), (99, 20))
    )  # fmt: skip
    prepared = prepare(model, MPQConfig(activation_mode="dynamic"), few[0])
    for call in few:
        prepared.record(**call)
    quantized = convert(prepared)
    assert epsilon_sqnr(model, quantized, many) > 38  # 31 where the budget decides
