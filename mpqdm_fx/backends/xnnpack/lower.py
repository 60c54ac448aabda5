"""ExecuTorch with XNNPACK: rounded graphs become a `.pte` for phone CPUs, executed once.

The road: decompose what XNNPACK does not know -> stock PT2E conversion -> remedies for what its
partitioner and its channels-last pass do to such graphs -> `to_edge_transform_and_lower` -> file ->
one execution, compared with the fake-quantized graph. Lowering that succeeds proves nothing in this
backend; only running the file does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from mpqdm_fx.backends.xnnpack.four_bit import FourBit, check_four_bit
from mpqdm_fx.backends.xnnpack.lowering_stages import Stages
from mpqdm_fx.backends.xnnpack.method import Method, make_methods
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.backends.xnnpack.road import ProgramGraphs
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.backends.xnnpack.write_program import FORWARD, write_program
from mpqdm_fx.records.activations import Activation

__all__ = ["lower_methods", "lower_xnnpack", "lower_xnnpack_float"]


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
            has no dynamic kernel for (depthwise convolutions).
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
        result = write_program(
            {FORWARD: method},
            Path(path),
            stage,
            max_delegates=max_delegates,
            external_weights=external_weights,
            edges=edges,
        )[FORWARD]
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
        methods = {FORWARD: Method(graph, example_inputs)}
        return write_program(
            methods,
            Path(path),
            stage,
            max_delegates=max_delegates,
            external_weights=external_weights,
        )[FORWARD]


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
    with Stages() as stage, torch.no_grad():
        stage("decompose")
        methods = make_methods(
            graphs, example_inputs, ranges or {}, partial(Method, four_bit=four_bit)
        )
        return write_program(
            methods,
            Path(path),
            stage,
            max_delegates=max_delegates,
            external_weights=external_weights,
        )
