"""Two lanes in one graph: the float value of a node, and its value behind quantized layers.

`passes.CarryErrorLane` builds such a graph. A node of the float lane may have a *twin* in the
quantized lane, which stands directly behind it; a node without a twin serves both lanes, so that
its error is exactly 0. Quantizers exist in the quantized lane alone: the float lane reads what they
read. Names pair the nodes, because names survive every copy of a graph.
"""

from typing import Any

from torch import fx, nn

from mpqdm_fx.graph.editing import replace_module
from mpqdm_fx.graph.layers import called_module
from mpqdm_fx.graph.qdq import is_dequantize, is_quantize
from mpqdm_fx.graph.quantizers import ActivationQuantizer

__all__ = [
    "error_lane_name",
    "float_of",
    "has_lanes",
    "install_in_lane",
    "is_lane",
    "is_quantizer",
    "mark_lanes",
    "pair",
    "twin_of",
]

_ROOT = "error_lane"
# keys of node.meta
_LANE, _FLOAT, _TWIN = "lane", "float_node", "twin_node"


def is_quantizer(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node quantizes, dequantizes or rounds an activation.

    In the float lane such a node is the identity on its first argument.
    """
    if is_quantize(node) or is_dequantize(node):
        return True
    return called_module(graph_module, node, ActivationQuantizer) is not None


def has_lanes(graph_module: fx.GraphModule) -> bool:
    """Tell whether the graph carries a quantized lane."""
    return graph_module.meta.get(_ROOT) is True


def mark_lanes(graph_module: fx.GraphModule) -> None:
    """Note in `graph_module.meta` that the graph carries a quantized lane."""
    graph_module.meta[_ROOT] = True


def is_lane(node: fx.Node) -> bool:
    """Tell whether a node belongs to the quantized lane alone."""
    return node.meta.get(_LANE) == "quantized"


def error_lane_name(fqn: str) -> str:
    """Return where the quantized lane's module of a weight layer sits."""
    return f"{_ROOT}.{fqn}"


def install_in_lane(graph_module: fx.GraphModule, fqn: str, module: nn.Module) -> None:
    """Give the quantized lane another module for one layer; the float lane keeps its own.

    Args:
        graph_module: a graph with two lanes, edited in place.
        fqn: the layer's name in the float lane.
        module: the rounded layer.

    Raises:
        AttributeError: the quantized lane has no layer of that name.
    """
    replace_module(graph_module, error_lane_name(fqn), module)


def pair(float_node: fx.Node, lane_node: fx.Node, *, twins: bool = True) -> None:
    """Record that `lane_node` is the quantized lane's value of `float_node`.

    Args:
        float_node: a node of the float lane.
        lane_node: a node of the quantized lane.
        twins: record it at `float_node` too. False for quantizers: they hold a rounded copy of the
            value, which stands beside the twin.
    """
    lane_node.meta[_LANE] = "quantized"
    lane_node.meta[_FLOAT] = float_node.name
    if twins:
        float_node.meta[_TWIN] = lane_node.name


def twin_of(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the quantized lane's version of a float node, as it is before any quantizer.

    Args:
        graph_module: a graph with two lanes.
        node: any node of it.

    Returns:
        None if both lanes share the node, or if it belongs to the quantized lane itself.
    """
    name = node.meta.get(_TWIN)
    return None if name is None else _named(graph_module, name, node.next)


def float_of(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the float lane's version of a node.

    Args:
        graph_module: a graph with two lanes.
        node: any node of it.

    Returns:
        The float node of a twin; of a quantizer, the float value of what it rounds; of a node
        outside the quantized lane, itself. None if the float node was removed, as nobody read it.
    """
    if not is_lane(node):
        return node
    name = node.meta.get(_FLOAT)
    return None if name is None else _named(graph_module, name, node.prev)


def _named(graph_module: fx.GraphModule, name: str, likely: fx.Node) -> fx.Node | None:
    if likely.name == name:
        return likely
    nodes: Any = graph_module.graph.nodes
    return next((node for node in nodes if node.name == name), None)
