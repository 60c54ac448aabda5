"""How much the rows of each sample count in a layer's statistics: what errors in them do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqdm_fx.bits.noise_groups import NoiseGroups

__all__ = ["RowWeights"]

_LEAST = 1e-6  # of the largest weight: every row keeps a say


@dataclass(frozen=True, kw_only=True)
class RowWeights:
    """Weights of rows by layer and group of noise levels.

    The mean over rows of weight times squared error is, up to a factor, what the layer's error does
    to the model's output, if it does the same to every position of a sample.

    Attributes:
        groups: Groups of noise levels.
        energies: By layer, squared error of the model's output per squared error of the layer's
            output, in each group, float64 [G]. A layer without an entry has rows that count alike.
    """

    groups: NoiseGroups
    energies: Mapping[str, Tensor]

    def of_samples(self, layer: str, samples: Tensor) -> Tensor:
        """Weights of samples.

        Args:
            layer: Name of the layer that reads them.
            samples: Group of each sample, int64 [B]; see `NoiseGroups.of_samples`.

        Returns:
            float32 [B]; 1 in the group that counts most.
        """
        energy = self.energies.get(layer)
        if energy is None or not float(energy.max()) > 0:
            return torch.ones(len(samples))
        return (energy / energy.max()).clamp_min(_LEAST).float()[samples]

    def of_input(self, layers: Sequence[str], samples: Tensor) -> Tensor:
        """Weights of samples to all layers that read one value, mean over these, float32 [B].

        Args:
            layers: Their names.
            samples: Group of each sample, int64 [B].
        """
        return torch.stack([self.of_samples(name, samples) for name in layers]).mean(dim=0)

    def of_rows(self, layer: str, samples: Tensor, positions: Tensor, total: int) -> Tensor:
        """Weights of some rows of a call.

        Args:
            layer: Name of the layer that reads them.
            samples: Group of each sample of the call, int64 [B]; see `NoiseGroups.of_samples`.
            positions: Flat output positions of the rows, samples one after the other, int64 [P].
            total: Output positions of the whole call.

        Returns:
            float32 [P]; 1 in the group that counts most.
        """
        return self.of_samples(layer, samples)[positions * len(samples) // total]
