"""How the activations around a weight layer are quantized: static, by noise level, or at run time.

A static range holds for every input. Late in a denoising run activations are smaller than early on,
so one range over all of it wastes codes; two remedies exist. `TimestepActivation` has one range for
each group of noise levels. `DynamicActivation` computes the range of each sample or row at run
time.

Noise levels are told apart by the model's own argument (a timestep, a sigma, a log-SNR, a time in
0..1), as the model gets it and divided by nothing: `NoiseLevels` holds the values between the
groups. That argument is what the model was trained to read as "how much noise is in this sample". A
step index is not: step 3 of 20 and step 3 of 50 hold different noise, while timestep 800 means the
same noise to the model whichever scheduler asks for it, after however many steps, and whether it is
whole or fractional. So ranges keyed by it survive another number of steps and another scheduler.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Discriminator, Tag
from torch import Tensor

from mpqdm_fx.errors import CalibrationError, ConfigError, LoweringError
from mpqdm_fx.numerics.levels.grids import CODEBOOK_MAX_BITS, MAX_BITS
from mpqdm_fx.records.config import MAX_TIMESTEP_GROUPS, ActivationMode
from mpqdm_fx.records.validation import Between, Bits, Positive, check_fields, check_value

__all__ = [
    "OUTPUT_BITS",
    "Activation",
    "ActivationRange",
    "DynamicActivation",
    "KernelActivation",
    "NoiseLevels",
    "Side",
    "StaticActivation",
    "StoredActivation",
    "TimestepActivation",
    "kernel_activations",
    "placeholder_activations",
    "static_ranges",
]

logger = logging.getLogger(__name__)

Side = Literal["input", "output"]
"""What a weight layer reads, and what it writes."""

_EVEN = {
    bits: tuple(range(-(1 << (bits - 1)), 1 << (bits - 1))) if bits <= CODEBOOK_MAX_BITS else ()
    for bits in range(1, MAX_BITS + 1)
}  # levels that are still to be fitted, by width

OUTPUT_BITS = 8
"""Bits of what a layer writes: a static integer kernel writes int8, whatever width it reads."""


@dataclass(frozen=True, kw_only=True)
class ActivationRange:
    """Affine integers of one activation tensor: `value = scale * (code - zero_point)`.

    Attributes:
        scale: Positive step size.
        zero_point: Code of the value 0, within `quant_min..quant_max`.
        bits: Width; codes run from `-2**(bits-1)` to `2**(bits-1) - 1` in an int8.
        levels: Fitted levels, ascending, in place of evenly spaced codes: `value = scale * level`,
            and the zero point is 0. A code is the place of a level. None of them: evenly spaced.
    """

    scale: Positive
    zero_point: Annotated[int, Between(-128, 127)]
    bits: Bits = 8
    levels: tuple[Annotated[int, Between(-127, 127)], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "activation range: ")
        if self.levels:
            self._check_levels()
        if not self.quant_min <= self.zero_point <= self.quant_max:
            raise ConfigError(
                f"zero_point {self.zero_point} is outside {self.quant_min}..{self.quant_max}"
            )

    def _check_levels(self) -> None:
        if self.bits > CODEBOOK_MAX_BITS or len(self.levels) > 1 << self.bits or self.zero_point:
            raise ConfigError(
                f"{len(self.levels)} fitted levels, {self.bits} bits, zero_point "
                f"{self.zero_point}: fitted levels have at most {CODEBOOK_MAX_BITS} bits, no more "
                f"levels than codes, and the zero_point 0"
            )
        if not all(a < b for a, b in itertools.pairwise(self.levels)):
            raise ConfigError(f"fitted levels {self.levels} are not ascending")

    @property
    def quant_min(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True, kw_only=True)
class StaticActivation:
    """Static ranges of what a weight layer reads and of what it writes."""

    input: ActivationRange
    output: ActivationRange

    def __post_init__(self) -> None:
        check_fields(self, "layer's activation: ")


@dataclass(frozen=True, kw_only=True)
class TimestepActivation:
    """Ranges of what a weight layer reads and writes, one pair for each group of noise levels.

    Attributes:
        groups: In ascending order of the noise level's argument, as `NoiseLevels` separates them.
            The widths are the same in all of them.
    """

    groups: tuple[StaticActivation, ...]

    def __post_init__(self) -> None:
        check_fields(self, "activation by noise level: ")
        if not 1 <= len(self.groups) <= MAX_TIMESTEP_GROUPS:
            raise ConfigError(
                f"{len(self.groups)} groups of noise levels; give 1 to {MAX_TIMESTEP_GROUPS}"
            )
        widths = {(group.input.bits, group.output.bits) for group in self.groups}
        if len(widths) > 1:
            raise ConfigError(
                f"the groups of noise levels have different widths {sorted(widths)} (input, "
                f"output); a layer has the same widths at all noise levels"
            )

    def ranges(self, side: Side) -> tuple[ActivationRange, ...]:
        """The input's or the output's range in each group."""
        return tuple(group.input if side == "input" else group.output for group in self.groups)


@dataclass(frozen=True, kw_only=True)
class DynamicActivation:
    """The layer's input is quantized with a range computed at run time; its output stays float.

    Attributes:
        bits: Width of the input's codes.
    """

    bits: Bits = 8

    def __post_init__(self) -> None:
        check_fields(self, "dynamic activation: ")


Activation = StaticActivation | TimestepActivation | DynamicActivation
"""How one layer's activations are quantized."""


def _kind(data: Any) -> str:
    """Which of them plain JSON types are."""
    keys = data if isinstance(data, Mapping) else ()
    return "timestep" if "groups" in keys else "dynamic" if "bits" in keys else "static"


StoredActivation = Annotated[
    Annotated[StaticActivation, Tag("static")]
    | Annotated[TimestepActivation, Tag("timestep")]
    | Annotated[DynamicActivation, Tag("dynamic")],
    Discriminator(_kind),
]
"""An `Activation` as a field of a `Strict` record."""

KernelActivation = StaticActivation | DynamicActivation
"""What integer kernels run: one fixed range, or one that is chosen at run time."""


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """Groups of noise levels, told apart by what the model itself is told of them.

    Group g holds the levels t with `boundaries[g-1] <= t < boundaries[g]`; the first and the
    last group are open. See the module's text for why the argument itself is the key.

    Attributes:
        boundaries: Values between the groups, finite and ascending; none makes one group.
        argument: The model's argument that tells them; None finds it (`find_noise_argument`).
    """

    boundaries: tuple[float, ...]
    argument: str | None = None

    def __post_init__(self) -> None:
        check_value(self.boundaries, Sequence[float], "boundaries")
        check_value(self.argument, str | None, "argument")
        values = tuple(map(float, self.boundaries))
        object.__setattr__(self, "boundaries", values)
        if not all(a < b for a, b in itertools.pairwise(values)):
            raise ConfigError(f"boundaries {values} are not ascending")
        if self.count > MAX_TIMESTEP_GROUPS:
            raise ConfigError(
                f"{self.count} groups of noise levels; {MAX_TIMESTEP_GROUPS} are the most"
            )

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.boundaries) + 1

    @classmethod
    def of(
        cls, levels: Tensor | Iterable[float], groups: int, *, argument: str | None = None
    ) -> Self:
        """Part calibrated noise levels into groups of about equally many samples.

        A boundary lies halfway between two neighbouring calibrated values, so levels that were not
        calibrated (of another number of steps) go to the group of the nearest one. Halfway is the
        geometric mean where all levels are positive and their ratios are more alike than their
        differences (`_spaced_by_ratio`): the nearest of sigma 80 and 0.3 to 10 is 80.

        Args:
            levels: What the model is told of every calibrated sample, any shape and dtype.
            groups: Number of groups wanted. With fewer distinct levels there are fewer groups,
                which is logged.
            argument: The model's argument that tells them.

        Raises:
            CalibrationError: There are no levels, or NaN or infinity among them.
            ConfigError: `groups` is below 1 or above the most that is allowed.
        """
        check_value(groups, Annotated[int, Between(1, MAX_TIMESTEP_GROUPS)], "groups")
        given = levels if isinstance(levels, Tensor) else torch.tensor([*levels])
        values = given.detach().flatten().to(device="cpu", dtype=torch.float64)
        if not len(values) or not bool(torch.isfinite(values).all()):
            raise CalibrationError(
                "groups of noise levels need finite calibrated levels, got "
                + ("NaN or infinity" if len(values) else "none")
            )
        unique, counts = torch.unique(values, return_counts=True)
        distinct = len(unique)
        if distinct < groups:
            logger.warning(
                "calibration has %d distinct noise levels, too few for %d groups of noise levels; "
                "going on with %d", distinct, groups, distinct,
            )  # fmt: skip
            groups = distinct
        share = (counts.cumsum(0) / counts.sum()).tolist()
        cuts: list[int] = []
        for group in range(1, groups):
            first = cuts[-1] + 1 if cuts else 0
            # leave one level for each group that is still to come
            candidates = range(first, distinct - (groups - group))
            cuts.append(min(candidates, key=lambda cut: abs(share[cut] - group / groups)))
        below, above = unique[cuts], unique[[cut + 1 for cut in cuts]]
        by_ratio = _spaced_by_ratio(unique)
        halfway = below.sqrt() * above.sqrt() if by_ratio else (below + above) / 2
        return cls(boundaries=tuple(halfway.tolist()), argument=argument)

    def group_of(self, levels: Tensor) -> Tensor:
        """Group of each noise level.

        Args:
            levels: [B] or a single number (0-d), any dtype.

        Returns:
            int64 [B], or [1] of a single number, values 0 to `count - 1`.
        """
        boundaries = torch.tensor(self.boundaries, dtype=torch.float64, device=levels.device)
        return torch.bucketize(levels.reshape(-1).to(torch.float64), boundaries, right=True)


def _spaced_by_ratio(levels: Tensor) -> bool:
    """Whether distinct ascending levels are spaced by ratios (sigmas) and not by differences.

    The scale on which the gaps between neighbours are more alike (their deviation over their mean)
    is taken for that of the model. Two levels have one gap, which tells nothing: by differences.
    """
    if len(levels) < 3 or not bool(levels[0] > 0):
        return False
    gaps = torch.stack([levels.diff(), levels.log().diff()])
    differences, ratios = (gaps.std(1) / gaps.mean(1)).tolist()
    return bool(ratios < differences)


def placeholder_activations(
    widths: Mapping[str, int],
    mode: ActivationMode,
    *,
    output_bits: int = OUTPUT_BITS,
    groups: int = 1,
    fitted: bool = False,
) -> dict[str, Activation]:
    """Activations of the right kind and widths whose ranges are still to be found.

    Args:
        widths: Bits of the input of each weight layer whose activations are quantized.
        mode: Kind of quantization.
        output_bits: Width of the outputs.
        groups: Groups of noise levels, for the mode `"timestep"`.
        fitted: Whether inputs of at most 4 bits get fitted levels where their ranges are fixed.

    Returns:
        Activation by layer, every scale 1 and every zero point 0; nothing in the mode `"float"`.
    """
    if mode == "float":
        return {}
    if mode == "dynamic":
        return {name: DynamicActivation(bits=bits) for name, bits in widths.items()}
    pairs = {
        name: StaticActivation(
            input=ActivationRange(
                scale=1.0, zero_point=0, bits=bits, levels=_EVEN[bits] if fitted else ()
            ),
            output=ActivationRange(scale=1.0, zero_point=0, bits=output_bits),
        )
        for name, bits in widths.items()
    }
    if mode == "static":
        return dict(pairs)
    return {name: TimestepActivation(groups=(pair,) * groups) for name, pair in pairs.items()}


def static_ranges(ranges: Mapping[str, Activation], backend: str) -> dict[str, StaticActivation]:
    """The same ranges, for a backend that knows static ones only.

    Args:
        ranges: Activation by layer.
        backend: The backend's name, for the message.

    Raises:
        LoweringError: A layer's activation is of another kind; names the layer and what runs.
    """
    static: dict[str, StaticActivation] = {}
    for name, activation in ranges.items():
        if not isinstance(activation, StaticActivation):
            kind, door = "by noise level", ""
            if isinstance(activation, DynamicActivation):
                kind, door = "at run time", 'lower to backend="xnnpack", which runs them, '
            raise LoweringError(
                f"{name}: its activations are quantized {kind}, but {backend} runs static ranges "
                f'only; quantize with activation_mode="static", {door}or keep the model in packed '
                f'form (backend="packed")'
            )
        _refuse_levels(name, activation, backend)
        static[name] = activation
    return static


def _refuse_levels(name: str, activation: KernelActivation, backend: str) -> None:
    if isinstance(activation, StaticActivation) and activation.input.levels:
        raise LoweringError(
            f"{name}: its input has fitted levels, but {backend} runs evenly spaced codes only; "
            f'quantize with activation_bits=8, or with activation_levels="uniform", or keep the '
            f'model in packed form (backend="packed")'
        )


def kernel_activations(
    ranges: Mapping[str, Activation], backend: str
) -> dict[str, KernelActivation]:
    """The same activations, for a backend that knows static and dynamic ones.

    Args:
        ranges: Activation by layer.
        backend: The backend's name, for the message.

    Raises:
        LoweringError: A layer has ranges by noise level; names the layer and what runs.
    """
    activations: dict[str, KernelActivation] = {}
    for name, activation in ranges.items():
        if isinstance(activation, TimestepActivation):
            raise LoweringError(
                f"{name}: its activations are quantized by noise level, but {backend} runs fixed "
                f'ranges and ranges chosen at run time; quantize with activation_mode="static" or '
                f'"dynamic", or keep the model in packed form (backend="packed")'
            )
        _refuse_levels(name, activation, backend)
        activations[name] = activation
    return activations
