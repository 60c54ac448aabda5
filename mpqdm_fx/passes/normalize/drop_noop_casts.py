"""Remove casts to the dtype and device that a tensor already has.

Models cast defensively (`hidden_states.to(dtype)`); the export records every cast, eight to
fourteen of them in a small UNet, and each one cuts a quantized region in two.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import writes_in_place
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DropNoopCasts"]

_aten = torch.ops.aten

_COPIES = frozenset(
    {_aten._to_copy.default, torch.ops.prims.convert_element_type.default},
)

_CASTS = frozenset(
    {
        _aten.to.dtype,
        _aten.to.dtype_layout,
        _aten.to.device,
        _aten.to.other,
        _aten.type_as.default,
        *_COPIES,
    }
)


@dataclass(frozen=True, kw_only=True)
class DropNoopCasts(GraphPass):
    """Replace every cast that changes nothing by its input. Bit-equal.

    1. The cast's input and output have the same dtype, device and layout. This is read from
       `node.meta["val"]`, so it holds for the dtypes the model was traced with; a cast without
       values is kept.
    2. No memory format is asked for, other than the one the tensor has.
    3. A cast that is a copy (`_to_copy`, `copy=True`) goes only if nothing in the graph is
       written in place, since the copy may protect a value from a write.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Apply the rules everywhere."""
        noops = _noop_casts(graph_module)
        for node in noops:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph_module.graph.erase_node(node)
        return bool(noops)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """No cast that changes nothing is left.

        Raises:
            DialectError: one is; names the node.
        """
        for node in _noop_casts(graph_module):
            raise DialectError(f"no-op cast {node.name!r} ({node.target}) is left")


def _noop_casts(graph_module: fx.GraphModule) -> list[fx.Node]:
    casts = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in _CASTS]
    writes = any(writes_in_place(graph_module, n) for n in graph_module.graph.nodes)
    return [n for n in casts if _keeps_value(n) and not (writes and _is_copy(n))]


def _keeps_value(node: fx.Node) -> bool:
    if node.kwargs.get("memory_format") not in (None, torch.preserve_format):
        return False
    # `to.dtype(x, dtype, non_blocking, copy, memory_format)` may also carry it as an argument
    if any(isinstance(a, torch.memory_format) and a != torch.preserve_format for a in node.args):
        return False
    before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return False
    return _kind(before) == _kind(after)


def _kind(value: torch.Tensor) -> tuple[torch.dtype, torch.device, torch.layout]:
    return value.dtype, value.device, value.layout


def _is_copy(node: fx.Node) -> bool:
    if node.target in _COPIES or node.kwargs.get("copy"):
        return True
    # the only true booleans among a cast's positional arguments are non_blocking and copy
    flags: list[Any] = [a for a in node.args if isinstance(a, bool)]
    return len(flags) > 1 and flags[1]
