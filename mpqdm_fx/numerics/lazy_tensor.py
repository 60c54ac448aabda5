"""Float32 weights that are computed when they are read, and held in fewer bytes until then.

A large text encoder does not fit in memory in float32, once for the float model and once more for
the rounded one. A `StoredTensor` is a weight as its file has it (bfloat16 or float16, mapped from
the file); a `CodedTensor` is a rounded weight as its integers and scales. Both are parameters of
the stock layers that hold them, of the shape and dtype that they would have in full; whoever
computes with one gets a plain float32 tensor of the same bits, which lives as long as that reader
needs it.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

__all__ = ["CodedTensor", "LazyTensor", "StoredTensor", "plain", "row_blocks"]

_aten = torch.ops.aten

#: What gives back the same numbers in the same shape.
_SAME = (_aten.detach.default, _aten.alias.default)


class LazyTensor(Tensor):
    """A float32 tensor whose numbers are made for each reader; it cannot be written into.

    A row look-up makes the rows that are looked up, and a slice of the first axis makes nothing.
    """

    @staticmethod
    def __new__(cls, shape: torch.Size, *_: Any) -> Self:
        """An empty shell of the shape."""
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, requires_grad=False
        )
        return made

    @abstractmethod
    def plain(self) -> Tensor:
        """All numbers, float32."""

    @abstractmethod
    def rows(self, index: Any) -> Self:
        """Some of the rows, as indexing the first axis gives them, still to be computed."""

    @abstractmethod
    def twin(self) -> Self:
        """Another shell around the same numbers."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The numbers are never written into, so that copies share them."""
        twin = self.twin()
        for flag in ("_is_param",):  # what makes a tensor a parameter
            if hasattr(self, flag):
                setattr(twin, flag, getattr(self, flag))
        memo[id(self)] = twin
        return twin

    def __repr__(self) -> str:  # type: ignore[override]  # torch has a private argument
        """Shape and kind; numbers would have to be made."""
        return f"{type(self).__name__}({tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Products see plain tensors from the start, so that torch chooses the same kernels."""
        if func is functional.linear:
            return _product(func, args, dict(kwargs or {}))
        return torch._C._disabled_torch_function_impl(func, types, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is no class method
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute an operator of the plain numbers, or of as few of them as it reads."""
        first = args[0] if args else None
        if isinstance(first, LazyTensor):
            if func._schema.is_mutable:
                raise RuntimeError(f"{func}: {first!r} is computed when it is read, never written")
            if func in _SAME:
                return first.twin()
            if func is _aten.embedding.default:
                index = args[1]
                return first.rows(index.reshape(-1)).plain().reshape(*index.shape, -1)
            if func is _aten.slice.Tensor and first.dim() and (args[1:2] or (0,))[0] == 0:
                return first.rows(slice(*args[2:5]))
        return func(*_plain_tree(args), **_plain_tree(dict(kwargs or {})))


class StoredTensor(LazyTensor):
    """A weight in the dtype of its file.

    Args:
        values: Of any floating dtype; best mapped from a file, so that it takes no memory that the
            system cannot take back.
    """

    def __new__(cls, values: Tensor) -> Self:
        """A shell of the same shape."""
        return super().__new__(cls, values.shape)

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values_as_stored = values.detach()

    def plain(self) -> Tensor:
        """The numbers in float32, exactly."""
        return self.values_as_stored.to(torch.float32)

    def rows(self, index: Any) -> Self:
        """Some of the rows."""
        return type(self)(self.values_as_stored[index])

    def twin(self) -> Self:
        """Another shell."""
        return type(self)(self.values_as_stored)


class CodedTensor(LazyTensor):
    """A rounded weight, `codes * scale` of its row.

    Args:
        codes: int8 [O, ...].
        scale: float32 [O].
    """

    def __new__(cls, codes: Tensor, scale: Tensor) -> Self:
        """A shell of the codes' shape."""
        return super().__new__(cls, codes.shape)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.codes, self.scale = codes, scale

    def plain(self) -> Tensor:
        """The numbers, float32; the product is exact."""
        return self.codes.float() * self.scale.reshape(-1, *[1] * (self.codes.dim() - 1))

    def rows(self, index: Any) -> Self:
        """Some of the rows."""
        return type(self)(self.codes[index], self.scale[index])

    def twin(self) -> Self:
        """Another shell."""
        return type(self)(self.codes, self.scale)


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself, or the numbers of a lazy one."""
    return tensor.plain() if isinstance(tensor, LazyTensor) else tensor


def row_blocks(tensor: Tensor, numbers: int) -> Iterator[Tensor]:
    """A matrix in plain blocks of whole rows.

    Args:
        tensor: [O, ...], lazy or not.
        numbers: Most numbers of a block, unless one row has more.
    """
    step = max(1, numbers // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor), step):
        yield plain(tensor[start : start + step])


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product whose backward pass makes the numbers again, where autograd would keep them all."""
    lazy: dict[int, LazyTensor] = {}

    def made(tensor: LazyTensor) -> Tensor:
        numbers = tensor.plain()
        lazy[numbers.untyped_storage().data_ptr()] = tensor
        return numbers

    def pack(saved: Tensor) -> Any:
        tensor = lazy.get(saved.untyped_storage().data_ptr())
        if tensor is None:
            return saved
        return tensor, saved.shape, saved.stride(), saved.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor, *view = kept
        return torch.as_strided(tensor.plain(), *view)

    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    args, kwargs = pytree.tree_map_only(LazyTensor, made, (args, kwargs))
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return func(*args, **kwargs)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return func(*args, **kwargs)


def _plain_tree(values: Any) -> Any:
    return pytree.tree_map_only(LazyTensor, plain, values)
