"""A summary that is written can be read: no other one is."""

import json

import pytest

from mpqdm_fx.model.summary import SUMMARY, Summary, write_summary

MEASURED = {
    "backend": "packed",
    "settings": {},
    "mean_bits": 4.0,
    "effective_bits": 4.5,
    "num_weights": 10,
    "weight_bytes": 6,
    "float_remainder_bytes": 4,
    "float32_bytes": 44,
    "parameters": {"quantized": 10, "float": 1},
    "remarks": [],
    "epsilon_sqnr_db": float("inf"),
    "backend_epsilon_sqnr_db": float("nan"),
    "milliseconds_per_step": {"packed": 1.0, "float": 2.0},
    "threads": 1,
    "seconds_to_quantize": 1.5,
    "program": None,
    "peak_memory_bytes": {"packed": 100, "float": 200},
    "files": {"model.safetensors": 8},
}


@pytest.mark.parametrize("peak", [300, None])  # None where the system does not tell
def test_what_was_measured_can_be_read_again(tmp_path, peak):
    write_summary(tmp_path, {**MEASURED, "peak_memory_bytes": {"packed": peak, "float": peak}})
    found = Summary.model_validate_json((tmp_path / SUMMARY).read_text())
    assert found.peak_memory_bytes["float"] == peak
    assert found.epsilon_sqnr_db == float("inf")
    assert json.loads((tmp_path / SUMMARY).read_text())["backend_epsilon_sqnr_db"] == "nan"


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"mean_bits": None}, "mean_bits"),
        ({"files": {"a": -1}}, "files"),
        ({"more": 1}, "more"),
        ({"milliseconds_per_step": {"float": 1.0}}, "times and memory"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, changed, field):
    with pytest.raises(ValueError, match=field):
        write_summary(tmp_path, {**MEASURED, **changed})
    assert list(tmp_path.iterdir()) == []
