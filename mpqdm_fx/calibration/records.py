"""Recorded inputs of a prepared model: bounded in memory, the rest in safetensors shards."""

import logging
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mpqdm_fx.calibration.calls import check_call
from mpqdm_fx.io.scratch import Scratch
from mpqdm_fx.io.tensors import read_record, write_record
from mpqdm_fx.records.run_options import DEFAULT_RECORD_MEMORY
from mpqdm_fx.records.validation import Bytes, checked

__all__ = ["RecordedInputs"]

logger = logging.getLogger(__name__)

_KIND, _VERSION = "recorded inputs", 1
_FIX = "leave the files of a running process alone, and start it again"


class RecordedInputs:
    """Keyword arguments of calls, in call order; iterating yields them again.

    Tensors are kept on the CPU. Once `memory` bytes are held, what is in memory moves to one
    shard in a folder of its own in `directory`, so they stay below `memory` plus one call.

    Args:
        memory: Bytes of tensors held in memory.
        directory: Where to make the folder for shards, which goes with this object; default the
            system's place for temporary files.

    Attributes:
        measured: What was measured of exactly these calls, by all else that it depends on; another
            budget of the same model finds it there. Empty again when a call is added.

    Raises:
        ConfigError: `memory` is no positive integer.
    """

    @checked
    def __init__(
        self, *, memory: Bytes = DEFAULT_RECORD_MEMORY, directory: str | Path | None = None
    ) -> None:
        self.measured: dict[Hashable, Any] = {}
        self._memory = memory
        self._scratch: Scratch | None = None
        self._directory = Path(directory) if directory is not None else None
        # of each call: its containers, and what stands in them that is no tensor, by position
        self._specs: list[tuple[pytree.TreeSpec, dict[int, Any]]] = []
        self._held: list[list[torch.Tensor]] = []
        self._held_bytes = 0
        self._held_out: list[int] = []
        self._shards: list[tuple[Path, int]] = []

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def place(self) -> str:
        """Which call comes next, for messages."""
        return f"calibration call {len(self)}"

    @property
    def shards(self) -> tuple[Path, ...]:
        """Files that hold the calls which no longer fit in memory."""
        return tuple(path for path, _ in self._shards)

    @property
    def held_out(self) -> tuple[int, ...]:
        """Indices of the calls that were recorded as held out: they judge what others fit."""
        return tuple(self._held_out)

    def append(self, inputs: Mapping[str, Any], *, held_out: bool = False) -> None:
        """Keep one call's arguments.

        Args:
            inputs: Tensors, or dicts, lists and tuples of tensors, by argument name.
            held_out: Judge corrections by this call instead of fitting them to it.

        Raises:
            CalibrationError: An input cannot be used (`calls.check_call`); call and input are
                named.
        """
        check_call(inputs, self.place)
        self.measured.clear()
        leaves, spec = pytree.tree_flatten(dict(inputs))
        constants = {i: v for i, v in enumerate(leaves) if not isinstance(v, torch.Tensor)}
        # Clones: a caller may reuse its buffers, and views would keep whole batches alive.
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        clones = [tensor.detach().cpu().clone() for tensor in tensors]
        if held_out:
            self._held_out.append(len(self))
        self._specs.append((spec, constants))
        self._held.append(clones)
        self._held_bytes += sum(leaf.nbytes for leaf in clones)
        if self._held_bytes > self._memory:
            self._spill()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = 0
        for path, calls in self._shards:
            tensors = read_record(path, _KIND, _VERSION, fix=_FIX).tensors
            for index in range(calls):
                prefix = f"{index}."
                names = [name for name in tensors if name.startswith(prefix)]
                leaves = [tensors[f"{prefix}{position}"] for position in range(len(names))]
                yield _unflatten(*self._specs[start + index], leaves)
            start += calls
        for spec, leaves in zip(self._specs[start:], self._held, strict=True):
            yield _unflatten(*spec, leaves)

    def _spill(self) -> None:
        if self._scratch is None:
            self._scratch = Scratch("mpqdm_fx_calibration", self._directory)
        path = self._scratch.folder / f"inputs-{len(self._shards):05d}.safetensors"
        tensors = {
            f"{call}.{position}": leaf
            for call, leaves in enumerate(self._held)
            for position, leaf in enumerate(leaves)
        }
        write_record(path, _KIND, _VERSION, {"shard": len(self._shards)}, tensors)
        logger.info("calibration inputs: %d calls moved to %s", len(self._held), path)
        self._shards.append((path, len(self._held)))
        self._held = []
        self._held_bytes = 0


def _unflatten(
    spec: pytree.TreeSpec, constants: Mapping[int, Any], tensors: list[torch.Tensor]
) -> dict[str, Any]:
    rest = iter(tensors)
    count = len(tensors) + len(constants)
    leaves = [constants[i] if i in constants else next(rest) for i in range(count)]
    call: dict[str, Any] = spec.unflatten(leaves)
    return call
