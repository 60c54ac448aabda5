"""How many samples a call has: most models take a batch, some a list with a tensor for each."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mpqdm_fx.graph.nested import tensor_leaves

__all__ = ["batch_size_of", "samples_listed"]


def samples_listed(call: Mapping[str, Any]) -> bool:
    """Whether samples are the entries of a list: the first argument that holds tensors is one."""
    first = next((value for value in call.values() if any(tensor_leaves({"": value}))), None)
    return isinstance(first, list) and all(isinstance(entry, Tensor) for entry in first)


def batch_size_of(call: Mapping[str, Any]) -> int:
    """Samples in a call.

    The leading axis of its first tensor that has more than one axis; or the length of its first
    argument, where that is a list of tensors.
    """
    if samples_listed(call):
        return len(next(value for value in call.values() if any(tensor_leaves({"": value}))))
    return next((len(tensor) for _, tensor in tensor_leaves(call) if tensor.ndim > 1), 1)
