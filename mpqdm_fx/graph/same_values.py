"""Nodes that hold the same numbers although they are different nodes."""

from torch import fx, nn

from mpqdm_fx.graph.lanes import is_quantizer
from mpqdm_fx.graph.quantizers import DynamicQuantizer

__all__ = ["value_key"]


def value_key(graph_module: fx.GraphModule, node: object) -> object:
    """Equal for nodes that hold the same numbers.

    Two nodes count as one value if they apply the same function without tensors (an activation) to
    one value, so that `time_emb_proj(silu(emb))` of all blocks have one input.

    Args:
        graph_module: The nodes' graph.
        node: A node, or anything else that stands as an argument.
    """
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if not _is_function(module):
            return node.name
        function: object = (type(module).__name__, module.extra_repr())
    elif is_quantizer(graph_module, node):
        function = (str(node.target), repr(node.args[1:]))
    else:
        return node.name
    return (function, tuple(value_key(graph_module, source) for source in node.all_input_nodes))


def _is_function(module: nn.Module) -> bool:
    """Whether its type and `extra_repr` say all: PyTorch's own without tensors, or our quantizer.

    Somebody else's module may hold what its `extra_repr` does not tell.
    """
    stock = type(module).__module__.startswith("torch.nn.") or isinstance(module, DynamicQuantizer)
    return stock and not any(True for _ in (*module.parameters(), *module.buffers()))
