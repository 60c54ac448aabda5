import itertools
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records import read_back

from mpqdm_fx.errors import CalibrationError, ConfigError, LoweringError
from mpqdm_fx.records.activations import (
    ActivationRange,
    DynamicActivation,
    NoiseLevels,
    StaticActivation,
    StoredActivation,
    TimestepActivation,
    kernel_activations,
    placeholder_activations,
    static_ranges,
)


def ranges(bits):
    scale = st.floats(2.0**-20, 2.0**20, width=32)
    zero_point = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return st.builds(ActivationRange, scale=scale, zero_point=zero_point, bits=st.just(bits))


def layers(bits=8, output_bits=8):
    return st.builds(StaticActivation, input=ranges(bits), output=ranges(output_bits))


activations = st.integers(1, 8).flatmap(
    lambda bits: st.one_of(
        layers(bits),
        st.builds(DynamicActivation, bits=st.just(bits)),
        st.builds(
            TimestepActivation, groups=st.lists(layers(bits), min_size=1, max_size=4).map(tuple)
        ),
    )
)
timesteps = st.one_of(
    st.lists(st.integers(0, 999), min_size=1, max_size=60),
    st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=60),
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=60),  # log-SNR
)


@given(activations)
def test_json_round_trip_gives_an_equal_activation_of_the_same_kind(activation):
    assert read_back(StoredActivation, asdict(activation)) == activation


@given(timesteps, st.integers(1, 8))
def test_groups_are_as_many_as_asked_or_as_distinct_values(values, groups):
    levels = NoiseLevels.of(torch.tensor(values), groups)
    assert levels.count == min(groups, len(set(values)))
    assert levels == NoiseLevels.of(values[::-1], groups), "the order of the samples counts"
    # every group has calibrated samples
    assert levels.group_of(torch.tensor(values)).unique().tolist() == [*range(levels.count)]


@given(timesteps, st.integers(2, 6))
def test_boundaries_lie_halfway_between_calibrated_neighbours(values, groups):
    known = sorted({float(torch.tensor(value)) for value in values})
    middles = [
        {(a + b) / 2 for a, b in itertools.pairwise(known)},
        {a**0.5 * b**0.5 for a, b in itertools.pairwise(known) if a > 0},
    ]
    boundaries = NoiseLevels.of(torch.tensor(values), groups).boundaries
    near = [{b for b in boundaries if any(b == pytest.approx(m) for m in ms)} for ms in middles]
    assert set(boundaries) in near, "all on one scale"


@pytest.mark.parametrize(
    ("values", "boundaries"),
    [
        ((80.0, 20.0, 5.0, 1.0, 0.3), (0.3**0.5, 5**0.5, 10.0, 40.0)),  # sigmas
        ([2.0**k for k in range(-3, 4)], [2 ** (k + 0.5) for k in range(-3, 3)]),
        (range(999, 0, -100), range(149, 999, 100)),  # timesteps, over three decades
        ([0.0, 0.3, 1.0, 5.0], [0.15, 0.65, 3.0]),  # sigma 0 has no logarithm
        ([-4.0, 0.0, 6.0], [-2.0, 3.0]),  # log-SNR
        ([0.1, 0.5, 0.9], [0.3, 0.7]),  # a time in 0..1
        ([0.3, 80.0], [40.15]),  # one gap tells no scale
    ],
)
def test_halfway_is_on_the_scale_on_which_the_levels_are_spaced(values, boundaries):
    levels = NoiseLevels.of(torch.tensor([*values]), len(values))
    assert levels.boundaries == pytest.approx(tuple(boundaries))


@given(st.lists(st.integers(0, 10**6), min_size=12, max_size=60, unique=True), st.integers(2, 6))
def test_distinct_timesteps_are_split_evenly(values, groups):
    levels = NoiseLevels.of(torch.tensor(values), groups)
    sizes = levels.group_of(torch.tensor(values)).bincount(minlength=groups)
    assert int(sizes.max() - sizes.min()) <= 1


@given(timesteps, st.integers(1, 6), st.floats(-100, 1100, width=32))
def test_a_timestep_belongs_to_the_group_between_its_boundaries(values, groups, other):
    levels = NoiseLevels.of(torch.tensor(values), groups)
    (group,) = levels.group_of(torch.tensor(other)).tolist()
    assert group == sum(boundary <= other for boundary in levels.boundaries)


def test_groups_do_not_depend_on_the_number_of_steps_or_on_the_dtype():
    levels = NoiseLevels.of(torch.arange(0, 1000, 50), 4)
    fine = torch.arange(0, 1000, 20)
    assert torch.equal(levels.group_of(fine), levels.group_of(fine.float()))
    coarse_groups = levels.group_of(torch.tensor([0, 240, 260, 990]))
    assert coarse_groups.tolist() == [0, 1, 1, 3]
    assert levels.group_of(fine).bincount().tolist() == [12, 12, 13, 13]


def test_too_few_distinct_timesteps_are_logged(caplog):
    assert NoiseLevels.of([10, 10, 500], 5).boundaries == (255.0,)
    assert "2 distinct noise levels" in caplog.text


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_noise_levels_of_nothing_or_of_nan_are_refused(values):
    with pytest.raises(CalibrationError, match="finite calibrated levels"):
        NoiseLevels.of(values, 3)


@pytest.mark.parametrize("groups", [0, 65])
def test_an_impossible_number_of_groups_is_refused(groups):
    with pytest.raises(ConfigError, match="1 to 64"):
        NoiseLevels.of([1.0, 2.0], groups)


@pytest.mark.parametrize("boundaries", [(2.0, 1.0), (1.0, 1.0), (float("nan"),), (float("inf"),)])
def test_boundaries_that_do_not_ascend_are_refused(boundaries):
    with pytest.raises(ConfigError, match=r"ascending|finite"):
        NoiseLevels(boundaries=boundaries)


@given(layers(8), layers(6))
def test_groups_of_different_widths_are_refused(wide, narrow):
    with pytest.raises(ConfigError, match="widths"):
        TimestepActivation(groups=(wide, narrow))
    with pytest.raises(ConfigError, match="0 groups"):
        TimestepActivation(groups=())


@given(activations.filter(lambda a: not isinstance(a, StaticActivation)))
def test_a_static_backend_refuses_other_kinds_and_names_what_runs(activation):
    with pytest.raises(LoweringError, match=r'conv: .*activation_mode="static"'):
        static_ranges({"conv": activation}, "XNNPACK")


@given(activations)
def test_a_backend_with_dynamic_kernels_refuses_ranges_by_noise_level_alone(activation):
    if not isinstance(activation, TimestepActivation):
        assert kernel_activations({"conv": activation}, "XNNPACK") == {"conv": activation}
        return
    message = r'conv: .*activation_mode="static" or "dynamic".*backend="packed"'
    with pytest.raises(LoweringError, match=message):
        kernel_activations({"conv": activation}, "XNNPACK")


FITTED = ActivationRange(scale=0.5, zero_point=0, bits=2, levels=(-3, 0, 1, 7))


def test_programs_refuse_fitted_levels_and_name_the_layer():
    activation = StaticActivation(input=FITTED, output=ActivationRange(scale=1.0, zero_point=0))
    for check in (static_ranges, kernel_activations):
        with pytest.raises(LoweringError, match=r"conv: .*fitted levels.*activation_bits=8"):
            check({"conv": activation}, "PT2E")


@pytest.mark.parametrize(
    "change",
    [
        {"levels": (0, 1, 2, 3, 4)},
        {"levels": (1, 0)},
        {"levels": (1, 1)},
        {"levels": (-128, 0)},
        {"zero_point": 1},
        {"bits": 5},
    ],
)
def test_impossible_levels_are_refused(change):
    with pytest.raises(ConfigError, match=r"levels"):
        replace(FITTED, **change)


@given(layers())
def test_a_static_backend_takes_static_ranges_as_they_are(activation):
    assert static_ranges({"conv": activation}, "XNNPACK") == {"conv": activation}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("static", StaticActivation),
        ("timestep", TimestepActivation),
        ("dynamic", DynamicActivation),
    ],
)
def test_placeholders_have_the_kind_and_the_widths_of_the_mode(mode, kind):
    found = placeholder_activations({"a": 6, "b": 6}, mode, groups=3)
    assert list(found) == ["a", "b"]
    assert all(type(activation) is kind for activation in found.values())
    one = found["a"]
    if isinstance(one, DynamicActivation):
        assert one.bits == 6
        return
    groups = one.groups if isinstance(one, TimestepActivation) else (one,)
    assert {(group.input.bits, group.output.bits) for group in groups} == {(6, 8)}
    assert len(groups) == (3 if mode == "timestep" else 1)


def test_float_activations_need_no_placeholders():
    assert placeholder_activations({"a": 8}, "float") == {}
