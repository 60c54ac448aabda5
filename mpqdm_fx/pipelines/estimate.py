"""Time, memory, disk and size of an export, told before any of its work."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from mpqdm_fx.backends.lowbit.layers import module_refusal
from mpqdm_fx.backends.names import Cpu, FourBit, Kernels, ProgramBackend, SideBits
from mpqdm_fx.backends.xnnpack.passes.gather_codes import GatherCodes
from mpqdm_fx.bits.allocate import layer_limits
from mpqdm_fx.bits.pinning import ends_in_float
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.layers import EMBEDDINGS, WeightLayer, is_pointwise, weight_layers
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.pipelines.adapters import Lora
from mpqdm_fx.pipelines.check_export import check_export
from mpqdm_fx.pipelines.encoder_memory import encoder_peak, held_bytes
from mpqdm_fx.pipelines.layout import Size
from mpqdm_fx.pipelines.part_inputs import PipelineInputs, inputs_of
from mpqdm_fx.pipelines.part_seconds import lower_seconds
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.programs import side_settings
from mpqdm_fx.pipelines.stored_encoders import LARGE, is_held_as_stored
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.validation import Bytes, Count, NonNegative, Some, checked
from mpqdm_fx.split.timestep_table import tabulate_timesteps
from mpqdm_fx.sweep.estimate import estimate

__all__ = ["ExportEstimate", "PartEstimate", "estimate_export"]

_PROCESS = 6.0  # that measures one peak: mostly imports
_TIMED = 6  # calls of a part, and as many of its program
_JUDGED = 2  # a part's held-out calls, once in float and once quantized, which is as slow
_LAYER_BYTES = 2800  # of a layer in one method's graph
_PROGRAM = 0.6  # what a program's call takes of the float one's
_SCALES = 4  # bytes of a channel's scale


@dataclass(frozen=True, kw_only=True)
class PartEstimate:
    """What one part is expected to take, and to become.

    Attributes:
        parameters: Its parameters.
        float_bytes: Of them in float32.
        program_bytes: Of its program, if it is quantized where that is asked for.
        call_seconds: Of one call in float, batch 1, measured.
        quantize_seconds: Calibration, rounding and judging; the denoiser's with its runs.
        lower_seconds: Lowering for all sizes.
        measure_seconds: Time and peaks of memory.
        peak_bytes: While it is quantized; of an encoder that stays in its files, also while it is
            lowered.
        held_bytes: What it takes in float while others are exported; pages of files do not count.
        kept_bytes: What its quantized form takes from when it is finished to the end.
    """

    parameters: int
    float_bytes: int
    program_bytes: int
    call_seconds: float
    quantize_seconds: float
    lower_seconds: float
    measure_seconds: float
    peak_bytes: int
    held_bytes: int
    kept_bytes: int


@dataclass(frozen=True, kw_only=True)
class ExportEstimate:
    """What `export_pipeline` is expected to take on this machine.

    Attributes:
        parts: By name, in running order.
        draw_seconds: `samples.png`.
        disk_bytes: Finished programs and solved layers beside the output, at most.
    """

    parts: Mapping[str, PartEstimate]
    draw_seconds: float
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """All of it."""
        parts = self.parts.values()
        spent = (p.quantize_seconds + p.lower_seconds + p.measure_seconds for p in parts)
        return sum(spent) + self.draw_seconds

    @property
    def bytes(self) -> int:
        """Of all programs."""
        return sum(part.program_bytes for part in self.parts.values())

    @property
    def peak_bytes(self) -> int:
        """Of memory: all parts in float, those quantized before, and what one needs beside them."""
        parts = self.parts.values()
        before = [0, *itertools.accumulate(part.kept_bytes for part in parts)]
        needed = [part.peak_bytes - part.held_bytes for part in parts]
        beside = [kept + max(0, more) for kept, more in zip(before, [*needed, 0], strict=True)]
        return sum(part.held_bytes for part in parts) + max(beside)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes,
            "bytes": self.bytes,
            "draw_seconds": self.draw_seconds,
            "parts": {name: asdict(part) for name, part in self.parts.items()},
        }


@dataclass(frozen=True)
class _Storage:
    """How a program may store weights of few bits."""

    four_bit: FourBit
    own_kernels: bool
    timesteps: Sequence[float] | None = None  # of tables

    def graph(self, part: Part, traced: fx.GraphModule) -> fx.GraphModule:
        """What is stored of a part: tables in the place of a denoiser's time branch."""
        if self.timesteps is None or not part.stepped:
            return traced
        return tabulate_timesteps(traced, self.timesteps)

    def bits(self, layer: WeightLayer, bits: float, settings: MPQConfig) -> float:
        """That a weight takes in the program, of a layer quantized to `bits`."""
        if self.own_kernels and module_refusal(layer.module) is None:
            return bits
        narrow = bits <= 4 and self.four_bit != "never" and _fits_four_bits(layer, settings)
        return 4 if narrow else 8


@checked
def estimate_export(
    pipeline: Any,
    config: MPQConfig | None,
    *,
    sizes: Sequence[Size] | None = None,
    prompts: Sequence[str] | None = None,
    steps: Count = 20,
    guidance: NonNegative | None = None,
    trajectories: Count = 16,
    batch_size: Count = 8,
    max_memory: Bytes | None = None,
    backend: ProgramBackend = "xnnpack",
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
    four_bit: FourBit = "whole",
    encoder_bits: SideBits = 8,
    samples: Some = 4,
    measure: bool = True,
    tabulate: bool = False,
    lora: Lora | None = None,
) -> ExportEstimate:
    """Estimate an export without running it: each part is traced, and called twice.

    Args: as of `export_pipeline`. Weights whose bits are to be searched count eight, of which the
    program may store some at four; `kernels="auto"` may keep some at fewer, too. With
    `kernels="memory"` the layers that own kernels have count the bits asked for.

    Raises:
        MPQError: Settings have no program, the pipeline cannot be opened, or a part not traced, or
            there are to be tables of what has no time branch.
    """
    check_export(
        config, prompts, four_bit, encoder_bits=encoder_bits,
        backend=backend, kernels=kernels, cpu=cpu,
    )  # fmt: skip
    inputs, chosen = inputs_of(
        pipeline, sizes, prompts=prompts, steps=steps, guidance=guidance,
        trajectories=trajectories, batch_size=batch_size, seed=0 if config is None else config.seed,
        stored=config is not None, lora=lora,
    )  # fmt: skip
    if config is not None:
        inputs.check_settings(config, max_memory=max_memory)
    storage = _Storage(
        four_bit,
        own_kernels=backend == "lowbit" and kernels == "memory",
        timesteps=inputs.told_times() if tabulate else None,
    )
    parts, solved, moved = {}, 0, 0
    for part in inputs.layout.parts.values():
        settings = None if config is None else _settings(part, config, encoder_bits)
        estimated, layers, disk = _part(
            part, inputs, settings, chosen, storage, measure, max_memory
        )
        parts[part.name] = estimated
        # layers stay until all parts are finished, activations until one is
        solved, moved = solved + layers, max(moved, disk)
    # in float, by the programs, and by these again on the calls of the float runs
    drawing = samples * (1 + 2 * _PROGRAM) * _image_seconds(parts, inputs)
    total = sum(part.program_bytes for part in parts.values())
    return ExportEstimate(parts=parts, draw_seconds=drawing, disk_bytes=total + solved + moved)


def _image_seconds(parts: Mapping[str, PartEstimate], inputs: PipelineInputs) -> float:
    """One picture in float."""
    calls = inputs.steps * inputs.calls_per_step
    stepped = {name for name, part in inputs.layout.parts.items() if part.stepped}
    return sum(p.call_seconds * (calls if name in stepped else 1) for name, p in parts.items())


def _part(
    part: Part,
    inputs: PipelineInputs,
    settings: MPQConfig | None,
    sizes: Sequence[Size],
    storage: _Storage,
    measure: bool,
    max_memory: int | None,
) -> tuple[PartEstimate, int, int]:
    """A part's numbers, bytes of its solved layers, and of activations while it is quantized."""
    example = inputs.example(part.name, inputs.size)
    graph = normalized(part.module, dict(example), settings or MPQConfig())
    call_seconds = _call_seconds(part, example)
    calls, rows = _calls(part, inputs)
    quantize, solved, disk = 0.0, 0, 0
    peak = 4 * _numbers(graph)
    if settings is not None:
        batch = example_inputs(graph.meta["signature"], batch_size=rows)
        sweep = estimate(graph, [batch] * calls, settings, max_memory=max_memory)
        quantize = sweep.seconds + _JUDGED * call_seconds * calls * rows / 4
        peak, solved, disk = sweep.peak_bytes, sweep.weights, sweep.disk_bytes - sweep.weights
    if part.stepped:
        quantize += call_seconds * calls * rows if settings is not None else 0.0
    held = 4 * part.parameters
    # large ones are kept as codes alone, others as rounded numbers too
    kept = 0 if settings is None else part.parameters + (held if held <= LARGE else 0)
    if is_held_as_stored(part.module):
        kept = 0
        peak = encoder_peak(part.module, inputs.tokens_of(part.name))
        held = held_bytes(part.module)
    methods = len(sizes) if part.sized else 1
    program = storage.graph(part, graph)
    stored = _stored_bytes(graph, program, settings, storage)
    layers = weight_layers(program, embeddings=True)
    weights = sum(layer.weight.numel() for layer in layers.values())
    lower = methods * lower_seconds(len(layers), weights)
    estimated = PartEstimate(
        parameters=part.parameters,
        float_bytes=4 * part.parameters,
        program_bytes=stored + methods * len(layers) * _LAYER_BYTES,
        call_seconds=call_seconds,
        quantize_seconds=quantize,
        lower_seconds=lower,
        measure_seconds=(2 * _PROCESS + 2 * _TIMED * call_seconds) if measure else 0.0,
        peak_bytes=peak,
        held_bytes=held,
        kept_bytes=kept,
    )
    return estimated, solved, disk


def _settings(part: Part, config: MPQConfig, encoder_bits: SideBits) -> MPQConfig:
    """Settings that a part is quantized with."""
    if part.stepped:
        return config
    return side_settings(config, encoder_bits if part.name.startswith("text_encoder") else 8)


def _numbers(graph: fx.GraphModule) -> int:
    """Floating-point numbers that a graph reads: a last layer may be there for nothing."""
    return sum(t.numel() for t in graph.state_dict().values() if t.is_floating_point())


def _stored_bytes(
    graph: fx.GraphModule,
    program: fx.GraphModule,
    settings: MPQConfig | None,
    storage: _Storage,
) -> int:
    """Bytes of a graph's numbers in its program, whose graph may have fewer layers."""
    total = 4 * _numbers(program)
    if settings is None or settings.activation_mode == "float":
        return total
    limits = layer_limits(graph, settings)
    in_float = {*ends_in_float(graph, settings.activation_mode), *limits.skipped}
    for name, layer in weight_layers(program, embeddings=True).items():
        is_table = isinstance(layer.module, EMBEDDINGS)
        if layer.weight.numel() < GatherCodes().least if is_table else name in in_float:
            continue
        fixed, _ = limits.fixed.get(name, (settings.weight_bits, ""))
        numbers = layer.weight.numel()
        stored = math.ceil(numbers * storage.bits(layer, fixed, settings) / 8)
        total += stored - 4 * numbers + _SCALES * layer.weight.shape[0]
    return total


def _fits_four_bits(layer: WeightLayer, settings: MPQConfig) -> bool:
    """Whether a layer of at most four bits has the form that XNNPACK stores at four."""
    known = settings.allocation == "uniform" and settings.levels == "int4"
    rows = is_pointwise(layer.module) and layer.weight.shape[1] % 2 == 0
    return known and rows and settings.activation_mode == "dynamic"


def _calls(part: Part, inputs: PipelineInputs) -> tuple[int, int]:
    """Calibration calls of a part, and rows of one."""
    if not part.sized:
        rows = 1 + len(inputs.prompts)
    elif part.stepped:
        rows = inputs.trajectories * inputs.steps * inputs.calls_per_step
    else:
        return inputs.vae_call_count(inputs.trajectories), 1
    batch = min(rows, inputs.batch_size)
    return math.ceil(rows / batch), batch


def _call_seconds(part: Part, example: Mapping[str, Any]) -> float:
    with torch.no_grad():
        part.module(**example)
        start = time.perf_counter()
        part.module(**example)
    return time.perf_counter() - start
