"""Let a group norm write the codes that the convolutions behind it read."""

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
    """Turn `group_norm_mixed` and `quantize_mixed` into `group_norm_quantize_mixed`.

    1. Only quantizers with a part a sample read the norm. One operator serves them all.
    2. It comes after `MoveLayouts`: a permutation between the two hides them from each other.
    """

    # The definition of the fused operator is the two in a row, but its kernel sums on its own.
    tolerance: ClassVar[float] = 1e-2

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fuse; False if there was nothing to fuse."""
        modified = False
        for norm in list(graph_module.graph.nodes):
            if norm.target is not _mpqdm.group_norm_mixed.default or not _is_fusible(norm):
                continue
            target = _mpqdm.group_norm_quantize_mixed.default
            fused = insert_call(graph_module, target, norm.args, anchor=norm)
            for quantize in list(norm.users):
                quantize.replace_all_uses_with(fused)
                graph_module.graph.erase_node(quantize)
            graph_module.graph.erase_node(norm)
            modified = True
        return modified


def _is_fusible(norm: fx.Node) -> bool:
    batch = sizes(norm)[0]
    return bool(norm.users) and all(
        user.target is _mpqdm.quantize_mixed.default and user.args[1] == batch
        for user in norm.users
    )
