"""Leaf modules that quantize and dequantize an activation at run time.

A static range needs no module: it is a pair of `quantized_decomposed` ops (`graph.qdq`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.activations.codebook import fake_quantize_levels
from mpqdm_fx.numerics.activations.dynamic import fake_quantize_dynamic
from mpqdm_fx.records.activations import ActivationRange, NoiseLevels
from mpqdm_fx.records.validation import Bits, check_value

__all__ = [
    "FIXED_QUANTIZERS",
    "ActivationQuantizer",
    "CodebookQuantizer",
    "DynamicQuantizer",
    "NoiseLevelGroups",
    "NoiseLevelQuantizer",
    "fixed_quantizer",
    "level_table",
]


class ActivationQuantizer(nn.Module):
    """Base of modules that round an activation: `forward(x, *extra)` keeps x's shape and dtype.

    In a graph with two lanes they exist in the quantized lane alone; the float lane passes `x`
    through.
    """


class DynamicQuantizer(ActivationQuantizer):
    """Rounds to integers whose range is that of the very tensor, as XNNPACK's qd8 kernels do.

    Args:
        bits: Width of the codes; XNNPACK's are 8 bits wide.
        axes: The axes along which values share one range, counted from the end, or the number of
            trailing ones: 1 for a linear layer (one range per row), 1 + spatial axes for a
            convolution (one per sample), (-3,) for one that XNNPACK runs as a linear layer over
            the pixels. See `graph.quantizer_sites.row_axes`.

    Raises:
        ConfigError: `bits` is outside 1..8, or `axes` name no axes.
    """

    def __init__(self, bits: int = 8, axes: int | tuple[int, ...] = 1) -> None:
        super().__init__()
        check_value(bits, Bits, "activation bits")
        self.bits = bits
        if (axes < 1) if isinstance(axes, int) else (not axes or max(axes) >= 0):
            raise ConfigError(
                f"axes={axes}: a range is shared along at least one axis, counted from the end"
            )
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Round x, float [..., C] or [..., C, *spatial]; see `numerics.activations.dynamic`."""
        return fake_quantize_dynamic(x, self.bits, self.axes)

    def extra_repr(self) -> str:
        """Settings, for print."""
        return f"bits={self.bits}, axes={self.axes}"


class NoiseLevelGroups(nn.Module):
    """Tells which group of noise levels each sample is in; see `activations.NoiseLevels`.

    Args:
        boundaries: Noise levels between the groups, ascending.

    Raises:
        ConfigError: The boundaries are not finite and ascending.
    """

    boundaries: Tensor

    def __init__(self, boundaries: Sequence[float]) -> None:
        super().__init__()
        levels = NoiseLevels(boundaries=tuple(boundaries))
        # float64 holds every int64 timestep in use and every float32 one
        self.register_buffer("boundaries", torch.tensor(levels.boundaries, dtype=torch.float64))

    def forward(self, levels: Tensor) -> Tensor:
        """Map noise levels, [B] or a single number (0-d), any dtype, to groups, int64 [B], [1]."""
        values = levels.reshape(-1).to(self.boundaries.dtype)
        return torch.bucketize(values, self.boundaries, right=True)

    def extra_repr(self) -> str:
        """Boundaries, for print."""
        return ", ".join(f"{value:g}" for value in self.boundaries.tolist())


class NoiseLevelQuantizer(ActivationQuantizer):
    """Rounds each sample to integers whose fixed range is that of its group of noise levels.

    With equal ranges in all groups it computes what a static q/dq pair computes, bit for bit.

    Args:
        scales: Step size of each group [G], positive.
        zero_points: Code of the value 0 in each group [G].
        bits: Width of the codes.

    Raises:
        ConfigError: A range is impossible, or the numbers of scales and zero points differ.
    """

    scales: Tensor
    zero_points: Tensor
    inverses: Tensor

    def __init__(self, scales: Sequence[float], zero_points: Sequence[int], bits: int = 8) -> None:
        super().__init__()
        if len(scales) != len(zero_points) or not len(scales):
            raise ConfigError(
                f"{len(scales)} scales and {len(zero_points)} zero points; give one of each for "
                f"every group of noise levels"
            )
        for scale, zero_point in zip(scales, zero_points, strict=True):
            ActivationRange(scale=scale, zero_point=zero_point, bits=bits)
        self.bits = bits
        exact = torch.tensor(scales, dtype=torch.float32)
        self.register_buffer("scales", exact)
        # the q/dq ops divide in double precision, then multiply in single
        self.register_buffer("inverses", (1.0 / exact.double()).float())
        self.register_buffer("zero_points", torch.tensor(zero_points, dtype=torch.int64))

    @property
    def ranges(self) -> tuple[ActivationRange, ...]:
        """Range of each group."""
        pairs = zip(self.scales.tolist(), self.zero_points.tolist(), strict=True)
        return tuple(ActivationRange(scale=s, zero_point=int(z), bits=self.bits) for s, z in pairs)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Round each sample of x with its group's range.

        Args:
            x: Float [n * B, ...], computed in float32. Where frames or heads are folded into the
                first axis, a sample's n rows follow one another.
            group: int64 [B], or [1] for all samples alike.

        Returns:
            Shape and dtype of x.
        """
        # Only the parameters are reshaped: x keeps its memory layout, on which later sums depend.
        repeats = x.shape[0] // group.shape[0]
        trailing = [1] * (x.dim() - 1)

        def for_rows(table: Tensor) -> Tensor:
            return table[group][:, None].expand(-1, repeats).reshape(-1, *trailing)

        zero_point = for_rows(self.zero_points)
        low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        codes = (x.to(torch.float32) * for_rows(self.inverses)).round_().add_(zero_point)
        codes.clamp_(low, high).sub_(zero_point)
        return codes.mul_(for_rows(self.scales)).to(x.dtype)

    def extra_repr(self) -> str:
        """Settings, for print."""
        return f"bits={self.bits}, groups={len(self.scales)}"


class CodebookQuantizer(ActivationQuantizer):
    """Rounds to fitted levels, fixed: of the whole tensor, or of each sample's noise levels.

    Args:
        ranges: One range, or one for each group of noise levels; all of one width, with levels.

    Raises:
        ConfigError: A range has no levels, or the widths differ.
    """

    scales: Tensor
    levels: Tensor

    def __init__(self, ranges: Sequence[ActivationRange]) -> None:
        super().__init__()
        if len({chosen.bits for chosen in ranges}) != 1 or not all(r.levels for r in ranges):
            raise ConfigError("fitted levels need one width, and levels in every range")
        self.bits = ranges[0].bits
        self.counts = [len(chosen.levels) for chosen in ranges]
        self.register_buffer("levels", level_table(ranges))
        scales = torch.tensor([chosen.scale for chosen in ranges], dtype=torch.float32)
        self.register_buffer("scales", scales)

    @property
    def ranges(self) -> tuple[ActivationRange, ...]:
        """Range of each group, or the only one."""
        rows = zip(self.scales.tolist(), self.levels.tolist(), self.counts, strict=True)
        return tuple(
            ActivationRange(
                scale=scale, zero_point=0, bits=self.bits, levels=tuple(map(int, levels[:count]))
            )
            for scale, levels, count in rows
        )

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """Round x; with `group`, each sample by the levels of its group.

        Args:
            x: Float [n * B, ...], computed in float32; see `NoiseLevelQuantizer.forward`.
            group: int64 [B], or [1] for all samples alike.

        Returns:
            Shape and dtype of x.
        """
        if group is None:
            rows: Any = slice(0, 1)
        else:  # one table serves all rows
            rows = group.repeat_interleave(x.shape[0] // len(group)) if len(group) > 1 else group
        rounded = fake_quantize_levels(x, self.scales[rows], self.levels[rows])
        # x keeps its memory layout, on which later sums depend
        return torch.empty_like(x).copy_(rounded)

    def extra_repr(self) -> str:
        """Settings, for print."""
        return f"bits={self.bits}, groups={len(self.scales)}"


def level_table(ranges: Sequence[ActivationRange]) -> Tensor:
    """Fitted levels of ranges, float32 [ranges, L]; fewer than L repeat the last one.

    Args:
        ranges: Each has levels.
    """
    count = max(len(chosen.levels) for chosen in ranges)
    # repeating a level changes nothing
    rows = [[*r.levels, *[r.levels[-1]] * (count - len(r.levels))] for r in ranges]
    return torch.tensor(rows, dtype=torch.float32)


FIXED_QUANTIZERS = (NoiseLevelQuantizer, CodebookQuantizer)
"""Modules whose ranges are fixed beforehand; both have `ranges`."""


def fixed_quantizer(ranges: Sequence[ActivationRange]) -> NoiseLevelQuantizer | CodebookQuantizer:
    """The module that rounds by ranges of groups of noise levels, or by fitted levels.

    Args:
        ranges: One for each group, of one width.

    Raises:
        ConfigError: Some have fitted levels and others none, or the widths differ.
    """
    if any(chosen.levels for chosen in ranges):
        return CodebookQuantizer(ranges)
    return NoiseLevelQuantizer(
        [chosen.scale for chosen in ranges],
        [chosen.zero_point for chosen in ranges],
        ranges[0].bits,
    )
