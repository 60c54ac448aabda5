"""Calibration calls spread over processes: who has which, and how what they saw comes together.

Process r of n holds the calls r, r + n, r + 2n, ... What each call contributes is gathered in the
calls' own order, so every process computes on the very numbers that one process alone would.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from torch import distributed

from mpqdm_fx.errors import CalibrationError

__all__ = ["Shards"]

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The calls of one process among those of all.

    Attributes:
        rank: This process.
        world: Number of processes.
        total: Calls of all of them.
    """

    rank: int
    world: int
    total: int

    @classmethod
    def of(cls, total: int) -> Self:
        """The share of the running process; everything, unless torch.distributed is initialised.

        Raises:
            CalibrationError: There are more processes than calls.
        """
        if distributed.is_available() and distributed.is_initialized():
            world = distributed.get_world_size()
            if total < world:
                raise CalibrationError(
                    f"{total} calibration calls cannot be shared out to {world} processes; record "
                    f"more calls, or start at most {total} processes"
                )
            return cls(rank=distributed.get_rank(), world=world, total=total)
        return cls(rank=0, world=1, total=total)

    @property
    def indices(self) -> range:
        """Global indices of this process's calls."""
        return range(self.rank, self.total, self.world)

    def gather(self, entries: Sequence[_T]) -> list[_T]:
        """What all processes have for their calls, in the order of the calls.

        Args:
            entries: One entry for each of `indices`.
        """
        if self.world == 1:
            return list(entries)
        parts: list[Any] = [None] * self.world
        distributed.all_gather_object(parts, list(entries))
        return [parts[index % self.world][index // self.world] for index in range(self.total)]

    def stream(self, entries: Iterable[_T]) -> Iterator[_T]:
        """Like `gather`, without holding more than one call of each process at a time.

        Every process has to read it to the end.
        """
        if self.world == 1:
            yield from entries
            return
        values = iter(entries)
        for start in range(0, self.total, self.world):
            parts: list[Any] = [None] * self.world
            distributed.all_gather_object(parts, next(values, None))
            yield from parts[: self.total - start]

    def once(self, make: Callable[[], _T]) -> _T:
        """What process 0 makes, for all of them."""
        if self.world == 1:
            return make()
        box: list[Any] = [make() if self.rank == 0 else None]
        distributed.broadcast_object_list(box, src=0)
        result: _T = box[0]
        return result
