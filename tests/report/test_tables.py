"""The tables of the terminal."""

from rich.console import Console

from mpqdm_fx.report.tables import summary_table

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


def printed(summary: dict[str, object]) -> str:
    console = Console(width=200, record=True)
    with console.capture() as capture:
        console.print(summary_table(summary))
    return capture.get()


def test_the_summary_says_what_its_numbers_do_not() -> None:
    remark = "20.3% of the weights stay in float: blocks[0].weight (no layer owns it)"
    text = printed({**SUMMARY, "remarks": [remark]})
    assert " ".join(remark.split()) in " ".join(text.split())


def test_a_summary_without_remarks_prints() -> None:
    assert "8.940" in printed(SUMMARY)
