"""ExecuTorch with XNNPACK: rounded graphs become a `.pte` for phone CPUs, executed once.

The road: decompose what XNNPACK does not know -> stock PT2E conversion -> remedies for what its
partitioner and its channels-last pass do to such graphs -> `to_edge_transform_and_lower` -> file ->
one execution, compared with the fake-quantized graph. Lowering that succeeds proves nothing in this
backend; only running the file does.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.backends.pt2e import export_graph
from mpqdm_fx.backends.xnnpack.doctor import refuse_fragments
from mpqdm_fx.backends.xnnpack.edge import (
    delegation,
    move_weights_out,
    runnable,
    to_edge,
    to_program,
)
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, check_four_bit
from mpqdm_fx.backends.xnnpack.lowering_stages import Stages
from mpqdm_fx.backends.xnnpack.method import Method, argument_names
from mpqdm_fx.backends.xnnpack.output_files import written
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.backends.xnnpack.road import ProgramGraphs
from mpqdm_fx.backends.xnnpack.runner import (
    TensorSpec,
    XnnpackRunner,
    require_executorch,
    weights_path,
)
from mpqdm_fx.errors import ArtifactError, ConfigError, LoweringError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.records.activations import Activation

__all__ = ["lower_methods", "lower_xnnpack", "lower_xnnpack_float"]

logger = logging.getLogger(__name__)

_FORWARD = "forward"


def lower_xnnpack(
    rounded: fx.GraphModule,
    ranges: Mapping[str, Activation],
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | Path,
    *,
    max_delegates: int | None = None,
    keep_graphs: bool = False,
    external_weights: bool = False,
    four_bit: FourBit = "whole",
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
        max_delegates: Refuse a program of more subgraphs; None takes any number.
        keep_graphs: Return the graphs that the program was made of, too: several times the model.
        external_weights: Write the weights to a file of their own beside `path`, `<stem>.ptd`.
        four_bit: Which weights are stored at four bits: `"never"` any; `"whole"`: those of linear
            layers and 1x1 convolutions with dynamic activations whose codes are all within -8..7;
            `"split"`: also those of layers of which only some channels are, cut from the others by
            `SplitMixedRows`, for fewer bytes but more time.

    Returns:
        What was written and measured.

    Raises:
        ConfigError: No layer is rounded, or `ranges` names a layer that is not.
        LoweringError: ExecuTorch is missing or failed, an activation is by noise level or not 8
            bits wide, the graph has a Conv3d, no layer would run as int8, the program would have
            too many delegates (all that stays out is named), or it computes other numbers than the
            fake-quantized graph.
    """
    check_four_bit(four_bit)
    require_executorch()
    with Stages() as stage, torch.no_grad():
        stage("decompose")
        method = Method(rounded, example_inputs, ranges, four_bit=four_bit)
        edges: list[fx.GraphModule] | None = [] if keep_graphs else None
        result = _lower(
            {_FORWARD: method}, Path(path), stage, max_delegates, external_weights, edges
        )[_FORWARD]
    if not edges or method.quantized is None:
        return result
    graphs = ProgramGraphs(
        decomposed=method.quantized, converted=method.lowered, edge=edges[0], inputs=method.inputs
    )
    return replace(result, graphs=graphs)


def lower_xnnpack_float(
    graph: fx.GraphModule,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | Path,
    *,
    max_delegates: int | None = None,
    external_weights: bool = False,
) -> XnnpackProgram:
    """Lower a float graph to an fp32 `.pte`, write it and execute it once: the baseline.

    Args:
        graph: Module-level graph; it is not changed.
        example_inputs: Inputs of `graph`, by name or in order.
        path: File to write. It appears only if the program ran with the right numbers.
        max_delegates: Refuse a program of more subgraphs; None takes any number.
        external_weights: Write the weights to a file of their own beside `path`, `<stem>.ptd`.

    Raises:
        LoweringError: ExecuTorch is missing or failed, the program would have too many delegates,
            or it computes other numbers.
    """
    require_executorch()
    with Stages() as stage, torch.no_grad():
        stage("decompose")
        methods = {_FORWARD: Method(graph, example_inputs)}
        return _lower(methods, Path(path), stage, max_delegates, external_weights)[_FORWARD]


def lower_methods(
    graphs: Mapping[str, fx.GraphModule],
    example_inputs: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    ranges: Mapping[str, Activation] | None = None,
    max_delegates: int | None = None,
    external_weights: bool = False,
    four_bit: FourBit = "whole",
) -> dict[str, XnnpackProgram]:
    """Lower several graphs to one `.pte`, write it and execute every method once.

    The graphs come from `split.methods.split_methods`, or are one network traced for several sizes.
    Weights are stored by their content: what two methods share is in the file once. Layers with an
    activation in `ranges` run as int8, as in `lower_xnnpack`; a method without any runs in float.
    `XnnpackRunner(path, method)` runs one of them.

    Args:
        graphs: Module-level graphs by method, in running order; they are not changed.
        example_inputs: Inputs of each method by its name. What an earlier method returns under the
            name of an argument may be left out; it is then taken from there.
        path: File to write. It appears only if all methods ran with the right numbers.
        ranges: Activation by layer name; None for a float program. A layer's name stands for that
            layer in every method.
        max_delegates: Refuse a method of more subgraphs; None takes any number.
        external_weights: Write the weights to a file of their own beside `path`, `<stem>.ptd`.
        four_bit: Which weights are stored at four bits, as of `lower_xnnpack`.

    Returns:
        What was written and measured, by method. All have the one path; `bytes` is the whole
        file's size, and `seconds` the time of the whole lowering. Outputs have the names under
        which a method returns them.

    Raises:
        ConfigError: There are no methods, an argument has no example, `ranges` names a layer that
            no method has or that is not rounded.
        LoweringError: As of `lower_xnnpack`.
    """
    check_four_bit(four_bit)
    require_executorch()
    _check_names(graphs, ranges or {})
    values: dict[str, Any] = {}
    methods: dict[str, Method] = {}
    with Stages() as stage, torch.no_grad():
        for name, graph in graphs.items():
            stage("decompose")
            inputs = _inputs(name, graph, {**values, **example_inputs.get(name, {})})
            layers = weight_layers(graph)
            activations = {
                layer: activation for layer, activation in (ranges or {}).items() if layer in layers
            }
            methods[name] = Method(graph, inputs, activations or None, four_bit=four_bit)
            values.update(methods[name].named_outputs)
        return _lower(methods, Path(path), stage, max_delegates, external_weights)


def _lower(
    methods: Mapping[str, Method],
    path: Path,
    stage: Stages,
    max_delegates: int | None,
    external_weights: bool,
    edges: list[fx.GraphModule] | None = None,
) -> dict[str, XnnpackProgram]:
    """Lower, write beside `path`, execute, compare, and only then rename.

    `edges` receives the edge graphs.
    """
    stage("export")
    exported = {name: export_graph(m.lowered, m.inputs) for name, m in methods.items()}
    if max_delegates is not None:
        for name, program in exported.items():
            refuse_fragments(name, program, max_delegates)
    weights = weights_path(path) if external_weights else None
    if weights is not None:
        for program in exported.values():
            move_weights_out(program)
    stage("lower")
    watch = None if edges is None else lambda program: edges.append(runnable(program))
    edge = to_edge(exported, watch=watch)
    stage("serialise")
    measured = {}
    program = to_program(edge, external_weights=external_weights)
    with written(program, path, weights) as parts:
        stage("execute")
        for name, method in methods.items():
            outputs = _execute(parts, path.name, name, method)
            measured[name] = method.expected.check(path, outputs, method.output_scale)
        sizes = [part.stat().st_size for part in parts]
    result = {}
    for name, method in methods.items():
        sqnr, steps = measured[name]
        result[name] = XnnpackProgram(
            path=path,
            bytes=sizes[0],
            weights_path=weights,
            weights_bytes=sum(sizes[1:]),
            inputs=tuple(_spec(*entry) for entry in method.named_inputs),
            outputs=tuple(_spec(*entry) for entry in method.named_outputs.items()),
            output_scale=method.output_scale,
            sqnr_db=sqnr,
            max_lsb=steps,
            reference_sqnr_db=method.expected.quality_db,
            float_layers=method.floats,
            seconds=stage.seconds,
            four_bit_layers=method.four_bit,
            eight_bit_layers=method.eight_bit,
            **delegation(edge, name),
        )
        logger.info(
            "%s, method %s: %d bytes, %d delegates, %d nodes delegated and %d not, %.1f dB against "
            "the graph", path, name, sum(sizes), result[name].subgraphs, result[name].delegated,
            result[name].undelegated, sqnr,
        )  # fmt: skip
    return result


def _execute(parts: Sequence[Path], file: str, name: str, method: Method) -> list[Tensor]:
    try:
        weights = parts[1] if len(parts) > 1 else None
        return list(XnnpackRunner(parts[0], name, weights=weights)(*method.inputs))
    except (ArtifactError, LoweringError) as error:
        place = file if name == _FORWARD else f"{file}, method {name!r}"
        raise LoweringError(
            f"{place}: ExecuTorch lowered the graph, but its own runtime refuses the program "
            f"({error.__cause__ or error}); nothing was written. This is a bug of the backend or "
            f"of its remedies: please report the model"
        ) from error


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


def _spec(name: str, value: Tensor) -> TensorSpec:
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return TensorSpec(name=name, shape=shape, dtype=dtype)
