"""Export a diffusers pipeline: every part a program, beside them what a runner needs.

The road: take the pipeline apart -> for each part: calibrate, quantize, judge, lower for all sizes
-> tokenizers, scheduler, manifest, runner. Finished programs lie in a folder beside the output, so
that a run that was killed goes on with them; the output appears whole.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.kernel_library import require_kernels
from mpqdm_fx.backends.names import Cpu, Kernels, ProgramBackend, SideBits, may_call_own_kernels
from mpqdm_fx.backends.xnnpack.four_bit import FourBit
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.io import progress
from mpqdm_fx.io.allocator import large_blocks_returned
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.folders import check_target, staged_directory
from mpqdm_fx.io.space import check_space
from mpqdm_fx.io.versions import versions
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.passes.quantize.round_weights import hold_codes
from mpqdm_fx.pipelines.adapters import Lora
from mpqdm_fx.pipelines.check_export import MINIMUM_SQNR_DB, check_export, check_float_run
from mpqdm_fx.pipelines.disk_space import least_bytes
from mpqdm_fx.pipelines.encoder_memory import check_memory
from mpqdm_fx.pipelines.finish_export import finish
from mpqdm_fx.pipelines.kept_run import KeptRun, layer_counts, work_place
from mpqdm_fx.pipelines.layout import Layout, Size
from mpqdm_fx.pipelines.manifest import MANIFEST, compressed_entry, write_manifest
from mpqdm_fx.pipelines.part_inputs import PipelineInputs, inputs_of
from mpqdm_fx.pipelines.part_numbers import kept_part
from mpqdm_fx.pipelines.part_seconds import part_stages
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.programs import JudgedPart, quantize_part, write_programs
from mpqdm_fx.pipelines.runner_files import write_runner
from mpqdm_fx.pipelines.stored_encoders import LARGE, is_held_as_stored
from mpqdm_fx.pipelines.work_folder import WorkFolder
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.former_keywords import former_keywords
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.records.validation import (
    Between,
    Count,
    NonNegative,
    Some,
    check_value,
    checked,
)
from mpqdm_fx.report.comparison import compare
from mpqdm_fx.report.page.packages import renders

__all__ = ["MINIMUM_SQNR_DB", "ExportResult", "export_pipeline"]

logger = logging.getLogger(__name__)

_END_SHARE = 0.15  # drawing, and measuring, against all parts
_REPORT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export_pipeline` made.

    Attributes:
        directory: The folder.
        quantized: Quantized parts by name. A part that stayed in float, or whose programs a
            resumed run found finished, has none; nor has a text encoder that was read from its
            files layer by layer, which would stay in memory. One of more than a GiB in float32
            holds codes, and its weights are computed when they are read.
        manifest: The content of `pipeline.json`.
        summary: The content of `summary.json`: sizes, times, peaks of memory, quality.
    """

    directory: Path
    quantized: Mapping[str, QuantizedModel]
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]


@former_keywords(
    resume="resume", max_memory="activation_memory", device="device", sensitivity="sensitivity"
)
@plain_torch()
@checked
def export_pipeline(
    pipeline: Any,
    config: MPQConfig | None,
    output: str | Path,
    *,
    sizes: Sequence[Size] | None = None,
    prompts: Sequence[str] | None = None,
    steps: Count = 20,
    guidance: NonNegative | None = None,
    trajectories: Count = 16,
    batch_size: Count = 8,
    minimum_sqnr_db: Annotated[float, Between(-300, 300)] = MINIMUM_SQNR_DB,
    run: RunOptions = RunOptions(),
    tabulate: bool = False,
    backend: ProgramBackend = "xnnpack",
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
    four_bit: FourBit = "whole",
    external_weights: bool = False,
    compress: bool = False,
    overwrite: bool = False,
    samples: Some = 4,
    measure: bool = True,
    command: str | None = None,
    lora: Lora | None = None,
    encoder_bits: SideBits = 8,
) -> ExportResult:
    """Turn a diffusers pipeline into a folder of ExecuTorch programs and a runner.

    The denoiser is quantized with `config`, calibrated on the pipeline's own denoising runs with
    the given prompts and guidance. Text encoders and VAE get 8-bit weights and the same kind of
    activations where that is good enough, and stay in float elsewhere. Every program has batch 1:
    guidance calls the denoiser twice a step, and can be switched off at run time.

    Each part is one file. The denoiser's has a method for what does not change from step to step
    (keys and values of the prompt), and one for the step; each image size adds a method, and the
    weights are there once.

    The folder also holds `summary.json`, and a report of every part: `report.json`, and
    `report.html` where what draws it is installed.

    Args:
        pipeline: Folder written by `save_pretrained`, or a pipeline object, which is not changed.
            Text encoders of a folder that take more than a GiB in float32 are never loaded whole.
        config: Settings of the denoiser; None exports everything in float.
        output: Folder; it appears whole or not at all.
        sizes: Heights and widths in pixels that can be drawn; the first is the default and the one
            calibrated at. Of sounds `(samples,)` in each channel. Default: the one that the model
            was trained for.
        prompts: Prompts to calibrate on. Default: captions of pictures, or of sounds.
        steps: Steps of the calibration runs, and the runner's default.
        guidance: Guidance scale of the calibration runs, and the runner's default; up to 1 none.
            Default: the pipeline's own.
        trajectories: Denoising runs to calibrate on.
        batch_size: Rows in a calibration call.
        minimum_sqnr_db: A quantized text encoder or VAE below this stays in float.
        run: How it runs; see `RunOptions`. Finished parts and solved layers lie in its `directory`,
            which stays, else beside `output`, in a folder of that name and `.checkpoint`, until the
            run is through; the sensitivities are the denoiser's. `start_from` is the `directory` of
            another export: parts of equal weights are taken with their programs, of the others
            layers of equal weights.
        tabulate: Replace the denoiser's time branch by tables for `steps` steps of the pipeline's
            scheduler. The folder then draws with that number of steps of that scheduler alone.
        backend: `"lowbit"` has own kernels beside XNNPACK's for quantized parts; what draws with
            the folder then needs the library `mpqdm_kernels`, and so does this function.
        kernels: Which layers own kernels run, of `"lowbit"`; as of `lower`, like `cpu`.
        cpu: Class of CPUs that the choice is made for.
        four_bit: Which weights programs store at four bits, as of `lower`.
        external_weights: Write each program's weights to a file of their own, `<part>.ptd`.
        compress: Store programs and weights as `.xz`; the runner expands them when they are first
            run.
        overwrite: Whether `output` may be an export that is replaced.
        samples: Columns of `samples.png`: pictures of the pipeline in float above those of the
            programs, of the first prompts. 0 draws none.
        measure: Measure time and peak memory of every part, as a program and in float; peaks of
            the float parts only where `pipeline` is a folder.
        command: The command line that does the same, for the report.
        lora: A LoRA that is fused into a copy of the pipeline first.
        encoder_bits: Bits of text encoders' weights; embedding tables, and an encoder's first and
            last layer, have 8. Give a lower `minimum_sqnr_db` with 4. Programs store four bits
            with dynamic activations alone.

    Returns:
        What was made.

    Raises:
        ConfigError: The pipeline's class is not supported, it carries a LoRA that is not to be
            fused, it draws nothing of a size, a setting has no program, or a text encoder does not
            fit in memory although it is read layer by layer; or the run to start from has other
            settings or another model, or the disk has less space than is written at least.
        ArtifactError: The pipeline's folder is not whole, `output` holds something else, or the run
            to start from is none that is finished.
        DialectError: There are to be tables, and the denoiser has no time branch of its own.
        LoweringError: ExecuTorch is missing, or the library of own kernels is.
        MPQError: A part cannot be traced, quantized or lowered; nothing is left at `output`.
    """
    check_export(
        config, prompts, four_bit, encoder_bits=encoder_bits,
        backend=backend, kernels=kernels, cpu=cpu,
    )  # fmt: skip
    check_value(run, RunOptions, "run")
    if config is None:
        check_float_run(run, minimum_sqnr_db)
    require_executorch()
    own = [backend, kernels, cpu] if backend == "lowbit" else []
    if may_call_own_kernels(backend, kernels):
        require_kernels()
    target = check_target(output, MANIFEST, overwrite=overwrite)
    place = work_place(target, run)
    inputs, chosen = inputs_of(
        pipeline,
        sizes,
        prompts=prompts,
        steps=steps,
        guidance=guidance,
        trajectories=trajectories,
        batch_size=batch_size,
        seed=0 if config is None else config.seed,
        lora=lora,
        stored=config is not None,
    )
    layout, guidance = inputs.layout, inputs.guidance
    if config is not None:
        inputs.check_settings(config, sensitivity=run.sensitivity, max_memory=run.activation_memory)
    check_memory(layout.parts.values(), inputs.tokens_of)
    timesteps = inputs.told_times() if tabulate else None
    digests = {name: part.digest for name, part in layout.parts.items()}
    identity: dict[str, Any] = {
        "pipeline": layout.class_name,
        "scheduler": json.loads(layout.pipeline.scheduler.to_json_string()),
        "models": digests,
        "settings": None if config is None else config.to_dict(),
        "sizes": [list(size) for size in chosen],
        "prompts": list(inputs.prompts) if layout.tokenizers else [],
        "numbers": [steps, guidance, trajectories, batch_size, minimum_sqnr_db],
        "timesteps": timesteps,
        "program form": [four_bit, external_weights, *own, *(["W4"] * (encoder_bits == 4))],
        "versions": versions(),
    }
    earlier = None
    if run.start_from is not None:
        earlier = KeptRun(Path(run.start_from), identity, layout.parts.values())
        identity["start"] = earlier.work.run
    if not run.resume:  # who resumes has some of it on the disk already
        taken = set() if earlier is None else set(filter(earlier.is_same, layout.parts))
        made = [part for name, part in layout.parts.items() if name not in taken]
        programs, layers = least_bytes(
            made, config, backend=backend, four_bit=four_bit, encoder_bits=encoder_bits
        )
        if run.directory is not None:
            check_space(place, programs + layers, "directory")
        check_space(target, programs + layers * (run.directory is None))
    work = WorkFolder(place, identity, resume=run.resume)
    quantized: dict[str, QuantizedModel] = {}
    records: dict[str, dict[str, Any]] = {}
    stages = partial(part_stages, sizes=len(chosen), is_quantized=config is not None)
    progress.expect(lambda: _foretold(layout, earlier, stages, samples=samples, measure=measure))
    for part in progress.each(layout.parts.values(), lambda part: part.name):
        record = work.finished(part.name)
        if record is None and earlier is not None and earlier.is_same(part.name):
            logger.info("taking %s from %s", part.name, run.start_from)
            record = earlier.give(part.name, work)
        if record is None:
            solved = None if earlier is None else earlier.layers(part.name)
            solving = replace(run, directory=work.directory / part.name, start_from=solved)
            held = is_held_as_stored(part.module)
            wanted = chosen if part.sized else (None,)
            progress.expect(partial(stages, part))
            with large_blocks_returned(held):
                judged = _judge(part, inputs, config, minimum_sqnr_db, solving, encoder_bits)
                logger.info("lowering %s", part.name)
                written = write_programs(
                    part,
                    judged.quantized,
                    {size: inputs.example(part.name, size or inputs.size) for size in wanted},
                    work.path(part.name),
                    timesteps=timesteps if part.stepped else None,
                    four_bit=four_bit,
                    external_weights=external_weights,
                    backend=backend,
                    kernels=kernels,
                    cpu=cpu,
                )
            if judged.quantized is not None and not held:
                quantized[part.name] = judged.quantized
                if 4 * part.parameters > LARGE:  # others are made beside it
                    hold_codes(judged.quantized, judged.quantized.rounded)
            kept = kept_part(
                part, judged, written, config, bound=minimum_sqnr_db,
                sensitivity=run.sensitivity, backend=backend,
            )  # fmt: skip
            record = work.finish(
                part.name,
                {
                    "methods": [method.entry for method in written],
                    "quality": _quality(judged, started=earlier is not None),
                    "report": kept.to_dict(),
                },
            )
        records[part.name] = record
    if run.directory is not None:
        work.keep(layout.parts.values())
    with staged_directory(target, MANIFEST, overwrite=overwrite) as stage:
        expanded = {}
        for name in records:
            expanded.update(work.place(name, stage, compress=compress))
        for name, tokenizer in layout.tokenizers.items():
            tokenizer.save_pretrained(stage / name)
        layout.pipeline.scheduler.save_pretrained(stage / "scheduler")
        write_runner(stage, layout.loop)
        methods = [entry for record in records.values() for entry in record["methods"]]
        write = partial(
            write_manifest,
            stage,
            layout,
            sizes=chosen,
            defaults={"steps": steps, "guidance": guidance, "numbers": inputs.default_numbers},
            methods=[compressed_entry(entry) for entry in methods] if compress else methods,
            parts={name: record["quality"] for name, record in records.items()},
            quantization=None if config is None else config.to_dict(),
            timesteps=timesteps,
            expanded=expanded,
        )
        progress.leave_log(stage)
        summary = finish(
            stage, inputs, write(), {name: record["report"] for name, record in records.items()},
            samples=samples, measure=measure, command=command, digests=digests,
            root=Path(pipeline) if isinstance(pipeline, (str, Path)) else None,
        )  # fmt: skip
        manifest = write()  # which now lists summary, samples and report too
    if run.directory is None:
        work.remove()
    return ExportResult(directory=target, quantized=quantized, manifest=manifest, summary=summary)


def _foretold(
    layout: Layout,
    earlier: KeptRun | None,
    stages: Callable[[Part], Mapping[str, float]],
    *,
    samples: int,
    measure: bool,
) -> dict[str, float]:
    """Seconds by stage, in running order; what has passed corrects them (`progress.expect`)."""
    parts = {
        part.name: sum(stages(part).values())
        for part in layout.parts.values()
        if earlier is None or not earlier.is_same(part.name)
    }
    every = sum(parts.values())
    ends = {"drawing": samples > 0, "measuring": measure}
    seconds = parts | {name: _END_SHARE * every for name, does in ends.items() if does}
    return seconds | ({"report": _REPORT_SECONDS} if renders() else {})


def _judge(
    part: Part,
    inputs: PipelineInputs,
    config: MPQConfig | None,
    bound: float,
    run: RunOptions,
    encoder_bits: SideBits,
) -> JudgedPart:
    """Quantize one part; what runs in every step as asked, the rest if it stays good enough."""
    if config is None:
        return JudgedPart(quantized=None, sqnr_db=None)
    logger.info("quantizing %s", part.name)
    if part.name != "denoiser":
        run = replace(run, sensitivity=None)
    if not part.stepped:
        bits = encoder_bits if part.name.startswith("text_encoder") else 8
        return quantize_part(part, inputs.calls(part.name), config, bound=bound, run=run, bits=bits)
    calls = inputs.runs.calls(part.name)
    quantized = quantize(part.module, config, calls, run=run)
    recorded = list(calls)
    held_out = [recorded[index] for index in calls.held_out_calls] or recorded
    compared = compare(part.module, quantized, held_out, noise_argument=config.noise_argument)
    return JudgedPart(
        quantized=quantized,
        sqnr_db=compared.sqnr_db,
        seconds=quantized.report.seconds,
        comparison=compared,
        held_out=held_out,
    )


def _quality(judged: JudgedPart, *, started: bool) -> dict[str, Any]:
    """Precision, bits and errors of a part; layers by origin if another export was started from."""
    if judged.quantized is None:
        counts = layer_counts(0, solved=0) if started else {}
        return {"precision": "float", "quantized_sqnr_db": judged.sqnr_db, **counts}
    plan, settings = judged.quantized.plan, judged.quantized.settings
    solved = judged.quantized.report.solved
    return {
        "precision": "int8" if judged.quantized.ranges else "rounded",
        "quantized_sqnr_db": judged.sqnr_db,
        "activation_mode": settings.activation_mode,
        "mean_bits": plan.mean_bits,
        "effective_bits": plan.effective_bits,
        **(layer_counts(len(plan.layers), solved=solved) if started else {}),
    }
