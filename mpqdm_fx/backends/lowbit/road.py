"""The graphs between a rounded graph and its program with own operators; each runs in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import fx

from mpqdm_fx.backends.lowbit.costs import Cpu
from mpqdm_fx.backends.lowbit.layers import Kernels
from mpqdm_fx.backends.lowbit.method import LowbitMethod
from mpqdm_fx.backends.pt2e import export_graph
from mpqdm_fx.backends.xnnpack.edge import edge_graph
from mpqdm_fx.backends.xnnpack.four_bit import FourBit
from mpqdm_fx.backends.xnnpack.road import RoadGraphs
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.records.activations import Activation

__all__ = ["LowbitGraphs"]


@dataclass(frozen=True, kw_only=True)
class LowbitGraphs(RoadGraphs):
    """What `lower_lowbit` goes through.

    Attributes:
        mixed: With own operators in the place of layers, by their references in Python. Its images
            lie channels last: node by node it is comparable with `edge` alone.
        edge: In ExecuTorch's edge operators, as the partitioner is given it.
    """

    mixed: fx.GraphModule
    edge: fx.GraphModule

    @classmethod
    def of_method(cls, method: LowbitMethod, edge: fx.GraphModule) -> Self:
        """The graphs of a method that was lowered.

        Args:
            method: The method.
            edge: Its edge graph.
        """
        assert method.quantized is not None
        assert method.prepared is not None
        return cls(
            decomposed=method.quantized, mixed=method.prepared, edge=edge, inputs=method.inputs
        )

    @classmethod
    def of(
        cls,
        rounded: fx.GraphModule,
        ranges: Mapping[str, Activation],
        example_inputs: Mapping[str, Any] | Sequence[Any],
        *,
        kernels: Kernels = "auto",
        cpu: Cpu = "avx2",
        four_bit: FourBit = "whole",
    ) -> Self:
        """Make the graphs without lowering.

        Args: as of `lower_lowbit`.

        Raises:
            ConfigError, LoweringError: As of `lower_lowbit`.
        """
        require_executorch()
        with torch.no_grad():
            method = LowbitMethod(
                rounded, example_inputs, ranges, kernels=kernels, cpu=cpu, four_bit=four_bit
            )
            edge = edge_graph(export_graph(method.lowered, method.inputs))
        return cls.of_method(method, edge)
