"""One part of a pipeline: quantize it, judge it, and write its programs."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.names import Cpu, FourBit, Kernels, ProgramBackend, SideBits
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.graph.layers import replace_module, weight_layers
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.graph.signature import tensor_leaves
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.stages import in_form_of, normalized
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.pipelines.encoder_memory import check_float_program
from mpqdm_fx.pipelines.layout import Size, size_text
from mpqdm_fx.pipelines.manifest import method_entry
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.report.comparison import Comparison
from mpqdm_fx.split.methods import split_methods
from mpqdm_fx.split.timestep_table import tabulate_timesteps

__all__ = [
    "DENOISE",
    "ENCODE_PROMPT",
    "JudgedPart",
    "PartMethod",
    "WrittenMethod",
    "method_name",
    "part_methods",
    "quantize_part",
    "side_settings",
    "sqnr_of",
    "write_programs",
]

logger = logging.getLogger(__name__)

Call = Mapping[str, Any]
Examples = Mapping[Size | None, Call]

#: What the denoiser computes once per image, and once per step.
ENCODE_PROMPT, DENOISE = "encode_prompt", "denoise"


@dataclass(frozen=True, kw_only=True)
class JudgedPart:
    """A part as it is to be lowered, and how good it is.

    Attributes:
        quantized: The quantized part, or None where it stays in float.
        sqnr_db: Quantized against float on held-out calls; None if it was not tried.
        seconds: Wall time of quantizing it; 0 if it was not tried.
        comparison: The same by noise level; None of a part that is told none.
        held_out: The calls that judged it.
        bits: Of the weights of a part that runs once per image.
    """

    quantized: QuantizedModel | None
    sqnr_db: float | None
    seconds: float = 0.0
    comparison: Comparison | None = None
    held_out: Sequence[Call] = ()
    bits: SideBits = 8


@dataclass(frozen=True, kw_only=True)
class PartMethod:
    """One method of a part, before it is lowered.

    Attributes:
        graph: What it computes.
        size: Image size that it is made for; None if any.
        example: Arguments of the whole part's call.
        outputs: Names of what it returns; None if the graph names them.
    """

    graph: fx.GraphModule
    size: Size | None
    example: Call
    outputs: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class WrittenMethod:
    """One method of a part's file.

    Attributes:
        entry: As the manifest has it.
        program: What its lowering measured.
    """

    entry: dict[str, Any]
    program: XnnpackProgram

    def to_dict(self) -> dict[str, Any]:
        """The program and the method's name, plain JSON types."""
        return {**self.program.to_dict(), "method": self.entry["method"]}


def side_settings(config: MPQConfig, bits: SideBits = 8) -> MPQConfig:
    """Settings of text encoders and VAE: 8-bit weights, activations as the denoiser's.

    They run once per image, so that their bytes matter less than the denoiser's and nothing is
    searched; nearest rounding to 8 bits costs less than their activations' rounding.

    Args:
        config: The denoiser's.
        bits: Of weights; 4 takes the integers that XNNPACK stores at four bits.
    """
    return MPQConfig(
        weight_bits=bits,
        activation_bits=config.activation_bits,
        activation_mode=config.activation_mode,
        allocation="uniform",
        levels="uniform" if bits == 8 else "int4",
        rounding="nearest",
        refinements=0,
        propagation=0.0,
        max_rows=config.max_rows,
        seed=config.seed,
    )


def quantize_part(
    part: Part,
    calls: list[dict[str, Any]],
    config: MPQConfig,
    *,
    bound: float,
    run: RunOptions,
    bits: SideBits = 8,
) -> JudgedPart:
    """Quantize a text encoder or a half of the VAE, and keep that only if it is good.

    Args:
        part: The part.
        calls: Its calls; the last quarter, at least one, judges and is not calibrated on.
        config: Settings of the denoiser; see `side_settings`.
        bound: Least signal-to-noise ratio in dB of the quantized part.
        run: How it runs; see `RunOptions`.
        bits: Of its weights.

    Raises:
        ConfigError: It is not good, and does not fit in memory in float.
        MPQError: The part cannot be traced or quantized.
    """
    held_out = max(1, len(calls) // 4)
    known = calls[:-held_out] or calls
    quantized = quantize(part.module, side_settings(config, bits), known, run=run)
    unseen = calls[-held_out:]
    ratio = sqnr_of(part.module, quantized, unseen)
    seconds = quantized.report.seconds
    if ratio >= bound:
        return JudgedPart(quantized=quantized, sqnr_db=ratio, seconds=seconds, held_out=unseen)
    check_float_program(part, ratio, bound, bits)
    logger.warning(
        "%s stays in float: quantized to %d bits it has %.1f dB on held-out inputs, less than %.1f",
        part.name, bits, ratio, bound,
    )  # fmt: skip
    return JudgedPart(quantized=None, sqnr_db=ratio, seconds=seconds, bits=bits)


def sqnr_of(reference: nn.Module, quantized: nn.Module, calls: Iterable[Call]) -> float:
    """Signal-to-noise ratio in dB of a quantized part's outputs over all calls together.

    Args:
        reference: The float part.
        quantized: The quantized one.
        calls: Keyword arguments.
    """
    expected, actual = [], []
    with torch.no_grad():
        for call in calls:
            expected.append(_flat(reference(**call)))
            actual.append(_flat(quantized(**call)))
    return sqnr_db(torch.cat(expected), torch.cat(actual))


def _flat(output: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(output)])


def write_programs(
    part: Part,
    quantized: QuantizedModel | None,
    examples: Examples,
    path: Path,
    *,
    timesteps: Sequence[float] | None = None,
    four_bit: FourBit = "whole",
    external_weights: bool = False,
    backend: ProgramBackend = "xnnpack",
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
) -> list[WrittenMethod]:
    """Lower one part to a file with all of its methods, which share their weights.

    Args:
        part: The part.
        quantized: The quantized part, for whatever shapes it was made; None for a float program.
        examples: Keyword arguments of a call with batch 1, by image size.
        path: File to write.
        timesteps: As of `part_methods`.
        four_bit: Which weights are stored at four bits, as of `lower`.
        external_weights: Write the weights to a file of their own beside `path`, `<stem>.ptd`.
        backend: `"lowbit"` has own kernels beside XNNPACK's.
        kernels: Which layers own kernels run, as of `lower`, like `cpu`.
        cpu: Class of CPUs that the choice is made for.

    Returns:
        Its methods, in running order.

    Raises:
        DialectError: The part has no time branch of its own to make tables of.
        LoweringError: The backend cannot run the part.
    """
    # importing the package must not load torchao
    from mpqdm_fx.backends.lowbit.lower import lower_lowbit_methods
    from mpqdm_fx.backends.xnnpack.lower import lower_methods

    methods = part_methods(part, quantized, examples, timesteps=timesteps)
    graphs = {name: method.graph for name, method in methods.items()}
    known = {layer for graph in graphs.values() for layer in weight_layers(graph)}
    # what became a table is no layer any more
    ranges = {} if quantized is None else quantized.ranges
    ranges = {layer: chosen for layer, chosen in ranges.items() if layer in known}
    calls = {name: method.example for name, method in methods.items()}
    lower_all: Callable[..., Mapping[str, XnnpackProgram]] = lower_methods
    if backend == "lowbit":
        lower_all = partial(lower_lowbit_methods, kernels=kernels, cpu=cpu)
    programs = lower_all(
        graphs,
        calls,
        path,
        ranges=ranges or None,
        external_weights=external_weights,
        four_bit=four_bit,
    )
    return [
        WrittenMethod(
            entry=method_entry(
                part.name, method.size, name, method.outputs, programs[name].to_dict()
            ),
            program=programs[name],
        )
        for name, method in methods.items()
    ]


def part_methods(
    part: Part,
    quantized: QuantizedModel | None,
    examples: Examples,
    *,
    timesteps: Sequence[float] | None = None,
) -> dict[str, PartMethod]:
    """The graphs of a part's methods.

    A part that runs once per image has a method `forward`. The denoiser has `denoise`, which runs
    once per step, and `encode_prompt` with what does not change from step to step, if there is
    anything. The names above are those of the first size; `denoise_512x768` is another one's.

    Args:
        part: The part.
        quantized: The quantized part, for whatever shapes it was made; None for a float program.
        examples: Keyword arguments of a call with batch 1, by image size; one entry, of None, for
            a part whose shapes do not depend on it.
        timesteps: Make tables of what depends on the timestep alone, with rows for these; the
            denoiser then takes the number of a row in the timestep's place. None: any timestep.

    Returns:
        Methods by name, in running order.

    Raises:
        DialectError: The part has no time branch of its own to make tables of.
    """
    methods: dict[str, PartMethod] = {}
    for size, example in examples.items():
        graph = _graph(part, quantized, example)
        graphs = {"forward": graph}
        if part.stepped and timesteps is not None:
            graph = tabulate_timesteps(graph, timesteps)
            row = find_noise_argument(graph)
            assert row is not None  # else there are no tables
            example = {**example, str(row.target): torch.zeros(1, dtype=torch.int64)}
        if part.stepped:
            constant = [a for a in graph.meta["signature"].arguments if a not in part.stepped]
            graphs = split_methods(graph, {ENCODE_PROMPT: constant}, rest=DENOISE)
        first = not methods
        for name, method_graph in graphs.items():
            if name == ENCODE_PROMPT:
                once = PartMethod(graph=method_graph, size=None, example=example, outputs=None)
                methods.setdefault(name, once)
            else:
                methods[method_name(name, size, first=first)] = PartMethod(
                    graph=method_graph, size=size, example=example, outputs=part.outputs
                )
    return methods


def method_name(base: str, size: Size | None, *, first: bool) -> str:
    """Name of a method for one image size; that of the first size has no suffix."""
    return base if first or size is None else f"{base}_{size_text(size)}"


def _graph(part: Part, quantized: QuantizedModel | None, example: Call) -> fx.GraphModule:
    if quantized is None:
        return normalized(part.module, dict(example), MPQConfig())
    return _at_shapes(part, quantized, example).rounded


def _at_shapes(part: Part, quantized: QuantizedModel, inputs: Call) -> QuantizedModel:
    """The same integers and ranges in a graph of other shapes than those calibrated at."""
    signature = quantized.signature
    shapes = {name: tuple(value.shape) for name, value in tensor_leaves(dict(inputs))}
    if all(shapes.get(spec.name) == spec.shape_at(1) for spec in signature.inputs):
        return quantized
    graph = in_form_of(quantized, part.module, dict(inputs))
    for name in weight_layers(quantized.rounded, embeddings=True):
        replace_module(graph, name, quantized.rounded.get_submodule(name))
    return quantized.with_graph(graph)
