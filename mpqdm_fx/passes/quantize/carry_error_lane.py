"""Give every node behind a weight layer a second value: the one it has once layers are rounded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import fx

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import (
    add_module,
    infer_val,
    inherit_meta,
    shallow_clone,
    writes_in_place,
)
from mpqdm_fx.graph.lanes import error_lane_name, has_lanes, is_quantizer, mark_lanes, pair
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.base import GraphPass

__all__ = ["CarryErrorLane"]

_aten = torch.ops.aten

#: They read the shape of a value and not its numbers, so both lanes give the same.
_SHAPE_READERS = frozenset(
    {
        _aten.sym_size.int,
        _aten.sym_stride.int,
        _aten.sym_numel.default,
        _aten.zeros_like.default,
        _aten.ones_like.default,
        _aten.full_like.default,
        _aten.new_zeros.default,
        _aten.new_ones.default,
        _aten.new_full.default,
    }
)


@dataclass(frozen=True, kw_only=True)
class CarryErrorLane(GraphPass):
    """Build the graph that computes the float network and the quantized one side by side.

    The result returns the pair `(float output, quantized output)`. It is what quantization error
    propagation (QEP, arXiv 2504.09629, eq. 3) needs: for each weight layer its input X in the float
    network and its input X_hat behind the layers that are rounded already, from one run.

    1. The float lane is the input graph without its activation quantizers.
    2. A node has a twin in the quantized lane if it is a call of a weight layer or reads the
       quantized lane; quantizers exist there alone. All other nodes serve both lanes: a layer
       whose error is 0 reads the very same node in both.
    3. A twin stands directly behind its float node, hence behind everything that node reads.
    4. The twin of a weight layer's call calls `error_lane.<name>`: a layer of its own with the
       same tensors, so that it can be replaced without touching the float lane. A layer with
       several calls has one.

    `graph.lanes` finds the twin of a node and the float node of a twin.
    """

    preserves_function: ClassVar[bool] = False

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Return the pass; it has no settings."""
        return (cls(),)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """No node writes into its input, and the name of the lane is free.

        Raises:
            DialectError: One does (a value that both lanes share would be overwritten), or the
                model has a module under the lane's name.
        """
        if has_lanes(graph_module):
            return
        for node in graph_module.graph.nodes:
            if writes_in_place(graph_module, node):
                raise DialectError(
                    f"node {node.name} ({node.op} {node.target}) writes into its input, which both "
                    "lanes may read; use the form that returns a new tensor (inplace=False, or "
                    "the operator without the trailing underscore) and trace again"
                )
        root = error_lane_name("").rstrip(".")
        if hasattr(graph_module, root):
            raise DialectError(
                f"the model has an attribute {root!r}, where the quantized lane keeps its layers; "
                "rename it"
            )

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Add the quantized lane; False if the graph has one already."""
        if has_lanes(graph_module):
            return False
        names = _install_layers(graph_module)
        exact: dict[fx.Node, fx.Node] = {}  # original node -> float lane
        noisy: dict[fx.Node, fx.Node] = {}  # original node -> quantized lane, where it differs
        for node in list(graph_module.graph.nodes):
            args = (node.args, dict(node.kwargs))
            to_float = _mapped(args, exact)
            to_lane = _mapped(args, {**exact, **noisy}) if _reads(node, noisy) else to_float
            if node.op == "output":
                node.args = ((to_float[0][0], to_lane[0][0]),)
                if "val" in node.meta:
                    node.meta["val"] = (node.meta["val"], node.meta["val"])
            elif is_quantizer(graph_module, node):
                exact[node], noisy[node] = to_float[0][0], node
                node.args, node.kwargs = to_lane
                pair(exact[node], node, twins=False)
            else:
                if node in names or (_reads(node, noisy) and node.target not in _SHAPE_READERS):
                    noisy[node] = _insert_twin(graph_module, node, names.get(node), to_lane)
                _redirect(graph_module, node, to_float)
        mark_lanes(graph_module)
        return True

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph says that it has two lanes.

        Raises:
            DialectError: It does not.
        """
        if not has_lanes(graph_module):
            raise DialectError("CarryErrorLane left a graph without its mark")


def _install_layers(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """Give the lane its layers; return the name of the lane's layer for each call."""
    names: dict[fx.Node, str] = {}
    for name, layer in weight_layers(graph_module, embeddings=True).items():
        lane_name = error_lane_name(name)
        # not the module itself: replace_module follows aliases, and would change both lanes
        add_module(graph_module, lane_name, shallow_clone(layer.module))
        names.update(dict.fromkeys(layer.nodes, lane_name))
    return names


def _reads(node: fx.Node, noisy: Mapping[fx.Node, fx.Node]) -> bool:
    return any(source in noisy for source in node.all_input_nodes)


def _mapped(args: tuple[Any, ...], values: Mapping[fx.Node, fx.Node]) -> tuple[Any, Any]:
    mapped: Any = fx.node.map_arg(args, lambda node: values.get(node, node))
    return mapped[0], mapped[1]


def _insert_twin(
    graph_module: fx.GraphModule, node: fx.Node, name: str | None, arguments: tuple[Any, Any]
) -> fx.Node:
    graph = graph_module.graph
    with graph.inserting_after(node):
        twin = graph.create_node(node.op, name or node.target, *arguments, name=f"{node.name}_hat")
    inherit_meta(twin, node, fqn=name)
    if "val" in node.meta:
        twin.meta["val"] = node.meta["val"]
    pair(node, twin)
    return twin


def _redirect(graph_module: fx.GraphModule, node: fx.Node, arguments: tuple[Any, Any]) -> None:
    """Let a float node read float values; work its own value out again if their dtype changed."""
    before = node.all_input_nodes
    node.args, node.kwargs = arguments
    after = node.all_input_nodes
    if before != after and [*map(_dtype, before)] != [*map(_dtype, after)]:
        infer_val(graph_module, node)


def _dtype(node: fx.Node) -> object:
    return getattr(node.meta.get("val"), "dtype", None)
