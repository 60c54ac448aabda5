"""Backward passes that hold few values: a graph goes backwards part by part.

A sample of a large picture has gigabytes of activations: 7 in the decoder of Stable Diffusion at
512x512. Only the values that cross from part to part are held; those inside a part are computed
again when its gradients are due (Chen et al., arXiv 1604.06174).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.bits.probe import NO_LAYER, Probe
from mpqdm_fx.bits.probed_parts import PROBED_BYTES
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.parts import GraphPart
from mpqdm_fx.run.cost import Sizes, bind_sizes, value_bytes

__all__ = ["PartedProbe", "backward_bytes", "backward_parts"]

# A byte of a part: values, gradients, and the errors that are tried; 5.0 GiB were measured of
# a decoder of 512x512 pixels, for 5.3 here, where one pass over the whole had 12.8.
_WORK = 4


class PartedProbe(Probe):
    """A probe that parts the graph where a call's values take more than `PROBED_BYTES`.

    The gradients are the same but for the order in which those of a value that several parts read
    are added up. Where the graph has a gate for `detach`, it goes backwards whole.
    """

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self._behind: set[fx.Node] = set()  # nodes that are computed from what layers write
        for node in self.graph.nodes:
            if node in self.layer_of or not self._behind.isdisjoint(node.all_input_nodes):
                self._behind.add(node)

    def measure(self, inputs: Mapping[str, Any], probes: int, importance: Tensor) -> None:
        """Add one part of a call: tensors by placeholder name, importance [B]."""
        sizes = bind_sizes(self.graph_module, inputs)
        parts = [] if self.gate else backward_parts(self.graph_module, sizes, PROBED_BYTES)
        if len(parts) < 2:
            super().measure(inputs, probes, importance)
            return
        self.begin(inputs)
        values = self._forward(parts, inputs)
        outputs = self._outputs(values)
        leaves = [values[node] for node in outputs]
        for _ in range(probes):
            pending: dict[fx.Node, Tensor] = {}
            for node, sign in zip(outputs, self.signs(leaves, importance), strict=True):
                _add(pending, node, sign)
            for part in reversed(parts):
                with torch.enable_grad():
                    gradients = self._part_gradients(part, values, pending)
                self.show(gradients, inputs, importance, probes)
            if self.watch is not None:
                self.watch.finish(len(importance))
        self.env = {}
        self.end(leaves, inputs, importance)

    def _forward(self, parts: list[GraphPart], inputs: Mapping[str, Any]) -> dict[fx.Node, Any]:
        """Inputs, and what crosses from part to part."""
        places = self.graph.find_nodes(op="placeholder")
        values: dict[fx.Node, Any] = {node: inputs[str(node.target)] for node in places}
        for part in parts:
            with torch.no_grad():
                self._run_part(part, {node: values[node] for node in part.reads})
            values |= {node: self.env[node] for node in part.gives}
        return values

    def _run_part(self, part: GraphPart, values: dict[fx.Node, Any]) -> None:
        self.watched, self.read, self.env = [], {}, values
        for node in part.nodes:
            self.env[node] = self.run_node(node)

    def _outputs(self, values: Mapping[fx.Node, Any]) -> list[fx.Node]:
        """Nodes of what the graph returns, as far as it depends on layers."""
        returned = pytree.tree_leaves(self.graph.output_node().args[0])
        outputs = [node for node in returned if node in self._behind and _is_float(values[node])]
        if not outputs:
            raise CalibrationError(NO_LAYER)
        return outputs

    def _part_gradients(
        self, part: GraphPart, values: Mapping[fx.Node, Any], pending: dict[fx.Node, Tensor]
    ) -> list[Tensor | None]:
        """Gradients of what is seen in a part; those of what it reads go to `pending`."""
        reads = {
            node: values[node].detach().requires_grad_()
            for node in part.reads
            if node in self._behind and _is_float(values[node])
        }
        self._run_part(part, {node: values[node] for node in part.reads} | reads)
        gradients = {node: pending.pop(node) for node in part.gives if node in pending}
        roots = [node for node in gradients if self.env[node].requires_grad]
        seen = self.seen()
        if not roots:
            return [None] * len(seen)
        found = torch.autograd.grad(
            [self.env[node] for node in roots],
            [*seen, *reads.values()],
            [gradients[node] for node in roots],
            allow_unused=True,
        )
        for node, gradient in zip(reads, found[len(seen) :], strict=True):
            if gradient is not None:
                _add(pending, node, gradient)
        return [*found[: len(seen)]]


def backward_parts(graph_module: fx.GraphModule, sizes: Sizes, limit: int) -> list[GraphPart]:
    """Cut a graph where few tensors cross, after at most so many bytes of values.

    Args:
        graph_module: With `meta["val"]`.
        sizes: Of a call, as of `bind_sizes`.
        limit: Bytes of a part, unless one node has more; only tensors and numbers cross a cut.

    Returns:
        Parts of all nodes but inputs and output.
    """
    nodes = [n for n in graph_module.graph.nodes if n.op not in ("placeholder", "output")]
    place = {node: index for index, node in enumerate(nodes)}
    last = {
        node: max((place.get(user, len(nodes)) for user in node.users), default=-1)
        for node in nodes
    }
    parts, start, held = [], 0, 0
    for index, node in enumerate(nodes):
        size = value_bytes(node, sizes)
        if held + size > limit and index > start and _is_cut(nodes, last, index):
            parts.append(GraphPart.of(nodes[start:index]))
            start, held = index, 0
        held += size
    return [*parts, GraphPart.of(nodes[start:])]


def _is_cut(nodes: list[fx.Node], last: Mapping[fx.Node, int], index: int) -> bool:
    """Whether nothing but tensors and numbers is read behind a place that was written before it."""
    crossing = (node.meta.get("val") for node in nodes[:index] if last[node] >= index)
    return not any(isinstance(value, tuple | list | dict) for value in crossing)


def backward_bytes(graph_module: fx.GraphModule, call: Mapping[str, Any]) -> int:
    """Bytes that backward passes hold at most while inputs are measured.

    Args:
        graph_module: Normalized float graph.
        call: A calibration call; of its values only the shapes matter.
    """
    signature = graph_module.meta["signature"]
    fewest = signature.batch if signature.batch_range is None else signature.batch_range[0]
    sample = example_inputs(signature, batch_size=fewest)
    whole = _bytes_at_once(graph_module, bind_sizes(graph_module, call))
    one = _bytes_at_once(graph_module, bind_sizes(graph_module, sample))
    return min(whole, max(one, _WORK * PROBED_BYTES))


def _bytes_at_once(graph_module: fx.GraphModule, sizes: Sizes) -> int:
    """What crosses, and a part with what is made of it."""
    parts = backward_parts(graph_module, sizes, PROBED_BYTES)
    crossing = {node for part in parts[:-1] for node in part.gives}
    inside = max(sum(value_bytes(node, sizes) for node in part.nodes) for part in parts)
    return sum(value_bytes(node, sizes) for node in crossing) + _WORK * inside


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _add(pending: dict[fx.Node, Tensor], node: fx.Node, gradient: Tensor) -> None:
    pending[node] = pending[node] + gradient if node in pending else gradient
