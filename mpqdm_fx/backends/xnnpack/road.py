"""The graphs between a rounded graph and its program, each of which runs in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import fx

from mpqdm_fx.backends.pt2e import export_graph
from mpqdm_fx.backends.xnnpack.edge import edge_graph
from mpqdm_fx.backends.xnnpack.four_bit import FourBit
from mpqdm_fx.backends.xnnpack.method import Method
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.records.activations import Activation

__all__ = ["ProgramGraphs", "RoadGraphs"]


@dataclass(frozen=True, kw_only=True)
class RoadGraphs:
    """What every road to a program begins with.

    Attributes:
        decomposed: In operators that XNNPACK knows, with biases in whole steps and fake-quantized
            activations: what the program is to compute.
        inputs: Inputs in order, whose shapes all graphs take.
    """

    decomposed: fx.GraphModule
    inputs: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class ProgramGraphs(RoadGraphs):
    """What `lower_xnnpack` goes through.

    Attributes:
        converted: With int8 weights and q/dq ops, after the remedies.
        edge: In ExecuTorch's edge operators, as the partitioner is given it.
    """

    converted: fx.GraphModule
    edge: fx.GraphModule

    @classmethod
    def of(
        cls,
        rounded: fx.GraphModule,
        ranges: Mapping[str, Activation],
        example_inputs: Mapping[str, Any] | Sequence[Any],
        *,
        four_bit: FourBit = "whole",
    ) -> Self:
        """Make the graphs without lowering.

        Args: as of `lower_xnnpack`.

        Raises:
            ConfigError, LoweringError: As of `lower_xnnpack`.
        """
        require_executorch()
        with torch.no_grad():
            method = Method(rounded, example_inputs, ranges, four_bit=four_bit)
            assert method.quantized is not None
            return cls(
                decomposed=method.quantized,
                converted=method.lowered,
                edge=edge_graph(export_graph(method.lowered, method.inputs)),
                inputs=method.inputs,
            )
