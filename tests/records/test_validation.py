"""Every number that a user gives is judged at once, by one rule, and refused in one line."""

import dataclasses
import inspect
import math
from typing import Annotated, Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_digits import TrainConfig

import mpqdm_fx
from mpqdm_fx.backends.lower import lower_to_packed, lower_to_torch_ao, lower_to_xnnpack
from mpqdm_fx.bits.sensitivity import measure_sensitivity
from mpqdm_fx.calibration.records import RecordedInputs
from mpqdm_fx.calibration.sampling import denoise
from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.distill import DistillConfig, distill
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.jobs.estimate import estimate_run
from mpqdm_fx.jobs.evaluate import evaluate_folder
from mpqdm_fx.jobs.quantize import quantize_to_folder
from mpqdm_fx.jobs.result_folder import ProgramForm
from mpqdm_fx.records.activations import ActivationRange, DynamicActivation, NoiseLevels
from mpqdm_fx.records.config import MPQConfig, Override
from mpqdm_fx.records.plan import BitPlan, FloatTensor, LayerPlan
from mpqdm_fx.records.validation import Between, check_value, checked
from mpqdm_fx.report.reference_run import run_reference
from mpqdm_fx.sources.denoisers import draw
from mpqdm_fx.sweep.estimate import estimate

RECORDS = [
    MPQConfig(),
    Override(pattern="a", weight_bits=2),
    DistillConfig(updates=1),
    ActivationRange(scale=1.0, zero_point=0),
    DynamicActivation(),
    NoiseLevels(boundaries=(1.0,)),
    LayerPlan(name="a", kind="Linear", shape=(1, 2), bits=(3,)),
    FloatTensor(name="a", numel=3, bits=32, is_weight=True, reason="b"),
    BitPlan(layers=()),
    ProgramForm(backend="packed"),
    TrainConfig(),
    mpqdm_fx.Pipeline(passes=()),
]

VERBS = [
    mpqdm_fx.prepare, mpqdm_fx.convert, mpqdm_fx.open_sweep, mpqdm_fx.quantize,
    lower_to_torch_ao, lower_to_xnnpack, lower_to_packed,
    mpqdm_fx.export_pipeline, Trajectories.__init__, RecordedInputs.__init__, denoise, distill,
    measure_sensitivity, draw, run_reference, estimate, estimate_run,
    evaluate_folder, quantize_to_folder,
]  # fmt: skip

#: What fits no field: not finite, half made, too large, or of a kind that only looks like a number.
STRAY = [
    math.nan, math.inf, -math.inf, -(10**400), 10**5000, np.int64(4), np.array([1, 2]), object(),
    b"4", 4j, {1: 2}, [[1]],
]  # fmt: skip

FIELDS = [
    (record, field.name) for record in RECORDS for field in dataclasses.fields(record) if field.init
]


@pytest.mark.parametrize(
    ("record", "name"), FIELDS, ids=[f"{type(r).__name__}.{name}" for r, name in FIELDS]
)
def test_a_stray_value_of_any_field_is_refused_in_one_line_that_names_it(record, name):
    for stray in STRAY:
        with pytest.raises(ConfigError) as caught:
            dataclasses.replace(record, **{name: stray})
        message = str(caught.value)
        assert name.rstrip("s") in message
        assert "\n" not in message
        assert len(message) < 400


def _numbers(kind):
    """The parts of an annotation that are bare numbers, without bounds."""
    if kind in (int, float):
        return [kind]
    parts = () if hasattr(kind, "__metadata__") else get_args(kind)
    return [number for part in parts for number in _numbers(part)]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__qualname__)
def test_every_number_that_a_verb_takes_has_bounds_and_is_checked(verb):
    hints = get_type_hints(verb, include_extras=True)
    bare = [name for name in inspect.signature(verb).parameters if _numbers(hints.get(name))]
    assert not bare
    wrappers = [verb]
    while hasattr(wrappers[-1], "__wrapped__"):
        wrappers.append(wrappers[-1].__wrapped__)
    checking = checked(lambda: None).__code__
    assert any(wrapper.__code__ is checking for wrapper in wrappers), "not checked"


def test_no_verb_of_the_package_is_missing_here():
    public = [getattr(mpqdm_fx, name) for name in mpqdm_fx.__all__]
    functions = {entry for entry in public if inspect.isfunction(entry)}
    assert mpqdm_fx.quantize in functions
    bounded = {
        f
        for f in functions
        if any("Between" in str(h) for h in get_type_hints(f, include_extras=True).values())
    }
    assert bounded <= set(VERBS)
    bare = {
        f"{f.__name__}({name})"
        for f in functions - bounded
        for name in inspect.signature(f).parameters
        if _numbers(get_type_hints(f).get(name))
    }
    assert not bare


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "weight_bits",
            3.5,
            r"weight_bits=3.5 \(float\): give an integer from 1 to 8.*effective_bits",
        ),
        ("weight_bits", True, r"weight_bits=True \(bool\)"),
        ("weight_bits", np.int64(4), r"\(numpy\.int64\): give an integer from 1 to 8"),
        ("weight_bytes", math.nan, r"weight_bytes=nan \(float\): give an integer"),
        ("weight_bytes", 0, "weight_bytes=0"),
        ("effective_bits", math.inf, "effective_bits=inf.*a number from 1 to 32"),
        ("effective_bits", 0.5, "a weight takes one bit at least"),
        ("propagation", "never", "a number from 0 to 1 or 'auto'"),
        ("bias_correction", 1, r"bias_correction=1 \(int\): give True or False"),
        ("overrides", None, "overrides=None"),
        ("overrides", "a", "override 'a'"),
        ("seed", 2**62, r"seed=4611686018427387904 \(int\): .*below 2\^62"),
        ("refinements", 10**5000, r"refinements=\.\.\. \(int\): give an integer from 0 to 64"),
    ],
    ids=range(13),
)
def test_the_message_names_setting_value_type_and_range(setting, value, message):
    with pytest.raises(ConfigError, match=message):
        MPQConfig(**{setting: value})


def test_a_float_of_numpy_is_a_float():
    assert MPQConfig(effective_bits=np.float64(3.5)).effective_bits == 3.5


@given(
    st.integers() | st.floats() | st.booleans() | st.text() | st.none(),
    st.integers(-9, 9),
    st.integers(-9, 9),
    st.booleans(),
    st.booleans(),
)
def test_a_number_fits_if_and_only_if_it_is_one_and_inside(value, low, high, above, below):
    number = type(value) in (int, float) and math.isfinite(value)
    inside = number and low <= value <= high
    inside = inside and not (above and value == low) and not (below and value == high)
    for kind, ok in ((float, inside), (int, inside and type(value) is int)):
        bounded = Annotated[kind, Between(low, high, above=above, below=below)]
        if ok:
            check_value(value, bounded, "x")
        else:
            with pytest.raises(ConfigError, match=r"^x="):
                check_value(value, bounded, "x")


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        ((1, 2), tuple[int, int], True),
        ((1, 2, 3), tuple[int, int], False),
        ([1, 2], tuple[int, ...], False),
        ((1, True), tuple[int, ...], False),
        ({"a": 1.0}, dict[str, float], True),
        ({"a": object()}, dict[str, Any], True),
        ({1: object()}, dict[str, Any], False),
        ({"a": math.nan}, dict[str, float], False),
        (None, int | None, True),
        (1, Literal[True], False),
        ("ab", list[str], False),
    ],
)
def test_containers_words_and_unions_are_judged_entry_by_entry(value, kind, fits):
    if fits:
        check_value(value, kind, "x")
        return
    with pytest.raises(ConfigError, match=r"^x="):
        check_value(value, kind, "x")


def test_a_wrong_call_is_still_pythons_own_error():
    with pytest.raises(TypeError, match="sample_size"):
        Trajectories(None, None, sample_size=3)


def test_settings_of_a_verb_are_refused_before_anything_else_is_looked_at():
    with pytest.raises(ConfigError, match=r"run=\{\} \(dict\): give a RunOptions"):
        mpqdm_fx.quantize(torch.nn.Linear(1, 1), MPQConfig(), [], run={})
    with pytest.raises(ConfigError, match=r"model='digits' \(str\): give a Module"):
        mpqdm_fx.quantize("digits", MPQConfig(), [])
    with pytest.raises(ConfigError, match=r"config=\{\} \(dict\): give a MPQConfig"):
        mpqdm_fx.prepare(torch.nn.Linear(1, 1), {}, ())
    with pytest.raises(ConfigError, match="batch_size=0"):
        mpqdm_fx.lower(None, "xnnpack", output="net.pte", batch_size=0)
    with pytest.raises(ConfigError, match="'torch_ao', 'xnnpack', 'lowbit' or 'packed'"):
        mpqdm_fx.lower(None, "tflite")
