"""What the operator of a node is called in whatever dialect, and whether it is a function."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["is_pure", "operator_name", "plain_name"]

_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv2d_mixed"), "convolution"),
    **dict.fromkeys(("addmm", "mm", "linear_mixed"), "linear"),
}


def operator_name(node: fx.Node) -> str | None:
    """Name of the operator that a node calls, without namespace, overload and dialect.

    Weight layers are `convolution` and `linear` whichever operator computes them.

    Returns:
        None for what calls no operator of torch or ExecuTorch, and for quantizers.
    """
    schema: Any = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return None
    name = str(schema.name)
    return None if name.startswith("quantized_decomposed::") else plain_name(name)


def plain_name(name: str) -> str:
    """An operator's name without namespace and dialect.

    Args:
        name: As its schema has it (`aten::view_copy`).
    """
    name = name.rpartition("::")[2].removesuffix("_copy")
    return _NAMES.get(name, name)


def is_pure(target: object) -> bool:
    """Whether a call of an operator gives the same whenever it reads the same."""
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    drawn = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace == "aten" and not target._schema.is_mutable and not drawn
