"""The end of a run, and the table of its numbers."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from mpqdm_fx.cli.screens.layers import layer_table
from mpqdm_fx.cli.screens.result import ResultScreen, summary_table
from mpqdm_fx.cli.screens.start import bits_of
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.report import LayerReport, QuantizationReport

SUMMARY = {
    "backend": "packed",
    "mean_bits": 4.0,
    "effective_bits": 8.94,
    "weight_bytes": 100,
    "float_remainder_bytes": 20,
    "float32_bytes": 800,
    "epsilon_sqnr_db": 20.0,
    "backend_epsilon_sqnr_db": 20.0,
    "threads": 1,
    "milliseconds_per_step": {"packed": 1.0, "float": 2.0},
    "peak_memory_bytes": {"packed": 3 * 2**20, "float": 6 * 2**20},
    "program": None,
    "remarks": [],
    "files": {},
}
PROGRAM = {
    "path": "unet.pte",
    "bytes": 2**21,
    "weights_bytes": 0,
    "subgraphs": 1,
    "delegated": 1281,
    "undelegated": 1,
    "refusals": {"aten_embedding_default": 1},
    "four_bit_layers": ["mid"],
    "sqnr_db": 130.8,
    "max_lsb": None,
    "seconds": 40.0,
}
TRAINED = {
    "updates": 1455,
    "seconds": 600.0,
    "improved": True,
    "epsilon_sqnr_db_before": 18.0,
}


def layer(name, sqnr_db=9.0, **fields):
    return LayerReport(
        name=name, kind="Linear", shape=(2, 3), mean_bits=4.0, bytes=3, sqnr_db=sqnr_db,
        fraction=0.0, reason=None, **fields,
    )  # fmt: skip


def report(*layers):
    return QuantizationReport(layers=layers, calibration_calls=1, seconds=1.0, versions={})


def printed(thing, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


def test_a_result_is_a_dozen_lines_that_say_what_it_is(tmp_path):
    layers = [layer(f"blocks.{index}", sqnr_db=30.0 - index) for index in range(9)]
    summary = {
        **SUMMARY, "backend": "xnnpack", "program": PROGRAM, "files": {"unet.pte": 2**21},
        "milliseconds_per_step": {"xnnpack": 22.5, "float": 55.0},
    }  # fmt: skip
    text = printed(ResultScreen(summary, report(*layers), tmp_path))
    lines = text.splitlines()
    assert len(lines) <= 12
    assert lines[0] == "size          weights 120 B, were 800 B (15.0%); unet.pte 2 MiB"
    assert "22.5 ms a step, was 55.0" in lines[1]
    assert "3 MiB to load and run a step, was 6 MiB" in lines[2]
    assert "20.0 dB, close: output of one call against float" in lines[3]
    assert "yes, 1 delegate with 1,281 nodes; outside 1: embedding" in lines[4]
    worst = [line.split()[-5] for line in lines[5:]]
    assert worst == [f"blocks.{index}" for index in (8, 7, 6, 5, 4)]
    assert "report" not in text


def test_the_report_is_named_where_it_is_there(tmp_path):
    (tmp_path / "report.html").touch()
    text = printed(ResultScreen(SUMMARY, report(), tmp_path), width=400)
    assert text.splitlines()[-1].split() == ["report", str(tmp_path / "report.html")]


def test_a_trained_model_says_what_training_did(tmp_path):
    text = printed(ResultScreen({**SUMMARY, "distilled": TRAINED}, None, tmp_path))
    assert "1,455 updates in 10 min; noise SQNR was 18.0 dB" in text
    training = {**TRAINED, "improved": False}
    text = printed(ResultScreen({**SUMMARY, "distilled": training}, None, tmp_path))
    assert "did not help: the model is as before" in text


def test_a_program_in_parts_is_told_as_none_that_is_whole(tmp_path):
    program = {**PROGRAM, "subgraphs": 7, "undelegated": 30}
    text = printed(ResultScreen({**SUMMARY, "program": program}, None, tmp_path))
    assert "no, 7 delegates" in text


large = st.integers(1, 10**15)


@given(
    sizes=st.tuples(large, large, large),
    times=st.tuples(st.floats(0.001, 1e7), st.floats(0.001, 1e7)),
    sqnr=st.floats(-50, 200) | st.just(math.inf),
    name=st.text("abc._0123", min_size=1, max_size=150),
    peak=st.none() | large,
    width=st.sampled_from([80, 120]),
)
def test_no_line_of_a_result_is_wider_than_the_terminal(
    tmp_path_factory, sizes, times, sqnr, name, peak, width
):
    weights, program, before = sizes
    summary = {
        **SUMMARY,
        "weight_bytes": weights,
        "float32_bytes": before,
        "backend_epsilon_sqnr_db": sqnr,
        "milliseconds_per_step": {"packed": times[0], "float": times[1]},
        "peak_memory_bytes": {"packed": peak, "float": peak},
        "program": {**PROGRAM, "bytes": program, "delegated": weights},
        "files": {"unet.pte": program},
        "distilled": TRAINED,
        "remarks": [f"20.3% of the weights stay in float: {'block ' * 30}"],
    }
    screen = ResultScreen(summary, report(layer(name)), tmp_path_factory.getbasetemp())
    text = printed(screen, width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    joined = " ".join(text.split())
    digits = [1 if time >= 10 else 2 for time in times]
    now, was = (f"{time:.{places}f}" for time, places in zip(times, digits, strict=True))
    sentence = f"{now} ms a step fake-quantized, was {was} (batch 1, 1 thread)"
    assert sentence in joined
    assert "9.0 dB" in joined
    text = printed(summary_table(summary), width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    assert f"{before:,}" in text


def test_the_numbers_say_what_remarks_there_are() -> None:
    remark = "20.3% of the weights stay in float: blocks[0].weight (no layer owns it)"
    for shown in (
        summary_table({**SUMMARY, "remarks": [remark]}),
        ResultScreen({**SUMMARY, "remarks": [remark]}, None, Path()),
    ):
        assert " ".join(remark.split()) in " ".join(printed(shown).split())


def test_all_numbers_of_a_program_are_in_the_table() -> None:
    summary = {**SUMMARY, "program": {**PROGRAM, "max_lsb": 1.0}, "distilled": TRAINED}
    text = printed(summary_table(summary))
    for shown in ("8.940", "1,281", "130.8", "1,455", "10 min", "18.00"):
        assert shown in text.split() or shown in text


def test_a_peak_of_memory_that_the_system_does_not_tell_is_left_out(tmp_path) -> None:
    summary = {**SUMMARY, "peak_memory_bytes": {"packed": 3 * 2**20, "float": None}}
    text = printed(summary_table(summary))
    assert "3.0" in next(line for line in text.splitlines() if "peak memory" in line)
    assert "3 MiB to load and run a step\n" in printed(ResultScreen(summary, None, tmp_path))
    summary = {**SUMMARY, "peak_memory_bytes": {"packed": None, "float": None}}
    assert "peak" not in printed(ResultScreen(summary, None, tmp_path))


def test_a_pattern_with_brackets_is_printed_as_it_is() -> None:
    reason = "override 're:mid[a-z]+[01]'"
    entry = LayerReport(
        name="mid[red]", kind="Linear", shape=(2, 3), mean_bits=4.0, bytes=3, sqnr_db=9.0,
        fraction=0.0, reason=reason,
    )  # fmt: skip
    text = printed(layer_table(report(entry)), 200)
    assert reason in text
    assert "mid[red]" in text


def test_layers_are_sorted_and_the_rest_is_counted() -> None:
    layers = report(layer("b", 3.0), layer("a", None), layer("c", 1.0))
    rows = printed(layer_table(layers, order="sqnr", top=2)).splitlines()
    assert [row.split()[0] for row in rows[3:5]] == ["c", "b"]
    assert rows[5] == "1 more layers"
    rows = printed(layer_table(layers, order="name")).splitlines()
    assert [row.split()[0] for row in rows[3:6]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "4-bit weights, 8-bit activations"),
        ({"activation_mode": "float"}, "4-bit weights, float activations"),
        ({"activation_mode": "timestep"}, "4-bit weights, 8-bit activations by noise level"),
        ({"effective_bits": 3.5}, "3.5 effective bits a weight, 8-bit activations"),
        ({"weight_bytes": 12345}, "weights in 12,345 bytes, 8-bit activations"),
    ],
)
def test_settings_in_words(settings, words):
    assert bits_of(MPQConfig(**settings)) == words
