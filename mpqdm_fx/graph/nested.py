"""Nested dicts, lists and tuples of tensors and constants, as models take them and return them.

Every helper for such values is here: leaves by name, rows, batches put together, devices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpqdm_fx.errors import CalibrationError, first_line

__all__ = [
    "concatenate",
    "constant_leaves",
    "first_row",
    "map_tensors",
    "named_leaves",
    "same_constant",
    "take_rows",
    "tensor_leaves",
    "tensors_of",
    "to_device",
]


def named_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of whatever nested dicts, lists and tuples hold.

    Args:
        value: What holds them; a value that is no container is its own leaf.
        name: Its own name.
    """
    if isinstance(value, Mapping):
        entries: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list | tuple):
        entries = iter(enumerate(value))
    else:
        yield name, value
        return
    for key, entry in entries:
        yield from named_leaves(entry, f"{name}.{key}" if name else str(key))


def tensor_leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted name, tensor) for every tensor in nested dicts, lists and tuples."""
    for name, leaf in named_leaves(value, prefix):
        if isinstance(leaf, Tensor):
            yield name, leaf


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """The tensors in what a model returns, in order: nested values, or a dataclass of outputs."""
    return tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def map_tensors(value: Any, change: Callable[[str, Tensor], Any], name: str = "") -> Any:
    """Nested containers of the same kinds with every tensor changed.

    Args:
        value: What holds them.
        change: Called with each tensor's dotted name and itself.
        name: Name of `value`.
    """
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        return {k: map_tensors(entry, change, f"{prefix}{k}") for k, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [map_tensors(e, change, f"{prefix}{i}") for i, e in enumerate(value)]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return change(name, value) if isinstance(value, Tensor) else value


def to_device(value: Any, device: torch.device | str) -> Any:
    """Nested values with every tensor on a device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def take_rows(value: Any, rows: slice | Tensor) -> Any:
    """Rows of every tensor in nested dicts, lists and tuples; flags, None and 0-d tensors stay.

    Args:
        value: Tensors, or what holds them.
        rows: Which; int64 [n], or a slice.
    """
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor[rows] if tensor.ndim else tensor, value
    )


def first_row(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first sample of a batch of keyword arguments, batch 1."""
    rows: dict[str, Any] = take_rows(dict(inputs), slice(0, 1))
    return rows


def concatenate(values: Sequence[Any]) -> Any:
    """Put the rows of tensors at equal places of nested dicts, lists and tuples behind each other.

    Args:
        values: At least one; all have the same places. Flags, numbers and None have no rows, and
            are the same in all.

    Raises:
        CalibrationError: One has other places than the last, a tensor of another shape, or another
            flag or number.
    """

    def behind(last: Any, *earlier: Any) -> Any:
        parts = [*earlier, last]
        # one tensor beside a flag is an error of torch.cat, and not the flag
        tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(parts))
        if tensors:
            return torch.cat(parts)
        if not all(same_constant(part, last) for part in parts):
            raise ValueError(f"{parts[0]!r} and {last!r} have no rows to be put together")
        return last

    try:
        return pytree.tree_map(behind, values[-1], *values[:-1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"inputs that belong together differ: {first_line(error)}; give all of them the same "
            f"entries, of the same shapes but for the first axis, and a tensor where values differ"
        ) from error


def constant_leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of whatever is no tensor and holds none."""
    if isinstance(value, Tensor):
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
    if any(isinstance(v, Tensor) for v in (value, baked)):
        return False
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (value, baked))
    return (numbers or type(value) is type(baked)) and bool(value == baked)


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, Sized) and len(value) == 0)
