"""Set up the sweep of a whole graph: decide under the budget what is decided beforehand."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import fx

from mpqdm_fx.bits.allocate import Limits, few_levels, layer_limits
from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.calibration.records import RecordedInputs
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.io.progress import expect
from mpqdm_fx.passes.quantize.scale_inputs import factors_of
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.sweep.checkpoint import Checkpoint
from mpqdm_fx.sweep.estimate import estimate, stage_seconds
from mpqdm_fx.sweep.identity import run_identity
from mpqdm_fx.sweep.preparation import prepared_sweep, started_sweep
from mpqdm_fx.sweep.shards import Shards
from mpqdm_fx.sweep.stored_run import StoredRun, keep_decisions, layer_digests
from mpqdm_fx.sweep.sweep import Sweep

__all__ = ["start_sweep"]

logger = logging.getLogger(__name__)


def start_sweep(
    graph_module: fx.GraphModule,
    records: RecordedInputs,
    settings: MPQConfig,
    *,
    run: RunOptions = RunOptions(),
) -> Sweep:
    """Decide the bits that are decided beforehand, and set up the sweep.

    Args:
        graph_module: Normalized graph; it is not changed.
        records: Calibration calls.
        settings: The run's settings.
        run: How it runs; see `RunOptions`.

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
    groups = NoiseGroups.of(graph_module, calls, settings)
    limits = few_levels(layer_limits(graph_module, settings), graph_module, settings, groups)
    held_out = records.held_out or groups.held_out(calls)
    if settings.propagation == "auto" and not held_out:
        logger.warning(
            "propagation='auto' chooses strengths on held-out calls, and there is only one call: "
            "errors are not propagated; record more calls, or give a strength such as 0.5"
        )
    expect(lambda: _foretold(graph_module, calls, settings, run))
    kept = _Kept.of(graph_module, calls, held_out, settings, limits, shards, run)
    checkpoint = kept.checkpoint
    if kept.start is not None:
        limits = kept.start.limits(limits.skipped)
        prepared = started_sweep(
            graph_module, kept.start, settings, limits=limits, checkpoint=checkpoint
        )
    else:
        prepared = prepared_sweep(
            graph_module,
            calls,
            settings,
            limits=limits,
            groups=groups,
            checkpoint=checkpoint,
            shards=shards,
            measured=records.measured,
            run=run,
        )
    if checkpoint is not None:
        keep_decisions(
            checkpoint,
            kept.digests,
            choices=prepared.choices,
            factors=factors_of(prepared.graph_module),
            row_weights=prepared.row_weights,
            input_energies={} if prepared.budget is None else prepared.budget.energy,
        )
    return Sweep(
        prepared.graph_module,
        [calls[index] for index in shards.indices],
        settings,
        limits=limits,
        prepared=prepared,
        validation=held_out,
        shards=shards,
        checkpoint=checkpoint,
        max_memory=run.activation_memory,
        half=run.half,
        progress="rounding" if shards.rank == 0 else None,
        device=run.device,
    )


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What lies in folders: the run that this one starts from, and this one's solved layers.

    Attributes:
        start: The earlier run, or None.
        checkpoint: This run's folder; None without one, and in all processes but the first.
        digests: Of the float layers; empty without folders.
    """

    start: StoredRun | None = None
    checkpoint: Checkpoint | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graph_module: fx.GraphModule,
        calls: Sequence[Mapping[str, Any]],
        held_out: Sequence[int],
        settings: MPQConfig,
        limits: Limits,
        shards: Shards,
        run: RunOptions,
    ) -> Self:
        """Open the folders of a run."""
        if run.directory is None and run.start_from is None:
            return cls()
        layers = {
            name: layer
            for name, layer in weight_layers(graph_module, embeddings=True).items()
            if name not in limits.skipped
        }
        digests = layer_digests(layers)
        identity = run_identity(graph_module, calls, held_out, settings, half=run.half)
        start, checkpoint = None, None
        if run.start_from is not None:
            folder = Path(run.start_from)
            alike = {key: identity[key] for key in ("settings", "held_out", "versions")}
            start = shards.once(lambda: StoredRun.open(folder, layers, digests, alike))
            identity["start"] = start.checkpoint.run
        if run.directory is not None and shards.rank == 0:
            checkpoint = Checkpoint(run.directory, identity, resume=run.resume)
        return cls(start=start, checkpoint=checkpoint, digests=digests)


def _foretold(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    settings: MPQConfig,
    run: RunOptions,
) -> dict[str, float]:
    """Seconds by stage, for progress; what an earlier run measured is not measured again."""
    forecast = estimate(graph_module, calls, settings, max_memory=run.activation_memory)
    seconds = stage_seconds(forecast, settings)
    if run.start_from is None:
        return seconds
    return {name: seconds[name] for name in ("rounding", "judging")}
