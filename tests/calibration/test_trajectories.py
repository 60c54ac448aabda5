from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.calibration.sampling import denoise
from mpqdm_fx.calibration.trajectories import (
    Trajectories,
    balanced_class_labels,
    digits_trajectories,
    sample_shape_of,
)
from mpqdm_fx.errors import CalibrationError, ConfigError


def toy_model(sample, timestep, class_labels=None):
    level = (timestep.float() / 1000).reshape(-1, 1, 1, 1)
    output = torch.tanh(sample) * (0.5 + level)
    return (output,) if class_labels is None else (output + class_labels.reshape(-1, 1, 1, 1),)


def make(**changes):
    settings = {
        "num_trajectories": 6,
        "num_inference_steps": 5,
        "batch_size": 4,
        "seed": 0,
        "sample_shape": (1, 3, 3),
        "conditions": balanced_class_labels(4),
    }
    return Trajectories(toy_model, DDIMScheduler(), **(settings | changes))


def rows(batches):
    """Every row as a hashable (timestep, label, pixels)."""
    return Counter(
        (int(timestep), int(label), tuple(sample.flatten().tolist()))
        for batch in batches
        for sample, timestep, label in zip(
            batch["sample"], batch["timestep"], batch["class_labels"], strict=True
        )
    )


@given(
    num_trajectories=st.integers(1, 5),
    num_inference_steps=st.integers(1, 6),
    batch_size=st.integers(1, 7),
    shuffle=st.booleans(),
)
def test_each_trajectory_is_there_at_each_timestep_exactly_once(
    num_trajectories, num_inference_steps, batch_size, shuffle
):
    trajectories = make(
        num_trajectories=num_trajectories,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        shuffle=shuffle,
        conditions=lambda count, generator: {"class_labels": torch.arange(count)},
    )
    batches = list(trajectories)
    assert len(trajectories) == len(batches)
    assert all(1 <= len(batch["sample"]) <= batch_size for batch in batches)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(num_inference_steps)
    found = Counter((timestep, label) for timestep, label, _ in rows(batches).elements())
    expected = {
        (int(timestep), label): 1
        for timestep in scheduler.timesteps
        for label in range(num_trajectories)
    }
    assert found == expected


def test_rows_are_what_the_model_was_called_with():
    labels = torch.arange(6) % 4
    calls = []

    def spy(**inputs):
        calls.append(inputs)
        return toy_model(**inputs)

    noise = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    for part in (slice(0, 4), slice(4, 6)):
        denoise(
            spy,
            DDIMScheduler(),
            noise[part],
            num_inference_steps=5,
            seed=0,
            conditions={"class_labels": labels[part]},
        )
    assert rows(make()) == rows(calls)


def test_same_seed_gives_the_same_batches_and_reading_twice_too():
    torch.manual_seed(1)
    one = make()
    first, second = list(one), list(one)
    torch.manual_seed(2)
    other = list(make())
    for a, b, c in zip(first, second, other, strict=True):
        for name in ("sample", "timestep", "class_labels"):
            assert torch.equal(a[name], b[name])
            assert torch.equal(a[name], c[name])
    assert rows(make(seed=1)) != rows(first)


def test_shuffled_batches_mix_timesteps_and_hold_the_same_rows():
    plain, mixed = list(make(shuffle=False)), list(make(shuffle=True))
    assert rows(plain) == rows(mixed)
    assert all(len(batch["timestep"].unique()) == 1 for batch in plain)
    assert all(len(batch["timestep"].unique()) > 1 for batch in mixed if len(batch["sample"]) > 2)


def test_rows_per_timestep_keeps_that_many_of_each_timestep():
    kept = rows(make(rows_per_timestep=3))
    assert Counter(timestep for timestep, _, _ in kept.elements()) == dict.fromkeys(
        (800, 600, 400, 200, 0), 3
    )
    assert kept <= rows(make())
    assert max(kept.values()) == 1


def test_guided_runs_hold_both_halves_of_each_pair():
    trajectories = make(
        guidance_scale=2.0,
        unconditional=lambda count, generator: {"class_labels": torch.full((count,), 9)},
    )
    found = rows(trajectories)
    assert sum(found.values()) == 2 * 6 * 5
    plain = Counter((t, pixels) for t, label, pixels in found.elements() if label == 9)
    conditional = Counter((t, pixels) for t, label, pixels in found.elements() if label != 9)
    assert plain == conditional


def test_second_order_scheduler_contributes_all_of_its_calls():
    trajectories = Trajectories(
        toy_model,
        HeunDiscreteScheduler(),
        num_trajectories=2,
        num_inference_steps=4,
        batch_size=2,
        seed=0,
        sample_shape=(1, 3, 3),
    )
    assert sum(len(batch["sample"]) for batch in trajectories) == 2 * (2 * 4 - 1)


def test_changing_a_batch_dict_does_not_change_the_trajectories():
    trajectories = make()
    next(iter(trajectories)).clear()
    assert set(next(iter(trajectories))) == {"sample", "timestep", "class_labels"}


def test_final_samples_are_the_ends_of_the_runs():
    trajectories = make(num_trajectories=4)
    noise = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = denoise(
        toy_model, DDIMScheduler(), noise, num_inference_steps=5, seed=0,
        conditions={"class_labels": torch.arange(4)},
    )  # fmt: skip
    assert torch.equal(trajectories.final_samples, expected)


def test_digits_trajectories_are_320_rows_16_of_each_of_20_timesteps():
    def model(sample, timestep, class_labels):
        return (sample * 0.5,)

    batches = list(digits_trajectories(model, DDIMScheduler(), seed=0))
    timesteps = torch.cat([batch["timestep"] for batch in batches])
    assert timesteps.unique(return_counts=True)[1].tolist() == [16] * 20
    labels = torch.cat([batch["class_labels"] for batch in batches])
    assert len(labels.unique()) == 10
    assert len(batches) == 10
    assert batches[0]["sample"].shape == (32, 1, 16, 16)


@pytest.mark.parametrize(
    "name", ["num_trajectories", "num_inference_steps", "batch_size", "rows_per_timestep"]
)
def test_counts_below_one_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name}=0"):
        make(**{name: 0})


def test_conditions_of_the_wrong_length_are_refused_by_name():
    with pytest.raises(CalibrationError, match="class_labels"):
        make(conditions={"class_labels": torch.zeros(5, dtype=torch.int64)})


def test_model_without_sample_size_needs_a_sample_shape():
    with pytest.raises(CalibrationError, match="sample_shape"):
        make(sample_shape=None)


def test_samples_that_are_not_finite_are_refused():
    trajectories = Trajectories(
        lambda sample, timestep: sample * torch.nan,
        DDIMScheduler(),
        num_trajectories=1,
        num_inference_steps=2,
        batch_size=1,
        seed=0,
        sample_shape=(1, 3, 3),
    )
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        list(trajectories)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta_start": float("nan")}, "DDIMScheduler: beta_start is nan"),
        ({"beta_end": 7.0}, r"beta_end is 7\.0"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"trained_betas": [0.1, float("nan")]}, r"trained_betas\.1 is nan"),
    ],
)
def test_a_scheduler_of_impossible_numbers_is_refused_before_any_run(settings, words):
    with pytest.raises(CalibrationError, match=words):
        Trajectories(
            toy_model,
            DDIMScheduler(**settings),
            num_trajectories=1,
            num_inference_steps=2,
            batch_size=1,
            seed=0,
            sample_shape=(1, 3, 3),
        )


def test_conditions_that_are_not_finite_are_refused_by_name():
    with pytest.raises(CalibrationError, match=r"conditions: input 'text\.pooled' .*holds NaN"):
        make(conditions={"text": {"pooled": torch.full((6, 2), torch.nan)}})


def test_extra_channels_reach_the_model_and_the_batches_behind_the_noisy_ones():
    def model(sample, timestep):
        return (sample[:, :1] * 0.5 + sample[:, 1:2],)

    extra = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 2, 3, 3)
    settings = {
        "num_trajectories": 6, "num_inference_steps": 3, "batch_size": 4, "seed": 0,
        "sample_shape": (1, 3, 3),
    }  # fmt: skip
    data = Trajectories(model, DDIMScheduler(), conditions={"extra_channels": extra}, **settings)
    batches = list(data)
    assert all(batch.keys() == {"sample", "timestep"} for batch in batches)
    shown = torch.cat([batch["sample"][:, 1:] for batch in batches])
    assert shown.shape == (18, 2, 3, 3)
    assert sorted(shown[:, 0, 0, 0].tolist()) == sorted([0.0, 1, 2, 3, 4, 5] * 3)
    wrong = {"extra_channels": extra[..., :2]}
    with pytest.raises(CalibrationError, match="extra_channels"):
        list(Trajectories(model, DDIMScheduler(), conditions=wrong, **settings))


def test_a_model_whose_further_channels_are_no_noise_needs_a_sample_shape():
    config = FrozenDict({"sample_size": 3, "in_channels": 9, "out_channels": 4})
    with pytest.raises(CalibrationError, match=r"sample_shape=\(4, H, W\)"):
        sample_shape_of(SimpleNamespace(config=config))
