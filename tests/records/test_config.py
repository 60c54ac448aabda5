import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import MPQConfig, Override

configs = st.builds(
    MPQConfig,
    weight_bits=st.integers(1, 8),
    activation_bits=st.integers(1, 8),
    allocation=st.sampled_from(["omq", "uniform"]),
    levels=st.sampled_from(["uniform", "codebook"]),
    seed=st.integers(0, 2**31),
    split_skips=st.booleans(),
    activation_mode=st.sampled_from(["measured", "static", "timestep", "dynamic", "float"]),
    slowdown=st.floats(1, 100),
    row_weights=st.sampled_from(["output", "plain"]),
    timestep_groups=st.integers(1, 64),
    overrides=st.lists(
        st.one_of(
            st.builds(Override, pattern=st.just("mid.*"), weight_bits=st.integers(1, 8)),
            st.builds(Override, pattern=st.just("re:conv[0-9]"), skip=st.just(True)),
            st.builds(Override, pattern=st.just("*.to_q"), activation_bits=st.integers(1, 8)),
        ),
        max_size=3,
    ).map(tuple),
)


@given(configs)
def test_json_round_trip_gives_an_equal_config(config):
    assert MPQConfig.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize("bits", [0, 9, -1, 3.0, True, "4", None])
def test_bits_outside_one_to_eight_are_refused_with_the_range(bits):
    with pytest.raises(ConfigError, match="1 to 8"):
        MPQConfig(weight_bits=bits)


@pytest.mark.parametrize("groups", [0, 65, 2.0, True, "5", None])
def test_an_impossible_number_of_noise_levels_is_refused_with_the_range(groups):
    with pytest.raises(ConfigError, match=r"timestep_groups=.*1 to 64"):
        MPQConfig(timestep_groups=groups)


@pytest.mark.parametrize("slowdown", [0.99, 0, -1, 101, float("nan"), float("inf"), "2", None])
def test_an_impossible_slowdown_is_refused_with_the_range(slowdown):
    with pytest.raises(ConfigError, match=r"slowdown=.*1 to 100"):
        MPQConfig(slowdown=slowdown)


@pytest.mark.parametrize(
    ("setting", "value", "choices"),
    [
        ("allocation", "best", "'omq' or 'uniform'"),
        ("levels", "log", "'uniform', 'codebook' or 'int4'"),
        ("row_weights", "timestep", "'output' or 'plain'"),
        ("activation_mode", "int8", "'dynamic' or 'float'"),
    ],
)
def test_an_unknown_word_is_refused_with_the_choices(setting, value, choices):
    with pytest.raises(ConfigError, match=choices):
        MPQConfig(**{setting: value})


def test_of_several_matching_overrides_the_later_one_wins():
    config = MPQConfig(
        overrides=[
            {"pattern": "mid.*", "weight_bits": 2},
            {"pattern": "re:conv1$", "weight_bits": 6},
        ]
    )
    assert config.override_for("mid.conv1").weight_bits == 6
    assert config.override_for("mid.conv2").weight_bits == 2
    assert config.override_for("up.conv2") is None


def test_weights_and_activations_are_overridden_apart():
    config = MPQConfig(
        activation_bits=4,
        overrides=[
            {"pattern": "mid.*", "weight_bits": 2, "activation_bits": 6},
            {"pattern": "mid.conv1", "activation_bits": 8},
            {"pattern": "mid.conv2", "skip": True},
        ],
    )
    assert config.override_for("mid.conv1").weight_bits == 2
    assert [config.activation_bits_of(f"{name}.conv1") for name in ("mid", "up")] == [8, 4]
    assert config.activation_bits_of("mid.conv2") == 6
    assert config.override_for("mid.conv2").skip


def test_an_override_that_matches_nothing_lists_the_nearest_names():
    config = MPQConfig(overrides=[Override(pattern="mid_block.conv3", weight_bits=2)])
    with pytest.raises(ConfigError, match=r"matches no layer.*mid_block\.conv1"):
        config.check_overrides(["mid_block.conv1", "conv_in", "up.attn.to_q"])


@pytest.mark.parametrize(
    "entry",
    [
        {"pattern": "a"},
        {"pattern": "a", "weight_bits": 2, "skip": True},
        {"pattern": "a", "activation_bits": 2, "skip": True},
        {"pattern": "a", "activation_bits": 9},
        {"pattern": "re:(", "skip": True},
        {"name": "a", "weight_bits": 2},
        {"pattern": "", "weight_bits": 2},
        "a=2",
    ],
)
def test_an_override_that_says_nothing_or_two_things_is_refused(entry):
    with pytest.raises(ConfigError):
        MPQConfig(overrides=[entry])


@pytest.mark.parametrize("data", [None, [], "weight_bits", {3: 4}, {"weight_bits": "4"}])
def test_what_is_no_mapping_of_settings_is_refused(data):
    with pytest.raises(ConfigError):
        MPQConfig.from_dict(data)


def test_an_unknown_setting_suggests_the_nearest_name():
    with pytest.raises(ConfigError, match="weight_bits"):
        MPQConfig.from_dict({"weights_bits": 4})
