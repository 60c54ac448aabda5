"""What XNNPACK, and own kernels beside it, would take of a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import fx

from mpqdm_fx.backends.check_settings import check_kernel_options
from mpqdm_fx.backends.lowbit.doctor import diagnose_lowbit
from mpqdm_fx.backends.names import Cpu, FourBit, Kernels, ProgramBackend
from mpqdm_fx.backends.xnnpack.doctor import Diagnosis, diagnose
from mpqdm_fx.backends.xnnpack.four_bit import check_four_bit
from mpqdm_fx.bits.allocate import even_levels, fixed_plan, layer_limits
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.io.folders import MANIFEST
from mpqdm_fx.io.progress import expect, stage
from mpqdm_fx.jobs.foretold import doctor_stages
from mpqdm_fx.jobs.result_folder import ProgramForm
from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.model.storage import load
from mpqdm_fx.passes.quantize.round_weights import RoundWeights
from mpqdm_fx.records.activations import Activation
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import BitPlan
from mpqdm_fx.sources.sources import load_with_calls
from mpqdm_fx.sweep.plain_rounding import plain_activations
from mpqdm_fx.sweep.shards import Shards

__all__ = ["diagnose_model"]


def diagnose_model(
    name: str,
    config: MPQConfig | None = None,
    *,
    backend: ProgramBackend | None = None,
    four_bit: FourBit = "whole",
    kernels: Kernels | None = None,
    cpu: Cpu | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    inputs: str | None = None,
) -> Diagnosis:
    """What a backend would take of a model, at batch 1, in the form that `quantize` would lower.

    Which nodes are taken depends on the settings' passes, on how activations are quantized and on
    which weights fit four bits, and not on the numbers: so a float model is rounded plainly, and
    static ranges come from one call.

    Args:
        name: A float model (see `load_source`), or a folder written by `quantize`, which is judged
            as it is.
        config: Settings of a float model's int8 program; None for its float program.
        backend: The backend; None: XNNPACK, or for a folder the one that it was written for.
        four_bit: Which weights a float model's program stores at four bits.
        kernels: Which layers own kernels run, of `"lowbit"`; None: `"auto"`, or as the folder's
            own program was made. So is `cpu`, whose default is `"avx2"`.
        cpu: Class of CPUs that the choice is made for.
        subfolder: Part of a pipeline folder.
        variant: Variant of a float model's weight files.
        inputs: Calls of a float model, as of `load_with_calls`.

    Raises:
        ConfigError: The backend does not run the settings, has no own kernels or no float program,
            or an override matches no layer.
        LoweringError: ExecuTorch is missing, or an activation mode does not run.
    """
    stored = (Path(name) / MANIFEST).exists()
    expect(lambda: doctor_stages(stored=stored, rounded=config is not None))
    if stored:
        with stage("loading"):
            quantized = load(Path(name))
        example = example_inputs(quantized.signature, batch_size=1)
        form = _stored_form(Path(name), backend, kernels, cpu)
        return _diagnosis(quantized.rounded, example, quantized.ranges or None, form)
    form = ProgramForm(
        backend=backend or "xnnpack",
        four_bit=four_bit,
        kernels=kernels or "auto",
        cpu=cpu or "avx2",
    )
    if config is not None:
        form.check(config, runs=False)
    else:
        _refuse_float(form)
    with stage("loading"):
        source = load_with_calls(name, subfolder, variant, inputs)
    with stage("tracing"):
        graph_module = normalized(
            source.model, source.example_inputs, config or MPQConfig(), fractional_timesteps=True
        )
    example = example_inputs(graph_module.meta["signature"], batch_size=1)
    if config is None:
        return diagnose(graph_module, example)
    config.check_overrides(weight_layers(graph_module, embeddings=True))
    skipped = layer_limits(graph_module, config).skipped
    with stage("plain rounding"):
        ranges = plain_activations(graph_module, [example], config, Shards.of(1), skipped)
        rounded = _rounded(graph_module, config)
    return _diagnosis(rounded, example, ranges, form)


def _stored_form(
    folder: Path, backend: ProgramBackend | None, kernels: Kernels | None, cpu: Cpu | None
) -> ProgramForm:
    """The form of a folder's program, but for what is asked for."""
    program = open_folder(folder).manifest.program
    stored: dict[str, Any] = {}
    if program is not None:
        stored = program.model_dump(include={"four_bit", "kernels", "cpu"})
    own: ProgramBackend = "lowbit" if stored.get("kernels") else "xnnpack"
    chosen = backend or own
    asked = {"kernels": kernels, "cpu": cpu}
    if chosen != own or kernels is not None:  # what was stored belongs to another choice
        stored = {name: value for name, value in stored.items() if name not in asked}
    wanted = {**stored, **{name: value for name, value in asked.items() if value is not None}}
    form = ProgramForm(
        backend=chosen, **{name: value for name, value in wanted.items() if value is not None}
    )
    check_kernel_options(form.backend, form.kernels, form.cpu)
    return form


def _refuse_float(form: ProgramForm) -> None:
    check_four_bit(form.four_bit, "float")
    check_kernel_options(form.backend, form.kernels, form.cpu)
    if form.backend == "lowbit":
        raise ConfigError(
            "a float program has no layers for own kernels, which run rounded weights; give "
            'settings, or choose backend="xnnpack"'
        )


def _diagnosis(
    graph_module: fx.GraphModule,
    example: Mapping[str, Any],
    ranges: Mapping[str, Activation] | None,
    form: ProgramForm,
) -> Diagnosis:
    if form.backend != "lowbit":
        return diagnose(graph_module, example, ranges, four_bit=form.four_bit)
    return diagnose_lowbit(
        graph_module,
        example,
        ranges or {},
        kernels=form.kernels,
        cpu=form.cpu,
        four_bit=form.four_bit,
    )


def _rounded(graph_module: fx.GraphModule, config: MPQConfig) -> fx.GraphModule:
    """Every weight on the nearest level of the layer's bits."""
    limits = layer_limits(graph_module, config)
    plans = []
    for name, layer in weight_layers(graph_module, embeddings=True).items():
        if name not in limits.skipped:
            bits, reason = limits.fixed.get(name, (config.weight_bits, None))
            plans.append(fixed_plan(layer, bits, reason, even_levels(layer, config)))
    rounded: fx.GraphModule = RoundWeights(plan=BitPlan(layers=tuple(plans)))(
        graph_module
    ).graph_module
    return rounded
