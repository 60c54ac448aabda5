"""A quantized model against its float model on calls of the user's: one number, and by level."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.calibration.calls import check_calls
from mpqdm_fx.calibration.samplers import Denoiser, first_tensor
from mpqdm_fx.capture.entry import in_float32
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.numerics.metrics import ratio_db
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.validation import Count, checked
from mpqdm_fx.report.noise_levels import noise_argument_of, row_powers, told_levels
from mpqdm_fx.report.words import word_of_sqnr

__all__ = ["Comparison", "LevelSqnr", "compare", "compare_all"]

_MOST_LEVELS = 8


@dataclass(frozen=True, kw_only=True)
class LevelSqnr:
    """The error at one noise level.

    Attributes:
        level: What the model is told there; of several levels put together, their mean.
        sqnr_db: Signal-to-noise ratio of the output in dB; inf where it is exact.
        samples: Samples that it was measured on.
    """

    level: float
    sqnr_db: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Outputs of a quantized model against those of its float model, on the same calls.

    Attributes:
        sqnr_db: Signal-to-noise ratio of all outputs together, in dB; inf if they are equal.
        levels: The same by noise level, the largest first; empty if the model is told none.
        noise_argument: The argument that tells noise levels; None if none does.
        calls: Calls that were made.
        samples: Samples in them.
    """

    sqnr_db: float
    levels: tuple[LevelSqnr, ...]
    noise_argument: str | None
    calls: int
    samples: int

    def __str__(self) -> str:
        """A line for all calls, and one for each noise level."""
        word = word_of_sqnr(self.sqnr_db)
        counts = f"{_counted(self.samples, 'sample')} in {_counted(self.calls, 'call')}"
        lines = [f"output SQNR {self.sqnr_db:.1f} dB ({word}), {counts}"]
        width = max((len(f"{point.level:g}") for point in self.levels), default=0)
        lines += [
            f"  at {self.noise_argument} {point.level:>{width}g}  {point.sqnr_db:6.1f} dB"
            f"  ({_counted(point.samples, 'sample')})"
            for point in self.levels
        ]
        return "\n".join(lines)


def compare(
    float_model: Denoiser,
    quantized: Denoiser,
    calls: Iterable[Mapping[str, Any]],
    *,
    noise_argument: str | None = None,
) -> Comparison:
    """Compare a quantized model's outputs with its float model's on the same calls.

    Args:
        float_model: The float model, called with each call as keywords.
        quantized: The other model, called the same way.
        calls: Keyword arguments of each call, which calibration has not seen.
        noise_argument: The argument that tells noise levels; None finds it by its name.

    Returns:
        What was found; `print` it.

    Raises:
        CalibrationError: There is no call, or one cannot be used.
        ConfigError: `noise_argument` is no argument of the calls, or outputs have other shapes.
    """
    comparisons = compare_all(float_model, {"": quantized}, calls, noise_argument=noise_argument)
    return comparisons[""]


@plain_torch()
@checked
@torch.no_grad()
def compare_all(
    reference: Denoiser,
    denoisers: Mapping[str, Denoiser],
    calls: Iterable[Mapping[str, Any]],
    *,
    noise_argument: str | None = None,
    most: Count = _MOST_LEVELS,
) -> dict[str, Comparison]:
    """Compare several models with one, which runs once.

    Args:
        reference: The float model.
        denoisers: What is compared with it, by name.
        calls: As of `compare`.
        noise_argument: As of `compare`.
        most: Most groups of noise levels; see `sqnr_by_noise_level`.

    Raises: as of `compare`.
    """
    batches: Sequence[Mapping[str, Any]] = list(calls)
    check_calls(batches, "call")
    if not batches:
        raise CalibrationError("there is no call to compare on; give at least one")
    if noise_argument is not None and noise_argument not in batches[0]:
        raise ConfigError(
            f"no argument {noise_argument!r} tells the noise level; name one of "
            f"({', '.join(batches[0])}) with noise_argument="
        )
    model = in_float32(reference)
    powers: dict[str, list[Tensor]] = {name: [] for name in denoisers}
    for batch in batches:
        expected = first_tensor(model(**batch))
        for name, denoiser in denoisers.items():
            output = first_tensor(denoiser(**batch))
            powers[name].append(row_powers(expected, output, batch_size_of(batch)))
    argument = noise_argument or noise_argument_of(batches[0])
    row_levels = None if argument is None else told_levels(batches, argument)
    result = {}
    for name, parts in powers.items():
        sums = torch.cat(parts)
        apart = row_levels is not None and len(row_levels) == len(sums)
        result[name] = Comparison(
            sqnr_db=ratio_db(*sums.sum(dim=0).tolist()),
            levels=_by_level(sums, row_levels, most) if apart and row_levels is not None else (),
            noise_argument=argument if apart else None,
            calls=len(batches),
            samples=sum(map(batch_size_of, batches)),
        )
    return result


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _by_level(sums: Tensor, row_levels: Tensor, most: int) -> tuple[LevelSqnr, ...]:
    levels = NoiseLevels.of(row_levels, min(most, len(set(row_levels.tolist()))))
    groups = levels.group_of(row_levels)
    points = []
    for group in reversed(range(levels.count)):
        rows = groups == group
        if rows.any():
            ratio = ratio_db(*sums[rows].sum(dim=0).tolist())
            mean = float(row_levels[rows].mean())
            points.append(LevelSqnr(level=mean, sqnr_db=ratio, samples=int(rows.sum())))
    return tuple(points)
