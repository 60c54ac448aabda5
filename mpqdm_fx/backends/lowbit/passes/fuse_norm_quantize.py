"""Let a group norm write the codes that the convolutions behind it read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import mpqdm_fx.backends.lowbit.ops  # noqa: F401 - registers the operators
from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["FuseNormQuantize"]

_mpqdm = torch.ops.mpqdm


@dataclass(frozen=True, kw_only=True)
class FuseNormQuantize(GraphPass):
    """Turn `group_norm_mixed` and a quantizer into one operator.

    1. Only `quantize_mixed` with a part a sample reads the norm, or only `quantize_static_mixed`
       of one range. One `group_norm_quantize_mixed` or `group_norm_quantize_static_mixed` serves
       all that read codes.
    2. It comes after `MoveLayouts`: a permutation between the two hides them from each other.
    """

    # The definition of the fused operator is the two in a row, but its kernel sums on its own.
    tolerance: ClassVar[float] = 1e-2

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fuse; False if there was nothing to fuse."""
        modified = False
        known: tuple[object, ...]
        for norm in list(graph_module.graph.nodes):
            if norm.target is not _mpqdm.group_norm_mixed.default or not norm.users:
                continue
            quantizers = [node for node in graph_module.graph.nodes if node in norm.users]
            if _have_a_part_a_sample(norm, quantizers):
                target, known, anchor = _mpqdm.group_norm_quantize_mixed.default, (), norm
            elif _share_a_range(quantizers):
                target = _mpqdm.group_norm_quantize_static_mixed.default
                # the constants of the range stand in front of the first reader, not of the norm
                known, anchor = quantizers[0].args[1:], quantizers[0]
            else:
                continue
            fused = insert_call(graph_module, target, (*norm.args, *known), anchor=anchor)
            for quantize in quantizers:
                quantize.replace_all_uses_with(fused)
                graph_module.graph.erase_node(quantize)
            graph_module.graph.erase_node(norm)
            modified = True
        return modified


def _have_a_part_a_sample(norm: fx.Node, quantizers: Sequence[fx.Node]) -> bool:
    batch = sizes(norm)[0]
    return all(
        node.target is _mpqdm.quantize_mixed.default and node.args[1] == batch
        for node in quantizers
    )


def _share_a_range(quantizers: Sequence[fx.Node]) -> bool:
    return all(
        node.target is _mpqdm.quantize_static_mixed.default
        and node.args[1:] == quantizers[0].args[1:]
        for node in quantizers
    )
