"""What scaling the channels of an input does to the rounding of the weights that it meets.

With `W x = (W f) (x / f)` one range for all channels fits the inputs better, and one scale for a
row of weights fits worse, or better. At 8 bits a weight that is next to nothing; at 2 it is more
than what the inputs gain. So both errors are counted, in one unit: squared error of the output.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqdm_fx.bits.channel_sizes import ChannelSizes
from mpqdm_fx.graph.layers import WeightLayer, weight_rows
from mpqdm_fx.numerics.levels.grids import MAX_BITS, dequantize
from mpqdm_fx.numerics.solve.scales import quantize_uniform

__all__ = ["expected_widths", "weight_costs"]

_CHANNELS = 16  # output channels that stand for all of a layer
_FEEDBACK = 0.5  # of nearest rounding's error stays, roughly; `feedback_gains` measures it by layer
_BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class _WeightSample:
    """A few rows of a layer's weights, and what errors in them do.

    Attributes:
        rows: Weights, float32 [n, K].
        energy: Mean square of each weight's input, float64 [n, K].
        importance: Squared error of the output per squared error of a row's output, float64 [n];
            all rows of the layer together.
        places: Which entry of a factor [C] belongs to each weight, int64 [n, K].
    """

    rows: Tensor
    energy: Tensor
    importance: Tensor
    places: Tensor

    @classmethod
    def of(
        cls, layer: WeightLayer, mean_square: Tensor, energies: Tensor, seed: int
    ) -> "_WeightSample":
        rows = weight_rows(layer.module).detach().float().cpu()
        channels, inputs = layer.weight.shape[:2]
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(channels, generator=generator)[:_CHANNELS].sort().values
        groups = int(getattr(layer.module, "groups", 1))
        within = torch.arange(rows.shape[1]) // (rows.shape[1] // inputs)
        places = (picked // (channels // groups) * inputs)[:, None] + within
        return cls(
            rows=rows[picked],
            energy=mean_square[places],
            importance=energies[picked] * (channels / len(picked)),
            places=places,
        )

    def error(self, bits: int, factor: Tensor | None = None) -> float:
        """Squared error of the output from rounding the layer to nearest.

        Args:
            bits: Width of all rows.
            factor: What the channels of the input are divided by, float [C].
        """
        rows, energy = self.rows, self.energy
        if factor is not None:
            factors = factor[self.places]
            rows, energy = rows * factors.to(rows), energy / factors.to(energy).square()
        widths = torch.full((len(rows),), bits)
        codes, scale = quantize_uniform(rows, widths, energy.float())
        squared = (rows - dequantize(codes, scale)).double().square()
        return float(self.importance @ (energy * squared).sum(dim=1))


def weight_costs(
    layers: Mapping[str, WeightLayer],
    units: Mapping[str, Sequence[str]],
    sizes: ChannelSizes,
    energies: Mapping[str, Tensor],
    exponents: Sequence[float],
    *,
    fixed: Mapping[str, int],
    mean_bits: float,
    feedback: bool,
    seed: int,
) -> dict[str, dict[float, float]]:
    """Squared error of the model's output from the weights of each unit, mean over samples.

    Args:
        layers: Weight layers that are quantized, by name.
        units: Layers that read the same numbers, by the name of the first.
        sizes: Of the channels that they read.
        energies: By layer, what an error of each output channel does, float64 [O]; see
            `OutputEnergies.channels`.
        exponents: How far channels may be brought to one size.
        fixed: Bits of layers that have them whatever is chosen.
        mean_bits: Average of the others.
        feedback: Weights are rounded with error feedback.
        seed: Of the channels that stand for all.

    Returns:
        By unit and exponent.
    """
    samples = {
        name: _WeightSample.of(layers[name], sizes.mean_square[unit], energies[name], seed)
        for unit, names in units.items()
        for name in names
        if name in layers and unit in sizes.mean_square
    }
    free = [name for name in samples if name not in fixed]
    start = min(MAX_BITS, max(1, round(mean_bits)))
    widths = dict(fixed)
    expected = expected_widths(
        torch.tensor([samples[name].error(start) * 4.0**start for name in free]).double(),
        torch.tensor([layers[name].weight.numel() for name in free]).double(),
        mean_bits,
    )
    widths.update(zip(free, expected, strict=True))
    share = _FEEDBACK if feedback else 1.0
    return {
        unit: {
            exponent: share
            * sum(
                samples[name].error(
                    widths[name], sizes.factor(unit, exponent) if exponent else None
                )
                for name in names
                if name in samples
            )
            for exponent in exponents
        }
        for unit, names in units.items()
    }


def expected_widths(costs: Tensor, numbers: Tensor, mean_bits: float) -> list[int]:
    """Widths at which every weight costs about the same (reverse water-filling).

    With an error of `c 4^-b` for `n` weights of `b` bits, the sum over layers is least at a given
    average where `c 4^-b / n` is the same in all of them, but for widths below 1 or over 8.

    Args:
        costs: c of each layer, float64 [L].
        numbers: n of each layer, float64 [L].
        mean_bits: The average over all weights.
    """
    if not len(costs):
        return []
    level = 0.5 * (costs.clamp_min(1e-300) / numbers).log2()
    low, high = float(level.min()) - MAX_BITS, float(level.max())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        widths = (level - middle).clamp(1, MAX_BITS)
        if float((widths * numbers).sum() / numbers.sum()) > mean_bits:
            low = middle
        else:
            high = middle
    return [math.floor(width + 0.5) for width in (level - high).clamp(1, MAX_BITS).tolist()]
