"""Values of a node-by-node run: in memory up to a limit, on disk beyond it."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.io.scratch import Scratch
from mpqdm_fx.io.tensors import read_record, write_record
from mpqdm_fx.run.cost import tensor_bytes

__all__ = ["Key", "ValueStore"]

logger = logging.getLogger(__name__)

#: A value is that of a node at a call.
Key = tuple[fx.Node, int]


_LEAF = pytree.tree_flatten(torch.empty(0))[1]

_KIND, _VERSION = "value", 1
_FIX = "leave the files of a running process alone, and start it again"
_ALIGNMENT = 64  # bytes; where torch's allocators start a tensor, and the widest vector register


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a tensor lies in memory. Kernels may add up in another order for another layout.

    `start` is the first element's place behind a boundary of 64 bytes, in elements.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> "_Layout":
        start = tensor.data_ptr() % _ALIGNMENT // tensor.element_size()
        return _Layout(tuple(tensor.shape), tensor.stride(), start, tensor.device)

    @property
    def repeated(self) -> tuple[int, ...]:
        """The axes along which one element stands for many (`expand`)."""
        pairs = zip(self.size, self.stride, strict=True)
        return tuple(axis for axis, (n, step) in enumerate(pairs) if step == 0 and n > 1)

    def pack(self, tensor: Tensor) -> Tensor:
        """Return the tensor's own elements, contiguous."""
        for axis in self.repeated:
            tensor = tensor.narrow(axis, 0, 1)
        return tensor.contiguous()

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the tensor as it was."""
        shape = tuple(packed.shape)
        extent = max(1, 1 + sum((n - 1) * step for n, step in zip(shape, self.stride, strict=True)))
        memory = torch.empty(self.start + extent, dtype=packed.dtype, device=self.device)
        laid_out = memory.as_strided(shape, self.stride, self.start)
        return laid_out.copy_(packed).expand(self.size)


@dataclass(slots=True)
class _Entry:
    """One value. `leaves` holds all of it, or what is no tensor while the tensors are on disk.

    `layouts` of the tensors are noted when they go there for the first time.
    """

    spec: pytree.TreeSpec
    leaves: list[Any]
    bytes: int
    halved: frozenset[int]
    layouts: dict[int, _Layout] = field(default_factory=dict)
    path: Path | None = None
    in_memory: bool = True


def _flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """As pytree does, and at once for a tensor, which nearly every value is."""
    return ([value], _LEAF) if isinstance(value, Tensor) else pytree.tree_flatten(value)


class ValueStore:
    """Nested values of (node, call), freed by whoever knows that they are not needed any more.

    Args:
        limit: bytes of tensors held in memory, or None. Whoever adds values calls `reserve` first.
        half: hold float32 tensors as float16, where they do not overflow.
        directory: where to make a temporary folder for values that do not fit; it goes with this
            object, or with the process.
        victim: chooses, among the values that are in memory and not pinned, the one to go.
    """

    def __init__(
        self,
        *,
        limit: int | None,
        half: bool,
        directory: Path | None,
        victim: Callable[[dict[fx.Node, dict[int, None]], frozenset[Key]], Key | None],
    ) -> None:
        self._limit = limit
        self._half = half
        self._directory = directory
        self._victim = victim
        self._scratch: Scratch | None = None
        self._entries: dict[fx.Node, dict[int, _Entry]] = {}
        self._in_memory: dict[fx.Node, dict[int, None]] = {}
        self._files = 0
        self._warned = False
        self.held = 0
        self.peak = 0

    def __contains__(self, node: object) -> bool:
        return node in self._entries

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Nodes that have values."""
        return tuple(self._entries)

    @property
    def spilled(self) -> int:
        """How many values were written to disk so far."""
        return self._files

    def put(self, key: Key, value: Any, *, pinned: frozenset[Key] = frozenset()) -> None:
        """Hold a value in memory, while those that are pinned stay there."""
        leaves, spec = _flatten(value)
        halved = frozenset(self._shrink(leaves)) if self._half else frozenset()
        entry = _Entry(spec, leaves, sum(map(tensor_bytes, leaves)), halved)
        self.reserve(entry.bytes, pinned)
        node, call = key
        self._entries.setdefault(node, {})[call] = entry
        self._hold(key, entry)

    def peek(self, key: Key) -> Any:
        """Return a value without holding it in memory if it is on disk."""
        entry = self._entries[key[0]][key[1]]
        leaves = entry.leaves if entry.in_memory else self._read(entry)
        if entry.halved:
            leaves = [x.float() if i in entry.halved else x for i, x in enumerate(leaves)]
        return leaves[0] if entry.spec is _LEAF else pytree.tree_unflatten(leaves, entry.spec)

    def load(self, keys: Iterable[Key]) -> None:
        """Bring values into memory, all at once."""
        pinned = frozenset(keys)
        for key in pinned:
            entry = self._entries[key[0]][key[1]]
            if not entry.in_memory:
                self.reserve(entry.bytes, pinned)
                entry.leaves, entry.in_memory = self._read(entry), True
                self._hold(key, entry)

    def reserve(self, size: int, pinned: frozenset[Key]) -> None:
        """Move values to disk until `size` more bytes fit, except those that are pinned."""
        while self._limit is not None and self.held + size > self._limit:
            key = self._victim(self._in_memory, pinned)
            if key is None:
                if not self._warned:
                    # refused at the start where it can be foreseen; hours later, going on is better
                    logger.warning("activation_memory=%d cannot be kept to: a value is larger than "
                                   "its meta says, or overflows float16", self._limit)  # fmt: skip
                    self._warned = True
                return
            self._evict(key)

    def free(self, key: Key) -> None:
        """Drop a value, in memory and on disk."""
        node, call = key
        entry = self._entries[node].pop(call)
        if not self._entries[node]:
            del self._entries[node]
        if entry.in_memory:
            self._release(key, entry)
        if entry.path is not None:
            entry.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Drop everything, and the temporary folder."""
        self._entries.clear()
        self._in_memory.clear()
        self.held = 0
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def _hold(self, key: Key, entry: _Entry) -> None:
        self.held += entry.bytes
        self.peak = max(self.peak, self.held)
        self._in_memory.setdefault(key[0], {})[key[1]] = None

    def _release(self, key: Key, entry: _Entry) -> None:
        self.held -= entry.bytes
        del self._in_memory[key[0]][key[1]]
        if not self._in_memory[key[0]]:
            del self._in_memory[key[0]]

    def _shrink(self, leaves: list[Any]) -> Iterable[int]:
        """Replace float32 tensors by float16 ones in place; yield where."""
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                small = leaf.half()
                # overflow is rare: look closer only if something is not finite
                if small.isfinite().all() or torch.equal(small.isfinite(), leaf.isfinite()):
                    leaves[index] = small
                    yield index

    def _evict(self, key: Key) -> None:
        entry = self._entries[key[0]][key[1]]
        if entry.path is None:
            tensors = ((i, x) for i, x in enumerate(entry.leaves) if isinstance(x, Tensor))
            entry.layouts = {i: _Layout.of(x) for i, x in tensors}
        if entry.path is None and entry.layouts:
            if self._scratch is None:
                self._scratch = Scratch("mpqdm_fx_values", self._directory)
            entry.path = self._scratch.folder / f"{self._files}.safetensors"
            self._files += 1
            packed = {str(i): x.pack(entry.leaves[i]) for i, x in entry.layouts.items()}
            # a copy of its own for each: safetensors refuses tensors that share memory
            copies = {i: t.clone() for i, t in packed.items()}
            write_record(entry.path, _KIND, _VERSION, {"value": entry.path.name}, copies)
        entry.leaves = [None if i in entry.layouts else x for i, x in enumerate(entry.leaves)]
        entry.in_memory = False
        self._release(key, entry)

    def _read(self, entry: _Entry) -> list[Any]:
        leaves = list(entry.leaves)
        if entry.path is not None:
            loaded = read_record(entry.path, _KIND, _VERSION, fix=_FIX).tensors
            for index, layout in entry.layouts.items():
                leaves[index] = layout.unpack(loaded[str(index)])
        return leaves
