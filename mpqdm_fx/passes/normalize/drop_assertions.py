"""Remove assertions and guards.

`torch.export` records checks of shapes and dtypes that held while tracing. They compute nothing,
no backend runs them, and they count as users of the tensors they look at.
"""

from dataclasses import dataclass

import torch
from torch import fx

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.layers import called_module
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DropAssertions"]

_aten = torch.ops.aten

_ASSERTIONS = frozenset(
    {
        _aten._assert_tensor_metadata.default,
        _aten._assert_scalar.default,
        _aten._assert_async.default,
        _aten._assert_async.msg,
        _aten.sym_constrain_range.default,
        _aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)

# the class of the submodule that ExportedProgram.module() calls first; torch has no public name
_GUARDS = "GuardsFn"


@dataclass(frozen=True, kw_only=True)
class DropAssertions(GraphPass):
    """Erase every node that only checks. Bit-equal on inputs that pass the checks.

    1. aten assertions on metadata, scalars and symbolic ranges, and `torch._check`.
    2. Calls of the guard function of an exported program.

    What only fed a check (sizes, comparisons) goes with it as dead code. The checks on a model's
    inputs are made by its signature instead (`graph.signature`), with better messages.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Apply rules 1 and 2 everywhere."""
        checks = [n for n in graph_module.graph.nodes if _is_check(graph_module, n)]
        for node in checks:
            graph_module.graph.erase_node(node)
        return bool(checks)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """No check is left.

        Raises:
            DialectError: one is; names the node.
        """
        for node in graph_module.graph.nodes:
            if _is_check(graph_module, node):
                raise DialectError(f"the check {node.name!r} ({node.target}) is left")


def _is_check(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.users:  # checks return nothing that could be used
        return False
    if node.op == "call_function":
        return node.target in _ASSERTIONS
    module = called_module(graph_module, node)
    return module is not None and type(module).__name__ == _GUARDS
