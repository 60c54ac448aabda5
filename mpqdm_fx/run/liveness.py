"""Until when the value of a node is needed, in a run that executes node by node."""

from collections.abc import Iterator

from torch import fx

from mpqdm_fx.graph.lanes import error_lane_name, twin_of

__all__ = ["readers"]

_LANE_LAYERS = error_lane_name("")


def readers(graph_module: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes before whose execution the value of `node` must not be freed.

    These are its users. Beyond them, a value that a weight layer reads in the float lane is kept
    for the layer's twin, which is executed right after: whoever rounds the layer there sees the
    inputs of both lanes.

    Args:
        graph_module: the graph's owner.
        node: a node of it.
    """
    for user in node.users:
        yield user
        if user.op == "call_module":
            twin = twin_of(graph_module, user)
            if twin is not None and str(twin.target).startswith(_LANE_LAYERS):
                yield twin
