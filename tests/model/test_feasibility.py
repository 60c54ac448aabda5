"""A budget is refused before any data is made exactly where solving would refuse it."""

import re

import pytest
from small import tiny_unet, unet_calls

import mpqdm_fx
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.model.feasibility import check_feasible
from mpqdm_fx.records.config import MPQConfig


def check(**settings):
    check_feasible(tiny_unet(), unet_calls(1)[0], MPQConfig(refinements=0, **settings))


def test_the_smallest_budget_that_is_named_can_be_solved_and_a_byte_less_cannot():
    with pytest.raises(ConfigError, match="the smallest that can is") as refused:
        check(weight_bytes=9)
    smallest = int(re.search(r"smallest that can is weight_bytes=(\d+)", str(refused.value))[1])
    with pytest.raises(ConfigError, match="the smallest that can is"):
        check(weight_bytes=smallest - 1)
    check(weight_bytes=smallest)
    config = MPQConfig(weight_bytes=smallest, refinements=0, propagation=0.0)
    quantized = mpqdm_fx.quantize(tiny_unet(), config, unet_calls(2))
    assert quantized.plan.weight_bytes <= smallest


def test_an_override_that_only_the_graph_knows_or_nobody_does():
    check(overrides=[{"pattern": "conv_in", "weight_bits": 4}])
    with pytest.raises(ConfigError, match="nearest names: conv_in"):
        check(overrides=[{"pattern": "convin", "weight_bits": 4}])


@pytest.mark.matrix
def test_stored_sensitivities_are_taken_for_another_budget_and_for_no_other_model(tmp_path):
    stored = tmp_path / "sensitivities"
    settings = {"refinements": 0, "propagation": 0.0}
    run = mpqdm_fx.RunOptions(sensitivity=stored)
    mpqdm_fx.quantize(tiny_unet(), MPQConfig(**settings), unet_calls(2), run=run)
    config = MPQConfig(weight_bits=3, **settings)
    check_feasible(tiny_unet(), unet_calls(1)[0], config, sensitivity=stored)
    with pytest.raises(ArtifactError, match="measured on another model"):
        check_feasible(tiny_unet(seed=1), unet_calls(1)[0], config, sensitivity=stored)
