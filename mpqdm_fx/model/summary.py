"""What `summary.json` may hold: the numbers that a job printed, as `inspect` prints them again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.schema import Count, Name, Ratio, Strict, plain, read_listed
from mpqdm_fx.model.folder import ModelFolder

__all__ = ["SUMMARY", "Summary", "read_summary", "write_summary"]

SUMMARY = "summary.json"


class _Tensor(Strict):
    name: str
    shape: tuple[Count, ...]
    dtype: Name


class _Program(Strict):
    """See `XnnpackProgram` and `LowbitProgram` of the backends; older ones had no own layers."""

    path: Name
    bytes: Count
    subgraphs: Count
    delegated: Count
    undelegated: Count
    refusals: dict[str, Count]
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]
    output_scale: float | None
    sqnr_db: Ratio
    max_lsb: Ratio | None
    reference_sqnr_db: Ratio | None
    float_layers: dict[str, str]
    seconds: float
    four_bit_layers: tuple[str, ...]
    eight_bit_layers: dict[str, str]
    weights_path: Name | None
    weights_bytes: Count
    own_layers: tuple[str, ...] = ()
    left_layers: dict[str, str] = Field(default_factory=dict)
    own_operators: dict[str, Count] = Field(default_factory=dict)
    crossings: Count = 0
    layout_copies: Count = 0
    layout_copy_bytes: Count = 0
    executed: bool = True


class _Training(Strict):
    """What `distill` did."""

    settings: dict[str, Any]
    updates: Count
    seconds: float
    error_before: Ratio
    error_after: Ratio
    improved: bool
    epsilon_sqnr_db_before: Ratio


class Summary(Strict):
    """Numbers of a folder; sizes in bytes, ratios in dB. Not every system tells peaks of memory.

    `command` is the command line that makes the folder again, where there is one.
    """

    backend: Name
    settings: dict[str, Any]
    mean_bits: float
    effective_bits: float
    num_weights: Count
    weight_bytes: Count
    float_remainder_bytes: Count
    float32_bytes: Count
    parameters: dict[str, Count]
    remarks: tuple[str, ...]
    epsilon_sqnr_db: Ratio
    backend_epsilon_sqnr_db: Ratio
    milliseconds_per_step: dict[str, float]
    threads: Count
    seconds_to_quantize: float
    program: _Program | None
    peak_memory_bytes: dict[str, Count | None]
    files: dict[str, Count]
    distilled: _Training | None = None
    command: str | None = None

    @model_validator(mode="after")
    def _compared(self) -> "Summary":
        times, memory = self.milliseconds_per_step, self.peak_memory_bytes
        if not {self.backend, "float"} <= times.keys() or "float" not in memory:
            raise ValueError("times and memory of the backend and of the float model are missing")
        return self


def write_summary(stage: Path, summary: Mapping[str, Any]) -> None:
    """Write a folder's summary; what `read_summary` would not take is a defect of who made it.

    Args:
        stage: The folder.
        summary: Plain values.

    Raises:
        ValueError: A field is missing, unknown, or does not fit.
    """
    text = json.dumps(plain(summary), indent=2, allow_nan=False)
    Summary.model_validate_json(text)
    write_text(stage / SUMMARY, text)


def read_summary(folder: ModelFolder) -> dict[str, Any]:
    """A folder's summary, plain values.

    Raises:
        ArtifactError: It is missing, not what was written, or a field does not fit.
    """
    folder.require(SUMMARY)
    return read_listed(Summary, folder.files, SUMMARY).model_dump()
