"""ExecuTorch with XNNPACK: a rounded graph becomes a `.pte` for phone CPUs, executed once.

The road: decompose what XNNPACK does not know -> stock PT2E conversion -> remedies for what its
partitioner and its channels-last pass do to such graphs -> `to_edge_transform_and_lower` -> file ->
one execution, compared with the fake-quantized graph. Lowering that succeeds proves nothing in this
backend; only running the file does.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.activations import Activation
from mpqdm_fx.backends.pt2e import export_graph
from mpqdm_fx.backends.xnnpack.convert import (
    DECOMPOSE,
    converted_graph,
    decomposed,
    quantized_graph,
)
from mpqdm_fx.backends.xnnpack.edge import delegation, to_edge, to_program
from mpqdm_fx.backends.xnnpack.files import written
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.backends.xnnpack.reference import Reference
from mpqdm_fx.backends.xnnpack.runner import (
    TensorSpec,
    XnnpackRunner,
    flat_inputs,
    require_executorch,
    sorted_entries,
)
from mpqdm_fx.backends.xnnpack.stages import Stages
from mpqdm_fx.errors import ArtifactError, LoweringError
from mpqdm_fx.graph.editing import replace_module, shallow_clone
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.qdq import is_dequantize, qdq_parameters

__all__ = [
    "argument_names",
    "execute",
    "lower_xnnpack",
    "lower_xnnpack_float",
    "output_scale",
    "positional",
    "refuse_conv3d",
    "tensor_spec",
    "without_codes",
]

logger = logging.getLogger(__name__)


def lower_xnnpack(
    rounded: fx.GraphModule,
    ranges: Mapping[str, Activation],
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | Path,
) -> XnnpackProgram:
    """Lower a rounded graph to an int8 `.pte`, write it and execute it once.

    Convolutions and linear layers with an activation run as int8 with int8 weights per channel: on
    a fixed range (static), or on one that is chosen at run time per row of a linear layer and per
    sample of a convolution (dynamic). Both kinds may stand side by side. All else runs in float.
    Shapes are those of the example inputs.

    Args:
        rounded: Module-level graph after `RoundWeights`; it is not changed.
        ranges: Activation by layer name, static or dynamic, 8 bits. Layers without an entry stay
            in float with their rounded weights; so do, with a warning, dynamic layers that XNNPACK
            has no dynamic kernel for (Conv1d, depthwise convolutions).
        example_inputs: Inputs of `rounded`, by name or in order; also what the program is tried on.
        path: File to write. It appears only if the program ran with the right numbers.

    Returns:
        What was written and measured.

    Raises:
        ConfigError: No layer is rounded, or `ranges` names a layer that is not.
        LoweringError: ExecuTorch is missing or failed, an activation is by noise level or not 8
            bits wide, the graph has a Conv3d, no layer would run as int8, or the program computes
            other numbers than the fake-quantized graph.
    """
    require_executorch()
    refuse_conv3d(rounded)
    inputs = positional(example_inputs)
    with Stages() as stage, torch.no_grad():
        stage("decompose")
        plain, runnable, floats = decomposed(rounded, ranges)
        quantized = quantized_graph(plain, runnable)
        expected = Reference.of_quantized(rounded, quantized, inputs)
        stage("convert")
        converted = converted_graph(plain, runnable, inputs)
        names = argument_names(rounded)
        return _write(converted, inputs, names, Path(path), expected, stage, floats)


def lower_xnnpack_float(
    graph: fx.GraphModule,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | Path,
) -> XnnpackProgram:
    """Lower a float graph to an fp32 `.pte`, write it and execute it once: the baseline.

    Args:
        graph: Module-level graph; it is not changed.
        example_inputs: Inputs of `graph`, by name or in order.
        path: File to write. It appears only if the program ran with the right numbers.

    Raises:
        LoweringError: ExecuTorch is missing or failed, or the program computes other numbers.
    """
    require_executorch()
    refuse_conv3d(graph)
    inputs = positional(example_inputs)
    with Stages() as stage, torch.no_grad():
        stage("decompose")
        plain = without_codes(DECOMPOSE(graph).graph_module)
        expected, names = Reference.of_float(graph, inputs), argument_names(graph)
        return _write(plain, inputs, names, Path(path), expected, stage, {})


def _write(
    graph: fx.GraphModule,
    inputs: tuple[Any, ...],
    names: Sequence[str],
    path: Path,
    expected: Reference,
    stage: Stages,
    floats: Mapping[str, str],
) -> XnnpackProgram:
    """Lower, write beside `path`, execute, compare, and only then rename."""
    stage("export")
    exported = export_graph(graph, inputs)
    stage("lower")
    edge = to_edge(exported)
    stage("serialise")
    program = to_program(edge)
    with written(program, path) as part:
        stage("execute")
        found = execute(part, path.name, inputs)
        scale = output_scale(graph)
        sqnr, lsb = expected.check(path, found, scale)
        size = part.stat().st_size
    info = delegation(edge)
    result = XnnpackProgram(
        path=path,
        bytes=size,
        inputs=tuple(tensor_spec(name, value) for name, value in flat_inputs(inputs, names)),
        outputs=tuple(tensor_spec(str(i), value) for i, value in enumerate(expected.outputs)),
        output_scale=scale,
        sqnr_db=sqnr,
        max_lsb=lsb,
        reference_sqnr_db=expected.quality_db,
        float_layers=floats,
        seconds=stage.seconds,
        **info,
    )
    logger.info(
        "%s: %d bytes, %d delegates, %d nodes delegated and %d not, %.1f dB against the graph",
        path, size, result.subgraphs, result.delegated, result.undelegated, sqnr,
    )  # fmt: skip
    return result


def execute(
    path: Path, name: str, inputs: tuple[Any, ...], method: str = "forward"
) -> list[Tensor]:
    """Try a program that was lowered just now.

    Args:
        path: The file, under its temporary name.
        name: The name that it is to have.
        inputs: Inputs of the method, in order.
        method: Which method to run.

    Raises:
        LoweringError: The runtime refuses the program.
    """
    try:
        return list(XnnpackRunner(path, method)(*inputs))
    except (ArtifactError, LoweringError) as error:
        raise LoweringError(
            f"{name}: ExecuTorch lowered the graph, but its own runtime refuses the program "
            f"({error.__cause__ or error}); nothing was written. This is a bug of the backend or "
            f"of its remedies: please report the model"
        ) from error


def refuse_conv3d(graph: fx.GraphModule) -> None:
    """Refuse a graph that has a Conv3d; raises LoweringError naming the layer."""
    for name, layer in weight_layers(graph).items():
        if isinstance(layer.module, torch.nn.Conv3d):
            raise LoweringError(
                f"{name}: neither XNNPACK nor ExecuTorch's portable kernels have a Conv3d; use the "
                f"torch_ao backend, or a model without volumetric convolutions"
            )


def without_codes(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop the integers of rounded layers from a private copy: a float program would ship them."""
    for name, layer in weight_layers(graph, embeddings=True).items():
        if "weight_codes" in layer.module._buffers:
            clone = shallow_clone(layer.module)
            del clone._buffers["weight_codes"], clone._buffers["weight_scale"]
            replace_module(graph, name, clone)
    return graph


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


def tensor_spec(name: str, value: Tensor) -> TensorSpec:
    """Describe a tensor."""
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return TensorSpec(name=name, shape=shape, dtype=dtype)


def output_scale(graph: fx.GraphModule) -> float | None:
    """Step of the first output, if it comes from integers."""
    (output,) = graph.graph.find_nodes(op="output")
    first = output.all_input_nodes[0]
    return float(qdq_parameters(first)[0]) if is_dequantize(first) else None
