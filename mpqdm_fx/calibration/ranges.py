"""Fixed activation ranges of a value that was seen over many calls, by least squared error."""

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.activations.codebook import fit_levels
from mpqdm_fx.numerics.activations.ranges import RangeSearch
from mpqdm_fx.numerics.levels.grids import CODEBOOK_MAX_BITS
from mpqdm_fx.records.activations import ActivationRange

__all__ = ["RangeSamples", "search_by_noise_level", "search_static"]

logger = logging.getLogger(__name__)

# Settles a histogram's tails; a search over so many values takes about 0.1 s.
MAX_VALUES = 2**17


@dataclass(frozen=True, eq=False)
class _Draw:
    """Which values are in a sample once another call has given its own.

    Attributes:
        chosen: Which of the call's values are taken, int32; None for all.
        members: Which of the values taken from all calls so far, one call after the other, are in
            the sample, int32; None for all.
        taken: Values taken from all calls so far.
        seen: Values of all calls so far.
        state: The generator's, for the next draw.
    """

    chosen: Tensor | None
    members: Tensor | None
    taken: int
    seen: int
    state: Tensor


# A draw takes as long as all else that a call adds, and most values have the sizes of another one.
@functools.lru_cache(maxsize=64)
def _drawn(last: _Draw | None, seed: int, limit: int, size: int) -> _Draw:
    """The draw of a call of so many values, after those of the calls before it."""
    generator = torch.Generator()
    if last is None:
        generator.manual_seed(seed)
    else:
        generator.set_state(last.state)
    taken, seen = (0, 0) if last is None else (last.taken, last.seen)
    members = None if last is None else last.members
    seen += size
    if seen <= limit:
        return _Draw(None, None, taken + size, seen, generator.get_state())
    share = round(limit * size / seen)
    chosen = torch.randint(size, (share,), generator=generator).to(torch.int32)
    count = taken if members is None else len(members)
    kept = torch.randperm(count, generator=generator)[: limit - share].to(torch.int32)
    kept = kept if members is None else members[kept]
    added = torch.arange(taken, taken + share, dtype=torch.int32)
    return _Draw(chosen, torch.cat([kept, added]), taken + share, seen, generator.get_state())


@dataclass
class _Sample:
    """Ends of all values seen, and a random sample of them in which every call has its share."""

    seed: int
    limit: int
    minimum: float = float("inf")
    maximum: float = float("-inf")
    draw: _Draw | None = None
    taken: list[Tensor] = field(default_factory=list)

    def add(self, value: Tensor) -> None:
        flat = value.detach().reshape(-1)
        if not flat.numel():
            return
        low, high = (float(end) for end in torch.aminmax(flat))
        if not (low > float("-inf") and high < float("inf")):  # catches NaN too
            raise CalibrationError(
                f"NaN or infinity in an activation of shape {tuple(value.shape)}; check the "
                f"calibration data and the weights of the layers before it"
            )
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.draw = _drawn(self.draw, self.seed, self.limit, flat.numel())
        if self.draw.chosen is not None:
            flat = flat.index_select(0, self.draw.chosen.to(flat.device))
        self.taken.append(flat.float().cpu())

    @functools.cached_property
    def kept(self) -> Tensor:
        """The sample, float32 [N]."""
        values = torch.cat(self.taken)
        members = None if self.draw is None else self.draw.members
        return values if members is None else values.index_select(0, members)

    @functools.cached_property
    def _found(self) -> RangeSearch:
        return RangeSearch(self.kept, self.minimum, self.maximum)

    def search(self, bits: int, *, fitted: bool = False) -> ActivationRange:
        """The range of one width, once every call was added."""
        scale, zero_point = self._found.best(bits)
        if fitted and bits <= CODEBOOK_MAX_BITS:
            scale, levels = fit_levels(self.kept, scale, zero_point, bits)
            return ActivationRange(scale=scale, zero_point=0, bits=bits, levels=levels)
        return ActivationRange(scale=scale, zero_point=zero_point, bits=bits)


def search_static(
    values: Iterable[Tensor],
    bits: int,
    seed: int,
    *,
    fitted: bool = False,
    limit: int = MAX_VALUES,
) -> ActivationRange:
    """Find one range for all calls.

    Args:
        values: What the value was at each call, any shapes, float.
        bits: Width of the codes, 1 to 8.
        seed: Seed of the bounded sample that the error is measured on. The ends of the range are
            searched from the smallest and largest value of all.
        fitted: Fit levels, where the width is at most 4 bits; else evenly spaced codes.
        limit: Numbers in that sample.

    Raises:
        CalibrationError: There are no values, or NaN or infinity among them.
        ConfigError: `bits` is outside 1..8.
    """
    return RangeSamples.of(values, seed, limit=limit).ranges(bits, fitted=fitted)[0]


def search_by_noise_level(
    values: Iterable[Tensor],
    groups: Iterable[Tensor],
    bits: int,
    count: int,
    seed: int,
    *,
    fitted: bool = False,
    limit: int = MAX_VALUES,
) -> tuple[ActivationRange, ...]:
    """Find one range for each group of noise levels.

    Args:
        values: What the value was at each call, float [n * B, ...], the n rows of a sample
            following one another.
        groups: Group of each sample of each call, int64 [B], or [1] for all samples of the call.
        bits: Width of the codes, 1 to 8.
        count: Number of groups.
        seed: Seed of the bounded samples, one for each group.
        fitted: Fit levels, where the width is at most 4 bits; else evenly spaced codes.
        limit: Numbers in each sample.

    Returns:
        Ranges of groups 0 to `count - 1`. A group without samples takes that of the nearest group
        that has some (the lower one of two), which is logged.

    Raises:
        CalibrationError: There are no values, or NaN or infinity among them.
        ConfigError: `bits` is outside 1..8, or a group is outside 0..count - 1.
    """
    samples = RangeSamples.by_noise_level(values, groups, count, seed, limit=limit)
    return samples.ranges(bits, fitted=fitted)


class RangeSamples:
    """Samples of one value, of all calls or by noise level, for ranges of any width.

    Args:
        samples: One for each group; a group may have no values.

    Raises:
        CalibrationError: There are no values.
    """

    def __init__(self, samples: Sequence[_Sample]) -> None:
        self._samples = samples
        self._filled = [index for index, sample in enumerate(samples) if sample.draw]
        if not self._filled:
            raise CalibrationError("an activation range needs at least one call with values")
        missing = sorted({*range(len(samples))} - {*self._filled})
        if missing:
            logger.info("groups %s of %d noise levels have no samples", missing, len(samples))

    @classmethod
    def of(cls, values: Iterable[Tensor], seed: int, *, limit: int = MAX_VALUES) -> Self:
        """One sample of all calls; see `search_static`."""
        sample = _Sample(seed, limit)
        for value in values:
            sample.add(value)
        return cls([sample])

    @classmethod
    def by_noise_level(
        cls,
        values: Iterable[Tensor],
        groups: Iterable[Tensor],
        count: int,
        seed: int,
        *,
        limit: int = MAX_VALUES,
    ) -> Self:
        """One sample for each group; see `search_by_noise_level`."""
        samples = [_Sample(seed, limit) for _ in range(count)]
        for value, group in zip(values, groups, strict=True):
            rows = group.repeat_interleave(value.shape[0] // len(group))
            for index in torch.unique(group).tolist():
                if not 0 <= index < count:
                    raise ConfigError(f"a sample is in group {index} of {count} noise levels")
                samples[index].add(value[rows == index])
        return cls(samples)

    def ranges(self, bits: int, *, fitted: bool = False) -> tuple[ActivationRange, ...]:
        """Range of each group; one without samples takes that of the nearest that has some.

        Args:
            bits: Width of the codes, 1 to 8.
            fitted: Fit levels, where the width is at most 4 bits.

        Raises:
            ConfigError: `bits` is outside 1..8.
        """
        ranges = {index: self._samples[index].search(bits, fitted=fitted) for index in self._filled}
        return tuple(
            ranges[min(self._filled, key=lambda level: abs(level - index))]
            for index in range(len(self._samples))
        )
