"""Several methods in one `.pte`: `encode_prompt` once per image, `denoise` once per step.

The graphs come from `graph.methods.split_methods`, or are one network traced for several sizes.
Weights are stored by their content, so what two methods share is in the file once.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

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
from mpqdm_fx.backends.xnnpack.lower import (
    argument_names,
    execute,
    output_scale,
    positional,
    refuse_conv3d,
    tensor_spec,
    without_codes,
)
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.backends.xnnpack.reference import Reference
from mpqdm_fx.backends.xnnpack.runner import flat_inputs, require_executorch
from mpqdm_fx.backends.xnnpack.stages import Stages
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.layers import weight_layers

__all__ = ["lower_methods"]

logger = logging.getLogger(__name__)


def lower_methods(
    methods: Mapping[str, fx.GraphModule],
    example_inputs: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    ranges: Mapping[str, Activation] | None = None,
) -> dict[str, XnnpackProgram]:
    """Lower several graphs to one `.pte`, write it and execute every method once.

    Layers with an activation in `ranges` run as int8, as in `lower_xnnpack`; a method without any
    runs in float. `XnnpackRunner(path, method)` runs one of them.

    Args:
        methods: Module-level graphs by method, in running order; they are not changed.
        example_inputs: Inputs of each method by its name. What an earlier method returns under the
            name of an argument may be left out; it is then taken from there.
        path: File to write. It appears only if all methods ran with the right numbers.
        ranges: Activation by layer name; None for a float program. A layer's name stands for that
            layer in every method.

    Returns:
        What was written and measured, by method. All have the one path; `bytes` is the whole
        file's size, and `seconds` the time of the whole lowering. Outputs have the names under
        which a method returns them.

    Raises:
        ConfigError: There are no methods, an argument has no example, `ranges` names a layer that
            no method has or that is not rounded.
        LoweringError: As of `lower_xnnpack`.
    """
    require_executorch()
    _check(methods, ranges)
    path = Path(path)
    values: dict[str, Any] = {}
    prepared: dict[str, _Method] = {}
    with Stages() as stage, torch.no_grad():
        for name, graph in methods.items():
            stage("decompose")
            given = {**values, **example_inputs.get(name, {})}
            missing = [argument for argument in argument_names(graph) if argument not in given]
            if missing:
                raise ConfigError(
                    f"method {name!r} takes {', '.join(missing)}, for which there is neither an "
                    "example nor an earlier method that returns it; give examples by method"
                )
            inputs = positional({argument: given[argument] for argument in argument_names(graph)})
            prepared[name] = method = _Method(graph, inputs, ranges)
            values.update(method.named_outputs())
        stage("export")
        exported = {name: export_graph(m.lowered, m.inputs) for name, m in prepared.items()}
        stage("lower")
        edge = to_edge(exported)
        stage("serialise")
        with written(to_program(edge), path) as part:
            stage("execute")
            measured = {}
            for name, method in prepared.items():
                found = execute(part, f"{path.name}, method {name!r}", method.inputs, name)
                scale = output_scale(method.lowered)
                measured[name] = (scale, *method.expected.check(path, found, scale))
            size = part.stat().st_size
        result = {
            name: XnnpackProgram(
                path=path,
                bytes=size,
                inputs=tuple(tensor_spec(*entry) for entry in method.named_inputs()),
                outputs=tuple(tensor_spec(*entry) for entry in method.named_outputs().items()),
                output_scale=measured[name][0],
                sqnr_db=measured[name][1],
                max_lsb=measured[name][2],
                reference_sqnr_db=method.expected.quality_db,
                float_layers=method.floats,
                seconds=stage.seconds,
                **delegation(edge, name),
            )
            for name, method in prepared.items()
        }
    told = ", ".join(f"{name} in {program.subgraphs} delegates" for name, program in result.items())
    logger.info("%s: %d bytes, %s", path, size, told)
    return result


class _Method:
    """A graph ready to be exported, and what its program has to compute."""

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: tuple[Any, ...],
        ranges: Mapping[str, Activation] | None,
    ) -> None:
        self.graph, self.inputs = graph, inputs
        own = {name: ranges[name] for name in _layer_names(graph) if ranges and name in ranges}
        self.floats: dict[str, str] = {}
        if not own:
            self.lowered = without_codes(DECOMPOSE(graph).graph_module)
            self.expected = Reference.of_float(graph, inputs)
            return
        plain, runnable, self.floats = decomposed(graph, own)
        quantized = quantized_graph(plain, runnable)
        self.expected = Reference.of_quantized(graph, quantized, inputs)
        self.lowered = converted_graph(plain, runnable, inputs)

    def named_inputs(self) -> list[tuple[str, Tensor]]:
        """Inputs in the order in which the program takes them."""
        return flat_inputs(self.inputs, argument_names(self.graph))

    def named_outputs(self) -> dict[str, Tensor]:
        """Outputs in the order in which the program returns them; numbered if they have no name."""
        returned = self.graph.graph.output_node().args[0]
        names = returned if isinstance(returned, dict) else range(len(self.expected.outputs))
        return dict(zip(map(str, names), self.expected.outputs, strict=True))


def _layer_names(graph: fx.GraphModule) -> list[str]:
    return list(weight_layers(graph))


def _check(methods: Mapping[str, fx.GraphModule], ranges: Mapping[str, Activation] | None) -> None:
    if not methods:
        raise ConfigError("there are no methods to lower")
    for graph in methods.values():
        refuse_conv3d(graph)
    known = {name for graph in methods.values() for name in _layer_names(graph)}
    for name in ranges or {}:
        if name not in known:
            raise ConfigError(f"ranges name {name!r}, which is a layer of no method")
