"""No graph needs its values to lie in memory in one way.

A pass may change the strides of a value and leave its numbers: slices and a concatenation keep
channels last where the pad operator they stand for does not. What reads numbers does not notice.
"""

import torch
from torch import fx

from mpqdm_fx.errors import TraceError

__all__ = ["reshape_views"]

_aten = torch.ops.aten
_RESHAPES = {
    _aten.view.default: _aten.reshape.default,
    _aten.view_as.default: _aten.reshape_as.default,
    _aten._unsafe_view.default: _aten.reshape.default,
}
_STRIDED = frozenset({_aten.as_strided.default, _aten.as_strided_copy.default})


def reshape_views(graph_module: fx.GraphModule) -> None:
    """Turn views, which take some strides alone, into reshapes, which copy where they have to.

    Args:
        graph_module: The graph; changed in place. Its results keep their bits.

    Raises:
        TraceError: The graph reads memory by strides of its own (``as_strided``), and would read
            other numbers without a word.
    """
    for node in graph_module.graph.nodes:
        if node.target in _STRIDED:
            raise TraceError(
                f"{graph_module.meta['signature'].model_class}: {node.name} reads memory by "
                f"strides ({node.target}), which passes may change; use unfold, reshape or indexing"
            )
        node.target = _RESHAPES.get(node.target, node.target)
    graph_module.recompile()
