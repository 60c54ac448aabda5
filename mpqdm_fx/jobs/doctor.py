"""What XNNPACK would take of a model."""

from pathlib import Path

from torch import fx

from mpqdm_fx.backends.names import FourBit
from mpqdm_fx.backends.xnnpack.doctor import Diagnosis, diagnose
from mpqdm_fx.bits.allocate import even_levels, fixed_plan, layer_limits
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
    four_bit: FourBit = "whole",
    subfolder: str | None = None,
    variant: str | None = None,
    inputs: str | None = None,
) -> Diagnosis:
    """What XNNPACK would take of a model, at batch 1, in the form that `quantize` would lower.

    Which nodes are taken depends on the settings' passes, on how activations are quantized and on
    which weights fit four bits, and not on the numbers: so a float model is rounded plainly, and
    static ranges come from one call.

    Args:
        name: A float model (see `load_source`), or a folder written by `quantize`, which is judged
            as it is.
        config: Settings of a float model's int8 program; None for its float program.
        four_bit: Which weights that program stores at four bits.
        subfolder: Part of a pipeline folder.
        variant: Variant of a float model's weight files.
        inputs: Calls of a float model, as of `load_with_calls`.

    Raises:
        ConfigError: XNNPACK does not run the settings, or an override matches no layer.
        LoweringError: ExecuTorch is missing, or an activation mode does not run.
    """
    stored = (Path(name) / MANIFEST).exists()
    expect(lambda: doctor_stages(stored=stored, rounded=config is not None))
    if stored:
        with stage("loading"):
            quantized = load(Path(name))
        example = example_inputs(quantized.signature, batch_size=1)
        program = open_folder(name).manifest.program
        return diagnose(
            quantized.rounded,
            example,
            quantized.ranges or None,
            four_bit="whole" if program is None else program.four_bit,
        )
    if config is not None:
        ProgramForm(backend="xnnpack", four_bit=four_bit).check(config)
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
    return diagnose(rounded, example, ranges, four_bit=four_bit)


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
