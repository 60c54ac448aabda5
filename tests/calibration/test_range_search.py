"""Ranges of values seen over many calls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.calibration import ranges as module
from mpqdm_fx.calibration.ranges import search_by_noise_level, search_static
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.activations.ranges import search_range


def calls(seed: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(4, 2, 5, generator=generator) * (1 + index) - index for index in range(count)
    ]


def as_pair(found) -> tuple[float, int]:
    return found.scale, found.zero_point


@given(st.integers(0, 2**16), st.integers(2, 8), st.integers(0, 2**16))
def test_few_values_are_searched_whole_whatever_the_seed(seed, bits, sample_seed):
    values = calls(seed)
    everything = torch.cat([value.flatten() for value in values])
    want = search_range(everything, float(everything.min()), float(everything.max()), bits)
    found = search_static(iter(values), bits, sample_seed)
    assert as_pair(found) == want
    assert found.bits == bits


def test_of_many_values_every_call_has_its_share():
    sample = module._Sample(0, 4000)
    for level in range(1, 9):
        sample.add(torch.full((level, 1000), float(level)))
    kept = torch.bincount(sample.kept.long(), minlength=9)[1:]
    assert int(kept.sum()) == 4000
    want = 4000 * torch.arange(1, 9) / 36
    assert (kept - want).abs().max() < 40
    assert (sample.minimum, sample.maximum) == (1.0, 8.0)


def test_a_sampled_range_is_about_the_exact_one_and_depends_on_the_seed_alone(monkeypatch):
    values = [torch.randn(50_000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    exact = search_static(values, 4, 0)
    monkeypatch.setattr(module, "MAX_VALUES", 20_000)
    sampled = search_static(values, 4, 0)
    assert sampled.scale == pytest.approx(exact.scale, rel=0.05)
    torch.manual_seed(1)
    assert search_static(values, 4, 0) == sampled
    assert search_static(values, 4, 1) != sampled


@given(st.integers(0, 2**16), st.data())
def test_each_group_has_the_range_of_its_own_samples(seed, data):
    values = calls(seed)
    draw = st.lists(st.integers(0, 2), min_size=2, max_size=2)
    groups = [torch.tensor(data.draw(draw)) for _ in values]
    found = search_by_noise_level(values, groups, 6, 3, 0)
    assert len(found) == 3
    for index in range(3):
        own = [v.view(2, 2, 2, 5)[g == index] for v, g in zip(values, groups, strict=True)]
        if sum(map(len, own)):
            assert found[index] == search_static([v for v in own if len(v)], 6, 0)


def test_a_group_without_samples_takes_its_neighbours_range():
    low, high = torch.full((1, 3), -1.0), torch.full((1, 3), 4.0)
    groups = [torch.tensor([1]), torch.tensor([4])]
    found = search_by_noise_level([low, high], groups, 8, 6, 0)
    one, four = search_static([low], 8, 0), search_static([high], 8, 0)
    assert found == (one, one, one, four, four, four)


def test_one_group_for_a_whole_call_counts_all_its_rows():
    values = calls(0)
    found = search_by_noise_level(values, [torch.tensor([0])] * len(values), 8, 1, 0)
    assert found == (search_static(values, 8, 0),)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 2])
def test_nan_and_infinity_are_refused_wherever_they_are(bad, where):
    values = calls(0)
    values[where][1, 1, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        search_static(values, 8, 0)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        search_by_noise_level(values, [torch.tensor([0, 1])] * 3, 8, 2, 0)


def test_no_values_and_groups_out_of_range_are_refused():
    with pytest.raises(CalibrationError, match="at least one call"):
        search_static([], 8, 0)
    with pytest.raises(CalibrationError, match="at least one call"):
        search_by_noise_level([], [], 8, 2, 0)
    with pytest.raises(ConfigError, match="group 2"):
        search_by_noise_level(calls(0, 1), [torch.tensor([2])], 8, 2, 0)


@pytest.mark.parametrize("sizes", [(300,), (900, 50, 400, 700), (20, 30, 5000, 1, 80)])
def test_draws_that_are_kept_are_those_of_a_generator_of_its_own(sizes):
    values = [torch.arange(1.0, size + 1) + 10_000 * call for call, size in enumerate(sizes)]
    generator, kept, seen = torch.Generator().manual_seed(5), torch.empty(0), 0
    for value in values:
        seen += len(value)
        if seen > 600:
            share = round(600 * len(value) / seen)
            value = value[torch.randint(len(value), (share,), generator=generator)]
            kept = kept[torch.randperm(len(kept), generator=generator)[: 600 - share]]
        kept = torch.cat([kept, value])
    for _ in range(2):  # the second time from what is kept
        sample = module._Sample(5, 600)
        for value in values:
            sample.add(value)
        assert torch.equal(sample.kept, kept)
