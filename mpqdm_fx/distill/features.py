"""Let a graph return some of its values beside its output."""

from collections.abc import Sequence

from torch import fx, nn

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.editing import copy_graph_module
from mpqdm_fx.graph.layers import called_module

__all__ = ["feature_nodes", "with_features"]

_NORMS = (nn.GroupNorm, nn.LayerNorm)


def feature_nodes(graph_module: fx.GraphModule, names: Sequence[str] = ()) -> list[fx.Node]:
    """The values to compare.

    Args:
        graph_module: Module-level graph, float or with trainable roundings.
        names: Module paths whose outputs are meant; none takes what the graph's last norm reads:
            the output of the last decoder block.

    Raises:
        ConfigError: A path is called nowhere, or the graph has no norm.
    """
    calls = {str(n.target): n for n in graph_module.graph.nodes if n.op == "call_module"}
    missing = [name for name in names if name not in calls]
    if missing:
        raise ConfigError(f"features name {missing[0]!r}, which the graph does not call")
    if names:
        return [calls[name] for name in names]
    norms = [n for n in calls.values() if called_module(graph_module, n, *_NORMS) is not None]
    if not norms:
        raise ConfigError("the graph has no group or layer norm; name the features to compare")
    (source,) = norms[-1].all_input_nodes
    return [source]


def with_features(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph that shares all modules and returns `(output, (feature, ...))`.

    Args:
        graph_module: The graph that `nodes` belong to; it is not changed.
        nodes: Values to return.
    """
    names = [node.name for node in nodes]
    result = copy_graph_module(graph_module)
    by_name = {node.name: node for node in result.graph.nodes}
    output = result.graph.output_node()
    output.args = ((output.args[0], tuple(by_name[name] for name in names)),)
    result.recompile()
    return result
