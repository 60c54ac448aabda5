"""What a run would take, from the first second to the last: time, memory, disk, result."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from mpqdm_fx.bits.allocate import layer_limits
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.jobs.calibration import BATCH, rows_of
from mpqdm_fx.jobs.result_folder import ProgramForm
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.validation import Bytes, Count, Some, checked
from mpqdm_fx.report.units import duration
from mpqdm_fx.sources.source import Source
from mpqdm_fx.sweep.estimate import Estimate, estimate, row_seconds
from mpqdm_fx.sweep.measured_bits import expected_bytes

__all__ = [
    "Finish",
    "RunEstimate",
    "TrainingEstimate",
    "estimate_finish",
    "estimate_run",
    "estimate_training",
    "finish_of",
]

# Seconds of one core, measured on `digits` and on a UNet of 860 M parameters. What comes behind the
# sweep is the work of interpreters (export, partitioning, one process for each peak of memory).
_LOWER_LAYER = 0.9  # norms and attention between two layers included
_LOWER_WEIGHT = 3e-7
_CONVERT_LAYER = 0.1
_COMPARE_LAYER = 0.06  # twice with a program, which has more forms
_PROCESS = 7.0
_REPORT = 6.0  # the page: errors by layer and noise level, charts
_TIMED_CALLS = 44  # of the float model and of what the backend runs
_MEASURED_ROWS = 80  # held-out runs: 4 of 20 steps
_MEASURED_PASSES = 7  # that they are drawn, and gone over by the float and the quantized model
_STUDENT = 2.0  # what a quantized graph takes against a float one
_TRAINED = 3.0  # forward and backward against forward
_LAYER_BYTES = 4500  # of a program's graph


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What comes behind the rounding or the training: the program, thresholds, numbers, pictures.

    Attributes:
        lower_seconds: Lowering to the backend.
        compare_seconds: All forms of the model against each other, layer by layer.
        measure_seconds: Noise SQNR, time of a step, peaks of memory, the grid of samples, the page.
    """

    lower_seconds: float
    compare_seconds: float
    measure_seconds: float

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage, in running order."""
        return {
            "lowering": self.lower_seconds,
            "comparing forms": self.compare_seconds,
            "measuring": self.measure_seconds,
        }

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.lower_seconds + self.compare_seconds + self.measure_seconds


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """What `quantize_to_folder` is expected to take.

    Attributes:
        sweep: Sensitivities, corrections and roundings.
        finish: What comes behind them.
        trace_seconds: Tracing the model, once more.
        record_seconds: Denoising runs of the float model to calibrate on.
        weight_bytes: Packed weights of the result, and all that stays in float.
        program_bytes: Its program; 0 if there is none.
    """

    sweep: Estimate
    finish: Finish
    trace_seconds: float
    record_seconds: float
    weight_bytes: int
    program_bytes: int

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage, in running order."""
        return {
            "tracing": self.trace_seconds,
            "float model's runs": self.record_seconds,
            "sensitivities": self.sweep.sensitivity_seconds,
            "both lanes forward": self.sweep.forward_seconds,
            "corrections and roundings": self.sweep.solve_seconds,
            **self.finish.stages,
        }

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **self.sweep.to_dict(),
            "stages": self.stages,
            "seconds": self.seconds,
            "weight_bytes": self.weight_bytes,
            "program_bytes": self.program_bytes,
        }


@checked
def estimate_run(
    source: Source,
    config: MPQConfig,
    *,
    form: ProgramForm,
    trajectories: Count = 16,
    steps: Count = 20,
    samples: Some = 16,
    max_memory: Bytes | None = None,
) -> RunEstimate:
    """What quantizing a source would take on this machine; the arguments are those of the run.

    Args:
        source: Model and scheduler, or model and calls.
        config: Settings.
        form: What is to be written.
        trajectories: Denoising runs to calibrate on, where the source has no calls.
        steps: Steps of each.
        samples: Images in the grid.
        max_memory: Bytes of activations held in memory.

    Raises:
        TraceError: The model cannot be traced.
    """
    start = time.perf_counter()
    graph_module = normalized(source.model, source.example_inputs, config)
    traced = time.perf_counter() - start
    calls, rows = _calls_of(source, trajectories, steps)
    inputs = example_inputs(graph_module.meta["signature"], batch_size=rows)
    sweep = estimate(graph_module, [inputs] * calls, config, max_memory=max_memory)
    layers = weight_layers(graph_module, embeddings=True)
    weights = sum(layer.weight.numel() for layer in layers.values())
    stored, remainder = expected_bytes(graph_module, config, layer_limits(graph_module, config))
    own = form.backend == "lowbit" and form.kernels == "memory"
    program = (stored if own else weights) + 2 * remainder + len(layers) * _LAYER_BYTES
    return RunEstimate(
        sweep=sweep,
        finish=estimate_finish(
            graph_module,
            form,
            row_seconds=sweep.row_seconds,
            images=_images(source, samples, steps),
        ),
        trace_seconds=traced,
        record_seconds=0.0 if source.calls is not None else sweep.row_seconds * calls * rows,
        weight_bytes=stored + remainder,
        program_bytes=program if form.has_program else 0,
    )


def _images(source: Source, samples: int, steps: int) -> int:
    return samples * steps if source.scheduler is not None else 0


def _calls_of(source: Source, trajectories: int, steps: int) -> tuple[int, int]:
    """Number of calibration calls, and rows of the largest, as `calibration_of` makes them."""
    rows = rows_of(source, trajectories, steps)
    if source.calls is not None:
        return len(source.calls), rows
    held_out = trajectories // 4
    parts = (trajectories - held_out) * steps, held_out * steps
    return sum(math.ceil(part / BATCH) for part in parts), rows


def estimate_finish(
    graph_module: fx.GraphModule, form: ProgramForm, *, row_seconds: float, images: int
) -> Finish:
    """What lowering, comparing and measuring a quantized graph would take.

    Args:
        graph_module: Normalized graph.
        form: What is to be written.
        row_seconds: Time of the float model for one row.
        images: Rows of the grid's pictures, over all steps.
    """
    layers = weight_layers(graph_module, embeddings=True)
    weights = sum(layer.weight.numel() for layer in layers.values())
    lowering = len(layers) * _LOWER_LAYER + weights * _LOWER_WEIGHT
    lower = {
        "xnnpack": lowering,
        "lowbit": lowering,
        "torch_ao": len(layers) * _CONVERT_LAYER,
        "packed": 0.0,
    }[form.backend]
    forms = 2 if form.has_program else 1
    rows = _MEASURED_PASSES * _MEASURED_ROWS + _TIMED_CALLS + images
    return Finish(
        lower_seconds=lower,
        compare_seconds=len(layers) * _COMPARE_LAYER * forms,
        measure_seconds=rows * row_seconds + 2 * _PROCESS + _REPORT,
    )


def finish_of(
    quantized: QuantizedModel, source: Source, form: ProgramForm, *, samples: int, steps: int
) -> Finish:
    """What lowering, comparing and measuring a quantized model would take.

    Args:
        quantized: The model.
        source: The float model.
        form: What is to be written.
        samples: Images in the grid.
        steps: Steps of each.
    """
    graph = quantized.rounded
    row = row_seconds(graph, example_inputs(quantized.signature))
    return estimate_finish(graph, form, row_seconds=row, images=_images(source, samples, steps))


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """What `distill_folder` is expected to take.

    Attributes:
        data_seconds: Runs of the float model, and what each step's error does to the sample.
        update_seconds: One update.
        training_seconds: All updates, or the time that a budget leaves for them.
        judge_seconds: Errors on held-out runs, before and after.
        finish: What comes behind the training, where it helped.
    """

    data_seconds: float
    update_seconds: float
    training_seconds: float
    judge_seconds: float
    finish: Finish

    @property
    def others(self) -> float:
        """All but the training itself."""
        return self.data_seconds + self.judge_seconds + self.finish.seconds

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage, in running order."""
        return {
            "float model's runs": self.data_seconds,
            "training": self.training_seconds,
            "judging": self.judge_seconds,
            **self.finish.stages,
        }

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.training_seconds + self.others

    def __str__(self) -> str:
        stages = [f"{name} {duration(s)}" for name, s in self.stages.items() if s >= 1]
        return f"about {duration(self.seconds)} in all: {', '.join(stages)}"


def estimate_training(
    quantized: QuantizedModel,
    source: Source,
    config: DistillConfig,
    *,
    form: ProgramForm,
    samples: int,
) -> TrainingEstimate:
    """What training a folder would take on this machine.

    Args:
        quantized: The model that training starts from.
        source: The float model.
        config: Settings; `seconds` count all of it, so that the rest is for training.
        form: What is to be written.
        samples: Images in the grid.
    """
    graph = quantized.rounded
    row = row_seconds(graph, example_inputs(quantized.signature)) * (2 if config.guided else 1)
    runs = (config.trajectories + config.held_out) * config.steps
    effects = config.effect_runs * config.steps**2 / 2 if config.final_share else 0
    judged = (config.trajectories + 3 * config.held_out) * config.steps
    update = config.batch_size * row * _STUDENT * _TRAINED
    times = TrainingEstimate(
        data_seconds=(runs + effects) * row,
        update_seconds=update,
        training_seconds=math.inf if config.updates is None else config.updates * update,
        judge_seconds=judged * row * _STUDENT,
        finish=estimate_finish(
            graph, form, row_seconds=row, images=_images(source, samples, config.steps)
        ),
    )
    if config.seconds is None:
        return times
    left = max(0.0, config.seconds - times.others)
    return replace(times, training_seconds=min(times.training_seconds, left))
