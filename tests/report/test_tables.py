"""The tables of the terminal."""

from rich.console import Console
from rich.table import Table

from mpqdm_fx.quantized import LayerReport, QuantizationReport
from mpqdm_fx.report.tables import layer_table, summary_table

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
}


def printed(table: Table) -> str:
    console = Console(width=200, record=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_summary_says_what_its_numbers_do_not() -> None:
    remark = "20.3% of the weights stay in float: blocks[0].weight (no layer owns it)"
    text = printed(summary_table({**SUMMARY, "remarks": [remark]}))
    assert " ".join(remark.split()) in " ".join(text.split())


def test_a_summary_without_remarks_prints() -> None:
    assert "8.940" in printed(summary_table(SUMMARY))


def test_a_peak_of_memory_that_the_system_does_not_tell_is_left_out() -> None:
    told = printed(
        summary_table({**SUMMARY, "peak_memory_bytes": {"packed": 3 * 2**20, "float": None}})
    )
    assert "3.0" in next(line for line in told.splitlines() if "peak memory" in line)


def test_a_pattern_with_brackets_is_printed_as_it_is() -> None:
    reason = "override 're:mid[a-z]+[01]'"
    layer = LayerReport(
        name="mid", kind="Linear", shape=(2, 3), mean_bits=4.0, bytes=3, sqnr_db=9.0,
        fraction=0.0, reason=reason,
    )  # fmt: skip
    report = QuantizationReport(layers=(layer,), calibration_calls=1, seconds=1.0, versions={})
    assert reason in printed(layer_table(report))
