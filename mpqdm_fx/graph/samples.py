"""How many samples a call has: most models take a batch, some a list with a tensor for each."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mpqdm_fx.graph.nested import tensor_leaves
from mpqdm_fx.graph.noise_names import NOISE_NAMES, TIMESTEP_NAMES

__all__ = ["batch_size_of", "samples_listed"]


def samples_listed(call: Mapping[str, Any]) -> bool:
    """Whether samples are the entries of a list: the first argument that holds tensors is one."""
    first = next((value for value in call.values() if any(tensor_leaves({"": value}))), None)
    return isinstance(first, list) and all(isinstance(entry, Tensor) for entry in first)


def batch_size_of(call: Mapping[str, Any]) -> int:
    """Samples in a call.

    The length of its first argument, where that is a list of tensors. Else the leading axis of its
    first tensor that has more than one axis; or of a later one where that has as many entries as a
    noise level is told for, and the first has not: positions and masks may have no batch.
    """
    if samples_listed(call):
        return len(next(value for value in call.values() if any(tensor_leaves({"": value}))))
    sizes = [len(tensor) for _, tensor in tensor_leaves(call) if tensor.ndim > 1]
    for name, value in call.items():
        is_level = name in TIMESTEP_NAMES or name in NOISE_NAMES
        if is_level and isinstance(value, Tensor) and value.ndim == 1 and len(value) > 1:
            sizes.sort(key=len(value).__ne__)
    return sizes[0] if sizes else 1
