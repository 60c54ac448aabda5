"""Bits by measured cost: what rounding a channel does to the model's output, under a budget."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from mpqdm_fx.calibration.allocate import Limits, even_levels, float_tensors
from mpqdm_fx.calibration.pinning import pinned_layers
from mpqdm_fx.calibration.sensitivity import measure_sensitivity
from mpqdm_fx.calibration.sensitivity_table import SensitivityTable
from mpqdm_fx.config import Levels, MPQConfig
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.numerics.budget import allocate_budget
from mpqdm_fx.numerics.packing import storage_bits
from mpqdm_fx.plan import LayerPlan
from mpqdm_fx.sweep.checkpoint import Checkpoint
from mpqdm_fx.sweep.shards import Shards

__all__ = ["budget_bits", "measured_plans", "solve_budget"]

_MAX_ROWS = 4096

TABLE = "sensitivity.safetensors"


def measured_plans(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    settings: MPQConfig,
    limits: Limits,
    checkpoint: Checkpoint | None,
    shards: Shards,
    *,
    path: Path | None = None,
    max_memory: int | None = None,
    half: bool = False,
) -> dict[str, LayerPlan]:
    """Measure (or load) the sensitivities and solve for the settings' budget.

    Args:
        graph_module: Normalized float graph.
        calls: All calibration calls.
        settings: The run's settings.
        limits: Layers off the budget's choice; their bits count against it.
        checkpoint: Where the table is kept for a run that goes on.
        shards: The processes; the first one measures.
        path: File that keeps the table for other budgets; read if it is there.
        max_memory: Bytes of activations held in memory.
        half: Hold activations as float16.

    Raises:
        ConfigError: The budget is below what the smallest widths take.
        CalibrationError: Gradients or rows are not finite.
        ArtifactError: The file is damaged, or of another model.
    """
    kept = None if checkpoint is None else checkpoint.directory / TABLE
    path = path or kept
    run = None if checkpoint is None else checkpoint.run

    def make() -> SensitivityTable:
        if path is not None and path.exists():
            found = SensitivityTable.load(path)
            if path == kept and found.run != run:
                raise ArtifactError(
                    f"{path} is of another run than the folder it lies in; delete it and resume"
                )
            return found
        table = measure_sensitivity(
            graph_module,
            calls,
            seed=settings.seed,
            max_rows=min(settings.max_rows, _MAX_ROWS),
            max_memory=max_memory,
            half=half,
        )
        if path is not None:
            dataclasses.replace(table, run=run).save(path)
        return table

    return solve_budget(graph_module, shards.once(make), settings, limits)


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
    table.check(graph_module)
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


def _levels(layer: WeightLayer, chosen: Levels, settings: MPQConfig) -> Levels:
    return even_levels(layer, settings) if chosen == "uniform" else chosen


def budget_bits(graph_module: fx.GraphModule, settings: MPQConfig, limits: Limits) -> int:
    """Stored bits that the quantized layers may take in all.

    Args:
        graph_module: Normalized float graph.
        settings: `weight_bytes`, `effective_bits`, or `weight_bits`: then what uniform bits take,
            with uniform levels and the layers that the paper's recipe keeps at 8 bits.
        limits: Layers left in float; they count against a budget that is given.
    """
    layers = weight_layers(graph_module, embeddings=True)
    kept = {name: layer for name, layer in layers.items() if name not in limits.skipped}
    floats = float_tensors(graph_module, set(kept), limits.skipped)
    in_float = sum(tensor.numel * tensor.bits for tensor in floats if tensor.is_weight)
    if settings.weight_bytes is not None:
        return 8 * settings.weight_bytes - in_float
    if settings.effective_bits is not None:
        weights = sum(layer.weight.numel() for layer in layers.values())
        return int(settings.effective_bits * weights) - in_float
    pinned = pinned_layers(graph_module)
    total = 0
    for name, layer in kept.items():
        channels = layer.weight.shape[0]
        bits = 8 if name in pinned else settings.weight_bits
        if name in limits.fixed:
            bits = limits.fixed[name][0]
        shape = (channels, layer.weight.numel() // channels)
        total += storage_bits(shape, torch.full((channels,), bits), "uniform").total
    return total
