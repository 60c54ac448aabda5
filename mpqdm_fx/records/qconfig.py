"""How one layer is quantized: what torch.ao calls its QConfig, in plain values."""

from dataclasses import dataclass

from mpqdm_fx.records.activations import Activation
from mpqdm_fx.records.plan import LayerPlan

__all__ = ["LayerQConfig"]


@dataclass(frozen=True, kw_only=True)
class LayerQConfig:
    """The decisions on one layer.

    Attributes:
        weight: Widths of its output channels (OMQ's, or measured) and their levels; None where the
            weight stays in float.
        activation: How what it reads, and writes, is quantized; None where that stays in float.
    """

    weight: LayerPlan | None
    activation: Activation | None
