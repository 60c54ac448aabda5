import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.activations import ActivationRange
from mpqdm_fx.records.plan import BitPlan, Fate, FloatTensor, LayerPlan, ParameterFate


@st.composite
def layer_plans(draw, name: str):
    channels = draw(st.integers(1, 9))
    bits = tuple(draw(st.lists(st.integers(1, 8), min_size=channels, max_size=channels)))
    return LayerPlan(
        name=name,
        kind="Conv2d",
        shape=(channels, draw(st.integers(1, 5)), 3, 3),
        bits=bits,
        levels=draw(st.sampled_from(["uniform", "codebook"])),
        reason=draw(st.sampled_from([None, "first layer"])),
        fraction=draw(st.sampled_from([0.0, 0.1])),
    )


def parameter_fates():
    return st.builds(
        ParameterFate,
        name=st.sampled_from(["conv.weight", "norm.bias"]),
        numel=st.integers(0, 99),
        fate=st.sampled_from(get_args(Fate)),
        note=st.sampled_from(["", "because"]),
    )


@st.composite
def plans(draw):
    layers = tuple(draw(layer_plans(f"layer{i}")) for i in range(draw(st.integers(0, 4))))
    floats = tuple(
        FloatTensor(name=f"t{i}", numel=i + 1, bits=32, is_weight=bool(i % 2), reason="norm")
        for i in range(draw(st.integers(0, 3)))
    )
    fates = tuple(draw(st.lists(parameter_fates(), max_size=4)))
    weights = [layer.tensors[0] for layer in layers]
    copies = tuple(draw(st.lists(st.sampled_from(weights), unique=True))) if weights else ()
    return BitPlan(
        layers=layers,
        floats=floats,
        activation_bits=draw(st.integers(1, 8)),
        parameters=fates,
        copies=copies,
    )


@given(plans())
def test_json_round_trip_gives_an_equal_plan(plan):
    assert BitPlan.from_json(plan.to_json()) == plan


@given(plans())
def test_effective_bits_are_never_below_the_average_of_the_codes(plan):
    if plan.num_weights:
        codes = sum(layer.mean_bits * layer.num_weights for layer in plan.layers)
        floats = sum(t.numel * t.bits for t in plan.floats if t.is_weight)
        assert plan.effective_bits >= (codes + floats) / plan.num_weights


def test_effective_bits_count_scales_tags_tables_and_float_weights():
    # 4 channels of 36 weights: codes 2+2+3+1 bits each, 16-bit scales, 3-bit width tags,
    # tables of 4+4+8+2 levels of 8 bits; and 10 weights left in float32.
    layer = LayerPlan(
        name="conv", kind="Conv2d", shape=(4, 4, 3, 3), bits=(2, 2, 3, 1), levels="codebook"
    )
    weight = FloatTensor(name="up.weight", numel=10, bits=32, is_weight=True, reason="no kernel")
    norm = FloatTensor(name="norm.weight", numel=8, bits=16, is_weight=False, reason="norm")
    plan = BitPlan(layers=(layer,), floats=(weight, norm))
    assert layer.storage == (8 * 36, 4 * 16, 18 * 8, 16)  # 12 tag bits take two bytes
    assert plan.weight_bytes == 36 + 8 + 18 + 2 + 40
    assert plan.effective_bits == pytest.approx(8 * 104 / 154)
    assert plan.float_bytes == 16


def test_a_tied_weight_counts_once_and_its_copy_takes_bytes():
    a, b = (LayerPlan(name=n, kind="Linear", shape=(2, 8), bits=(4, 4)) for n in "ab")
    fates = (
        ParameterFate(name="a.weight", numel=16, fate="quantized"),
        ParameterFate(name="b.weight", numel=0, fate="shared", note="a.weight"),
        ParameterFate(name="c.weight", numel=7, fate="unused", note="not read by forward"),
    )
    plan = BitPlan(layers=(a, b), parameters=fates, copies=("b.weight",))
    assert (plan.num_weights, plan.num_parameters) == (16, 23)
    assert plan.effective_bits == 2 * BitPlan(layers=(a,)).effective_bits
    assert plan.remarks == (
        "stored once more, with codes of their own: b.weight (tied to a.weight)",
        "7 parameters are not stored: c.weight (not read by forward)",
    )


def test_weights_in_float_are_told_from_one_percent_on_with_the_first_names():
    layer = LayerPlan(name="conv", kind="Linear", shape=(10, 99), bits=(4,) * 10)
    floats = [
        FloatTensor(name=f"t{i}", numel=2, bits=32, is_weight=True, reason="no kernel")
        for i in range(6)
    ]
    assert BitPlan(layers=(layer,), floats=tuple(floats[:5])).float_remark is None
    assert BitPlan(layers=(layer,), floats=tuple(floats)).float_remark == (
        "1.2% of the weights (12 of 1,002) stay in float: t0, t1, t2 and 3 more (no kernel)"
    )


def test_a_plan_of_an_older_file_counts_what_it_names():
    layer = LayerPlan(name="conv", kind="Linear", shape=(2, 8), bits=(4, 4))
    norm = FloatTensor(name="norm.weight", numel=8, bits=16, is_weight=False, reason="norm")
    old = BitPlan(layers=(layer,), floats=(norm,)).to_dict()
    del old["parameters"], old["copies"]
    assert BitPlan.from_json(json.dumps(old)).num_parameters == 24


def test_fates_and_copies_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"a\.weight.*'lost'"):
        ParameterFate(name="a.weight", numel=1, fate="lost")
    with pytest.raises(ConfigError, match=r"not stored: \['b\.weight'\]"):
        BitPlan(layers=(), copies=("b.weight",))


def test_the_budget_average_leaves_pinned_layers_out():
    free = LayerPlan(name="a", kind="Linear", shape=(2, 5), bits=(3, 5))
    pinned = LayerPlan(name="b", kind="Linear", shape=(2, 5), bits=(8, 8), reason="first layer")
    assert BitPlan(layers=(free, pinned)).mean_bits == 4


def test_an_unknown_layer_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="'conv9'"):
        BitPlan(layers=()).layer("conv9")


@pytest.mark.parametrize("bits", [(2, 2, 2), (0, 4), (4, 9)])
def test_widths_that_do_not_fit_the_layer_are_refused(bits):
    with pytest.raises(ConfigError, match="conv"):
        LayerPlan(name="conv", kind="Conv2d", shape=(2, 3, 1, 1), bits=bits)


@pytest.mark.parametrize(("scale", "zero_point"), [(0.0, 0), (float("nan"), 0), (1.0, 128)])
def test_an_impossible_activation_range_is_refused(scale, zero_point):
    with pytest.raises(ConfigError):
        ActivationRange(scale=scale, zero_point=zero_point)
