"""A graph whose batch may vary, written for the sizes of one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.graph.editing import copy_graph_module, eliminate_dead_code
from mpqdm_fx.graph.nodes import replace_by_number
from mpqdm_fx.graph.rebuild import infer_static_values

__all__ = ["fixed_sizes"]


def fixed_sizes(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Write a graph for the sizes of these inputs: no axis is dynamic in it.

    A program has the sizes of its examples. Passes before it may count on them only if the values
    of nodes say so: a size that is computed hides what a reshape or an expansion does.

    Args:
        graph_module: Any graph; it is not changed.
        inputs: Its inputs in order. Only shapes and dtypes are looked at.

    Returns:
        A copy, with the values of all nodes (`val`) for these inputs, and with numbers in the place
        of nodes that compute sizes. The graph itself where no size of it is dynamic.
    """
    if not any(_is_dynamic(node) for node in graph_module.graph.nodes):
        return graph_module
    result = copy_graph_module(graph_module)
    infer_static_values(result, inputs)
    for node in list(result.graph.nodes):
        number = node.meta.get("val")
        if node.op == "call_function" and isinstance(number, bool | int | float):
            replace_by_number(node, number)
    eliminate_dead_code(result)
    result.graph.lint()
    result.recompile()
    return result


def _is_dynamic(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(
        isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool)
        or (isinstance(leaf, Tensor) and not all(isinstance(n, int) for n in leaf.shape))
        for leaf in leaves
    )
