"""Numbers that a model reads off tensors which it makes of sizes, as numbers in its graph.

A model that writes the height and width of its input into a tensor and cuts others by what it reads
back has sizes that look as if they depended on values. They depend on nothing but the sizes of its
inputs.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.fixed_sizes import fixed_sizes
from mpqdm_fx.graph.nodes import replace_by_number
from mpqdm_fx.graph.operators import is_pure

__all__ = ["fold_constant_reads"]

_READS = frozenset({torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default})


def fold_constant_reads(graph_module: fx.GraphModule, call: Mapping[str, Any]) -> fx.GraphModule:
    """Replace reads of tensors that depend on no input by what they give.

    Args:
        graph_module: A traced graph of fixed sizes; it may be changed.
        call: Its inputs by name; only their sizes and dtypes count.

    Returns:
        A graph in which such reads are numbers and sizes that depended on them are known. The graph
        itself where there are none.
    """
    constant = _constants(graph_module)
    reads = [node for node in constant if node.target in _READS]
    known = _computed(graph_module, reads)
    for node in reads:
        replace_by_number(node, known[node])
    if not reads:
        return graph_module
    graph_module.graph.eliminate_dead_code()
    names = (str(node.target) for node in graph_module.graph.find_nodes(op="placeholder"))
    return fixed_sizes(graph_module, [call[name] for name in names])


def _constants(graph_module: fx.GraphModule) -> dict[fx.Node, None]:
    """Nodes that depend on no input and no parameter, in graph order."""
    constant: dict[fx.Node, None] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(graph_module)
            fits = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        else:
            fits = node.op == "call_function" and is_pure(node.target)
        if fits and all(source in constant for source in node.all_input_nodes):
            constant[node] = None
    return constant


def _computed(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, Any]:
    """Values of constant nodes, with those of the nodes that they are made of."""
    needed = set(nodes)
    for node in reversed(graph_module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    known: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node not in needed:
            continue
        if node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(graph_module)
            continue
        assert callable(node.target)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)
    return known
