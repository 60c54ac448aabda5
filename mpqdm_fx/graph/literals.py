"""Arguments and targets of nodes as JSON values, and back: nothing that is code gets through.

JSON has null, booleans, integers, floats, strings and lists. Everything else that a node's
arguments or a layer's settings hold is an object of one key, its kind: `{"tuple": [..]}`,
`{"node": "conv_in"}`, `{"dtype": "float32"}`. What has no such form is `{"code": "its.name"}`,
which tells it apart and cannot be read back.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["CODE", "code_name", "codes_in", "literal", "target_name", "target_of", "value_of"]

CODE = "code"
"""The kind of what only the program that made it can make again."""

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{n}": getattr(operator, n) for n in ("getitem", "add", "sub", "mul", "neg")},
    **{f"operator.{n}": getattr(operator, n) for n in ("floordiv", "truediv", "mod", "pow")},
    **{f"operator.{n}": getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"math.{n}": getattr(math, n) for n in ("floor", "ceil", "trunc")},
    **{f"torch.{n}": getattr(torch, n) for n in ("sym_max", "sym_min", "sym_int", "sym_float")},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}

# It maps a file into memory; what else returns something sees tensors and numbers alone.
_REFUSED = frozenset({"from_file"})
# They return nothing and check what they see; what else returns nothing is called for its effect
# (it writes a file, prints, seeds the generator).
_CHECKS = re.compile(r"_assert_\w+|sym_constrain_range\w*")
_OPERATOR = re.compile(r"aten\.(?!__class)(\w+)\.(\w+)")

# Constants of torch by kind: their names are `torch.float32`, `torch.preserve_format`, ...
_CONSTANTS: Mapping[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def literal(value: Any) -> Any:
    """JSON form of an argument of a node, or of a setting of a layer.

    A device is written as its kind of "cpu": where a graph computes is not what it computes.

    Args:
        value: Any object.

    Returns:
        Plain JSON types; `value_of` is the inverse where there is no `{"code": ..}` inside.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [literal(entry) for entry in value]}
    if isinstance(value, list):
        return [literal(entry) for entry in value]
    if isinstance(value, dict):
        return {"dict": [[literal(key), literal(entry)] for key, entry in value.items()]}
    if isinstance(value, slice):
        return {"slice": [literal(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": "cpu" if value.type in ("cpu", "cuda") else value.type}
    if value is Ellipsis:
        return {"ellipsis": None}
    for kind, cls in _CONSTANTS.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    return {CODE: code_name(value)}


def value_of(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Inverse of `literal`.

    Args:
        data: What `literal` returned.
        nodes: Nodes by name.

    Raises:
        KeyError, TypeError, ValueError: `data` is no such value.
    """
    if isinstance(data, list):
        return [value_of(entry, nodes) for entry in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(value_of(entry, nodes) for entry in content)
    if kind == "dict":
        return {value_of(key, nodes): value_of(entry, nodes) for key, entry in content}
    if kind == "slice":
        start, stop, step = (value_of(part, nodes) for part in content)
        return slice(start, stop, step)
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind == "ellipsis":
        return ...
    constant = getattr(torch, content, None) if kind in _CONSTANTS else None
    if constant is None or not isinstance(constant, _CONSTANTS[kind]):
        raise ValueError(f"{data!r} is no value of a graph")
    return constant


def target_name(target: Any) -> Any:
    """JSON form of what a `call_function` node calls: a name, or `{"code": ..}`."""
    if isinstance(target, torch._ops.OpOverload) and _computes(target):
        return str(target)
    return _NAMES.get(target) or {CODE: code_name(target)}


def target_of(name: Any) -> Callable[..., Any]:
    """Inverse of `target_name`.

    Raises:
        ValueError: There is no such function, or it is not one that graphs of numbers call.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    target: Any = None
    if isinstance(name, str) and _OPERATOR.fullmatch(name):
        _, packet, overload = name.split(".")
        target = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if not isinstance(target, torch._ops.OpOverload) or not _computes(target):
        raise ValueError(f"{name!r} is no function that a graph may call")
    return target


def _computes(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator of ATen makes values of values and does nothing else."""
    match = _OPERATOR.fullmatch(str(operator))
    if match is None or match[1] in _REFUSED or operator._schema.is_mutable:
        return False
    return bool(operator._schema.returns) or _CHECKS.fullmatch(match[1]) is not None


def code_name(value: Any) -> str:
    """Dotted name of a function or class, or of the class of any other object."""
    if isinstance(value, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def codes_in(data: Any) -> Iterator[str]:
    """Yield the names of all code in a JSON value, however deep."""
    if isinstance(data, dict):
        for key, entry in data.items():
            if key == CODE:
                yield str(entry)
            else:
                yield from codes_in(entry)
    elif isinstance(data, list):
        for entry in data:
            yield from codes_in(entry)
