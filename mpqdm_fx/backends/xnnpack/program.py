"""What a lowering wrote and measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqdm_fx.backends.xnnpack.runner import TensorSpec

if TYPE_CHECKING:
    from mpqdm_fx.backends.xnnpack.road import RoadGraphs

__all__ = ["XnnpackProgram"]


@dataclass(frozen=True, kw_only=True)
class XnnpackProgram:
    """A written and executed `.pte`.

    Attributes:
        path: The file.
        bytes: Its size.
        subgraphs: XNNPACK delegates in it.
        delegated: Nodes inside them.
        undelegated: Nodes that portable kernels run.
        refusals: Kinds and numbers of those nodes.
        inputs: What the program takes, in order.
        outputs: What it returns, in order.
        output_scale: Step of the first output's integers; None where it is float.
        sqnr_db: Program against the fake-quantized graph (or the float graph it was made of) on
            the example inputs.
        max_lsb: Largest difference between the two in steps of the output; None where it is float.
        reference_sqnr_db: Fake-quantized graph against the rounded graph with float activations;
            None for a float program.
        float_layers: Layers whose activations were to be chosen at run time but for which XNNPACK
            has no such kernel, with the reason; they run in float with their rounded weights.
        seconds: Wall time of the lowering.
        four_bit_layers: Linear layers whose weights are stored at four bits.
        eight_bit_layers: Layers of at most 16 levels a channel whose weights are stored at eight
            bits all the same, with the reason.
        weights_path: File of the weights, where they are in one of their own.
        weights_bytes: Size of that file; 0 without.
        graphs: What it was made of, where that was to be kept.
    """

    path: Path
    bytes: int
    subgraphs: int
    delegated: int
    undelegated: int
    refusals: Mapping[str, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output_scale: float | None
    sqnr_db: float
    max_lsb: float | None
    reference_sqnr_db: float | None
    float_layers: Mapping[str, str]
    seconds: float
    four_bit_layers: tuple[str, ...] = ()
    eight_bit_layers: Mapping[str, str] = field(default_factory=dict)
    weights_path: Path | None = None
    weights_bytes: int = 0
    graphs: "RoadGraphs | None" = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types without the graphs; the path is left to its file name."""
        names = ("refusals", "float_layers", "eight_bit_layers")
        plain = {name: dict(getattr(self, name)) for name in names}
        weights = None if self.weights_path is None else self.weights_path.name
        fields = asdict(replace(self, graphs=None))
        del fields["graphs"]
        return {**fields, "path": self.path.name, "weights_path": weights, **plain}
