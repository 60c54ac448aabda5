"""What `mpqdm.json` may hold, field by field.

Values that have a class of their own with checks of its own (settings, activation ranges) are
plain objects here, and are checked where that class is made.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.schema import Count, Name, Ratio, Shape, Strict, validated
from mpqdm_fx.io.versions import FORMAT

__all__ = ["STORED_DTYPES", "checked_manifest"]

_LARGEST_INPUT = 2**30  # elements of one input: example inputs of these shapes are made
_LARGEST_RUN = 2**25  # at the smallest batch and one more, with which a loaded model is run

DType = Literal[
    "float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64"
]
StoredDType = DType | Literal["complex64"]  # of buffers; no input of a graph is complex
STORED_DTYPES = frozenset({*get_args(DType), "complex64"})
"""What tensors of a packed file may be."""

Width = Annotated[int, Field(ge=1, le=8)]
Batch = Annotated[int, Field(ge=1, le=2**20)]
Share = Annotated[float, Field(ge=0, le=1)]
Levels = Literal["uniform", "codebook", "int4"]
Fate = Literal["quantized", "float", "shared", "folded", "unused"]


class StoredInput(Strict):
    """One tensor input; see `graph.signature.InputSpec`."""

    name: Name
    shape: Shape
    dtype: DType
    batch_axis: Literal[0] | None
    batch_multiple: Annotated[int, Field(ge=1, le=2**20)]

    @model_validator(mode="after")
    def _bounded(self) -> "StoredInput":
        if math.prod(self.shape) > _LARGEST_INPUT:
            raise ValueError(f"shape {self.shape} is no input's")
        return self


class StoredSignature(Strict):
    """See `graph.signature.Signature`."""

    model_class: Name
    output_class: Name | None
    parameters: tuple[Name, ...]
    arguments: tuple[Name, ...]
    baked: tuple[tuple[Name, Any], ...]
    inputs: Annotated[tuple[StoredInput, ...], Field(min_length=1, max_length=10_000)]
    batch: Batch
    batch_range: tuple[Batch, Batch | None] | None
    note: str
    defaults: tuple[tuple[Name, Any], ...] = ()
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _bounded(self) -> "StoredSignature":
        low, high = self.batch_range or (self.batch, self.batch)
        if not low <= self.batch <= (high or self.batch):
            raise ValueError(f"batch {self.batch} is not in its range")
        for spec in self.inputs:
            size = math.prod(spec.shape)
            if spec.batch_axis == 0:
                size = spec.batch_multiple * (low + 1) * math.prod(spec.shape[1:])
            if size > _LARGEST_RUN:
                raise ValueError(f"{spec.name} of {spec.shape} is too large at batch {low}")
        return self


class StoredLayer(Strict):
    """One quantized layer; see `plan.LayerPlan`. Mixed widths are in the file of the weights."""

    name: Name
    kind: Name
    shape: Annotated[tuple[Annotated[int, Field(ge=1, lt=2**40)], ...], Field(min_length=1)]
    bits: Width | Literal["mixed"]
    levels: Levels
    reason: str | None
    fraction: Share


class StoredWeights(Strict):
    """Layout of the file of the weights; see `model.packed`."""

    layers: tuple[StoredLayer, ...]
    floats: tuple[tuple[Name, StoredDType, StoredDType, Shape], ...]
    float_weights: dict[str, str]
    activation_bits: Width
    shared: dict[str, str] = Field(default_factory=dict)
    parameters: tuple[tuple[Name, Count, Fate, str], ...] = ()
    copies: tuple[Name, ...] = ()


class StoredLayerReport(Strict):
    """See `records.report.LayerReport`."""

    name: Name
    kind: Name
    shape: Shape
    mean_bits: float
    bytes: Count
    sqnr_db: Ratio | None
    fraction: Share
    reason: str | None
    base_sqnr_db: Ratio | None
    alpha: float
    beta: float
    damping: float
    rows: Count
    refitted: bool = False


class StoredChoice(Strict):
    """See `records.report.ActivationChoice`."""

    layers: Annotated[tuple[Name, ...], Field(min_length=1)]
    kind: Literal["float", "static", "dynamic"]
    exponent: Share
    quantized_cost: Annotated[float, Field(ge=0)]
    cost: Annotated[float, Field(ge=0)]
    slowdown: Annotated[float, Field(ge=0)]


class StoredJudgement(Strict):
    """See `records.report.Judgement`."""

    recipe: Name
    sqnr_db: tuple[float | None, ...]
    error: Ratio
    chosen: bool


class StoredReport(Strict):
    """See `records.report.QuantizationReport`."""

    layers: tuple[StoredLayerReport, ...]
    calibration_calls: Count
    seconds: Annotated[float, Field(ge=0)]
    versions: dict[str, str]
    activations: tuple[StoredChoice, ...] = ()
    judged: tuple[StoredJudgement, ...] = ()


class StoredFile(Strict):
    """See `io.sealed.Entry`."""

    bytes: Count
    sha256: str


class StoredProgram(Strict):
    """What a program was made with; see `result_folder.Form`."""

    four_bit: Literal["never", "whole", "split"]
    external_weights: bool
    compress: bool
    expanded: dict[str, StoredFile] = Field(default_factory=dict)


class StoredEnvironment(Strict):
    """See `proof.environment`."""

    torch: str
    machine: str
    kernels: str
    threads: Annotated[int, Field(ge=1, le=2**20)]
    precision: str
    device: str


class StoredProof(Strict):
    """What a loaded model is compared with, and whether code of the model's own is needed."""

    model_required: bool
    environment: StoredEnvironment


class StoredManifest(Strict):
    """`mpqdm.json` without its digest."""

    format: Literal["mpqdm_fx"]
    version: int
    versions: dict[str, str]
    signature: StoredSignature
    settings: dict[str, Any]
    weights: StoredWeights
    ranges: dict[str, dict[str, Any]]
    noise_levels: tuple[float, ...] | None
    report: StoredReport
    program: StoredProgram | None
    proof: StoredProof | None
    files: dict[str, StoredFile]


def checked_manifest(data: Mapping[str, Any], where: object, *, proof: bool) -> dict[str, Any]:
    """A parsed manifest whose fields all have their types and ranges, as plain JSON types.

    Args:
        data: Result of `read_json`.
        where: The file, for messages.
        proof: Whether its version has a proof. Those before have none, version 1 has no noise
            levels, and both may lack `program`.

    Raises:
        ArtifactError: It is no manifest of this package, or a field does not fit; it is named.
    """
    if data.get("format") != FORMAT:
        raise ArtifactError(f"{where} is not a manifest of this package")
    filled = dict(data) if proof else {"noise_levels": None, "program": None, "proof": None, **data}
    found = validated(StoredManifest, filled, where).model_dump()
    if proof and found["proof"] is None:
        raise ArtifactError(f"{where} is damaged: it has no proof")
    return found
