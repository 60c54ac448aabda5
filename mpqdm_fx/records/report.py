"""What quantizing did: by layer, by input, and at the model's output."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from torch import Tensor

from mpqdm_fx.io.schema import Count, Name, Ratio, Shape, Whole
from mpqdm_fx.numerics.metrics import ratio_db
from mpqdm_fx.records.validation import Bits

__all__ = ["ActivationChoice", "ActivationKind", "Judgement", "LayerReport", "QuantizationReport"]

_Amount = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]

ActivationKind = Literal["float", "static", "timestep", "dynamic"]
"""How the input of a layer may be quantized."""


@dataclass(frozen=True, kw_only=True)
class ActivationChoice:
    """What was chosen for the input of some layers.

    Attributes:
        layers: Layers that share the input, in graph order.
        kind: What was chosen.
        bits: Width of its codes; of no meaning where the input stays in float.
        exponent: How far the channels are brought to one size before (`passes.ScaleInputs`).
        quantized_cost: Squared error of the model's output from this input alone, over the output's
            energy, if it is quantized as it is.
        cost: The same as it was chosen.
        slowdown: Time that the choice takes over the fastest one, over the whole program's.
        elements: Numbers of one call that the layers read, each once; 0 where widths are not
            measured.
        multiply_adds: Of the layers in one call; 0 where widths are not measured.
    """

    layers: Annotated[tuple[Name, ...], Field(min_length=1)]
    kind: ActivationKind
    bits: Bits = 8
    exponent: _Share
    quantized_cost: _Amount
    cost: _Amount
    slowdown: _Amount
    elements: Count = 0
    multiply_adds: Count = 0

    @property
    def told(self) -> str:
        """What was chosen, in words."""
        if self.kind == "float":
            return "float"
        scaled = {0.0: "", 0.5: ", channels nearer", 1.0: ", channels alike"}
        width = "" if self.bits == 8 else f" at {self.bits} bits"
        return f"{self.kind}{width}{scaled.get(self.exponent, '')}"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How one way to round the model does at its output, on held-out calls.

    Attributes:
        recipe: What was done.
        sqnr_db: Signal-to-noise ratio in dB by group of noise levels, ascending; None where it is
            exact or there was no call.
        error: Mean over these groups of the error's energy over the output's.
        chosen: Whether this is the result.
    """

    recipe: Name
    sqnr_db: tuple[float | None, ...]
    error: Ratio
    chosen: bool

    @property
    def decibels(self) -> float:
        """The error in dB below the output."""
        return -10 * math.log10(self.error) if 0 < self.error < math.inf else math.inf

    @classmethod
    def of(cls, recipe: str, powers: Tensor) -> Self:
        """Judge by what `output_powers` gave.

        Args:
            recipe: What was done.
            powers: Sums over calls, float64 [G, 2].
        """
        energies = [(signal, noise) for signal, noise in powers.tolist() if signal or noise]
        ratios = [noise / signal if signal else math.inf for signal, noise in energies]
        error = sum(ratios) / len(ratios) if ratios else 0.0
        return cls(
            recipe=recipe,
            sqnr_db=tuple(_decibels(*row) for row in powers.tolist()),
            error=error if math.isfinite(error) else math.inf,
            chosen=False,
        )


def _decibels(signal: float, noise: float) -> float | None:
    ratio = ratio_db(signal, noise)
    return ratio if math.isfinite(ratio) else None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What quantization did to one layer.

    Attributes:
        name: Layer's name.
        kind: Class name of its module.
        shape: Shape of its weight.
        mean_bits: Average bits of a code.
        bytes: Stored bytes with scales, tables and width tags.
        sqnr_db: Signal-to-noise ratio of the layer's output in dB against the float model, on
            held-out rows, behind the layers that were quantized before; None for an embedding, and
            after training, which changed the codes.
        base_sqnr_db: The same if the layer did not make up for the error that reaches it.
        alpha: Strength of that correction; `beta` the same for the residual's error.
        beta: See `alpha`.
        damping: Ridge of the correction in units of the average second moment.
        rows: Input rows that the layer was fitted to.
        refitted: Whether its bias was refitted: that has to lower the error on held-out rows.
        fraction: Share of channels that OMQ promoted, and as many demoted.
        reason: Why the layer is off the budget, or None.
    """

    name: Name
    kind: Name
    shape: Shape
    mean_bits: float
    bytes: Count
    sqnr_db: Ratio | None
    fraction: _Share
    reason: str | None
    base_sqnr_db: Ratio | None = None
    alpha: float = 0.0
    beta: float = 0.0
    damping: float = 0.0
    rows: Count = 0
    refitted: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """The record of one `convert`.

    Attributes:
        layers: One entry per quantized layer, in graph order.
        calibration_calls: Recorded calls that the statistics come from.
        seconds: Wall time of `convert`.
        versions: Versions of this package and of torch.
        activations: How the input of each layer is quantized, and what that costs, where it was
            measured.
        judged: What was chosen and plain rounding, compared at the model's output.
        taken: Layers with the codes of the run that this one started from
            (`RunOptions.start_from`).
    """

    layers: tuple[Annotated[LayerReport, Whole(lacking=("refitted",))], ...]
    calibration_calls: Count
    seconds: _Amount
    versions: Mapping[str, str]
    activations: tuple[ActivationChoice, ...] = ()
    judged: tuple[Judgement, ...] = ()
    taken: Count = 0

    @property
    def solved(self) -> int:
        """Layers that were rounded in this run."""
        return len(self.layers) - self.taken

    @property
    def input_bits(self) -> tuple[float, float] | None:
        """Mean width of the inputs that are quantized, by elements and by multiply-adds.

        None where widths are not measured.
        """
        quantized = [choice for choice in self.activations if choice.kind != "float"]
        elements = sum(choice.elements for choice in quantized)
        work = sum(choice.multiply_adds for choice in quantized)
        if not elements or not work:
            return None
        return (
            sum(choice.bits * choice.elements for choice in quantized) / elements,
            sum(choice.bits * choice.multiply_adds for choice in quantized) / work,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as a field of a `Strict` record reads them."""
        fields = asdict(self)
        if not self.taken:  # older versions read what was made from nothing
            del fields["taken"]
        return fields
