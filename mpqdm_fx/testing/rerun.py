"""What a sweep computes, by its definition: run the model anew for every layer.

The work grows with the square of the depth. It is here to check the sweep and to time it against.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.bits.allocate import fixed_plan
from mpqdm_fx.bits.row_weights import RowWeights
from mpqdm_fx.graph.editing import copy_graph_module, replace_module
from mpqdm_fx.graph.layers import WeightLayer, output_positions, sample_rows, weight_layers
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.numerics.solve.layer_rows import LayerRows
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sweep.collect import readers_of_inputs, rows_of_all_calls, seeded
from mpqdm_fx.sweep.draws import RowDraw
from mpqdm_fx.sweep.problem import LayerData
from mpqdm_fx.sweep.solve import solve_layer
from mpqdm_fx.sweep.sweep import install_solution

__all__ = ["rerun_for_every_layer"]


class _Inputs(fx.Interpreter):
    """Runs a graph and keeps what one node reads."""

    def __init__(self, graph_module: fx.GraphModule, name: str) -> None:
        super().__init__(graph_module)
        self.name = name
        self.value: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        if n.name == self.name:
            source = n.args[0]
            assert isinstance(source, fx.Node)
            self.value = self.env[source]
        return super().run_node(n)


def _read(graph_module: fx.GraphModule, layer: WeightLayer, call: Mapping[str, Any]) -> Tensor:
    interpreter = _Inputs(graph_module, layer.nodes[0].name)
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        interpreter.run(*[call[name] for name in names])
    assert interpreter.value is not None
    return interpreter.value


def rerun_for_every_layer(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    settings: MPQConfig,
    held_out: Collection[int],
    row_weights: RowWeights,
) -> fx.GraphModule:
    """Solve one layer after the other; the float and the rounded model run from the start for each.

    Args:
        graph_module: Normalized float graph; it is not changed. Embedding tables stay in float.
        calls: Calibration calls.
        settings: Uniform bits and float activations.
        held_out: Indices of the calls that judge corrections.
        row_weights: How much the rows of each noise level count.

    Returns:
        The rounded graph.
    """
    rounded = copy_graph_module(graph_module)
    batches = [batch_size_of(call) for call in calls]
    readers = readers_of_inputs(graph_module)
    for name, layer in weight_layers(graph_module).items():
        parts: list[LayerRows] = []
        source = layer.nodes[0].args[0]
        samples = [row_weights.groups.of_samples(call) for call in calls]
        counted = [row_weights.of_input(readers[name], groups) for groups in samples]
        draw: RowDraw | None = None
        for index, call in enumerate(calls):
            exact, noisy = (_read(graph, layer, call) for graph in (graph_module, rounded))
            total = output_positions(layer.module, noisy)
            if draw is None:
                quota = rows_of_all_calls(layer.module, noisy, batches, index, settings.max_rows)
                draw = RowDraw.of(counted, max(1, total // batches[index]), quota)
            positions = draw.positions(index, total, seeded(settings.seed, str(source), index))
            x, x_hat = (
                sample_rows(layer.module, value, positions=positions).float()
                for value in (exact, noisy)
            )
            weights = row_weights.of_rows(name, samples[index], positions, total)
            weights = weights * draw.stands_for(index, positions, total)
            parts.append(LayerRows(inputs=x_hat, shift=x - x_hat, weights=weights))
        data = LayerData(
            train=LayerRows.join([part for i, part in enumerate(parts) if i not in held_out]),
            validation=LayerRows.join([parts[index] for index in sorted(held_out)]),
        )
        plan = fixed_plan(layer, settings.weight_bits, "all alike")
        solution = solve_layer(layer.module, plan, data, settings)
        replace_module(rounded, name, install_solution(layer.module, solution))
    return rounded
