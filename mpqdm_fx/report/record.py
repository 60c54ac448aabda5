"""What `report.json` holds: every number of `report.html`, in plain JSON types.

Sizes are in bytes, times in milliseconds unless the name says otherwise, ratios in dB; an exact
ratio is the text `"inf"`. What is not known is null, and `missing` says why.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mpqdm_fx.io.files import write_text, write_texts
from mpqdm_fx.io.schema import Count, Name, Ratio, Strict, plain

__all__ = [
    "PAGE",
    "RECORD",
    "ActivationNumbers",
    "BytesByKind",
    "Costs",
    "FloatPart",
    "JudgedRecipe",
    "LayerNumbers",
    "LevelNumbers",
    "PartRecord",
    "PictureNumbers",
    "Place",
    "ProgramNumbers",
    "ReportRecord",
    "Spread",
    "TrainingNumbers",
    "write_page",
    "write_record",
]

RECORD, PAGE = "report.json", "report.html"

Place = Literal["entry", "down", "mid", "up", "exit", "model"]
"""Where a layer is in a UNet; `model` in a model that is none."""


class Spread(Strict):
    """How values are spread over the channels of a layer: extremes and quartiles."""

    smallest: float
    lower: float
    middle: float
    upper: float
    largest: float


class LayerNumbers(Strict):
    """One quantized layer, in running order.

    `bits` counts channels by their width; those of an entropy-coded layer have none. `sqnr_db` is
    of the layer alone on held-out rows, `base_sqnr_db` the same without error propagation, whose
    strength is `alpha` (of the residual `beta`). `by_level` is the ratio of the layer's output in
    the running model at each of `PartRecord.levels`. `kurtosis` is of the float weights of its
    channels, `sensitivity` the squared error of the model's output per squared error of a
    channel's. Of a model that is told no noise level `running_sqnr_db` is what `by_level` is of
    others.
    """

    name: Name
    kind: Name
    place: Place
    shape: tuple[Count, ...]
    mean_bits: float
    bits: dict[str, Count]
    bytes: Count
    sqnr_db: Ratio | None
    base_sqnr_db: Ratio | None
    alpha: float
    beta: float
    rows: Count
    refitted: bool
    reason: str | None
    by_level: tuple[Ratio, ...] | None
    kurtosis: Spread | None
    sensitivity: Spread | None
    running_sqnr_db: Ratio | None = None

    @property
    def known_sqnr_db(self) -> float | None:
        """Its own ratio, else that in the running model."""
        return self.running_sqnr_db if self.sqnr_db is None else self.sqnr_db


class LevelNumbers(Strict):
    """Output's error at one noise level: of the quantized graph, and of what the backend runs.

    The latter is null where it was not measured by noise level.
    """

    level: float
    samples: Count
    sqnr_db: Ratio
    backend_sqnr_db: Ratio | None


class BytesByKind(Strict):
    """Stored bytes of the packed weights, by what they are for."""

    codes: Count
    scales: Count
    tables: Count
    widths: Count
    float_weights: Count
    float_remainder: Count


class ActivationNumbers(Strict):
    """What was chosen for the input of some layers; costs are shares of the output's energy."""

    layers: tuple[Name, ...]
    chosen: Name
    quantized_cost: float
    cost: float
    slowdown: float


class JudgedRecipe(Strict):
    """One way to round the model, at its output on held-out calls, by group of noise levels."""

    recipe: Name
    sqnr_db: Ratio
    by_group: tuple[float | None, ...]
    chosen: bool


class ProgramNumbers(Strict):
    """A method of a lowered file; `outside` counts nodes on portable kernels by their kind.

    Own layers, and what lies between them and XNNPACK, are of the backend `lowbit` alone.
    """

    file: Name
    bytes: Count
    weights_bytes: Count
    subgraphs: Count
    delegated: Count
    undelegated: Count
    outside: dict[str, Count]
    float_layers: dict[str, str]
    eight_bit_layers: dict[str, str]
    four_bit_layers: tuple[str, ...]
    sqnr_db: Ratio
    max_lsb: Ratio | None
    seconds: float
    method: Name = "forward"
    own_layers: tuple[str, ...] = ()
    left_layers: dict[str, str] = Field(default_factory=dict)
    own_operators: dict[str, Count] = Field(default_factory=dict)
    crossings: Count = 0
    layout_copies: Count = 0
    layout_copy_bytes: Count = 0


class TrainingNumbers(Strict):
    """What `distill` did; see `summary.Summary.distilled`."""

    updates: Count
    seconds: float
    error_before: Ratio
    error_after: Ratio
    improved: bool
    epsilon_sqnr_db_before: Ratio


class PictureNumbers(Strict):
    """Samples of both models from the same noise.

    `psnr_db` and `ssim` are of pictures in -1..1, where they were compared.
    """

    count: Count
    steps: Count
    seed: Count
    labels: tuple[str, ...]
    x0_sqnr_db: Ratio | None
    by_picture: tuple[Ratio, ...]
    psnr_db: Ratio | None = None
    ssim: float | None = None


class Costs(Strict):
    """What one model of a folder takes, and the program that it is.

    `milliseconds` are of a step, or of one call of what runs once per image: `calls_per_step` are 0
    then, and 2 with guidance. `program` is what runs most often, `methods` are the other ones of
    its file.
    """

    name: Name
    model_class: Name
    float32_bytes: Count
    files: dict[str, Count]
    milliseconds: float | None
    float_milliseconds: float | None
    threads: Count | None
    peak_bytes: Count | None
    float_peak_bytes: Count | None
    program: ProgramNumbers | None
    missing: dict[str, str]
    calls_per_step: Count = 1
    methods: tuple[ProgramNumbers, ...] = ()

    @property
    def programs(self) -> tuple[ProgramNumbers, ...]:
        """All methods of its file, the one that runs most often first."""
        return (() if self.program is None else (self.program,)) + self.methods

    @property
    def program_bytes(self) -> int | None:
        """Bytes of the program on disk, with weights that are apart; None without one."""
        if self.program is None:
            return None
        stem = self.program.file.partition(".")[0]
        sizes = [size for name, size in self.files.items() if name.startswith(f"{stem}.pt")]
        return sum(sizes) or self.program.bytes + self.program.weights_bytes

    @property
    def shipped_bytes(self) -> int:
        """Bytes of what is shipped: the program."""
        return self.program_bytes or 0


class PartRecord(Costs):
    """One quantized model."""

    backend: Name | None
    settings: dict[str, Any]
    mean_bits: float
    effective_bits: float
    num_weights: Count
    bytes: BytesByKind
    seconds_to_quantize: float
    calibration_calls: Count
    epsilon_sqnr_db: Ratio | None
    backend_epsilon_sqnr_db: Ratio | None
    noise_argument: Name | None
    levels: tuple[LevelNumbers, ...]
    layers: tuple[LayerNumbers, ...]
    activations: tuple[ActivationNumbers, ...]
    judged: tuple[JudgedRecipe, ...]
    trained: TrainingNumbers | None
    remarks: tuple[str, ...]

    @property
    def stored_bytes(self) -> int:
        """All bytes of the packed weights."""
        kinds: dict[str, int] = self.bytes.model_dump()
        return sum(kinds.values())

    @property
    def shipped_bytes(self) -> int:
        """Bytes of what is shipped: the program, else the packed weights."""
        return self.stored_bytes if self.program_bytes is None else self.program_bytes


class FloatPart(Costs):
    """A model of a folder that is a float program.

    `why` it is; `quantized_sqnr_db` is its output's when it was quantized and refused.
    """

    why: Name
    quantized_sqnr_db: Ratio | None


class ReportRecord(Strict):
    """A folder's report.

    `parts` are its quantized models, `float_parts` those that were left in float. `command` repeats
    the run; `missing` says, by section of the page, why it is not there.
    """

    format: Literal["mpqdm_fx report"] = "mpqdm_fx report"
    version: Literal[1] = 1
    model: Name
    command: str | None
    versions: dict[str, str]
    pictures: PictureNumbers | None
    parts: tuple[PartRecord, ...]
    missing: dict[str, str]
    float_parts: tuple[FloatPart, ...] = ()

    @property
    def all_parts(self) -> tuple[Costs, ...]:
        """Its models, quantized or not."""
        return (*self.parts, *self.float_parts)


def write_record(record: ReportRecord, path: Path) -> None:
    """Write a report's numbers.

    Args:
        record: The numbers.
        path: The file; it appears whole.
    """
    write_text(path, _text_of(record))


def write_page(record: ReportRecord, page: str, path: Path) -> None:
    """Write a page with its numbers beside it: both appear, or none.

    Args:
        record: The numbers.
        page: The page's text.
        path: The page, `.html`; the numbers get its name with `.json`.
    """
    write_texts({path.with_suffix(".json"): _text_of(record), path: page})


def _text_of(record: ReportRecord) -> str:
    return json.dumps(plain(record.model_dump()), indent=1, allow_nan=False)
