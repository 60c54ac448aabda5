"""What an export prints fits a terminal of 80 columns, and no number is cut."""

import pytest

from mpqdm_fx.cli.options import console
from mpqdm_fx.report.export_metrics import EXPORTED, export_metrics
from mpqdm_fx.report.export_tables import export_estimate_table, export_table, pictures_line
from mpqdm_fx.report.gates import METRICS

PART = {
    "precision": "rounded",
    "bytes": 3_755_991_040,
    "float32_bytes": 4_245_684_224,
    "quantized_sqnr_db": 22.94,
    "program_sqnr_db": "inf",
    "subgraphs": 2,
    "effective_bits": 4.25,
    "milliseconds": {"program": 4401.23, "float": 15069.9},
    "peak_memory_bytes": {"program": 12_767_557_632, "float": 12_767_557_632},
}
SUMMARY = {
    "parts": {"text_encoder_2": PART, "denoiser": {**PART, "program_sqnr_db": 71.5}},
    "size": [512, 512],
    "bytes": 7_511_982_080,
    "float32_bytes": 8_491_368_448,
    "milliseconds_per_step": {"program": 8802.46, "float": 30139.8},
    "pictures": {"count": 4, "x0_sqnr_db": 31.83, "psnr_db": None, "ssim": 0.9983},
    "denoiser_sqnr_db": 22.94,
    "backend_denoiser_sqnr_db": None,
    "seconds_to_quantize": 12.0,
}
ESTIMATE = {
    "parts": {
        "text_encoder_2": {
            "parameters": 2_567_463_684, "program_bytes": 2_567_463_684, "float_bytes": 10**10,
            "quantize_seconds": 123_456, "lower_seconds": 7100, "measure_seconds": 99,
        }
    },
    "seconds": 123_456, "draw_seconds": 5000, "bytes": 10**10, "peak_bytes": 10**11,
    "disk_bytes": 10**11,
}  # fmt: skip


@pytest.mark.parametrize("table", [export_table(SUMMARY), export_estimate_table(ESTIMATE)])
def test_the_tables_fit_80_columns(table):
    shown = console()
    shown.width = 80
    with shown.capture() as printed:
        shown.print(table)
    text = printed.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "text_encoder_2" in text
    assert "12,176" in text or "2,567,463,684" in text


def test_pictures_are_told_in_words_with_what_was_measured():
    assert pictures_line(SUMMARY) == (
        "4 pictures against float: x0_sqnr 31.83 dB (the same pictures), "
        "ssim 0.9983 (the same pictures)"
    )
    assert pictures_line({**SUMMARY, "size": [524_288]}).startswith("4 sounds against float: x0")
    assert pictures_line({**SUMMARY, "pictures": None}) == ""


def test_metrics_are_those_of_the_summary_and_what_is_not_known_is_absent():
    metrics = export_metrics(SUMMARY)
    assert metrics["bytes"] == 7_511_982_080
    assert metrics["ms"] == 8802.46
    assert metrics["speedup"] == pytest.approx(30139.8 / 8802.46)
    assert metrics["peak_memory"] == 12_767_557_632
    assert metrics["program_sqnr"] == 71.5  # of the worst one; an exact one is the text inf
    assert metrics["subgraphs"] == 2
    assert EXPORTED.keys() - metrics.keys() == {"backend_sqnr", "psnr"}
    unmeasured = {**PART, "milliseconds": None, "peak_memory_bytes": None}
    parts = {"text_encoder_2": PART, "denoiser": unmeasured}
    bare = export_metrics({**SUMMARY, "parts": parts, "milliseconds_per_step": None})
    assert {"ms", "speedup", "peak_memory"} & bare.keys() == set()


def test_every_metric_of_an_export_is_one_that_gates_know():
    assert EXPORTED.keys() <= METRICS.keys()
