"""The verbs: each is one step of the road from a float model to a program for a phone."""

import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from mpqdm_fx.calibration.calls import check_call, check_calls, check_example
from mpqdm_fx.calibration.records import DEFAULT_MAX_MEMORY, RecordedInputs
from mpqdm_fx.capture.entry import unwrap
from mpqdm_fx.capture.foreign_models import check_model
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.progress import stage, tracked
from mpqdm_fx.io.versions import versions
from mpqdm_fx.model.quantized import PreparedModel, Quantization, QuantizedModel
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.report import QuantizationReport
from mpqdm_fx.records.validation import Bytes, check_value, checked
from mpqdm_fx.sweep.finish import finish
from mpqdm_fx.sweep.measured import check_budget
from mpqdm_fx.sweep.quantize import start_sweep
from mpqdm_fx.sweep.sweep import Sweep

__all__ = ["convert", "open_sweep", "prepare", "prepare_on", "quantize"]

logger = logging.getLogger(__name__)


@plain_torch()
@checked
def prepare(
    model: nn.Module,
    config: MPQConfig,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    max_memory: Bytes = DEFAULT_MAX_MEMORY,
    directory: str | Path | None = None,
) -> PreparedModel:
    """Trace a model and make it record what it is called with.

    Call the result on calibration data, exactly as the model would be called; it returns what the
    model returns. Then `convert` it.

    Args:
        model: Float model; it is not changed.
        config: Settings.
        example_inputs: Keyword arguments (dict) or positional arguments (tuple) of one call.
        max_memory: Bytes of recorded inputs held in memory while they are recorded.
        directory: Folder for what goes to disk; a temporary one by default.

    Returns:
        The prepared model.

    Raises:
        CalibrationError: An example input cannot be used; it is named.
        TraceError: The model cannot be traced with these inputs, or is refused as it is: offloaded,
            quantized already, in float64 (see `trace`).
        ConfigError: There is nothing to quantize, an override matches no layer, or the budget is
            below the smallest one that holds the layers.
    """
    check_value(model, nn.Module, "model")
    check_value(config, MPQConfig, "config")
    model = unwrap(model)
    check_model(model)
    check_example(model, example_inputs)
    graph_module = normalized(model, example_inputs, config, fractional_timesteps=True)
    _check_layers(graph_module, config, type(model).__name__)
    check_budget(graph_module, config)
    return PreparedModel(
        graph_module,
        graph_module.meta["signature"],
        getattr(model, "config", None),
        config,
        RecordedInputs(max_memory=max_memory, directory=directory),
    )


@plain_torch()
@checked
def convert(
    prepared: PreparedModel,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    max_memory: Bytes | None = None,
    half: bool = False,
    device: str | None = None,
    sensitivity: str | Path | None = None,
    sweep: Sweep | None = None,
) -> QuantizedModel:
    """Decide the bits; correct and round the weights layer by layer; fix the activation ranges.

    Under torchrun each process takes its share of the recorded calls; all return the same model.

    Args:
        prepared: A prepared model that has been called on calibration data.
        directory: Folder for solved layers: a run that was killed goes on there.
        resume: Go on with what the folder holds; the result has the same bits.
        max_memory: Bytes of activations held in memory; the rest goes to disk.
        half: Hold activations as float16 between layers.
        device: Where to compute, for example `"cuda"`; by default where the model is.
        sensitivity: File of the sensitivities, for `allocation="measured"`: read if it is there,
            else written. Another budget then takes seconds to solve.
        sweep: A sweep of this prepared model (`open_sweep`) to go on with; the settings above are
            those it was opened with.

    Returns:
        The quantized model. `prepared` can be called and converted again.

    Raises:
        CalibrationError: No data, NaN or infinity in data, activations or weights, or a memory
            limit that is too small.
        ConfigError: The budget cannot be met, or the folder holds another run.
    """
    start = time.perf_counter()
    if sweep is None:
        sweep = open_sweep(
            prepared,
            directory=directory,
            resume=resume,
            max_memory=max_memory,
            half=half,
            device=device,
            sensitivity=sensitivity,
        )
    result = finish(sweep)
    report = QuantizationReport(
        layers=result.layers,
        calibration_calls=len(prepared.records),
        seconds=time.perf_counter() - start,
        versions=versions(),
        activations=result.choices,
        judged=result.judged,
    )
    quantization = Quantization(
        plan=result.plan,
        ranges=result.activations,
        noise_levels=result.noise_levels,
        settings=prepared.settings,
        report=report,
        config=prepared.config,
    )
    return QuantizedModel(result.rounded, quantization)


@plain_torch()
@checked
def open_sweep(
    prepared: PreparedModel,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    max_memory: Bytes | None = None,
    half: bool = False,
    device: str | None = None,
    sensitivity: str | Path | None = None,
) -> Sweep:
    """Set up what `convert` runs, to walk through it by hand.

    The sweep is an iterator over the nodes of a graph with two lanes, float and quantized:

        sweep = open_sweep(prepared)
        for node in sweep:                      # before each node is executed
            if node.name == "mid_block_resnets_0_conv1_hat":
                break
        print(sweep.graph_module.graph)         # the lanes
        print(sweep.delta(node.args[0]))        # relative error that reaches this layer
        quantized = convert(prepared, sweep=sweep)

    Args: as of `convert`.

    Raises:
        CalibrationError: No data, or a memory limit that is too small.
        ConfigError: The budget cannot be met, or the folder holds another run.
    """
    return start_sweep(
        prepared.graph_module,
        prepared.records,
        prepared.settings,
        directory=directory,
        resume=resume,
        max_memory=max_memory,
        half=half,
        device=device,
        sensitivity=sensitivity,
    )


@checked
def quantize(
    model: nn.Module,
    config: MPQConfig,
    calibration: Iterable[Mapping[str, Any]],
    *,
    max_memory: Bytes = DEFAULT_MAX_MEMORY,
    directory: str | Path | None = None,
    resume: bool = False,
    max_activations: Bytes | None = None,
    device: str | None = None,
    sensitivity: str | Path | None = None,
) -> QuantizedModel:
    """`prepare`, run the calibration data, `convert`.

    Args:
        model: Float model; it is not changed.
        config: Settings.
        calibration: As of `prepare_on`.
        max_memory: Bytes of recorded inputs held in memory while they are recorded.
        directory: Folder for solved layers: a run that was killed goes on there.
        resume: Go on with what the folder holds.
        max_activations: Bytes of activations held in memory while layers are solved.
        device: Where to compute, for example `"cuda"`; by default where the model is.
        sensitivity: File of the sensitivities; see `convert`.
    """
    return convert(
        prepare_on(model, config, calibration, max_memory=max_memory),
        directory=directory,
        resume=resume,
        max_memory=max_activations,
        device=device,
        sensitivity=sensitivity,
    )


@checked
def prepare_on(
    model: nn.Module,
    config: MPQConfig,
    calibration: Iterable[Mapping[str, Any]],
    *,
    max_memory: Bytes = DEFAULT_MAX_MEMORY,
) -> PreparedModel:
    """`prepare`, and record the calibration data; `convert` can follow with several settings.

    Args:
        model: Float model; it is not changed.
        config: Settings. The result's `settings` may be set to others with the same `split_skips`.
        calibration: Keyword arguments of each call, for example `Trajectories(...)`. Its
            `held_out_calls`, where it has them, judge corrections; else its last quarter does.
        max_memory: Bytes of recorded inputs held in memory while they are recorded.

    Raises:
        CalibrationError: There is no calibration data, or it holds NaN or infinity.
        TraceError: The model cannot be traced.
        ConfigError: There is nothing to quantize, or an override matches no layer.
    """
    check_value(model, nn.Module, "model")
    check_value(config, MPQConfig, "config")
    check_model(unwrap(model))  # before trajectories are run
    if isinstance(calibration, Mapping | Tensor) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"`calibration` is a {type(calibration).__name__}; give an iterable of calls, each a "
            f"dict of keyword arguments"
        )
    if isinstance(calibration, Sequence):  # all there: judged before the model is traced
        check_calls(calibration)
    iterator = iter(calibration)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError("`calibration` is empty; give at least one call") from None
    check_call(first, "calibration call 0")
    with stage("tracing"):
        prepared = prepare(model, config, first, max_memory=max_memory)
    held_out = getattr(calibration, "held_out_calls", ())
    every = itertools.chain([first], iterator)
    for index, inputs in enumerate(tracked(every, "recording calls")):
        # Recording alone: `convert` runs the float graph once over everything anyway.
        with prepared.held_out() if index in held_out else contextlib.nullcontext():
            prepared.record(**inputs)
    return prepared


def _check_layers(graph_module: fx.GraphModule, config: MPQConfig, model_name: str) -> None:
    """Refuse a model without weight layers, and overrides that match none."""
    names: Sequence[str] = list(weight_layers(graph_module, embeddings=True))
    if not weight_layers(graph_module):
        raise ConfigError(
            f"{model_name} has no layer to quantize: no convolution and no linear layer was found "
            f"in its graph"
        )
    config.check_overrides(names)
