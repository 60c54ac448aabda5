"""Measure what rounding each channel does to the model's output: `measure_sensitivity`.

To first order, and for errors that do not depend on each other, the squared error of the output is
the sum over channels of sensitivity (`probes`) times squared error of the channel
(`rounding_errors`). Alternatives were measured on the bundled model and lost, or were as good and
dearer: squared weight gradients, which see that one error repeats at all positions, instead of
squared output gradients; and one sensitivity for all channels of a layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, fx

from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.probes import PROBES, OutputEnergies, output_energies
from mpqdm_fx.bits.rounding_errors import (
    MAX_NUMBERS,
    ChannelInputs,
    channel_errors,
    feedback_gains,
    fitted_scales,
)
from mpqdm_fx.bits.row_weights import RowWeights
from mpqdm_fx.bits.sensitivity_table import LayerSensitivity, SensitivityTable
from mpqdm_fx.calibration.calls import check_calls
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.graph.layers import (
    EMBEDDINGS,
    WeightLayer,
    output_positions,
    sample_rows,
    weight_layers,
    weight_rows,
)
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.numerics.finite import all_finite
from mpqdm_fx.numerics.levels.grids import CODEBOOK_MAX_BITS, MAX_BITS
from mpqdm_fx.numerics.solve.gram import kept_rows
from mpqdm_fx.numerics.solve.layer_rows import LayerRows
from mpqdm_fx.records.validation import Between, Bytes, Count, Seed, checked
from mpqdm_fx.run.walk import Walk

__all__ = ["measure_sensitivity"]

_TEST_ROWS = 512  # rows that errors are measured on
_WIDE_ROWS = 1024  # rows of a layer that has fewer rows than columns: the work grows with the cube


@plain_torch()
@checked
def measure_sensitivity(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    *,
    probes: Count = PROBES,
    samples: Count = 128,
    seed: Seed = 0,
    weights: Sequence[Tensor] | None = None,
    groups: NoiseGroups | None = None,
    energies: OutputEnergies | None = None,
    codebooks: bool = True,
    max_rows: Count = 4096,
    max_numbers: Annotated[int, Between(0, 2**62)] = MAX_NUMBERS,
    max_memory: Bytes | None = None,
    half: bool = False,
    directory: Path | None = None,
) -> SensitivityTable:
    """Measure a float graph; nothing in it is changed.

    Args:
        graph_module: Normalized float graph.
        calls: Calibration calls: tensors by placeholder name, spread over the timesteps as the
            model will meet them.
        probes: Random directions of the output, each one backward pass per sample.
        samples: How many samples to probe, taken evenly from the calls; all, if there are fewer.
        seed: Of the directions and of all that is sampled.
        weights: Importance of each sample, one tensor [B] per call, for instance the square of what
            the sampler multiplies the model's output with at that timestep. Default: all alike.
        groups: Groups of noise levels; rows of each count by what errors in them do to the output.
            None for one group.
        energies: What `output_energies` found with these settings; None measures them.
        codebooks: Measure fitted levels too.
        max_rows: Input rows of a layer for the effect of GPTQ's feedback; best as many as the
            rounding will have.
        max_numbers: Largest layer, in weights, whose rounding errors are measured by fitting all of
            its channels; larger ones take a cheaper estimate.
        max_memory: Bytes of activations held in memory while the rounding errors are measured.
        half: Hold activations as float16 there.
        directory: Where to put what does not fit in memory.

    Returns:
        The table. Its costs are mean squared errors per sample of the model's output, summed over
        the output's elements.

    Raises:
        ConfigError: A number is out of range.
        CalibrationError: There are no calls, a layer's input, gradient or weight is not finite, or
            the output does not depend on any weight layer.
    """
    if len(calls) == 0:
        raise CalibrationError("no calibration data: sensitivities need at least one call")
    check_calls(calls)
    layers = weight_layers(graph_module, embeddings=True)
    for layer in layers.values():
        if not all_finite(layer.weight):
            raise CalibrationError(f"{layer.name}: its weight holds NaN or infinity")
    groups = groups or NoiseGroups.one()
    if energies is None:
        energies = output_energies(
            graph_module,
            calls,
            probes=probes,
            samples=samples,
            seed=seed,
            weights=weights,
            groups=groups,
        )
    row_weights = RowWeights(groups=groups, energies=energies.groups)
    held_out = groups.held_out(calls)
    entries: dict[str, LayerSensitivity] = {}
    first_calls = {layer.nodes[0]: layer for layer in layers.values()}
    walk = Walk(
        graph_module,
        calls,
        max_memory=max_memory,
        half=half,
        directory=directory,
        progress="rounding errors",
    )
    for node in walk:
        if node not in first_calls:
            continue
        layer = first_calls[node]
        measure = _Measure(energies, codebooks=codebooks, max_numbers=max_numbers, seed=seed)
        if isinstance(layer.module, EMBEDDINGS):
            entries[layer.name] = measure.table(layer)
        else:
            sampled = _rows(walk, node, layer, calls, row_weights, max_rows, seed)
            entries[layer.name] = measure.layer(layer, *_parted(sampled, held_out, seed))
    return SensitivityTable(
        layers=tuple(entries[name] for name in layers),
        fingerprint=graph_fingerprint(graph_module),
        seed=seed,
        probes=probes,
        samples=energies.samples,
        groups=groups,
    )


def _rows(
    walk: Walk,
    node: fx.Node,
    layer: WeightLayer,
    calls: Sequence[Mapping[str, Any]],
    row_weights: RowWeights,
    max_rows: int,
    seed: int,
) -> list[LayerRows]:
    """Sample a layer's input rows from every call."""
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    generator = torch.Generator().manual_seed(seed)
    count = 0
    rows: list[LayerRows] = []
    for call, value in zip(calls, walk.values(source), strict=True):
        total = output_positions(layer.module, value)
        if not count:  # at the first call; positions grow with the batch
            width = layer.weight[0].numel()
            available = total * sum(map(batch_size_of, calls)) // batch_size_of(calls[0])
            quota = kept_rows(width, available, max_rows)
            quota = quota if width <= quota else min(quota, _WIDE_ROWS)
            count = -(-quota // len(calls))
        positions = torch.randperm(total, generator=generator)[:count]
        sampled = sample_rows(layer.module, value, positions=positions)
        if not all_finite(sampled):
            raise CalibrationError(f"{layer.name}: it reads NaN or infinity")
        samples = row_weights.groups.of_samples(call)
        weights = row_weights.of_rows(layer.name, samples, positions, total)
        rows.append(LayerRows(inputs=sampled.float().cpu(), shift=None, weights=weights))
    return rows


def _parted(
    calls: Sequence[LayerRows], held_out: Sequence[int], seed: int
) -> tuple[LayerRows, LayerRows]:
    """Rows to fit to, and rows to measure on: of whole calls where there are at least four."""
    generator = torch.Generator().manual_seed(seed)
    if len(calls) >= 4:
        rest = [rows for index, rows in enumerate(calls) if index not in held_out]
        fit, test = LayerRows.join(rest), LayerRows.join([calls[index] for index in held_out])
    else:
        joined = LayerRows.join(calls)
        order = torch.randperm(len(joined), generator=generator)
        quarter = -(-len(joined) // 4)
        fit, test = joined.take(order[quarter:]), joined.take(order[:quarter])
        if not len(fit):  # a single row
            fit = test
    return fit, test.take(torch.randperm(len(test), generator=generator)[:_TEST_ROWS])


class _Measure:
    """Makes the table's entries."""

    def __init__(
        self, energies: OutputEnergies, *, codebooks: bool, max_numbers: int, seed: int
    ) -> None:
        self._energies = energies
        self._codebooks = codebooks
        self._max_numbers = max_numbers
        self._seed = seed

    def layer(
        self, layer: WeightLayer, fit_rows: LayerRows, held_out_rows: LayerRows
    ) -> LayerSensitivity:
        """Entry of a layer from its input rows."""
        weight = weight_rows(layer.module).cpu()
        # a bias makes up for what rounding does to the mean
        means = None if layer.module.bias is None else fit_rows.means()
        fit, held_out = fit_rows.fitted(means).inputs, held_out_rows.fitted(means).inputs
        inputs = ChannelInputs.of(fit, held_out, len(weight))
        scales = fitted_scales(weight, inputs.energy, self._max_numbers)
        gains = feedback_gains(
            weight, fit, held_out, codebooks=self._codebooks, scales=scales, seed=self._seed
        )
        return self._entry(layer, self._energies.channels[layer.name], inputs, gains, scales)

    def table(self, layer: WeightLayer) -> LayerSensitivity:
        """Entry of an embedding table from its energies [O, K].

        A row is written where it is looked up, so each of its numbers is an output of its own, and
        nothing makes up for its error. A row that no sample looked up may be needed later: it
        counts as the average of those that were.
        """
        energy = self._energies.channels[layer.name]
        used = energy.sum(dim=1) > 0
        typical = energy[used].mean(dim=0) if bool(used.any()) else torch.zeros_like(energy[0])
        energy = torch.where(used[:, None], energy, typical)
        sensitivity = energy.mean(dim=1)
        relative = energy / sensitivity.clamp_min(1e-300)[:, None]
        ones = torch.ones(MAX_BITS, dtype=torch.float64)
        gains = (ones, ones[:CODEBOOK_MAX_BITS].clone() if self._codebooks else None)
        return self._entry(layer, sensitivity, ChannelInputs(rows=None, energy=relative), gains)

    def _entry(
        self,
        layer: WeightLayer,
        sensitivity: Tensor,
        inputs: ChannelInputs,
        gains: tuple[Tensor, Tensor | None],
        scales: Tensor | None = None,
    ) -> LayerSensitivity:
        uniform, codebook = channel_errors(
            weight_rows(layer.module).cpu(),
            inputs,
            codebooks=self._codebooks,
            max_numbers=self._max_numbers,
            scales=scales,
            seed=self._seed,
        )
        return LayerSensitivity(
            name=layer.name,
            shape=tuple(layer.weight.shape),
            sensitivity=sensitivity,
            by_group=self._energies.groups[layer.name],
            uniform=uniform,
            uniform_gain=gains[0],
            codebook=codebook,
            codebook_gain=gains[1],
        )
