"""The graphs between a rounded graph and its program, each of which runs in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import fx

from mpqdm_fx.activations import Activation
from mpqdm_fx.backends.pt2e import export_graph
from mpqdm_fx.backends.xnnpack.convert import converted_graph, decomposed, quantized_graph
from mpqdm_fx.backends.xnnpack.edge import edge_graph
from mpqdm_fx.backends.xnnpack.method import positional
from mpqdm_fx.backends.xnnpack.runner import require_executorch

__all__ = ["ProgramGraphs"]


@dataclass(frozen=True, kw_only=True)
class ProgramGraphs:
    """What `lower_xnnpack` goes through.

    Attributes:
        decomposed: In operators that XNNPACK knows, with biases in whole steps and fake-quantized
            activations: what the program is to compute.
        converted: With int8 weights and q/dq ops, after the remedies.
        edge: In ExecuTorch's edge operators, as the partitioner is given it.
        inputs: Inputs in order, whose shapes all three take.
    """

    decomposed: fx.GraphModule
    converted: fx.GraphModule
    edge: fx.GraphModule
    inputs: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        rounded: fx.GraphModule,
        ranges: Mapping[str, Activation],
        example_inputs: Mapping[str, Any] | Sequence[Any],
    ) -> Self:
        """Make the graphs without lowering.

        Args: as of `lower_xnnpack`.

        Raises:
            ConfigError, LoweringError: As of `lower_xnnpack`.
        """
        require_executorch()
        inputs = positional(example_inputs)
        with torch.no_grad():
            plain, runnable, _ = decomposed(rounded, ranges)
            converted = converted_graph(plain, runnable, inputs)
            return cls(
                decomposed=quantized_graph(plain, runnable),
                converted=converted,
                edge=edge_graph(export_graph(converted, inputs)),
                inputs=inputs,
            )
