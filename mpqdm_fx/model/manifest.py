"""What `mpqdm.json` holds: records of this package as they are, and what a file adds to them."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.io.schema import Format, Strict, Whole
from mpqdm_fx.io.sealed import Entry
from mpqdm_fx.io.versions import FIRST_SEALED, FORMAT, FORMAT_VERSION
from mpqdm_fx.model.packed import Layout
from mpqdm_fx.model.proof import Environment
from mpqdm_fx.records.activations import StoredActivation
from mpqdm_fx.records.config import StoredSettings
from mpqdm_fx.records.report import QuantizationReport

__all__ = ["Manifest", "Program"]

_MOST_INPUTS = 10_000
_LARGEST_INPUT = 2**30  # elements of one input: example inputs of these shapes are made
_LARGEST_RUN = 2**25  # at the smallest batch and one more, with which a loaded model is run


def _bounded(signature: Signature) -> Signature:
    """Refuse inputs that nobody has the memory to make."""
    if not 1 <= len(signature.inputs) <= _MOST_INPUTS:
        raise ValueError(f"a graph with {len(signature.inputs)} inputs")
    low, high = signature.batch_range or (signature.batch, signature.batch)
    if not low <= signature.batch <= (high or signature.batch):
        raise ValueError(f"batch {signature.batch} is not in its range")
    for spec in signature.inputs:
        size = math.prod(spec.shape)
        least = size if spec.batch_axis is None else math.prod(spec.shape_at(low + 1))
        if size > _LARGEST_INPUT or least > _LARGEST_RUN:
            raise ValueError(f"{spec.name} of {spec.shape} is too large at batch {low}")
    return signature


class Program(Strict):
    """What a program was made with; see `jobs.result_folder.ProgramForm`.

    Attributes:
        kernels: Which layers own kernels were to run; None for a program of XNNPACK's alone.
        cpu: Class of CPUs that they were chosen for; None with `kernels`.
        expanded: Size and hash of what each compressed file expands to.
    """

    four_bit: Literal["never", "whole", "split"]
    external_weights: bool
    compress: bool
    kernels: Literal["auto", "memory", "xnnpack"] | None = None
    cpu: Literal["avx2", "vnni", "dotprod"] | None = None
    expanded: dict[str, Entry] = Field(default_factory=dict)


class Proof(Strict):
    """What a loaded model is compared with, and whether code of the model's own is needed."""

    model_required: bool
    environment: Environment


class Manifest(Strict):
    """`mpqdm.json` without its digest; the files are checked by who opens them."""

    stored_as: ClassVar[Format] = Format(
        name=FORMAT,
        noun="manifest of this package",
        newest=FORMAT_VERSION,
        sealed_from=FIRST_SEALED,
    )

    format: str
    version: int
    versions: dict[str, str]
    signature: Annotated[Signature, Whole(lacking=("defaults", "dtype")), AfterValidator(_bounded)]
    settings: StoredSettings
    weights: Layout
    ranges: dict[str, StoredActivation]
    noise_levels: tuple[float, ...] | None = None
    report: QuantizationReport
    program: Program | None = None
    proof: Proof | None = None
    files: dict[str, Any]

    @model_validator(mode="after")
    def _whole(self) -> "Manifest":
        if self.version >= FIRST_SEALED:
            missing = {"noise_levels", "program", "proof"} - self.model_fields_set
            if missing or self.proof is None:
                raise ValueError(f"it has no {min(missing, default='proof')}")
        return self
