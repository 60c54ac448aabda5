"""Judge what a model is to be called with before any work: call by call, input by input.

A NaN in an input that the model does not read, an empty batch or a list in a tensor's place shows
up much later, in a layer that has no part in it, or never. Here it is refused where it came in.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.nested import named_leaves

__all__ = [
    "check_call",
    "check_calls",
    "check_example",
    "check_indices",
    "table_sizes",
]

_DTYPES = frozenset(
    {
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
        torch.int8, torch.int16, torch.int32, torch.int64,
    }
)  # fmt: skip

_INT64 = 2**63

#: What hands on the values of its first argument, as far as an index is concerned.
_HANDS_ON = frozenset(
    {"to", "_to_copy", "reshape", "view", "flatten", "clone", "contiguous", "expand", "long"}
)

#: Words in an annotation by which an argument may hold several tensors.
_CONTAINERS = ("list", "tuple", "dict", "sequence", "mapping")


def check_calls(calls: Sequence[Mapping[str, Any]], what: str = "calibration call") -> None:
    """Check calls that are all there, and that they have the same inputs.

    Args:
        calls: Keyword arguments of each call.
        what: What a call is, for the message; its index follows.

    Raises:
        CalibrationError: See `check_call`; or a call has other inputs than the first one.
    """
    names: list[str] = []
    for index, call in enumerate(calls):
        place = f"{what} {index}"
        check_call(call, place)
        inputs = sorted(name for name, value in call.items() if value is not None)
        names = names or inputs
        if inputs != names:
            odd = sorted(set(inputs) ^ set(names))
            raise CalibrationError(
                f"{place}: it has the inputs {', '.join(inputs)} and {what} 0 has "
                f"{', '.join(names)}; give {', '.join(odd)} in all calls or in none"
            )


def check_call(call: object, place: str) -> None:
    """Check the arguments of one call.

    Args:
        call: Keyword arguments: tensors, numbers, flags, and dicts, lists and tuples of such.
        place: Which call it is, for the message.

    Raises:
        CalibrationError: It is no mapping by name; or a tensor is empty, not finite, of a kind that
            no model reads, or without data (the device "meta"); or a number is not finite or has
            more than 64 bits; or an array of NumPy is in a tensor's place. Names the input.
    """
    if not isinstance(call, Mapping) or not all(isinstance(name, str) for name in call):
        raise CalibrationError(
            f"{place}: give keyword arguments, a dict by name, not {type(call).__name__}"
        )
    for name, value in named_leaves(call):
        fault = _fault(value)
        if fault:
            raise CalibrationError(f"{place}: input {name!r} {fault}")


def check_example(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> None:
    """Check what a model is to be traced with: `check_call`, and lists where tensors belong.

    Args:
        model: The float model.
        inputs: Keyword arguments, or positional ones, of one call.

    Raises:
        CalibrationError: An input cannot be used; names it.
    """
    place = "example inputs"
    parameters = inspect.signature(model.forward).parameters
    call = inputs if isinstance(inputs, Mapping) else dict(zip(parameters, inputs, strict=False))
    check_call(call, place)
    for name, parameter in parameters.items():
        kind = str(parameter.annotation)
        takes_tensor = "Tensor" in kind and not any(word in kind.lower() for word in _CONTAINERS)
        if takes_tensor and isinstance(call.get(name), list | tuple):
            raise CalibrationError(
                f"{place}: input {name!r} is a {type(call[name]).__name__} where the model takes a "
                f"tensor; give torch.tensor(...)"
            )


def table_sizes(graph_module: fx.GraphModule) -> dict[str, int]:
    """Rows of the tables that inputs are indices of, by input name.

    Args:
        graph_module: A traced graph.
    """
    sizes: dict[str, int] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, nn.Embedding) and isinstance(source := _origin(node), fx.Node):
            name = str(source.target)
            sizes[name] = min(module.num_embeddings, sizes.get(name, module.num_embeddings))
    return sizes


def check_indices(call: Mapping[str, Any], sizes: Mapping[str, int], place: str) -> None:
    """Refuse indices that a table does not have.

    Args:
        call: Inputs of a traced graph.
        sizes: From `table_sizes`.
        place: Which call it is, for the message.

    Raises:
        CalibrationError: There is one; names input, value and range.
    """
    for name, size in sizes.items():
        value = call.get(name)
        if not isinstance(value, Tensor):
            continue
        low, high = (int(end) for end in torch.aminmax(value))
        if low < 0 or high >= size:
            raise CalibrationError(
                f"{place}: input {name!r} holds {low if low < 0 else high}, and the model's table "
                f"has the rows 0 to {size - 1}"
            )


def _fault(value: Any) -> str:
    """What is wrong with a leaf; empty if nothing is."""
    if isinstance(value, np.ndarray | np.generic):
        return f"is a {type(value).__name__} of NumPy; give torch.as_tensor(...)"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}"
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        return "is an integer of more than 64 bits"
    if not isinstance(value, Tensor):
        return ""
    about = f"(shape {tuple(value.shape)}, {value.dtype}) "
    if value.layout is not torch.strided or value.dtype not in _DTYPES:
        return f"{about}is {value.layout}; give a dense tensor of real numbers"
    if value.is_meta:
        return f'{about}has no data: it is on the device "meta"'
    if not value.numel():
        return f"{about}is empty; a call has at least one sample"
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        return f"{about}holds NaN or infinity; drop this call or look at what produced it"
    return ""


def _origin(node: fx.Node) -> fx.Node | None:
    """The placeholder whose values a node reads unchanged, if it is one."""
    while node.op != "placeholder":
        last = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        if node.op != "call_module" and last not in _HANDS_ON:
            return None
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or (source.op == "call_module"):
            return None
        node = source
    return node
