"""One run of the float graph over the recorded inputs: what every weight layer reads and writes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import WeightLayer, sample_rows, weight_layers

__all__ = ["LayerStatistics", "TensorStatistics", "collect_statistics"]

# Bounds of what is kept per layer: 2^17 values settle a histogram's tails, 2^20 numbers of input
# rows (4 MB) leave 116 rows for SD 1.5's widest layer and thousands for a small one.
MAX_VALUES = 2**17
MAX_ROW_NUMBERS = 2**20
MAX_ROWS = 2048


@dataclass
class TensorStatistics:
    """Range and a random sample of one activation tensor over all calls.

    Attributes:
        minimum: Smallest value seen.
        maximum: Largest value seen.
        samples: Random values [n], n <= about 2**17.
    """

    minimum: float = float("inf")
    maximum: float = float("-inf")
    _parts: list[Tensor] = field(default_factory=list)

    @property
    def samples(self) -> Tensor:
        """Random values [n] of all calls, float32."""
        return torch.cat(self._parts)

    def update(self, value: Tensor, count: int, generator: torch.Generator) -> None:
        """Take `count` random values and the range of `value`."""
        flat = value.detach().reshape(-1).float()
        low, high = torch.aminmax(flat)
        self.minimum = min(self.minimum, float(low))
        self.maximum = max(self.maximum, float(high))
        if flat.numel() > count:
            flat = flat[torch.randint(flat.numel(), (count,), generator=generator)]
        self._parts.append(flat.clone())

    @property
    def finite(self) -> bool:
        """Whether every value seen was finite."""
        return bool(torch.isfinite(torch.tensor([self.minimum, self.maximum])).all())


@dataclass
class LayerStatistics:
    """What calibration saw of one weight layer.

    Attributes:
        input: Statistics of the tensor that the layer reads.
        output: Statistics of the tensor that it writes.
        calls: Times the layer ran.
    """

    input: TensorStatistics = field(default_factory=TensorStatistics)
    output: TensorStatistics = field(default_factory=TensorStatistics)
    calls: int = 0
    _rows: list[Tensor] = field(default_factory=list)

    def add_rows(self, rows: Tensor) -> None:
        """Keep sampled rows [P, G, K]."""
        self._rows.append(rows.detach())

    @property
    def rows(self) -> Tensor:
        """Random input rows [P, G, K]: K numbers meet one output channel of each of G groups."""
        return torch.cat(self._rows)

    @property
    def second_moment(self) -> Tensor:
        """Mean square of each row entry [G, K]: the diagonal of the layer's Hessian."""
        return self.rows.square().mean(dim=0)


class _Recorder(fx.Interpreter):
    """Runs the graph and shows every weight layer's input and output to its statistics."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        layers: Mapping[str, WeightLayer],
        calls: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(graph_module)
        self.layers = {node: layer for layer in layers.values() for node in layer.nodes}
        self.tensors = _shared_tensors(layers.values())
        self.statistics = {
            layer.name: LayerStatistics(
                input=self.tensors[_input_of(layer.nodes[0])],
                output=self.tensors[layer.nodes[0]],
            )
            for layer in layers.values()
        }
        # How many values and rows one call may add.
        self.values_per_call = -(-MAX_VALUES // calls)
        self.calls = calls
        self.generator = generator

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.tensors:
            self._observe_tensor(n, result)
        if n in self.layers:
            self._observe_rows(self.layers[n], self.env[_input_of(n)])
        return result

    def _observe_tensor(self, node: fx.Node, value: Tensor) -> None:
        seen = self.tensors[node]
        seen.update(value, self.values_per_call, self.generator)
        if not seen.finite:
            raise CalibrationError(
                f"{node.target if node.op == 'call_module' else node.name}: NaN or infinity in a "
                f"tensor of shape {tuple(value.shape)} that "
                f"{'a quantized layer writes' if node in self.layers else 'quantized layers read'}"
                f"; check the calibration data and the weights of the layers before it"
            )

    def _observe_rows(self, layer: WeightLayer, value: Tensor) -> None:
        seen = self.statistics[layer.name]
        seen.calls += 1
        width = layer.weight[0].numel()
        wanted = min(MAX_ROWS, max(64, MAX_ROW_NUMBERS // width))
        share = self.calls * len(layer.nodes)
        rows = sample_rows(
            layer.module, value, count=-(-wanted // share), generator=self.generator
        ).float()
        seen.add_rows(rows if rows.dim() == 3 else rows.unsqueeze(1))


def _input_of(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(source, fx.Node)
    return source


def _shared_tensors(layers: Iterable[WeightLayer]) -> dict[fx.Node, TensorStatistics]:
    """Statistics of every node that a weight layer reads or writes.

    Layers that read one value share its statistics, so to_q, to_k and to_v get one range; so do
    all inputs, and all outputs, of a layer that is called several times.
    """
    shared: dict[fx.Node, TensorStatistics] = {}
    for layer in layers:
        for nodes in ([_input_of(node) for node in layer.nodes], list(layer.nodes)):
            known = [shared[node] for node in nodes if node in shared]
            one = known[0] if known else TensorStatistics()
            merged = {id(other) for other in known}
            for node, other in list(shared.items()):
                if id(other) in merged:
                    shared[node] = one
            shared.update(dict.fromkeys(nodes, one))
    return shared


def collect_statistics(
    graph_module: fx.GraphModule,
    calls: Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
) -> dict[str, LayerStatistics]:
    """Run a module-level graph in float over recorded calls.

    Args:
        graph_module: Traced (and normalized) graph.
        calls: Keyword arguments of each call; a sized iterable.
        seed: Seed of the random choice of values and rows.

    Returns:
        Statistics by layer name, in graph order. Memory stays below about 6 MB a layer, however
        many calls there are.

    Raises:
        CalibrationError: There are no calls, or a layer reads or writes NaN or infinity.
    """
    recorded = calls if hasattr(calls, "__len__") else list(calls)
    count = len(recorded)  # type: ignore[arg-type]
    if count == 0:
        raise CalibrationError(
            "no calibration data: call the prepared model on at least one input before convert"
        )
    layers = weight_layers(graph_module)
    if not layers:
        return {}
    generator = torch.Generator().manual_seed(seed)
    recorder = _Recorder(graph_module, layers, count, generator)
    names = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        for inputs in tqdm(recorded, desc="statistics", unit="call", disable=None):
            recorder.run(*[inputs[str(name)] for name in names])
    return recorder.statistics
