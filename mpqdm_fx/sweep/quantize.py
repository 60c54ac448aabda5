"""Quantize a whole graph: decide under the budget, sweep, write down the result."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from mpqdm_fx.activations import Activation, NoiseLevels
from mpqdm_fx.calibration.activation_choice import ActivationChoice
from mpqdm_fx.calibration.allocate import layer_limits
from mpqdm_fx.calibration.count import bit_plan, tell_remarks
from mpqdm_fx.calibration.noise_groups import NoiseGroups
from mpqdm_fx.calibration.records import RecordedInputs
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.editing import copy_graph_module
from mpqdm_fx.graph.lanes import error_lane_name
from mpqdm_fx.graph.layers import replace_module, weight_layers
from mpqdm_fx.plan import BitPlan
from mpqdm_fx.quantized import LayerReport
from mpqdm_fx.sweep.checkpoint import Checkpoint
from mpqdm_fx.sweep.identity import run_identity
from mpqdm_fx.sweep.preparation import prepared_sweep
from mpqdm_fx.sweep.shards import Shards
from mpqdm_fx.sweep.solve import LayerSolution
from mpqdm_fx.sweep.sweep import Sweep

__all__ = ["GraphQuantization", "finish", "start_sweep"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GraphQuantization:
    """What quantizing a graph gave.

    Attributes:
        rounded: Graph with rounded weights and refitted biases; activations are float.
        plan: Bits of every channel, and what stayed in float.
        activations: How each layer's activations are quantized.
        noise_levels: Groups of noise levels, for ranges by noise level.
        layers: One report per layer, in running order.
        choices: How each input is quantized and what that costs, where it was measured.
    """

    rounded: fx.GraphModule
    plan: BitPlan
    activations: Mapping[str, Activation]
    noise_levels: NoiseLevels | None
    layers: tuple[LayerReport, ...]
    choices: tuple[ActivationChoice, ...]


def start_sweep(
    graph_module: fx.GraphModule,
    records: RecordedInputs,
    settings: MPQConfig,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    max_memory: int | None = None,
    half: bool = False,
    device: torch.device | str | None = None,
    sensitivity: str | Path | None = None,
) -> Sweep:
    """Decide the bits that are decided beforehand, and set up the sweep.

    Args:
        graph_module: Normalized graph; it is not changed.
        records: Calibration calls.
        settings: The run's settings.
        directory: Folder for solved layers and sensitivities, so that a killed run can go on.
        resume: Go on with what the folder holds.
        max_memory: Bytes of activations held in memory; the rest goes to disk.
        half: Hold activations as float16.
        device: Where to compute; by default where the model is.
        sensitivity: File of the sensitivities, for `allocation="measured"`: read if it is there,
            else written. Another budget then takes seconds to solve.

    Raises:
        CalibrationError: No data, values that are not finite, or too little memory.
        ConfigError: A budget or a folder that cannot be used.
    """
    if len(records) == 0:
        raise CalibrationError(
            "no calibration data: call the prepared model on at least one input before convert"
        )
    if not weight_layers(graph_module):
        raise CalibrationError("calibration reached no weight layer; check the recorded inputs")
    calls = list(records)
    shards = Shards.of(len(calls))
    own = [calls[index] for index in shards.indices]
    limits = layer_limits(graph_module, settings)
    groups = NoiseGroups.of(graph_module, calls, settings)
    held_out = records.held_out or groups.held_out(calls)
    if settings.propagation == "auto" and not held_out:
        logger.warning(
            "propagation='auto' chooses strengths on held-out calls, and there is only one call: "
            "errors are not propagated; record more calls, or give a strength such as 0.5"
        )
    checkpoint = None
    if directory is not None and shards.rank == 0:
        identity = run_identity(graph_module, calls, held_out, settings)
        checkpoint = Checkpoint(directory, identity, resume=resume)
    prepared = prepared_sweep(
        graph_module,
        calls,
        settings,
        limits=limits,
        groups=groups,
        checkpoint=checkpoint,
        shards=shards,
        sensitivity=None if sensitivity is None else Path(sensitivity),
        max_memory=max_memory,
        half=half,
    )
    return Sweep(
        prepared.graph_module,
        own,
        settings,
        limits=limits,
        prepared=prepared,
        validation=held_out,
        shards=shards,
        checkpoint=checkpoint,
        max_memory=max_memory,
        half=half,
        progress="quantize" if shards.rank == 0 else None,
        device=device,
    )


def finish(sweep: Sweep) -> GraphQuantization:
    """Run a sweep to its end and write down the result.

    Args:
        sweep: From `start_sweep`, at any node.
    """
    sweep.run()
    _tell_short(sweep)
    graph_module, limits = sweep.source, sweep.limits
    rounded = copy_graph_module(graph_module)
    for name in sweep.solutions:
        # The very modules of the quantized lane: a large model is not held three times.
        module = sweep.graph_module.get_submodule(error_lane_name(name))
        replace_module(rounded, name, module)
    order = list(weight_layers(graph_module, embeddings=True))
    plan = bit_plan(
        graph_module,
        rounded,
        (sweep.solutions[name].plan for name in order if name in sweep.solutions),
        limits.skipped,
        activation_bits=sweep.settings.activation_bits,
    )
    tell_remarks(plan)
    return GraphQuantization(
        rounded=rounded,
        plan=plan,
        activations=sweep.activations,
        noise_levels=sweep.noise_levels,
        layers=tuple(_report(sweep.solutions[layer.name]) for layer in plan.layers),
        choices=sweep.prepared.choices,
    )


def _tell_short(sweep: Sweep) -> None:
    """Say which layers had fewer rows than numbers in a row, and what was done."""
    short = [
        one
        for one in sweep.solutions.values()
        if 0 < one.rows < one.plan.num_weights // one.plan.shape[0]
    ]
    if short:
        worst = min(short, key=lambda one: one.rows / (one.plan.num_weights / one.plan.shape[0]))
        logger.info(
            "%d layers had fewer calibration rows than inputs (%s: %d rows of %d numbers); their "
            "second moments are damped and corrections are chosen on held-out calls; more calls "
            "would help",
            len(short),
            worst.plan.name,
            worst.rows,
            worst.plan.num_weights // worst.plan.shape[0],
        )


def _report(solution: LayerSolution) -> LayerReport:
    plan = solution.plan
    measured = solution.rows > 0
    return LayerReport(
        name=plan.name,
        kind=plan.kind,
        shape=plan.shape,
        mean_bits=plan.mean_bits,
        bytes=sum(-(-part // 8) for part in plan.storage),
        sqnr_db=_decibels(solution.error) if measured else None,
        base_sqnr_db=_decibels(solution.base_error) if measured else None,
        alpha=solution.alpha,
        beta=solution.beta,
        damping=solution.damping,
        rows=solution.rows,
        fraction=plan.fraction,
        reason=plan.reason,
    )


def _decibels(error: float) -> float:
    return -10 * math.log10(error) if error > 0 else math.inf
