"""Which kernel call of a program is which node of its edge graph: told by the constants they read.

Partitioning reorders nodes, and a program names none of its kernel calls. Calls that read no
constants of their own are told apart by their operator alone.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from mpqdm_fx.graph.norms import constant
from mpqdm_fx.graph.operators import operator_name, plain_name

__all__ = ["KernelCall", "constant_digest", "kernel_call", "nodes_of_calls"]

_ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class KernelCall:
    """What is known of a kernel call.

    Attributes:
        op: Its operator, as of `graph.operators.plain_name`.
        constants: SHA-256 of the constant tensors that it reads, in order; of one that lies in a
            file of its own, its name.
    """

    op: str
    constants: tuple[str, ...]


def kernel_call(program: Any, plan: Any, call: Any) -> KernelCall:
    """Read a kernel call of a program.

    Args:
        program: The program (`executorch.exir.schema.Program`), with its constants in place.
        plan: The method's plan in it.
        call: Arguments of the instruction.
    """
    constants = []
    for index in call.args:
        value = plan.values[index].val
        name = getattr(getattr(value, "extra_tensor_info", None), "fully_qualified_name", None)
        if name:
            constants.append(str(name))
        elif getattr(value, "data_buffer_idx", 0):
            constants.append(
                constant_digest(program.constant_buffer[value.data_buffer_idx].storage)
            )
    op = plain_name(plan.operators[call.op_index].name)
    return KernelCall(op=op, constants=tuple(constants))


def nodes_of_calls(
    edge: fx.GraphModule, nodes: Iterable[fx.Node], calls: Mapping[int, KernelCall]
) -> dict[fx.Node, int]:
    """Find the node of each call.

    Args:
        edge: The edge graph.
        nodes: Those of its nodes that kernels compute.
        calls: By number of the instruction.

    Returns:
        The instruction by node. What several nodes or several calls could be is left out.
    """
    numbers: dict[KernelCall, list[int]] = defaultdict(list)
    for number, call in calls.items():
        numbers[call].append(number)
    candidates: dict[int, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        for call in _possible_calls(edge, node):
            for number in numbers.get(call, ()):
                candidates[number].append(node)
    alone = [number for same in numbers.values() if len(same) == 1 for number in same]
    return {candidates[n][0]: n for n in alone if len(candidates[n]) == 1}


def _possible_calls(edge: fx.GraphModule, node: fx.Node) -> set[KernelCall]:
    """How a program may have a node: constants inside it, or in a file of their own."""
    read = {str(n.target): constant(edge, n) for n in node.all_input_nodes if n.op == "get_attr"}
    digests = tuple(
        constant_digest(t.numpy(force=True).tobytes())
        for t in read.values()
        if isinstance(t, Tensor)
    )
    op = operator_name(node)
    assert op is not None
    return {KernelCall(op=op, constants=known) for known in (digests, tuple(read))}


def constant_digest(data: bytes) -> str:
    """SHA-256 of a constant with the zeros behind it that a program stores: up to 16 bytes.

    Args:
        data: The constant, with these zeros or without.
    """
    return hashlib.sha256(data.ljust(-(-len(data) // _ALIGNMENT) * _ALIGNMENT, b"\0")).hexdigest()
