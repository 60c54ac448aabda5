"""A hash of a graph: equal for graphs that compute the same numbers with the same names."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from types import CodeType

from torch import fx, nn

from mpqdm_fx.graph.describe import describe
from mpqdm_fx.graph.leaves import leaf_class
from mpqdm_fx.io.tensors import hash_tensor

__all__ = ["graph_fingerprint"]


def graph_fingerprint(graph_module: fx.GraphModule) -> str:
    """Hash of a graph's nodes, the settings of its modules, parameters and buffers.

    A module that is no stock layer, or has a method of its own, counts with its bytecode.

    Args:
        graph_module: Any graph.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(describe(graph_module)).encode())
    for target in sorted({str(n.target) for n in graph_module.graph.find_nodes(op="call_module")}):
        for code in _own_code(graph_module.get_submodule(target)):
            digest.update(f"{target}{code.co_names}{_constants(code)}".encode() + code.co_code)
    for name, tensor in sorted(graph_module.state_dict().items()):
        digest.update(name.encode())
        hash_tensor(digest, tensor)
    return digest.hexdigest()


def _own_code(module: nn.Module) -> Iterator[CodeType]:
    """The code of `forward` where that is not torch's, and of functions set on the module."""
    values = [*vars(module).values()]
    if leaf_class(module) is not type(module):
        values.append(type(module).forward)
    for value in values:
        code = getattr(getattr(value, "__func__", value), "__code__", None)
        if code is not None:
            yield code


def _constants(code: CodeType) -> list[str]:
    return [repr(value) for value in code.co_consts if not inspect.iscode(value)]
