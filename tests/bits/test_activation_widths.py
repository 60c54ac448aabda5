"""Which width every input gets below eight bits: the average is kept, and spent where it counts."""

from dataclasses import replace

import pytest
import torch
from test_activation_choice import Outliers, SumOfLinears

from mpqdm_fx import MPQConfig
from mpqdm_fx.bits.activation_costs import ActivationCosts
from mpqdm_fx.bits.activation_widths import choose_widths, width_options
from mpqdm_fx.bits.probes import output_energies
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.run.cost import bind_sizes

NUMBERS = {"first": 3, "even": 16, "uneven": 16, "last": 16}
"""Elements of each input, in units of a channel."""


def choices(model, shape, skipped=(), **settings):
    generator = torch.Generator().manual_seed(0)
    calls = [{"x": torch.randn(shape, generator=generator)} for _ in range(3)]
    graph = trace(model.eval(), calls[0])
    config = MPQConfig(**{"activation_bits": 4, "activation_allocation": "measured", **settings})
    costs = ActivationCosts(graph, calls, config, width_options(config))
    energies = output_energies(graph, calls, watch=costs)
    sizes = bind_sizes(graph, calls[0])
    chosen = choose_widths(
        graph, costs.units, costs.costs(), energies.output, config, sizes, skipped
    )
    return {name: choice for choice in chosen for name in choice.layers}


@pytest.mark.parametrize("mode", ["static", "dynamic", "measured"])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 7])
def test_the_average_over_elements_is_kept_and_ends_stay_in_float(mode, bits):
    chosen = choices(Outliers(), (2, 3, 16, 16), activation_mode=mode, activation_bits=bits)
    free = {name: choice for name, choice in chosen.items() if choice.kind != "float"}
    assert {*chosen} - {*free} == ({"first"} if mode == "dynamic" else {"first", "last"})
    used = sum(NUMBERS[name] * choice.bits for name, choice in free.items())
    assert used <= bits * sum(NUMBERS[name] for name in free)
    # the next wider input would be too much, or there is none
    assert used >= bits * sum(NUMBERS[name] for name in free) - 2 * max(NUMBERS.values())


def test_the_input_of_more_error_gets_more_bits_and_the_sum_of_costs_falls():
    chosen = choices(Outliers(), (8, 3, 16, 16), activation_mode="dynamic")
    uneven, even = chosen["uneven"], chosen["even"]
    assert uneven.quantized_cost > even.quantized_cost
    assert uneven.bits > 4 > even.bits
    assert uneven.cost + even.cost < uneven.quantized_cost + even.quantized_cost


def test_layers_that_read_the_same_numbers_get_one_width():
    chosen = choices(SumOfLinears(), (5, 4), activation_mode="dynamic")
    assert chosen["a"] is chosen["b"]


@pytest.mark.parametrize("batch", [1, 8])
def test_elements_and_multiply_adds_are_those_of_one_traced_call(batch):
    chosen = choices(Outliers(), (batch, 3, 16, 16), activation_mode="measured")
    pixels = batch * 16 * 16
    for name, channels in NUMBERS.items():
        assert chosen[name].elements == channels * pixels
        outputs = 3 if name == "last" else 16
        assert chosen[name].multiply_adds == outputs * channels * 9 * pixels


def test_an_override_gives_the_width_and_takes_nothing_of_the_average():
    rule = {"pattern": "even", "activation_bits": 7}
    chosen = choices(Outliers(), (2, 3, 16, 16), activation_mode="static", overrides=[rule])
    assert chosen["even"].bits == 7
    assert chosen["uneven"].bits == 4


def test_a_skipped_layer_gets_no_width_and_takes_none_of_the_others():
    chosen = choices(Outliers(), (2, 3, 16, 16), ["even"], activation_mode="static")
    assert "even" not in chosen
    assert chosen["uneven"].bits <= 4


@pytest.mark.parametrize(("allocation", "widest"), [("auto", 4), ("measured", 7), ("uniform", 0)])
def test_widths_are_measured_up_to_so_many_bits(allocation, widest):
    for bits in range(1, 9):
        settings = MPQConfig(activation_bits=bits, activation_allocation=allocation)
        assert settings.measures_widths == (bits <= widest)
        assert not replace(settings, activation_mode="float").measures_widths
