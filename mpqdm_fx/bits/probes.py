"""Squared Jacobian of the model's output, by random directions: what an error at a channel does.

With y_i the output of channel i at all its positions p and J the Jacobian of the model's output f,
independent errors e_ip change the output by

    E |df|^2 = sum_i s_i E e_i^2,    s_i = sum_p |J_ip|^2 = E_v sum_p (d<v, f> / d y_ip)^2

for random v with E v v^T = I (Hutchinson 1989). One backward pass gives all layers' terms for a v.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.parted_probe import PartedProbe
from mpqdm_fx.bits.probe import GradientWatch
from mpqdm_fx.bits.probed_parts import probed_parts
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.io.progress import tracked

__all__ = ["PROBES", "SAMPLES", "OutputEnergies", "output_energies"]

PROBES = 2
"""Random directions of the output, unless other many are asked for."""

SAMPLES = 128
"""Samples that are probed, unless other many are asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputEnergies:
    """What errors of each layer's output do to the model's output.

    Attributes:
        channels: By layer, s [O] as above, mean over samples, float64; of an embedding table
            [O, K], since each number of it is an output of its own.
        groups: By layer, the sum of s over channels in each group of noise levels, mean over its
            samples, float64 [G].
        output: Energy of the model's output, mean over samples.
        samples: Samples that were probed.
    """

    channels: Mapping[str, Tensor]
    groups: Mapping[str, Tensor]
    output: float
    samples: int


def output_energies(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    *,
    probes: int = PROBES,
    samples: int = SAMPLES,
    seed: int = 0,
    weights: Sequence[Tensor] | None = None,
    groups: NoiseGroups | None = None,
    watch: GradientWatch | None = None,
    skipped: Collection[str] = (),
) -> OutputEnergies:
    """Measure every weight layer of a float graph.

    Args:
        graph_module: Normalized float graph.
        calls: Calibration calls: tensors by placeholder name. Samples are taken evenly from all.
        probes: Random directions of the output, each one backward pass per sample.
        samples: How many samples to probe; all, if there are fewer.
        seed: Of the directions.
        weights: Importance of each sample, one tensor [B] per call. Default: all alike.
        groups: Groups of noise levels; None for one group.
        watch: Is shown what layers read and write, and the gradients there.
        skipped: Layers whose energies nobody asks for: no gradient has to reach them.

    Raises:
        CalibrationError: The weights do not fit the calls, the output does not depend on any weight
            layer, or on one in steps alone, or what a layer writes or a gradient is not finite.
    """
    if weights is not None and len(weights) != len(calls):
        raise CalibrationError(f"{len(weights)} tensors of weights for {len(calls)} calls")
    groups = groups or NoiseGroups.one()
    probe = PartedProbe(graph_module, seed, groups, watch, skipped)
    parts = probed_parts(graph_module, calls, weights, samples, groups)
    for inputs, importance in tracked(parts, "sensitivities"):
        probe.measure(inputs, probes, importance)
    total = float(probe.weight.sum())
    if not total > 0:
        raise CalibrationError("the weights of all probed samples are zero")
    for name, energy in probe.energy.items():
        if not bool(torch.isfinite(energy).all()):
            raise CalibrationError(
                f"{name}: the output has no finite gradient here; check the calibration data"
            )
    return OutputEnergies(
        channels={name: energy / total for name, energy in probe.energy.items()},
        groups={name: _group_means(sums, probe.weight) for name, sums in probe.by_group.items()},
        output=probe.output_energy / total,
        samples=probe.samples,
    )


def _group_means(sums: Tensor, weight: Tensor) -> Tensor:
    """Mean of each group [G]; a group that was not probed gets the mean of all."""
    means = sums / weight.clamp_min(1e-300)
    return torch.where(weight > 0, means, sums.sum() / weight.sum())
