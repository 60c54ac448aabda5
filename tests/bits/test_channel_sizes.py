"""Sizes of channels are those of all calls, and one walk finds them and the ranges."""

import pytest
import torch
from reporters import Told
from small import condition_calls, tiny_condition_unet
from torch import nn

from mpqdm_fx.bits.activation_choice import options_of
from mpqdm_fx.bits.activation_costs import ActivationCosts
from mpqdm_fx.bits.channel_sizes import ChannelSizes
from mpqdm_fx.bits.probes import output_energies
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.io.progress import reporting
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.records.config import MPQConfig


class Twice(nn.Module):
    """One layer that reads two values: the later one is larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(torch.relu(self.shared(3 * self.shared(x))))


def _measured(graph, calls, mode):
    reporter, settings = Told(), MPQConfig(activation_mode=mode)
    with reporting(reporter):
        costs = ActivationCosts(graph, calls, settings, options_of(settings))
        output_energies(graph, calls, watch=costs)
    return costs, reporter.names


def _same(sizes, expected):
    assert set(sizes.largest) == set(expected.largest)
    for unit, largest in expected.largest.items():
        assert torch.equal(sizes.largest[unit], largest)
        assert torch.equal(sizes.mean_square[unit], expected.mean_square[unit])


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_one_walk_finds_sizes_and_ranges_where_a_unit_reads_one_value(mode):
    calls = condition_calls()
    graph = normalized(tiny_condition_unet(), calls[0], MPQConfig())
    costs, stages = _measured(graph, calls, mode)
    _same(costs.sizes, ChannelSizes.of(graph, calls, costs.units))
    assert ("channels" in stages, "ranges" in stages) == (mode == "dynamic", mode == "static")


def test_sizes_come_before_ranges_where_a_unit_reads_several_values():
    generator = torch.Generator().manual_seed(0)
    calls = [{"x": torch.randn(4, 6, generator=generator)} for _ in range(3)]
    graph = trace(Twice().eval(), calls[0])
    costs, stages = _measured(graph, calls, "static")
    _same(costs.sizes, ChannelSizes.of(graph, calls, costs.units))
    assert [name for name in stages if name != "sensitivities"] == ["channels", "ranges"]
    # a walk that had settled after the first value would not know the second one, which is larger
    first = torch.cat([call["x"] for call in calls]).abs().amax(dim=0)
    assert bool((costs.sizes.largest["shared"] > first).any())
