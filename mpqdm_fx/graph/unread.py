"""Which inputs of a traced graph no operation reads."""

import operator

import torch
from torch import fx

__all__ = ["unread_inputs"]


def unread_inputs(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Names of the inputs whose values do not reach any operation; their shapes may be read.

    Args:
        graph_module: A traced graph.

    Returns:
        Dotted names, as in the graph's signature.
    """
    read: set[str] = set()

    def visit(node: fx.Node, name: str) -> None:
        for user in node.users:
            if user.target is operator.getitem:
                visit(user, f"{name}.{user.args[1]}")
            elif user.target is not torch.ops.aten.sym_size.int:
                read.add(name)

    for node in graph_module.graph.find_nodes(op="placeholder"):
        visit(node, str(node.target))
    inputs = graph_module.meta["signature"].inputs
    return tuple(spec.name for spec in inputs if spec.name not in read)
