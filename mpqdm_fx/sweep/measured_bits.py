"""Bits by measured cost: what rounding a channel does to the model's output, under a budget."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from mpqdm_fx.bits.allocate import Limits, even_levels, fixed_plan, layer_limits
from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.pinning import pinned_layers
from mpqdm_fx.bits.probes import OutputEnergies
from mpqdm_fx.bits.sensitivity import measure_sensitivity
from mpqdm_fx.bits.sensitivity_table import SensitivityTable
from mpqdm_fx.calibration.count import bit_plan
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.numerics.bits.budget import allocate_budget
from mpqdm_fx.numerics.levels.grids import MAX_BITS
from mpqdm_fx.numerics.levels.packing import storage_bits
from mpqdm_fx.records.config import Levels, MPQConfig
from mpqdm_fx.records.plan import BitPlan, LayerPlan
from mpqdm_fx.sweep.checkpoint import Checkpoint
from mpqdm_fx.sweep.coded_budget import CodedBudget, coded_plan
from mpqdm_fx.sweep.shards import Shards

__all__ = [
    "TABLE",
    "budget_bits",
    "check_budget",
    "coded_budget",
    "expected_bytes",
    "mean_bits",
    "measured_table",
    "solve_budget",
]

_MAX_ROWS = 4096

TABLE = "sensitivity.safetensors"
"""Where a run that can be resumed keeps its sensitivities."""


def measured_table(
    graph_module: fx.GraphModule,
    scaled: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    settings: MPQConfig,
    checkpoint: Checkpoint | None,
    shards: Shards,
    *,
    groups: NoiseGroups,
    energies: Callable[[], OutputEnergies],
    path: Path | None = None,
    max_memory: int | None = None,
    half: bool = False,
) -> SensitivityTable:
    """Measure (or load) the sensitivities.

    Args:
        graph_module: Normalized float graph, which the table is of.
        scaled: The same with scaled inputs, whose weights are rounded.
        calls: All calibration calls.
        settings: The run's settings.
        checkpoint: Where the table is kept for a run that goes on.
        shards: The processes; the first one measures.
        groups: Groups of noise levels of the calls.
        energies: Makes `output_energies` of the calls, with these groups and the settings' seed.
        path: File that keeps the table for other budgets; read if it is there.
        max_memory: Bytes of activations held in memory.
        half: Hold activations as float16.

    Raises:
        CalibrationError: Gradients or rows are not finite.
        ArtifactError: The file is damaged, or of another model.
        ConfigError: The run in the checkpoint's folder went by another table.
    """
    default = None if checkpoint is None else checkpoint.directory / TABLE
    path = path or default
    run = None if checkpoint is None else checkpoint.run

    def make() -> SensitivityTable:
        if path is not None and path.exists():
            table = SensitivityTable.load(path)
            if path == default and table.run != run:
                raise ArtifactError(
                    f"{path} is of another run than the folder it lies in; delete it and resume"
                )
            if checkpoint is not None and checkpoint.holds_layers() and path != default:
                _check_kept(checkpoint, table, path)
            return table
        table = measure_sensitivity(
            scaled,
            calls,
            seed=settings.seed,
            groups=groups,
            energies=energies(),
            codebooks=settings.levels == "codebook",
            max_rows=min(settings.max_rows, _MAX_ROWS),
            max_memory=max_memory,
            half=half,
        )
        # what errors of a channel do is a matter of the model, however its inputs are scaled
        table = dataclasses.replace(table, fingerprint=graph_fingerprint(graph_module), run=run)
        if path is not None:
            table.save(path)
        return table

    table = shards.once(make)
    table.check(graph_module)
    return table


def _check_kept(checkpoint: Checkpoint, table: SensitivityTable, path: Path) -> None:
    """Refuse other sensitivities than those by which a run in this folder shared its bits."""
    kept = checkpoint.directory / TABLE
    if kept.is_file() and SensitivityTable.load(kept).digest() != table.digest():
        raise ConfigError(
            f"{path} holds other sensitivities than this run began with; give the sensitivity file "
            f"of the run that was killed, or start anew"
        )


def solve_budget(
    graph_module: fx.GraphModule, table: SensitivityTable, settings: MPQConfig, limits: Limits
) -> dict[str, LayerPlan]:
    """Bits of every channel under the settings' budget; a matter of seconds.

    Args:
        graph_module: Normalized float graph.
        table: What each channel costs at each width.
        settings: Budget, levels, alignment.
        limits: Layers with fixed bits, and those left in float.

    Raises:
        ConfigError: The budget is below what the smallest widths take.
        ArtifactError: The table is of another model.
    """
    layers = weight_layers(graph_module, embeddings=True)
    fixed = {name: bits for name, (bits, _) in limits.fixed.items()}
    costs = table.costs(
        settings.levels,
        fixed=fixed,
        skip=limits.skipped,
        feedback=settings.rounding != "nearest",
    )
    choices = allocate_budget(
        costs, budget_bits(graph_module, settings, limits), align=settings.align
    )
    return {
        cost.name: LayerPlan(
            name=cost.name,
            kind=type(layers[cost.name].module).__name__,
            shape=tuple(layers[cost.name].weight.shape),
            bits=tuple(choice.bits.tolist()),
            levels=_levels(layers[cost.name], choice.levels, settings),
            reason=limits.fixed[cost.name][1] if cost.name in limits.fixed else None,
        )
        for cost, choice in zip(costs, choices, strict=True)
    }


def coded_budget(
    graph_module: fx.GraphModule,
    table: SensitivityTable,
    settings: MPQConfig,
    limits: Limits,
    *,
    energies: Mapping[str, float] = MappingProxyType({}),
) -> tuple[dict[str, LayerPlan], CodedBudget]:
    """Layers without fixed widths, and what they may take together.

    Args: as of `solve_budget`; `energies` as of `CodedBudget`.
    """
    left = budget_bits(graph_module, settings, limits)
    plans, coded = {}, {}
    for name, layer in weight_layers(graph_module, embeddings=True).items():
        if name in limits.fixed:
            plans[name] = fixed_plan(layer, *limits.fixed[name])
            left -= plans[name].storage.total
        elif name not in limits.skipped:
            plans[name], coded[name] = coded_plan(layer), layer
    return plans, CodedBudget(coded, table, left, energies=energies)


def _levels(layer: WeightLayer, chosen: Levels, settings: MPQConfig) -> Levels:
    return even_levels(layer, settings) if chosen == "uniform" else chosen


def check_budget(graph_module: fx.GraphModule, settings: MPQConfig) -> None:
    """Refuse a budget that no widths meet, before anything is measured.

    Args:
        graph_module: Normalized float graph.
        settings: The run's settings.

    Raises:
        ConfigError: With one bit a weight the layers take more; says how much.
    """
    if settings.effective_bits is None and settings.weight_bytes is None:
        return
    limits = layer_limits(graph_module, settings)
    draft = _draft(graph_module, limits)
    layers = weight_layers(graph_module, embeddings=True)
    least = sum(
        _stored_bits(layer, limits.fixed.get(name, (1, ""))[0])
        for name, layer in layers.items()
        if name not in limits.skipped
    )
    missing = least - budget_bits(graph_module, settings, limits)
    if missing <= 0:
        return
    if settings.weight_bytes is not None:
        budget = f"weight_bytes={settings.weight_bytes}"
        smallest = f"weight_bytes={settings.weight_bytes - (-missing // 8)}"
    else:
        assert settings.effective_bits is not None
        budget = f"effective_bits={settings.effective_bits}"
        bits = settings.effective_bits + missing / draft.num_weights
        smallest = f"effective_bits={math.ceil(1e4 * bits) / 1e4:g}"
    reason = (
        f"{budget} cannot hold these layers even at 1 bit a weight: the smallest that can is "
        f"{smallest} (codes, scales, layers of fixed bits or in float)"
    )
    raise ConfigError("; ".join([reason, *draft.remarks]))


def _stored_bits(layer: WeightLayer, bits: int) -> int:
    """Bits of a layer of uniform levels: codes and scales."""
    channels = layer.weight.shape[0]
    shape = (channels, layer.weight.numel() // channels)
    return storage_bits(shape, torch.full((channels,), bits), "uniform").total


def mean_bits(graph_module: fx.GraphModule, settings: MPQConfig, limits: Limits) -> float:
    """Average bits, scales and all, of the weights whose bits are not fixed.

    Args: as of `budget_bits`.
    """
    if settings.allocation != "measured":
        return settings.weight_bits
    left = budget_bits(graph_module, settings, limits)
    numbers = 0
    for name, layer in weight_layers(graph_module, embeddings=True).items():
        if name in limits.fixed:
            left -= _stored_bits(layer, limits.fixed[name][0])
        elif name not in limits.skipped:
            numbers += layer.weight.numel()
    return left / max(1, numbers)


def budget_bits(graph_module: fx.GraphModule, settings: MPQConfig, limits: Limits) -> int:
    """Stored bits that the quantized layers may take in all.

    Args:
        graph_module: Normalized float graph.
        settings: `weight_bytes`, `effective_bits`, or `weight_bits`: then what uniform bits take,
            with uniform levels and the layers that the paper's recipe keeps at 8 bits.
        limits: Layers left in float; they count against a budget that is given, as do all other
            weights left in float.
    """
    layers = weight_layers(graph_module, embeddings=True)
    kept = {name: layer for name, layer in layers.items() if name not in limits.skipped}
    if settings.weight_bytes is not None or settings.effective_bits is not None:
        plan = _draft(graph_module, limits)
        budget = 8 * (settings.weight_bytes or 0)
        if settings.effective_bits is not None:
            budget = int(settings.effective_bits * plan.num_weights)
        in_float = sum(tensor.numel * tensor.bits for tensor in plan.float_weights)
        return budget - in_float
    pinned = pinned_layers(graph_module)
    total = 0
    for name, layer in kept.items():
        bits = 8 if name in pinned else settings.weight_bits
        if name in limits.fixed:
            bits = limits.fixed[name][0]
        total += _stored_bits(layer, bits)
    return total


def expected_bytes(
    graph_module: fx.GraphModule, settings: MPQConfig, limits: Limits
) -> tuple[int, int]:
    """Stored bytes of all weights, and of norms, biases and constants, before bits are decided.

    Args: as of `budget_bits`.
    """
    plan = _draft(graph_module, limits)
    in_float = sum(tensor.numel * tensor.bits for tensor in plan.float_weights)
    return (budget_bits(graph_module, settings, limits) + in_float) // 8, plan.float_bytes


def _draft(graph_module: fx.GraphModule, limits: Limits) -> BitPlan:
    """A plan whose widths mean nothing, for what does not depend on them: what stays in float."""
    layers = weight_layers(graph_module, embeddings=True)
    kept = (layer for name, layer in layers.items() if name not in limits.skipped)
    widest = (fixed_plan(layer, MAX_BITS, "") for layer in kept)
    return bit_plan(graph_module, graph_module, widest, limits.skipped)
