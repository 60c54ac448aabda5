"""Split the fused projection of a gated linear unit into two linear layers.

GEGLU (arXiv 2002.05202, equation 6) computes `a * gelu(b)` with `[a, b] = x @ W.T + bias`, and
diffusers stores W as one Linear. Value and gate have different ranges, which one quantized output
would force together; and a chunk is a node that XNNPACK does not take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.layers import (
    WeightLayer,
    add_module,
    called_module,
    free_name,
    rebuild_layer,
    weight_layers,
)
from mpqdm_fx.graph.parameters import note_parts
from mpqdm_fx.passes.base import GraphPass

__all__ = ["SplitGeglu"]

_aten = torch.ops.aten
_GATES = frozenset({_aten.gelu.default, _aten.silu.default})
_GATE_MODULES = (nn.GELU, nn.SiLU)


@dataclass(frozen=True, kw_only=True)
class SplitGeglu(GraphPass):
    """Turn Linear -> two halves -> `a * gelu(b)` into two Linears.

    1. The Linear's only user cuts the last axis into two equal halves (chunk or split), which are
       then taken by index.
    2. One half goes through GELU or SiLU (SwiGLU) and is multiplied with the other: it is the
       gate, the other one the value. GEGLU has the gate second; the order is read off.
    3. A Linear called several times is split only if every call is gated in the same order.

    The halves become new layers `<name>_value` and `<name>_gate` (with a number if taken). Each
    output is the same dot product as before; a backend may sum it in another order.
    """

    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Apply the rules to every Linear."""
        gated = _gated_layers(graph_module)
        for layer, gate in gated:
            _split(graph_module, layer, gate)
        return bool(gated)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """No fused gated projection is left.

        Raises:
            DialectError: one is; names the layer.
        """
        for layer, _ in _gated_layers(graph_module):
            raise DialectError(f"the gated projection {layer.name!r} (Linear) is not split")


def _gated_layers(graph_module: fx.GraphModule) -> list[tuple[WeightLayer, int]]:
    """Find gated projections, each with the index of its half that is the gate."""
    layers = []
    for layer in weight_layers(graph_module).values():
        # a subclass may do something else in forward, a buffer may belong to the whole weight
        if type(layer.module) is not nn.Linear or layer.module._buffers:
            continue
        gates = {_gate_index(graph_module, node) for node in layer.nodes}
        if len(gates) == 1 and (gate := gates.pop()) is not None:
            layers.append((layer, gate))
    return layers


def _gate_index(graph_module: fx.GraphModule, projection: fx.Node) -> int | None:
    halves = _halves(projection)
    if halves is None:
        return None
    for gate in (1, 0):
        activations = [u for n in halves[gate] for u in n.users if _is_gate(graph_module, u)]
        products = {u for n in activations for u in n.users if u.target is _aten.mul.Tensor}
        if any(u in products for n in halves[1 - gate] for u in n.users):
            return gate
    return None


def _is_gate(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return node.target in _GATES or called_module(graph_module, node, *_GATE_MODULES) is not None


def _halves(projection: fx.Node) -> Mapping[int, list[fx.Node]] | None:
    """Return the getitem nodes of both halves of a projection, or None if it is not halved."""
    value = projection.meta.get("val")
    cuts = list(projection.users)
    if len(cuts) != 1 or not isinstance(value, torch.Tensor) or len(projection.args) != 1:
        return None
    cut, size = cuts[0], value.shape[-1]
    accepted: dict[object, tuple[object, ...]] = {
        _aten.chunk.default: (2,),
        _aten.split.Tensor: (size // 2,),
        _aten.split_with_sizes.default: ([size // 2, size // 2],),
    }
    if size % 2 or cut.target not in accepted or cut.args[1] not in accepted[cut.target]:
        return None
    axis = cut.args[2] if len(cut.args) > 2 else cut.kwargs.get("dim", 0)
    if axis not in (-1, value.dim() - 1):
        return None
    halves = {i: [u for u in cut.users if u.args[1] in (i, i - 2)] for i in (0, 1)}
    return halves if halves[0] and halves[1] else None


def _split(graph_module: fx.GraphModule, layer: WeightLayer, gate: int) -> None:
    linear = layer.module
    assert isinstance(linear, nn.Linear)
    weights = linear.weight.chunk(2)
    biases = (None, None) if linear.bias is None else linear.bias.chunk(2)
    names = []
    for half in (0, 1):
        role = "gate" if half == gate else "value"
        names.append(free_name(graph_module, f"{layer.name}_{role}"))
        add_module(graph_module, names[half], rebuild_layer(linear, weights[half], biases[half]))
    note_parts(graph_module, layer.name, names)
    for projection in layer.nodes:
        halves = _halves(projection)
        assert halves is not None
        for half, name in enumerate(names):
            part = insert_call(graph_module, name, projection.args, anchor=projection)
            for node in halves[half]:
                node.replace_all_uses_with(part)
        # the cut is dead now, but dead code elimination keeps nodes it thinks impure
        for node in (*halves[0], *halves[1], *projection.users, projection):
            graph_module.graph.erase_node(node)
