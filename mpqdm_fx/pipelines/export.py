"""Export a diffusers pipeline: every part a program, beside them what a runner needs.

The road: take the pipeline apart -> for each part: calibrate, quantize, judge, lower for each size
-> tokenizers, scheduler, manifest, runner. Finished programs lie in a folder beside the output, so
that a run that was killed goes on with them; the output appears whole.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.fingerprint import hash_tensor
from mpqdm_fx.pipelines import runner
from mpqdm_fx.pipelines.inputs import DenoiserCalls, PipelineInputs
from mpqdm_fx.pipelines.layout import Size, layout_of, open_pipeline
from mpqdm_fx.pipelines.manifest import MANIFEST, method_entry, write_manifest
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.programs import Judged, quantize_part, sqnr_of, write_program
from mpqdm_fx.pipelines.prompts import DEFAULT_PROMPTS
from mpqdm_fx.pipelines.work import WorkFolder
from mpqdm_fx.quantized import QuantizedModel
from mpqdm_fx.storage import check_target, staged_directory
from mpqdm_fx.versions import versions

__all__ = ["MINIMUM_SQNR_DB", "ExportResult", "export_pipeline"]

logger = logging.getLogger(__name__)

#: Below this a quantized text encoder or VAE is not used: noise of a thousandth of the power.
MINIMUM_SQNR_DB = 30.0
RUNNER = "run.py"


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export_pipeline` made.

    Attributes:
        directory: The folder.
        quantized: Quantized parts by name. A part that stayed in float, or whose programs a
            resumed run found finished, has none.
        manifest: The content of `pipeline.json`.
    """

    directory: Path
    quantized: Mapping[str, QuantizedModel]
    manifest: Mapping[str, Any]


def export_pipeline(
    pipeline: Any,
    config: MPQConfig | None,
    output: str | Path,
    *,
    sizes: Sequence[Size] | None = None,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    steps: int = 20,
    guidance: float = 7.5,
    trajectories: int = 16,
    batch_size: int = 8,
    minimum_sqnr_db: float = MINIMUM_SQNR_DB,
    resume: bool = False,
    max_memory: int | None = None,
    device: str | None = None,
    sensitivity: str | Path | None = None,
) -> ExportResult:
    """Turn a diffusers pipeline into a folder of ExecuTorch programs and a runner.

    The denoiser is quantized with `config`, calibrated on the pipeline's own denoising runs with
    the given prompts and guidance. Text encoders and VAE get 8-bit weights and the same kind of
    activations where that is good enough, and stay in float elsewhere. Every program has batch 1:
    guidance calls the denoiser twice a step, and can be switched off at run time.

    Args:
        pipeline: Folder written by `save_pretrained`, or a pipeline object, which is not changed.
        config: Settings of the denoiser; None exports everything in float.
        output: Folder; it appears whole or not at all.
        sizes: Heights and widths in pixels that get programs; the first is the default and the one
            calibrated at. Default: the one that the model was trained for.
        prompts: Prompts to calibrate on.
        steps: Steps of the calibration runs, and the runner's default.
        guidance: Guidance scale of the calibration runs, and the runner's default; up to 1 none.
        trajectories: Denoising runs to calibrate on.
        batch_size: Rows in a calibration call.
        minimum_sqnr_db: A quantized text encoder or VAE below this stays in float.
        resume: Go on with a run that was killed; its finished parts lie beside `output`, in a
            folder of that name and `.checkpoint`, until the run is through.
        max_memory: Bytes of activations held in memory; the rest goes to disk.
        device: Where to calibrate and to solve, for example `"cuda"`.
        sensitivity: File that keeps the denoiser's sensitivities for runs with other budgets.

    Returns:
        What was made.

    Raises:
        ConfigError: The pipeline's class is not supported, it carries a LoRA, or a setting has no
            program.
        ArtifactError: The pipeline's folder is not whole, or `output` holds something else.
        MPQError: A part cannot be traced, quantized or lowered; nothing is left at `output`.
    """
    _check_settings(config, prompts)
    require_executorch()
    target = check_target(output, MANIFEST)
    layout = layout_of(open_pipeline(pipeline))
    chosen = layout.check_sizes(sizes)
    if layout.kind == "unconditional":
        guidance = 1.0
    inputs = PipelineInputs(
        layout=layout,
        size=chosen[0],
        prompts=tuple(prompts),
        steps=steps,
        guidance=guidance,
        trajectories=trajectories,
        batch_size=batch_size,
        seed=0 if config is None else config.seed,
    )
    work = WorkFolder(
        target.with_name(f"{target.name}.checkpoint"),
        {
            "pipeline": layout.class_name,
            "models": {name: _digest(part) for name, part in layout.parts.items()},
            "settings": None if config is None else config.to_dict(),
            "sizes": [list(size) for size in chosen],
            "prompts": list(prompts) if layout.tokenizers else [],
            "numbers": [steps, guidance, trajectories, batch_size, minimum_sqnr_db],
            "versions": versions(),
        },
        resume=resume,
    )
    limits = {"resume": resume, "max_activations": max_memory, "device": device}
    quantized: dict[str, QuantizedModel] = {}
    records: dict[str, list[dict[str, Any]]] = {}
    programs = {part: _programs(part, chosen) for part in layout.parts.values()}
    count = sum(map(len, programs.values()))
    with tqdm(total=count, desc="export", unit="program", disable=None) as bar:
        for part, wanted in programs.items():
            if not all(work.finished(name) for name in wanted):
                judged = _judge(
                    part, inputs, config, minimum_sqnr_db,
                    directory=work.directory / part.name, sensitivity=sensitivity, **limits,
                )  # fmt: skip
                if judged.quantized is not None:
                    quantized[part.name] = judged.quantized
                _lower(part, wanted, judged, inputs, work)
            records[part.name] = [work.finished(name) or {} for name in wanted]
            bar.update(len(wanted))
    with staged_directory(target, MANIFEST) as stage:
        for entries in records.values():
            for record in entries:
                work.place(record["file"], stage)
        for name, tokenizer in layout.tokenizers.items():
            tokenizer.save_pretrained(stage / name)
        layout.pipeline.scheduler.save_pretrained(stage / "scheduler")
        shutil.copyfile(runner.__file__, stage / RUNNER)
        manifest = write_manifest(
            stage,
            layout,
            sizes=chosen,
            defaults={"steps": steps, "guidance": guidance},
            methods=[record for entries in records.values() for record in _methods(entries)],
            parts={name: entries[0]["quality"] for name, entries in records.items()},
            quantization=None if config is None else config.to_dict(),
        )
    work.remove()
    return ExportResult(directory=target, quantized=quantized, manifest=manifest)


def _check_settings(config: MPQConfig | None, prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ConfigError("prompts: give a sequence of at least one prompt")
    if config is None or config.activation_mode == "float":
        return
    if config.activation_mode == "timestep":
        raise ConfigError(
            'activation_mode="timestep" runs as a packed model only; programs take "static", '
            '"dynamic" or "float"'
        )
    if config.activation_bits != 8:
        raise ConfigError(
            f"activation_bits={config.activation_bits}: programs run 8-bit activations"
        )


def _digest(part: Part) -> str:
    digest = hashlib.sha256()
    for tensor in part.module.state_dict().values():
        hash_tensor(digest, tensor)
    return digest.hexdigest()[:16]


def _programs(part: Part, sizes: Sequence[Size]) -> dict[str, Size | None]:
    """Names of a part's programs and the size of each."""
    if not part.sized:
        return {part.name: None}
    return {f"{part.name}-{height}x{width}": (height, width) for height, width in sizes}


def _judge(
    part: Part,
    inputs: PipelineInputs,
    config: MPQConfig | None,
    bound: float,
    *,
    sensitivity: str | Path | None,
    **options: Any,
) -> Judged:
    """Quantize one part; the denoiser as asked, the others if they stay good enough."""
    if config is None:
        return Judged(quantized=None, sqnr_db=None)
    logger.info("quantizing %s", part.name)
    if part.name != "denoiser":
        return quantize_part(part, inputs.calls(part.name), config, bound=bound, **options)
    calls = DenoiserCalls(inputs.runs)
    found = quantize(part.module, config, calls, sensitivity=sensitivity, **options)
    every = list(calls)
    held_out = [every[index] for index in calls.held_out_calls] or every
    return Judged(quantized=found, sqnr_db=sqnr_of(part.module, found, held_out))


def _lower(
    part: Part,
    wanted: Mapping[str, Size | None],
    judged: Judged,
    inputs: PipelineInputs,
    work: WorkFolder,
) -> None:
    """Write the programs of one part that are not finished yet."""
    for name, size in wanted.items():
        if work.finished(name):
            continue
        logger.info("lowering %s", name)
        example = inputs.example(part.name, size or inputs.size)
        program = write_program(part, judged.quantized, example, work.path(name)).to_dict()
        entry = method_entry(part.name, size, work.path(name).name, part.outputs, program)
        record = {"file": entry["file"], "methods": [entry], "quality": _quality(judged)}
        work.finish(name, record)


def _quality(judged: Judged) -> dict[str, Any]:
    if judged.quantized is None:
        return {"precision": "float", "quantized_sqnr_db": judged.sqnr_db}
    plan, settings = judged.quantized.plan, judged.quantized.settings
    return {
        "precision": "int8" if judged.quantized.ranges else "rounded",
        "quantized_sqnr_db": judged.sqnr_db,
        "activation_mode": settings.activation_mode,
        "mean_bits": plan.mean_bits,
        "effective_bits": plan.effective_bits,
    }


def _methods(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [entry for record in records for entry in record["methods"]]
