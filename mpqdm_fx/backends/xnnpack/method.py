"""Graphs made ready for lowering: what is exported, and what the program has to compute."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from mpqdm_fx.backends.xnnpack.convert import (
    converted_graph,
    decomposed,
    fitted,
    quantized_graph,
)
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, four_bit_layers
from mpqdm_fx.backends.xnnpack.passes.split_complex import uncovered_complex
from mpqdm_fx.backends.xnnpack.pipelines import DECOMPOSE
from mpqdm_fx.backends.xnnpack.reference import Reference
from mpqdm_fx.backends.xnnpack.runnable_activations import runnable_activations
from mpqdm_fx.backends.xnnpack.runner import flat_inputs, sorted_entries
from mpqdm_fx.errors import ConfigError, LoweringError
from mpqdm_fx.graph.editing import copy_graph_module, replace_module, shallow_clone
from mpqdm_fx.graph.fixed_sizes import fixed_sizes
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.nested import named_leaves
from mpqdm_fx.graph.qdq import is_dequantize, qdq_parameters
from mpqdm_fx.records.activations import Activation

__all__ = ["Method", "argument_names", "make_methods", "positional"]

_Method = TypeVar("_Method", bound="Method")


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
        prepared: The same with what `prepare` put in; `quantized` itself if it put in nothing.
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
        self.inputs = positional(example_inputs)
        _refuse_unknown_sizes(graph)
        graph = fixed_sizes(graph, self.inputs)
        self._output_names = _output_names(graph)
        self.graph = graph = _tensors_alone(graph)
        self.floats: dict[str, str] = {}
        self.quantized: fx.GraphModule | None = None
        self.prepared: fx.GraphModule | None = None
        self.four_bit: tuple[str, ...] = ()
        self.eight_bit: dict[str, str] = {}
        if activations is None:
            self.lowered = _without_codes(DECOMPOSE(graph).graph_module)
            _refuse_unknown(self.lowered)
            self.expected = Reference.of_float(graph, self.lowered, self.inputs)
            return
        written = DECOMPOSE(graph).graph_module
        runnable, self.floats = runnable_activations(written, activations)
        prepared, taken, rest = self.prepare(written, activations)
        plain, runnable = fitted(written, runnable, four_bit=four_bit, exact=taken)
        _refuse_unknown(plain)
        self.quantized = self.prepared = quantized_graph(plain, runnable)
        self.expected = Reference.of_quantized(graph, self.quantized, self.inputs)
        if taken:
            rest = {name: a for name, a in rest.items() if name not in self.floats}
            if rest:
                plain, runnable, _ = decomposed(prepared, rest, four_bit=four_bit)
            else:
                plain, runnable = DECOMPOSE(prepared).graph_module, {}
            self.prepared = quantized_graph(plain, runnable)
        if four_bit != "never":
            self.four_bit, self.eight_bit = four_bit_layers(plain, runnable)
        if runnable:
            self.lowered = converted_graph(plain, runnable, self.inputs, self.four_bit)
        else:
            self.lowered = _without_codes(plain)

    def prepare(
        self, written: fx.GraphModule, activations: Mapping[str, Activation]
    ) -> tuple[fx.GraphModule, Collection[str], Mapping[str, Activation]]:
        """Put other operators in the place of layers before XNNPACK's passes see them.

        Args:
            written: The graph in ops that XNNPACK knows.
            activations: By layer name.

        Returns:
            The graph, a new one if layers were taken; the names of these layers, which it no
            longer calls; and the activations of those that it does call. Here no layer is taken.
        """
        return self.graph, (), activations

    @property
    def named_inputs(self) -> list[tuple[str, Tensor]]:
        """Inputs in the order in which the program takes them."""
        return flat_inputs(self.inputs, argument_names(self.graph))

    @property
    def named_outputs(self) -> dict[str, Tensor]:
        """Outputs in the order in which the program returns them; numbered if they have no name.

        Entries of containers have dotted names.
        """
        return dict(zip(self._output_names, self.expected.outputs, strict=True))

    @property
    def output_scale(self) -> float | None:
        """Step of the first output, if it comes from integers."""
        first = self.lowered.graph.output_node().all_input_nodes[0]
        return float(qdq_parameters(first)[0]) if is_dequantize(first) else None


def make_methods(
    graphs: Mapping[str, fx.GraphModule],
    example_inputs: Mapping[str, Mapping[str, Any]],
    ranges: Mapping[str, Activation],
    make: Callable[[fx.GraphModule, Mapping[str, Any], Mapping[str, Activation] | None], _Method],
) -> dict[str, _Method]:
    """Make graphs ready that pass values on to one another by name.

    Args:
        graphs: Module-level graphs by method, in running order.
        example_inputs: Inputs of each method by its name. What an earlier method returns under the
            name of an argument may be left out.
        ranges: Activation by layer name, in whichever methods the layer is.
        make: Makes one ready: graph, inputs, and activations of its layers (None without any).

    Raises:
        ConfigError: There are no methods, an argument has no example, or `ranges` names a layer
            that no method has.
    """
    _check_names(graphs, ranges)
    values: dict[str, Any] = {}
    methods: dict[str, _Method] = {}
    for name, graph in graphs.items():
        inputs = _inputs(name, graph, {**values, **example_inputs.get(name, {})})
        layers = weight_layers(graph)
        own = {layer: activation for layer, activation in ranges.items() if layer in layers}
        methods[name] = make(graph, inputs, own or None)
        values.update(methods[name].named_outputs)
    return methods


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


def _output_names(graph: fx.GraphModule) -> list[str]:
    """Names of the tensors that a graph returns, or their numbers."""
    returned = graph.graph.output_node().args[0]
    names = [name for name, leaf in named_leaves(returned) if not _is_constant(leaf)]
    return names if isinstance(returned, dict) else list(map(str, range(len(names))))


def _tensors_alone(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph without the constants that it returns: a program's outputs are tensors."""
    returned = graph.graph.output_node().args[0]
    kept = _without_constants(returned)
    if len(pytree.tree_leaves(kept)) == len(pytree.tree_leaves(returned)):
        return graph
    result = copy_graph_module(graph)
    node = result.graph.output_node()
    node.args = (_without_constants(node.args[0]),)
    result.recompile()
    return result


def _without_constants(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_constants(v) for key, v in value.items() if not _is_constant(v)}
    if isinstance(value, (list, tuple)):
        return [_without_constants(entry) for entry in value if not _is_constant(entry)]
    return value


def _is_constant(value: Any) -> bool:
    """Whether a graph returns no tensor here, nor a container."""
    if isinstance(value, fx.Node):
        return isinstance(value.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))
    return not isinstance(value, (Mapping, list, tuple))


def _refuse_unknown_sizes(graph: fx.GraphModule) -> None:
    """Refuse sizes that depend on values, which no program of fixed sizes has."""
    for node in graph.graph.nodes:
        if free_unbacked_symbols(pytree.tree_leaves(node.meta.get("val"))):
            raise LoweringError(
                f"{_module_of(node)}: the size of what {node.target} gives ({node.name}) depends "
                f"on the values of its input, and a program has fixed sizes; write it with a mask "
                f"instead of an index, or use the torch_ao backend"
            )


def _module_of(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack and stack[-1][0] else "the model"


def _refuse_unknown(graph: fx.GraphModule) -> None:
    """Refuse what neither XNNPACK nor a portable kernel runs, after all that is rewritten."""
    for name, layer in weight_layers(graph).items():
        if isinstance(layer.module, torch.nn.Conv3d):
            raise LoweringError(
                f"{name}: neither XNNPACK nor ExecuTorch's portable kernels have a Conv3d (but "
                f"over patches that do not overlap, which is a linear layer); use the torch_ao "
                f"backend, or a model without volumetric convolutions"
            )
    for node in uncovered_complex(graph):
        raise LoweringError(
            f"{_module_of(node)}: {node.target} of complex numbers ({node.name}) has no kernel "
            f"in ExecuTorch and no rewriting in real numbers here; write it with real tensors "
            f"(torch.view_as_real, cos and sin), or use the torch_ao backend"
        )


def _without_codes(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop the integers of rounded layers from a private copy: a float program would ship them."""
    for name, layer in weight_layers(graph, embeddings=True).items():
        if "weight_codes" in layer.module._buffers:
            clone = shallow_clone(layer.module)
            del clone._buffers["weight_codes"], clone._buffers["weight_scale"]
            replace_module(graph, name, clone)
    return graph


def _check_names(graphs: Mapping[str, fx.GraphModule], ranges: Mapping[str, Activation]) -> None:
    if not graphs:
        raise ConfigError("there are no methods to lower")
    layers = {name for graph in graphs.values() for name in weight_layers(graph)}
    for name in ranges:
        if name not in layers:
            raise ConfigError(f"ranges name {name!r}, which is a layer of no method")


def _inputs(name: str, graph: fx.GraphModule, values: Mapping[str, Any]) -> dict[str, Any]:
    missing = [argument for argument in argument_names(graph) if argument not in values]
    if missing:
        raise ConfigError(
            f"method {name!r} takes {', '.join(missing)}, for which there is neither an example "
            "nor an earlier method that returns it; give examples by method"
        )
    return {argument: values[argument] for argument in argument_names(graph)}
