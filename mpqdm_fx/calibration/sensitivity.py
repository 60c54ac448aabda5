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

from mpqdm_fx.ambient import plain_torch
from mpqdm_fx.calibration.calls import check_calls
from mpqdm_fx.calibration.probes import output_energies
from mpqdm_fx.calibration.rounding_errors import (
    MAX_NUMBERS,
    ChannelInputs,
    channel_errors,
    feedback_gains,
)
from mpqdm_fx.calibration.sensitivity_table import LayerSensitivity, SensitivityTable
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.calling import batch_size_of
from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.graph.layers import (
    EMBEDDINGS,
    WeightLayer,
    output_positions,
    sample_rows,
    weight_layers,
    weight_rows,
)
from mpqdm_fx.graph.walk import Walk
from mpqdm_fx.numerics.gram import kept_rows
from mpqdm_fx.numerics.grids import CODEBOOK_MAX_BITS, MAX_BITS
from mpqdm_fx.validation import Between, Bytes, Count, Seed, checked

__all__ = ["measure_sensitivity"]

_TEST_ROWS = 512  # rows that errors are measured on
_WIDE_ROWS = 1024  # rows of a layer that has fewer rows than columns: the work grows with the cube


@plain_torch()
@checked
def measure_sensitivity(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    *,
    probes: Count = 2,
    samples: Count = 128,
    seed: Seed = 0,
    weights: Sequence[Tensor] | None = None,
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
        if not bool(torch.isfinite(layer.weight).all()):
            raise CalibrationError(f"{layer.name}: its weight holds NaN or infinity")
    energies, probed = output_energies(
        graph_module, calls, probes=probes, samples=samples, seed=seed, weights=weights
    )
    entries: dict[str, LayerSensitivity] = {}
    batches = [batch_size_of(call) for call in calls]
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
        found = first_calls.get(node)
        if found is None:
            continue
        measure = _Measure(codebooks=codebooks, max_numbers=max_numbers, seed=seed)
        if isinstance(found.module, EMBEDDINGS):
            entries[found.name] = measure.table(found, energies[found.name])
        else:
            fit, held_out = _rows(walk, node, found, batches, max_rows, seed)
            entries[found.name] = measure.layer(found, energies[found.name], fit, held_out)
    return SensitivityTable(
        layers=tuple(entries[name] for name in layers),
        fingerprint=graph_fingerprint(graph_module),
        seed=seed,
        probes=probes,
        samples=probed,
    )


def _rows(
    walk: Walk,
    node: fx.Node,
    layer: WeightLayer,
    batches: Sequence[int],
    max_rows: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Sample a layer's input rows: three quarters to fit, one quarter to measure on.

    Whole calls are held out where there are at least four.
    """
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    generator = torch.Generator().manual_seed(seed)
    count = 0
    rows: list[Tensor] = []
    for value in walk.values(source):
        if not count:  # at the first call; positions grow with the batch
            width = layer.weight[0].numel()
            wanted = kept_rows(
                width, output_positions(layer.module, value) * sum(batches) // batches[0], max_rows
            )
            wanted = wanted if width <= wanted else min(wanted, _WIDE_ROWS)
            count = -(-wanted // len(batches))
        sampled = sample_rows(layer.module, value, count=count, generator=generator)
        if not bool(torch.isfinite(sampled).all()):
            raise CalibrationError(f"{layer.name}: it reads NaN or infinity")
        rows.append(sampled.float().cpu())
    if len(batches) >= 4:
        fit = torch.cat([part for index, part in enumerate(rows) if index % 4 != 3])
        held_out = torch.cat(rows[3::4])
    else:
        joined = torch.cat(rows)
        joined = joined[torch.randperm(len(joined), generator=generator)]
        quarter = -(-len(joined) // 4)
        fit, held_out = joined[quarter:], joined[:quarter]
        if not len(fit):  # a single row
            fit = held_out
    picked = torch.randperm(len(held_out), generator=generator)[:_TEST_ROWS]
    return fit, held_out[picked]


class _Measure:
    """Makes the table's entries."""

    def __init__(self, *, codebooks: bool, max_numbers: int, seed: int) -> None:
        self._codebooks = codebooks
        self._max_numbers = max_numbers
        self._seed = seed

    def layer(
        self, layer: WeightLayer, sensitivity: Tensor, fit: Tensor, held_out: Tensor
    ) -> LayerSensitivity:
        """Entry of a layer from its sensitivity [O] and its input rows."""
        weight = weight_rows(layer.module).cpu()
        center = layer.module.bias is not None
        inputs = ChannelInputs.of(fit, held_out, len(weight), center=center)
        gains = feedback_gains(
            weight, fit, held_out, center=center, codebooks=self._codebooks, seed=self._seed
        )
        return self._entry(layer, sensitivity, inputs, gains)

    def table(self, layer: WeightLayer, energy: Tensor) -> LayerSensitivity:
        """Entry of an embedding table from its energies [O, K].

        A row is written where it is looked up, so each of its numbers is an output of its own, and
        nothing makes up for its error. A row that no sample looked up may be needed later: it
        counts as the average of those that were.
        """
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
    ) -> LayerSensitivity:
        uniform, codebook = channel_errors(
            weight_rows(layer.module).cpu(),
            inputs,
            codebooks=self._codebooks,
            max_numbers=self._max_numbers,
            seed=self._seed,
        )
        return LayerSensitivity(
            name=layer.name,
            shape=tuple(layer.weight.shape),
            sensitivity=sensitivity,
            uniform=uniform,
            uniform_gain=gains[0],
            codebook=codebook,
            codebook_gain=gains[1],
        )
