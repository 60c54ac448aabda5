"""The verbs: each is one step of the road from a float model to a program for a phone."""

import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from mpqdm_fx.calibration.calls import check_call, check_calls, check_example
from mpqdm_fx.calibration.records import RecordedInputs
from mpqdm_fx.capture.entry import unwrap
from mpqdm_fx.capture.foreign_models import check_model
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.io.allocator import freed_memory_kept
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.progress import stage, tracked
from mpqdm_fx.io.versions import versions
from mpqdm_fx.model.lent_tensors import without_lent
from mpqdm_fx.model.quantized import PreparedModel, Quantization, QuantizedModel
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.former_keywords import former_keywords
from mpqdm_fx.records.report import QuantizationReport
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.records.validation import check_value, checked
from mpqdm_fx.sweep.finish import finish
from mpqdm_fx.sweep.measured_bits import check_budget
from mpqdm_fx.sweep.start import start_sweep
from mpqdm_fx.sweep.sweep import Sweep

__all__ = ["convert", "open_sweep", "prepare", "prepare_on", "quantize"]

logger = logging.getLogger(__name__)

_solving_keywords = former_keywords(
    directory="directory",
    resume="resume",
    max_memory="activation_memory",
    half="half",
    device="device",
    sensitivity="sensitivity",
)


@former_keywords(max_memory="record_memory", directory="record_directory")
@plain_torch()
@checked
def prepare(
    model: nn.Module,
    config: MPQConfig,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    run: RunOptions = RunOptions(),
) -> PreparedModel:
    """Trace a model and make it record what it is called with.

    Call the result on calibration data, exactly as the model would be called; it returns what the
    model returns. Then `convert` it.

    Args:
        model: Float model; it is not changed.
        config: Settings.
        example_inputs: Keyword arguments (dict) or positional arguments (tuple) of one call.
        run: How it runs; see `RunOptions`.

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
    check_value(run, RunOptions, "run")
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
        RecordedInputs(memory=run.record_memory, directory=run.record_directory),
    )


@_solving_keywords
@plain_torch()
@freed_memory_kept()
@checked
def convert(
    prepared: PreparedModel,
    *,
    run: RunOptions = RunOptions(),
    sweep: Sweep | None = None,
) -> QuantizedModel:
    """Decide the bits; correct and round the weights layer by layer; fix the activation ranges.

    Under torchrun each process takes its share of the recorded calls; all return the same model.

    Args:
        prepared: A prepared model that has been called on calibration data.
        run: How it runs; see `RunOptions`.
        sweep: A sweep of this prepared model (`open_sweep`) to go on with; it runs as it was
            opened, whatever `run` is.

    Returns:
        The quantized model. `prepared` can be called and converted again.

    Raises:
        CalibrationError: No data, NaN or infinity in data, activations or weights, or a memory
            limit that is too small.
        ConfigError: The budget cannot be met, or the folder holds another run.
    """
    start = time.perf_counter()
    if sweep is None:
        sweep = open_sweep(prepared, run=run)
    result = finish(sweep)
    report = QuantizationReport(
        layers=result.layers,
        calibration_calls=len(prepared.records),
        seconds=time.perf_counter() - start,
        versions=versions(),
        activations=result.choices,
        judged=result.judged,
        taken=len(result.taken),
    )
    quantization = Quantization(
        plan=result.plan,
        ranges=result.activations,
        noise_levels=result.noise_levels,
        settings=prepared.settings,
        report=report,
        config=prepared.config,
    )
    return QuantizedModel(without_lent(result.rounded, prepared.graph_module), quantization)


@_solving_keywords
@plain_torch()
@checked
def open_sweep(prepared: PreparedModel, *, run: RunOptions = RunOptions()) -> Sweep:
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
    check_value(run, RunOptions, "run")
    return start_sweep(prepared.graph_module, prepared.records, prepared.settings, run=run)


@former_keywords(
    max_memory="record_memory",
    directory="directory",
    resume="resume",
    max_activations="activation_memory",
    device="device",
    sensitivity="sensitivity",
)
@checked
def quantize(
    model: nn.Module,
    config: MPQConfig,
    calibration: Iterable[Mapping[str, Any]],
    *,
    run: RunOptions = RunOptions(),
) -> QuantizedModel:
    """`prepare`, run the calibration data, `convert`.

    Args:
        model: Float model; it is not changed.
        config: Settings.
        calibration: As of `prepare_on`.
        run: How it runs; see `RunOptions`.
    """
    return convert(prepare_on(model, config, calibration, run=run), run=run)


@former_keywords(max_memory="record_memory")
@checked
def prepare_on(
    model: nn.Module,
    config: MPQConfig,
    calibration: Iterable[Mapping[str, Any]],
    *,
    run: RunOptions = RunOptions(),
) -> PreparedModel:
    """`prepare`, and record the calibration data; `convert` can follow with several settings.

    Args:
        model: Float model; it is not changed.
        config: Settings. The result's `settings` may be set to others with the same `split_skips`.
        calibration: Keyword arguments of each call, for example `Trajectories(...)`. Its
            `held_out_calls`, where it has them, judge corrections; else its last quarter does.
        run: How it runs; see `RunOptions`.

    Raises:
        CalibrationError: There is no calibration data, or it holds NaN or infinity.
        TraceError: The model cannot be traced.
        ConfigError: There is nothing to quantize, or an override matches no layer.
    """
    check_value(model, nn.Module, "model")
    check_value(config, MPQConfig, "config")
    check_value(run, RunOptions, "run")
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
        prepared = prepare(model, config, first, run=run)
    held_out = getattr(calibration, "held_out_calls", ())
    calls = itertools.chain([first], iterator)
    for index, inputs in enumerate(tracked(calls, "recording calls")):
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
