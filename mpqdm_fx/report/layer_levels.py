"""How far every layer's output is from the float model's at each noise level."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.nested import take_rows
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.graph.signature import Signature, tensor_leaves
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.numerics.metrics import ratio_db
from mpqdm_fx.report.comparison import LevelSqnr
from mpqdm_fx.report.noise_levels import noise_argument_of, row_powers, told_levels

__all__ = ["running_sqnr", "sqnr_by_layer"]

_SAMPLES = 4  # of each noise level


@plain_torch()
@torch.no_grad()
def sqnr_by_layer(
    floats: fx.GraphModule,
    quantized: fx.GraphModule,
    layers: Sequence[str],
    calls: Sequence[Mapping[str, Any]],
    levels: Sequence[LevelSqnr],
    *,
    noise_argument: str | None = None,
) -> dict[str, tuple[float, ...]]:
    """Compare the outputs of layers in two graphs of one model, apart for each noise level.

    Both graphs run freely: a layer's error holds what reaches it from the layers before. Four
    samples of each noise level are taken, one at a time where the graph takes that.

    Args:
        floats: The float graph in the form that was quantized (`stages.in_form_of`).
        quantized: The quantized graph.
        layers: Names of the layers.
        calls: Keyword arguments of calls of the model.
        levels: The noise levels to tell apart, the largest first (`Comparison.levels`).
        noise_argument: As of `compare`.

    Returns:
        By layer, decibels at each of `levels`; layers that a graph does not call are left out.
    """
    argument = noise_argument or noise_argument_of(calls[0])
    if not levels or argument is None:
        return {}
    means = torch.tensor([point.level for point in levels], dtype=torch.float64)
    call_levels = (told_levels([call], argument) for call in calls)
    groups = [
        (row_levels[:, None] - means).abs().argmin(dim=1).tolist() for row_levels in call_levels
    ]
    return _ratios(floats, quantized, layers, zip(calls, groups, strict=True), len(levels))


@plain_torch()
@torch.no_grad()
def running_sqnr(
    floats: fx.GraphModule,
    quantized: fx.GraphModule,
    layers: Sequence[str],
    calls: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Compare the outputs of layers in two graphs of one model that is told no noise level.

    Args: as of `sqnr_by_layer`, of whose samples four are taken.

    Returns:
        By layer, decibels; layers that a graph does not call are left out.
    """
    grouped = ((call, [0] * batch_size_of(call)) for call in calls)
    ratios = _ratios(floats, quantized, layers, grouped, 1)
    return {name: ratio for name, (ratio,) in ratios.items()}


def _ratios(
    floats: fx.GraphModule,
    quantized: fx.GraphModule,
    layers: Sequence[str],
    grouped: Iterable[tuple[Mapping[str, Any], list[int]]],
    count: int,
) -> dict[str, tuple[float, ...]]:
    """Decibels of each layer in each of some groups of samples.

    Args:
        floats: As of `sqnr_by_layer`, like the next two.
        quantized: See above.
        layers: See above.
        grouped: Calls, and the group of each of their samples.
        count: Groups.
    """
    signature: Signature = floats.meta["signature"]
    names = set(layers)
    sums = {name: torch.zeros(count, 2, dtype=torch.float64) for name in layers}
    taken = [0] * count
    for call, numbers in grouped:
        inputs = signature.normalize((), call)
        for part, groups in _parts(signature, inputs, numbers):
            if all(taken[group] >= _SAMPLES for group in groups):
                continue
            for group in groups:
                taken[group] += 1
            arguments = [part[name] for name in signature.arguments]
            reference = _Outputs(floats, names).run_kept(arguments)
            outputs = _Outputs(quantized, names).run_kept(arguments)
            for name in reference.keys() & outputs.keys():
                for powers in _powers(reference[name], outputs[name], len(groups)):
                    sums[name].index_add_(0, torch.tensor(groups[: len(powers)]), powers)
    return {
        name: tuple(ratio_db(*row) for row in powers.tolist())
        for name, powers in sums.items()
        if bool(powers.any())
    }


def _parts(
    signature: Signature, inputs: Mapping[str, Any], groups: list[int]
) -> list[tuple[Mapping[str, Any], list[int]]]:
    """A call's samples one by one; the whole call where the graph takes no single ones."""
    specs = {spec.name: spec for spec in signature.inputs}
    alone = signature.batch_range is not None and signature.batch_range[0] == 1
    alone &= all(spec.batch_axis == 0 and spec.batch_multiple == 1 for spec in specs.values())
    batch = batch_size_of(inputs)
    alone &= all(tensor.shape[:1] == (batch,) for _, tensor in tensor_leaves(inputs))
    if not alone:
        return [(inputs, groups)]
    return [
        ({name: take_rows(value, slice(row, row + 1)) for name, value in inputs.items()}, [group])
        for row, group in enumerate(groups)
    ]


class _Outputs(fx.Interpreter):
    """Keeps what layers return, in the order of their calls."""

    def __init__(self, graph_module: fx.GraphModule, layers: set[str]) -> None:
        super().__init__(graph_module)
        self._layers = layers
        self._outputs: dict[str, list[Tensor]] = {}

    def run_kept(self, arguments: Sequence[Any]) -> dict[str, list[Tensor]]:
        """Run the graph; outputs of each layer, one for each call of it."""
        self.run(*arguments)
        return self._outputs

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module" and str(n.target) in self._layers and isinstance(result, Tensor):
            self._outputs.setdefault(str(n.target), []).append(result)
        return result


def _powers(reference: Sequence[Tensor], outputs: Sequence[Tensor], batch: int) -> list[Tensor]:
    pairs = zip(reference, outputs, strict=False)
    return [
        row_powers(expected, actual, batch)
        for expected, actual in pairs
        if expected.shape == actual.shape
    ]
