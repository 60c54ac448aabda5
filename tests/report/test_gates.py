import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.report.gates import (
    METRICS,
    Gate,
    catalogue,
    check_measured,
    expected_summary,
    judge,
    parse_gate,
    parse_gates,
    summary_metrics,
)

SUMMARY = {
    "backend": "xnnpack",
    "backend_epsilon_sqnr_db": 33.0,
    "weight_bytes": 900,
    "float_remainder_bytes": 100,
    "effective_bits": 4.2,
    "milliseconds_per_step": {"xnnpack": 2.0, "float": 8.0},
    "peak_memory_bytes": {"pte": 5000, "float": 9000},
    "seconds_to_quantize": 60.0,
    "files": {"model.safetensors": 950, "unet.pte.xz": 700, "unet.ptd.xz": 300, "samples.png": 9},
    "program": {"sqnr_db": 70.0, "subgraphs": 1},
}


@st.composite
def gates(draw):
    metric = draw(st.sampled_from(sorted(METRICS)))
    signs = [">=", ">"] if METRICS[metric].higher_is_better else ["<=", "<"]
    bound = draw(st.floats(-1e12, 1e12) | st.integers(-10, 10**9).map(float))
    return Gate(metric=metric, comparison=draw(st.sampled_from(signs)), bound=bound)


@given(gates())
def test_a_gate_that_is_written_reads_back_as_itself(gate):
    assert parse_gate(str(gate)) == gate


@given(gates(), st.lists(st.sampled_from(["", " ", "\t", "  "]), min_size=4, max_size=4))
def test_spaces_between_the_parts_do_not_matter(gate, spaces):
    first, second, third, last = spaces
    number = repr(gate.bound)
    text = f"{first}{gate.metric}{second}{gate.comparison}{third}{number}{last}"
    assert parse_gate(text) == gate


@given(
    st.integers(0, 10**6),
    st.sampled_from([("B", 1), ("kB", 1000), ("MB", 10**6), ("GB", 10**9), ("KiB", 1024),
                     ("MiB", 2**20), ("GiB", 2**30), ("mib", 2**20), ("KB", 1000)]),
    st.sampled_from(["", " "]),
)  # fmt: skip
def test_sizes_are_read_in_decimal_and_binary_units(number, unit, space):
    name, factor = unit
    assert parse_gate(f"bytes<={number}{space}{name}").bound == number * factor


@pytest.mark.parametrize(
    ("text", "bound"),
    [("ms<=0.5s", 500.0), ("accuracy>=95%", 0.95), ("accuracy>=0.95", 0.95),
     ("seconds<=2min", 120.0), ("x0_sqnr>=20dB", 20.0), ("x0_sqnr>=-2.5e1", -25.0),
     ("kernel_distance<=.5", 0.5), ("speedup>2x", 2.0)],
)  # fmt: skip
def test_a_bound_is_kept_in_the_metrics_own_unit(text, bound):
    assert parse_gate(text).bound == pytest.approx(bound)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x0_snr>=20", "did you mean x0_sqnr? metrics: epsilon_sqnr, x0_sqnr"),
        ("beauty>=20", "there is no metric beauty; metrics: epsilon_sqnr"),
        ("x0_sqnr<=20", "of x0_sqnr more is better; write x0_sqnr>=20"),
        ("bytes>2MB", "of bytes less is better; write bytes<=2"),
        ("bytes<=2dB", "bytes has no unit dB; its units: bytes, B, kB"),
        ("ssim>=1dB", "ssim has no unit dB; it is a plain number"),
        ("x0_sqnr", "write METRIC>=NUMBER"),
        ("x0_sqnr==20", "write METRIC>=NUMBER"),
        ("x0_sqnr>=nan", "write METRIC>=NUMBER"),
        ("x0_sqnr>=", "write METRIC>=NUMBER"),
        ("", "write METRIC>=NUMBER"),
        ("bytes<=1e400", "too large"),
    ],
)
def test_what_is_no_gate_is_refused_with_what_there_is(text, message):
    with pytest.raises(ConfigError) as refused:
        parse_gate(text)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"--gate {text!r}: ")
    assert "\n" not in str(refused.value)


@given(st.text(max_size=30))
def test_any_text_is_a_gate_or_refused(text):
    try:
        parse_gate(text)
    except ConfigError:
        return


@given(gates(), st.floats(-1e12, 1e12))
def test_a_better_value_passes_whenever_a_worse_one_does(gate, value):
    better = value + 1 if METRICS[gate.metric].higher_is_better else value - 1
    assert gate.passes(better) or not gate.passes(value)


def test_a_value_at_the_bound_passes_if_equal_counts():
    assert parse_gate("ssim>=0.5").passes(0.5)
    assert not parse_gate("ssim>0.5").passes(0.5)
    assert not parse_gate("bytes<2MB").passes(2e6)


def test_nan_passes_no_gate_and_infinite_decibels_every_one():
    assert not parse_gate("x0_sqnr>=20").passes(math.nan)
    assert not parse_gate("ms<=20").passes(math.nan)
    assert parse_gate("x0_sqnr>=20").passes(math.inf)


def test_metrics_of_a_summary_are_those_that_were_foretold():
    metrics = summary_metrics(SUMMARY)
    assert metrics["bytes"] == 1000
    assert metrics["speedup"] == 4
    assert metrics["parameter_bytes"] == 1000
    assert set(metrics) == set(expected_summary(program=True, drawn=True))
    packed = {**SUMMARY, "backend": "packed", "program": None,
              "milliseconds_per_step": {"packed": 2.0, "float": 8.0},
              "files": {"model.safetensors": 950},
              "peak_memory_bytes": {"packed": None, "float": None}}  # fmt: skip
    assert summary_metrics(packed)["bytes"] == 950
    assert set(summary_metrics(packed)) == set(expected_summary(program=False, drawn=False))


def test_gates_are_judged_in_their_order():
    verdicts = judge(
        parse_gates(["bytes<=900", "ms<=2", "backend_sqnr>=30"]), summary_metrics(SUMMARY)
    )
    assert [verdict.passed for verdict in verdicts] == [False, True, True]
    assert verdicts[0].to_dict() == {
        "gate": "bytes<=900bytes", "metric": "bytes", "comparison": "<=", "wanted": 900.0,
        "measured": 1000.0, "unit": "bytes", "passed": False,
    }  # fmt: skip


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"is not measured of out; measured are: x0_sqnr, bytes"):
        check_measured(parse_gates(["accuracy>=90%"]), {"bytes", "x0_sqnr"}, "out")
    with pytest.raises(ConfigError, match="lpips"):
        judge(parse_gates(["lpips<=1"]), {})


def test_the_catalogue_names_every_metric_once_within_80_columns():
    lines = catalogue().splitlines()
    assert [line.split()[0] for line in lines] == list(METRICS)
    assert max(map(len, lines)) <= 80
