"""Nested dicts, lists and tuples of tensors and constants, as models take them."""

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch

__all__ = ["constant_leaves", "same_constant", "tensor_leaves"]


def tensor_leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (dotted name, tensor) for every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield prefix, value
        return
    if isinstance(value, Mapping):
        items: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, (list, tuple)):
        items = iter(enumerate(value))
    else:
        return
    for key, entry in items:
        yield from tensor_leaves(entry, f"{prefix}.{key}" if prefix else str(key))


def constant_leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of whatever is no tensor and holds none."""
    if isinstance(value, torch.Tensor):
        return
    if prefix and not any(True for _ in tensor_leaves(value)):
        yield prefix, value
        return
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, entry in items:
        yield from constant_leaves(entry, f"{prefix}.{key}" if prefix else str(key))


def same_constant(value: Any, baked: Any) -> bool:
    """Tell whether a model may take both for the same; JSON knows no tuples."""
    if value is baked or (_is_nothing(value) and _is_nothing(baked)):
        return True
    if isinstance(value, Mapping) and isinstance(baked, Mapping):
        return value.keys() == baked.keys() and all(
            same_constant(value[k], baked[k]) for k in value
        )
    if isinstance(value, list | tuple) and isinstance(baked, list | tuple):
        return len(value) == len(baked) and all(map(same_constant, value, baked))
    if any(isinstance(v, torch.Tensor) for v in (value, baked)):
        return False
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (value, baked))
    return (numbers or type(value) is type(baked)) and bool(value == baked)


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, Sized) and len(value) == 0)
