"""Activation quantizers that can be trained: they compute what the frozen ones do, bit for bit.

Fixed ranges have a set of parameters for each group of noise levels (EfficientDM's TALSQ, arXiv
2310.03270, section 3.3): step and zero point, or step and fitted levels.
"""

import torch
from torch import Tensor, nn

from mpqdm_fx.graph.quantizers import ActivationQuantizer, level_table
from mpqdm_fx.numerics.training.straight_through import (
    fake_quantize_affine,
    fake_quantize_dynamic_ste,
    round_ste,
    table_values,
)
from mpqdm_fx.records.activations import ActivationRange

__all__ = ["DynamicRange", "TrainableLevels", "TrainableRange", "trainable_range"]

_TOP = 127


class TrainableRange(ActivationQuantizer):
    """A fixed activation quantizer whose step and zero point are trained, for each group.

    Args:
        ranges: Range of each group of noise levels; one for a static quantizer.
    """

    start_scale: Tensor
    start_zero: Tensor

    def __init__(self, ranges: tuple[ActivationRange, ...]) -> None:
        super().__init__()
        self.bits = ranges[0].bits
        self.quant_min, self.quant_max = ranges[0].quant_min, ranges[0].quant_max
        scales = torch.tensor([activation.scale for activation in ranges], dtype=torch.float32)
        zeros = torch.tensor([float(activation.zero_point) for activation in ranges])
        self.register_buffer("start_scale", scales, persistent=False)
        self.register_buffer("start_zero", zeros, persistent=False)
        self.log_scale = nn.Parameter(torch.zeros(len(ranges)))
        self.shift = nn.Parameter(torch.zeros(len(ranges)))

    @property
    def scale(self) -> Tensor:
        """Step of each group [G], float32."""
        return self.start_scale * self.log_scale.exp()

    @property
    def zero_point(self) -> Tensor:
        """Code of 0 in each group [G], whole numbers in float32."""
        return round_ste((self.start_zero + self.shift).clamp(self.quant_min, self.quant_max))

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """Round x; with `group` [B] each sample by the range of its group."""
        scale, zero_point = self.scale, self.zero_point
        if group is not None:
            repeats = x.shape[0] // group.shape[0]
            shape = (-1, *[1] * (x.dim() - 1))
            scale = scale[group].repeat_interleave(repeats).reshape(shape)
            zero_point = zero_point[group].repeat_interleave(repeats).reshape(shape)
        return fake_quantize_affine(x, scale, zero_point, self.quant_min, self.quant_max)

    @torch.no_grad()
    def hold(self) -> None:
        """Bring zero points back among the codes: beyond them they would have no gradient."""
        self.shift.clamp_(self.quant_min - self.start_zero, self.quant_max - self.start_zero)

    def roughness(self) -> Tensor:
        """Squared steps between neighbouring groups of how far ranges moved; 0 for one group."""
        moved = self.log_scale.diff().square().sum() + (self.shift.diff() / 16).square().sum()
        return moved

    @torch.no_grad()
    def frozen(self) -> tuple[ActivationRange, ...]:
        """The ranges as they are now."""
        pairs = zip(self.scale.tolist(), self.zero_point.tolist(), strict=True)
        return tuple(ActivationRange(scale=s, zero_point=int(z), bits=self.bits) for s, z in pairs)


class TrainableLevels(ActivationQuantizer):
    """Fitted levels of an activation that are trained, with their step, for each group.

    Args:
        ranges: Range of each group of noise levels, with levels; one for a static quantizer.

    Attributes:
        levels: In steps, [G, L]; a group of fewer levels repeats its last one.
        gap: Mean distance of two levels at the start.
    """

    start_scale: Tensor
    start_levels: Tensor

    def __init__(self, ranges: tuple[ActivationRange, ...]) -> None:
        super().__init__()
        self.bits = ranges[0].bits
        scales = torch.tensor([activation.scale for activation in ranges], dtype=torch.float32)
        self.register_buffer("start_scale", scales, persistent=False)
        start = level_table(ranges)
        self.register_buffer("start_levels", start, persistent=False)
        self.gap = float((start[:, -1] - start[:, 0]).mean()) / max(1, start.shape[1] - 1)
        self.log_scale = nn.Parameter(torch.zeros(len(ranges)))
        self.levels = nn.Parameter(start.clone())

    @property
    def scale(self) -> Tensor:
        """Step of each group [G], float32."""
        return self.start_scale * self.log_scale.exp()

    def table(self) -> Tensor:
        """Levels of each group [G, L]: whole numbers, ascending."""
        return round_ste(self.levels).clamp(-_TOP, _TOP).sort(dim=1).values

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """Round x; with `group` [B] each sample by the levels of its group."""
        scale, table = self.scale, self.table()
        if group is not None:
            repeats = x.shape[0] // group.shape[0] if len(group) > 1 else 1
            rows = group.repeat_interleave(repeats)
            scale, table = scale[rows], table[rows]
        flat = x.to(torch.float32).reshape(len(table), -1)
        # x keeps its memory layout, on which later sums depend
        return torch.empty_like(x).copy_(table_values(flat, scale, table).reshape(x.shape))

    @torch.no_grad()
    def hold(self) -> None:
        """Bring levels back into int8: beyond they would have no gradient."""
        self.levels.clamp_(-_TOP, _TOP)

    def roughness(self) -> Tensor:
        """Squared steps between neighbouring groups of how far ranges moved; 0 for one group."""
        moved = (self.levels - self.start_levels) / (16 * max(self.gap, 1.0))
        return self.log_scale.diff().square().sum() + moved.diff(dim=0).square().mean(1).sum()

    @torch.no_grad()
    def frozen(self) -> tuple[ActivationRange, ...]:
        """The ranges as they are now."""
        rows = zip(self.scale.tolist(), self.table().tolist(), strict=True)
        return tuple(
            ActivationRange(
                scale=scale, zero_point=0, bits=self.bits, levels=tuple(sorted({*map(int, row)}))
            )
            for scale, row in rows
        )


class DynamicRange(ActivationQuantizer):
    """A `DynamicQuantizer` that gradients pass through; it has nothing to train.

    Args:
        bits: Width of the codes.
        axes: See `DynamicQuantizer`.
    """

    def __init__(self, bits: int, axes: int | tuple[int, ...]) -> None:
        super().__init__()
        self.bits, self.axes = bits, axes

    def forward(self, x: Tensor) -> Tensor:
        """Round x."""
        return fake_quantize_dynamic_ste(x, self.bits, self.axes)


def trainable_range(ranges: tuple[ActivationRange, ...]) -> TrainableRange | TrainableLevels:
    """The trainable form of a fixed quantizer.

    Args:
        ranges: Range of each group of noise levels; one for a static quantizer.
    """
    return TrainableLevels(ranges) if ranges[0].levels else TrainableRange(ranges)
