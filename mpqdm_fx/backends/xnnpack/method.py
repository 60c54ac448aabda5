"""One graph made ready for lowering: what is exported, and what its program has to compute."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.backends.xnnpack.convert import (
    converted_graph,
    decomposed,
    quantized_graph,
)
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, four_bit_layers
from mpqdm_fx.backends.xnnpack.pipelines import DECOMPOSE
from mpqdm_fx.backends.xnnpack.reference import Reference
from mpqdm_fx.backends.xnnpack.runner import flat_inputs, sorted_entries
from mpqdm_fx.errors import LoweringError
from mpqdm_fx.graph.editing import replace_module, shallow_clone
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.qdq import is_dequantize, qdq_parameters
from mpqdm_fx.records.activations import Activation

__all__ = ["Method", "argument_names", "positional"]


class Method:
    """A graph on its way to a program.

    Args:
        graph: Module-level graph; it is not changed.
        example_inputs: Its inputs, by name or in order.
        activations: By layer name, for int8; None for float.
        four_bit: Which weights are stored at four bits.

    Attributes:
        inputs: The inputs in order, contiguous.
        quantized: What the program is to compute, in float; None for a float program.
        lowered: What is exported: ops that XNNPACK knows, with int8 weights and q/dq ops.
        expected: What the program has to compute.
        floats: Layers that stay in float for want of a kernel, with the reason.
        four_bit: Layers whose weights are stored at four bits.
        eight_bit: Layers of at most 16 levels that are stored at eight bits, with the reason.

    Raises:
        ConfigError: `activations` names a layer that is not rounded.
        LoweringError: An activation cannot run, or the graph has a Conv3d.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        example_inputs: Mapping[str, Any] | Sequence[Any],
        activations: Mapping[str, Activation] | None = None,
        *,
        four_bit: FourBit = "whole",
    ) -> None:
        _refuse_conv3d(graph)
        self.graph, self.inputs = graph, positional(example_inputs)
        self.floats: dict[str, str] = {}
        self.quantized: fx.GraphModule | None = None
        self.four_bit: tuple[str, ...] = ()
        self.eight_bit: dict[str, str] = {}
        if activations is None:
            self.lowered = _without_codes(DECOMPOSE(graph).graph_module)
            self.expected = Reference.of_float(graph, self.inputs)
            return
        plain, runnable, self.floats = decomposed(graph, activations, four_bit=four_bit)
        self.quantized = quantized_graph(plain, runnable)
        self.expected = Reference.of_quantized(graph, self.quantized, self.inputs)
        if four_bit != "never":
            self.four_bit, self.eight_bit = four_bit_layers(plain, runnable)
        self.lowered = converted_graph(plain, runnable, self.inputs, self.four_bit)

    @property
    def named_inputs(self) -> list[tuple[str, Tensor]]:
        """Inputs in the order in which the program takes them."""
        return flat_inputs(self.inputs, argument_names(self.graph))

    @property
    def named_outputs(self) -> dict[str, Tensor]:
        """Outputs in the order in which the program returns them; numbered if they have no name."""
        returned = self.graph.graph.output_node().args[0]
        names = returned if isinstance(returned, dict) else range(len(self.expected.outputs))
        return dict(zip(map(str, names), self.expected.outputs, strict=True))

    @property
    def output_scale(self) -> float | None:
        """Step of the first output, if it comes from integers."""
        first = self.lowered.graph.output_node().all_input_nodes[0]
        return float(qdq_parameters(first)[0]) if is_dequantize(first) else None


def positional(example_inputs: Mapping[str, Any] | Sequence[Any]) -> tuple[Any, ...]:
    """Inputs in order, contiguous, with dictionaries sorted: as the runner hands them over.

    A program is made for the strides of its examples, silently: a transposed view among them would
    give a program that reads all later inputs in the wrong order.
    """
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    ordered = tuple(sorted_entries(value) for value in values)
    dense: tuple[Any, ...] = pytree.tree_map_only(Tensor, Tensor.contiguous, ordered)
    return dense


def argument_names(graph: fx.GraphModule) -> list[str]:
    """Names of a graph's inputs, in order."""
    return [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]


def _refuse_conv3d(graph: fx.GraphModule) -> None:
    for name, layer in weight_layers(graph).items():
        if isinstance(layer.module, torch.nn.Conv3d):
            raise LoweringError(
                f"{name}: neither XNNPACK nor ExecuTorch's portable kernels have a Conv3d; use the "
                f"torch_ao backend, or a model without volumetric convolutions"
            )


def _without_codes(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop the integers of rounded layers from a private copy: a float program would ship them."""
    for name, layer in weight_layers(graph, embeddings=True).items():
        if "weight_codes" in layer.module._buffers:
            clone = shallow_clone(layer.module)
            del clone._buffers["weight_codes"], clone._buffers["weight_scale"]
            replace_module(graph, name, clone)
    return graph
