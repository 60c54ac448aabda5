"""How large the rounding error of each channel's output is at each width, by bounded work.

Two parts. Nearest rounding is measured channel by channel on input rows, not from the diagonal of
their second moments: inputs are strongly correlated (neighbouring pixels, positive activations).
What GPTQ's error feedback leaves of it is measured on a few channels of the layer, on rows that the
feedback did not see: a tenth of the error or all of it, by the rows' spectrum, by how many rows
there are for how many weights, and by width, because at 1 bit most weights sit at an outermost
level and cannot make up for others.

On the bundled model, weights at 2.4 / 3.4 / 4.4 effective bits rounded by GPTQ: 33.7 / 40.4 / 49.0
dB from the diagonal, 34.8 / 42.5 / 50.2 dB from rows, 36.1 / 44.1 / 50.5 dB with the feedback.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mpqdm_fx.numerics.levels.codebook import quantize_codebook
from mpqdm_fx.numerics.levels.grids import (
    CODEBOOK_MAX_BITS,
    MAX_BITS,
    dequantize,
    round_scale,
    snap,
)
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.gptq import gptq
from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.layer_rows import in_parts
from mpqdm_fx.numerics.solve.scales import quantize_uniform, uniform_scales

__all__ = ["MAX_NUMBERS", "ChannelInputs", "channel_errors", "feedback_gains", "fitted_scales"]

MAX_NUMBERS = 2**18
"""Largest layer, in weights, whose every channel is fitted at every width."""

_SAMPLE = 2**15  # weights of a larger layer that are fitted
_CHUNK = 2**22  # weights rounded at once
_FEEDBACK_CHANNELS = 16
_MAX_GAIN = 2.0  # feedback from few rows may do harm; more than this is an accident of few channels


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelInputs:
    """What the weights of a layer are multiplied with.

    Attributes:
        rows: Input rows, float32 [P, K], or [P, G, K] for a grouped layer; None if each weight is a
            position of its own (an embedding table).
        energy: Mean square of each weight's input, float64 [K] or [O, K].
    """

    rows: Tensor | None
    energy: Tensor

    @classmethod
    def of(cls, fit: Tensor, held_out: Tensor, channels: int) -> Self:
        """Prepare sampled rows.

        Args:
            fit: Rows that give the energies, [P, K] or [P, G, K], less what a bias makes up for
                (`LayerRows.fitted`).
            held_out: Rows that errors are measured on, in the same form.
            channels: Output channels O.
        """
        sums = [part.double().square_().sum(dim=0) for part in in_parts(fit)]
        energy = torch.stack(sums).sum(dim=0) / len(fit)
        if fit.dim() == 3:
            energy = energy.repeat_interleave(channels // len(energy), dim=0)
        return cls(rows=held_out.float(), energy=energy)

    def error(self, difference: Tensor, first: int, channels: int) -> Tensor:
        """Mean squared output of some channels with these weights.

        Args:
            difference: float32 [n, K], channels ``first .. first + n - 1``.
            first: First channel.
            channels: All channels O of the layer.

        Returns:
            float64 [n].
        """
        if self.rows is None:
            energy = self.energy.expand(channels, -1)[first : first + len(difference)]
            return (energy * difference.double().square()).sum(dim=1)
        if self.rows.dim() == 2:
            return (self.rows @ difference.T).double().square().mean(dim=0)
        group = torch.arange(first, first + len(difference)) // (channels // self.rows.shape[1])
        outputs = [
            self.rows[:, index] @ difference[group == index].T
            for index in sorted(set(group.tolist()))
        ]
        return torch.cat(outputs, dim=1).double().square().mean(dim=0)


def channel_errors(
    W: Tensor,
    inputs: ChannelInputs,
    *,
    codebooks: bool = True,
    max_numbers: int = MAX_NUMBERS,
    scales: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Mean squared error of each channel's output, its weights rounded to nearest.

    Layers of more than ``max_numbers`` weights are rounded with scales that follow, like those of a
    few fitted channels, from each channel's energy (narrow widths clip) and its largest weight
    (wide ones do not); and fitted levels lower their errors by as much as those of these channels.

    Args:
        W: Weight rows, float [O, K].
        inputs: What they are multiplied with.
        codebooks: Measure fitted levels too.
        max_numbers: Largest layer, in weights, that is fitted as a whole.
        scales: From `fitted_scales`, where they are there already.
        seed: Of the sampled channels.

    Returns:
        float64 [O, 8] for uniform levels of 1..8 bits, and float64 [O, 4] for fitted levels of
        1..4 bits or None.

    Raises:
        CalibrationError: A weight or an input is not finite.
    """
    W = W.detach().float()
    if scales is None:
        scales = fitted_scales(W, inputs.energy, max_numbers)
    if scales is not None:
        energy = inputs.energy.float()

        def fitted(bits: int) -> Tensor:
            codes, scale = quantize_codebook(W, torch.full((len(W),), bits), energy)
            return inputs.error(W - dequantize(codes, scale), 0, len(W))

        return (
            _uniform_errors(W, inputs, scales),
            _columns(CODEBOOK_MAX_BITS, fitted) if codebooks else None,
        )
    few = _FewChannels.of(W, inputs.energy, seed)
    uniform = _uniform_errors(W, inputs, few.scales())
    if not codebooks:
        return uniform, None
    shares = [few.codebook_share(bits) for bits in range(1, CODEBOOK_MAX_BITS + 1)]
    return uniform, uniform[:, :CODEBOOK_MAX_BITS] * torch.tensor(shares, dtype=torch.float64)


def fitted_scales(W: Tensor, energy: Tensor, max_numbers: int = MAX_NUMBERS) -> Tensor | None:
    """Scales of all channels at every width, for layers that are not too large.

    Args:
        W: Weight rows, float [O, K].
        energy: Mean square of each weight's input, [K] or [O, K].
        max_numbers: Largest layer, in weights, that is fitted as a whole.

    Returns:
        float32 [8, O], of 1 to 8 bits; None for larger layers.
    """
    return uniform_scales(W, energy.float()) if W.numel() <= max_numbers else None


def _uniform_errors(W: Tensor, inputs: ChannelInputs, scales: Sequence[Tensor] | Tensor) -> Tensor:
    return _columns(MAX_BITS, lambda bits: _error_at(W, inputs, scales[bits - 1], bits))


def _columns(bits: int, measure: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([measure(width) for width in range(1, bits + 1)], dim=1)


def _error_at(W: Tensor, inputs: ChannelInputs, scale: Tensor, bits: int) -> Tensor:
    errors = []
    step = max(1, _CHUNK // W.shape[1])
    for first in range(0, len(W), step):
        rows, scales = W[first : first + step], scale[first : first + step]
        errors.append(
            inputs.error(rows - dequantize(snap(rows, scales, bits), scales), first, len(W))
        )
    return torch.cat(errors)


def feedback_gains(
    W: Tensor,
    fit: Tensor,
    held_out: Tensor,
    *,
    codebooks: bool = True,
    scales: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Share of the error of nearest rounding that GPTQ leaves, at each width.

    A few channels are rounded at all widths in one run, since rows do not meet in it; the errors of
    both roundings are measured on rows that the feedback did not see.

    Args:
        W: Weight rows, float [O, K].
        fit: Input rows for the feedback, [N, K] or [N, G, K], less what a bias makes up for; of a
            grouped layer, the first group stands for all.
        held_out: Rows for the measurement, in the same form.
        codebooks: Measure fitted levels too.
        scales: From `fitted_scales`; those of the few channels are fitted here where it has none.
        seed: Of the sampled channels.

    Returns:
        float64 [8] for uniform levels, and float64 [4] for fitted levels or None.

    Raises:
        CalibrationError: Rows are not finite.
    """
    channels = len(W)
    if fit.dim() == 3:
        channels //= fit.shape[1]
        fit, held_out = fit[:, 0], held_out[:, 0]
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(channels, generator=generator)[:_FEEDBACK_CHANNELS]
    rows = W.detach()[picked].float()
    gram = Gram.of(fit)
    tests = held_out.float()
    importance = gram.diagonal.float()
    chosen = uniform_scales(rows, importance) if scales is None else scales[:, picked]

    def uniform(stacked: Tensor, bits: Tensor) -> RowLevels:
        return RowLevels(bits=bits, scale=chosen.flatten(), tables=None)

    def codebook(stacked: Tensor, bits: Tensor) -> RowLevels:
        return RowLevels.fit(stacked, bits, "codebook", importance)

    def gains(fit: Callable[[Tensor, Tensor], RowLevels], largest: int) -> Tensor:
        stacked = rows.repeat(largest, 1)
        bits = torch.arange(1, largest + 1).repeat_interleave(len(rows))
        levels = fit(stacked, bits)
        nearest = levels.snap(stacked)
        fed_back = gptq(stacked, levels, gram)
        errors = [
            (tests @ (stacked - codes.float() * levels.scale[:, None]).T).double().square().sum(0)
            for codes in (fed_back, nearest)
        ]
        after, before = (error.view(largest, -1).sum(dim=1) for error in errors)
        return torch.where(before > 0, after / before.clamp_min(1e-300), 1.0).clamp(0, _MAX_GAIN)

    return gains(uniform, MAX_BITS), gains(codebook, CODEBOOK_MAX_BITS) if codebooks else None


@dataclass(frozen=True, kw_only=True, eq=False)
class _FewChannels:
    """A few channels of a large layer, fitted; and two measures of scale of all channels.

    Attributes:
        rows: Weights of the few, [n, K].
        energy: Mean squares of their inputs, [K] or [n, K].
        picked: Which channels they are, int64 [n].
        log_rms: Logarithm of the root mean square of each channel's weights, weighted like that.
        log_max: Logarithm of its largest weight.
    """

    rows: Tensor
    energy: Tensor
    picked: Tensor
    log_rms: Tensor
    log_max: Tensor

    @classmethod
    def of(cls, W: Tensor, energy: Tensor, seed: int) -> Self:
        generator = torch.Generator().manual_seed(seed)
        count = max(2, _SAMPLE // W.shape[1])
        picked = torch.randperm(len(W), generator=generator)[:count]
        h = energy.float()
        weighted = W.square() @ h if h.dim() == 1 else (W.square() * h).sum(dim=1)
        rms = (weighted / h.sum(dim=-1).clamp_min(1e-30)).sqrt()
        return cls(
            rows=W[picked],
            energy=h if h.dim() == 1 else h[picked],
            picked=picked,
            log_rms=rms.clamp_min(1e-30).log(),
            log_max=W.abs().amax(dim=1).clamp_min(1e-30).log(),
        )

    def scales(self) -> list[Tensor]:
        """Scales of all channels at 1..8 bits, float32 [O] each.

        A power law in both measures, fitted to the few.
        """
        return [self._scale(fitted) for fitted in uniform_scales(self.rows, self.energy)]

    def _scale(self, fitted: Tensor) -> Tensor:
        spread = self.log_rms - self.log_max
        picked = spread[self.picked]
        target = fitted.log() - self.log_max[self.picked]
        deviation = picked - picked.mean()
        share = (deviation * target).sum() / deviation.square().sum().clamp_min(1e-12)
        share = share.clamp(0, 1)
        offset = (target - share * picked).median()
        return round_scale((self.log_max + share * spread + offset).exp())

    def codebook_share(self, bits: int) -> float:
        """Error of fitted levels over that of uniform ones."""
        widths = torch.full((len(self.rows),), bits)
        fitted, uniform = (
            float((self.energy * (self.rows - dequantize(*result)).square()).double().sum())
            for result in (
                quantize_codebook(self.rows, widths, self.energy),
                quantize_uniform(self.rows, widths, self.energy),
            )
        )
        return fitted / uniform if uniform else 1.0
