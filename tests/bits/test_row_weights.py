"""Rows count by the noise level of the sample that they are of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.row_weights import RowWeights
from mpqdm_fx.graph.layers import output_positions, sample_rows
from mpqdm_fx.records.activations import NoiseLevels

GROUPS = NoiseGroups(levels=NoiseLevels(boundaries=(0.5, 1.5, 2.5), argument="t"))
ENERGIES = torch.tensor([0.5, 8.0, 2.0, 0.0], dtype=torch.float64)
WEIGHTS = RowWeights(groups=GROUPS, energies={"layer": ENERGIES})

LAYERS = {
    "linear": (nn.Linear(3, 2), (3,)),
    "linear of tokens": (nn.Linear(3, 2), (5, 3)),
    "linear of a plane": (nn.Linear(3, 2), (4, 5, 3)),
    "convolution": (nn.Conv2d(4, 2, 3, padding=1), (4, 6, 5)),
    "strided": (nn.Conv2d(4, 2, 3, stride=2, padding=1), (4, 6, 5)),
    "grouped": (nn.Conv2d(4, 2, 3, groups=2), (4, 6, 5)),
    "1d": (nn.Conv1d(4, 2, 3, padding=1), (4, 7)),
}


@pytest.mark.parametrize("kind", LAYERS)
@given(levels=st.lists(st.integers(0, 3), min_size=1, max_size=5), data=st.data())
def test_a_row_has_the_weight_of_its_samples_noise_level(kind, levels, data):
    layer, shape = LAYERS[kind]
    # every number of a sample is its level plus 1, so rows tell whose they are; padding is 0
    marks = torch.tensor(levels).float().view(-1, *[1] * len(shape)) + 1
    x = marks.expand(-1, *shape).contiguous()
    total = output_positions(layer, x)
    chosen = data.draw(st.sets(st.integers(0, total - 1), min_size=1))
    positions = torch.tensor(sorted(chosen))
    call = {"x": x, "t": torch.tensor(levels)}
    weights = WEIGHTS.of_rows("layer", GROUPS.of_samples(call), positions, total)
    whose = sample_rows(layer, x, positions=positions).flatten(1).amax(dim=1).long() - 1
    assert torch.equal(weights, (ENERGIES / 8).clamp_min(1e-6).float()[whose])


def test_every_row_keeps_a_say_and_the_most_important_ones_count_one():
    samples = torch.arange(4)
    weights = WEIGHTS.of_rows("layer", samples, torch.arange(4), 4)
    assert weights.tolist() == pytest.approx([0.0625, 1.0, 0.25, 1e-6])
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("energies", [{}, {"layer": torch.zeros(4, dtype=torch.float64)}])
def test_rows_of_a_layer_without_energy_count_alike(energies):
    weights = RowWeights(groups=GROUPS, energies=energies)
    actual = weights.of_rows("layer", torch.arange(4), torch.arange(8), 8)
    assert torch.equal(actual, torch.ones(8))
