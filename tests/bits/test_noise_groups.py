"""Calls are held out noise level by noise level, whatever tells the model its noise."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import TinyDenoiser, TinyEDM, TinyNet, denoiser_calls, edm_calls, net_calls
from torch import nn

from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.config import MPQConfig

SETTINGS = MPQConfig()


class LogSNR(nn.Module):
    """A denoiser that is told the logarithm of the signal-to-noise ratio."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x, log_snr):
        return self.conv(x) * torch.sigmoid(log_snr)[:, None, None, None]


KINDS = {
    "timestep": (TinyDenoiser(), denoiser_calls(1)[0], [999, 750, 421, 20, 0]),
    "sigma": (TinyEDM(), edm_calls(1)[0], [80.0, 20.5, 5.0, 1.0, 0.002]),
    "log_snr": (
        LogSNR(),
        {"x": torch.zeros(2, 2, 3, 3), "log_snr": torch.zeros(2)},
        [-15.0, -2.5, 0.0, 3.25, 14.0],
    ),
}
GRAPHS = {name: trace(model, call) for name, (model, call, _) in KINDS.items()}


def calls_of(kind, levels):
    """Calls of two samples, all of one noise level."""
    _, example, known = KINDS[kind]
    return [
        {**example, kind: torch.tensor([known[level]] * 2, dtype=example[kind].dtype)}
        for level in levels
    ]


level_lists = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(st.sampled_from(list(KINDS)), level_lists)
def test_each_noise_level_of_two_calls_gives_some_and_keeps_some(kind, levels):
    calls = calls_of(kind, levels)
    groups = NoiseGroups.of(GRAPHS[kind], calls, SETTINGS)
    assert groups.levels.argument == kind
    assert groups.count == len(set(levels))
    held_out = groups.held_out(calls)
    assert list(held_out) == sorted(set(held_out))
    given_of = Counter(levels[index] for index in held_out)
    several = {level: count for level, count in Counter(levels).items() if count > 1}
    if several:
        assert given_of == {level: max(1, count // 4) for level, count in several.items()}
        assert all(given_of[level] < count for level, count in several.items())
        for level in several:  # the last ones: those of other images or runs
            group = [index for index, value in enumerate(levels) if value == level]
            assert set(group[-given_of[level] :]) <= set(held_out)
    elif len(calls) > 1:  # no level has two: the last quarter of all
        assert held_out == tuple(range(len(calls)))[-max(1, len(calls) // 4) :]
    else:
        assert held_out == ()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_grouped_by_their_own_level(kind):
    _, example, known = KINDS[kind]
    calls = calls_of(kind, range(5))
    groups = NoiseGroups.of(GRAPHS[kind], calls, SETTINGS)
    mixed = {**example, kind: torch.tensor([known[3], known[0]], dtype=example[kind].dtype)}
    expected = [int(groups.of_samples(calls[level])[0]) for level in (3, 0)]
    assert groups.of_samples(mixed).tolist() == expected
    assert sorted(int(groups.of_samples(call)[0]) for call in calls) == [0, 1, 2, 3, 4]
    for value in (torch.tensor(known[3]), torch.tensor([[known[3]]] * 2)):  # 0-d, and [B, 1]
        assert groups.of_samples({**mixed, kind: value}).tolist() == [expected[0]] * 2


def test_calls_of_several_levels_count_as_one_group():
    alike = calls_of("sigma", [0, 1])
    mixed = [
        {**alike[0], "sigma": torch.tensor(levels)}
        for levels in ([80.0, 1.0], [0.002, 80.0], [5.0, 20.5], [1.0, 80.0])
    ]
    calls = [mixed[0], alike[0], mixed[1], mixed[2], alike[1], mixed[3]]
    groups = NoiseGroups(levels=NoiseLevels(boundaries=(0.1, 2.0, 10.0, 40.0), argument="sigma"))
    assert groups.held_out(calls) == (5,)


@pytest.mark.parametrize(("count", "expected"), [(1, ()), (2, (1,)), (7, (6,)), (8, (6, 7))])
def test_a_model_that_is_told_no_noise_has_one_group(count, expected):
    calls = net_calls(count)
    groups = NoiseGroups.of(trace(TinyNet(), calls[0]), calls, SETTINGS)
    assert (groups.count, groups.levels.argument) == (1, None)
    assert groups.of_samples(calls[0]).tolist() == [0, 0]
    assert groups.held_out(calls) == expected


def test_many_levels_make_eight_groups_of_about_equally_many_samples():
    calls = denoiser_calls(50, batch=4)
    groups = NoiseGroups.of(GRAPHS["timestep"], calls, SETTINGS)
    sizes = torch.cat([groups.of_samples(call) for call in calls]).bincount()
    assert len(sizes) == groups.count == 8
    assert int(sizes.min()) >= 20


def test_the_argument_that_settings_name_parts_the_calls():
    calls = edm_calls(6)
    groups = NoiseGroups.of(GRAPHS["sigma"], calls, MPQConfig(noise_argument="difficulty"))
    assert groups.levels.argument == "difficulty"
    expected = groups.levels.group_of(calls[2]["difficulty"])
    assert torch.equal(groups.of_samples(calls[2]), expected)
