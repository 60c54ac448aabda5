"""What the command line does, as functions: quantize a source to a folder, sample, evaluate."""

import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.api import Backend, lower, quantize
from mpqdm_fx.calibration.sampling import denoise
from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.models.bundled import load_digits_classifier
from mpqdm_fx.models.sources import Source, diffusers_class, load_source, read_json
from mpqdm_fx.quantized import QuantizedModel
from mpqdm_fx.report.images import save_grid
from mpqdm_fx.report.metrics import (
    EVALUATION_SEED,
    epsilon_sqnr,
    evaluate_denoiser,
    x0_sqnr,
)
from mpqdm_fx.storage import MANIFEST, load, read_manifest, staged_directory, write_model

__all__ = [
    "PROGRAM",
    "QuantizeResult",
    "draw",
    "evaluate_folder",
    "open_denoiser",
    "quantize_to_folder",
]

logger = logging.getLogger(__name__)

PROGRAM = "unet.pte"
SOURCE = "source.json"
GRID = "samples.png"
SUMMARY = "summary.json"

Denoiser = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What `quantize_to_folder` made.

    Attributes:
        directory: The folder.
        quantized: The quantized model.
        summary: Numbers for the printed table, plain JSON types.
    """

    directory: Path
    quantized: QuantizedModel
    summary: dict[str, Any]


def calibration_of(
    source: Source, *, trajectories: int, steps: int, seed: int, batch_size: int = 16
) -> Trajectories:
    """Inputs along the float model's own denoising runs, all timesteps mixed in every batch."""
    return Trajectories(
        source.model,
        source.scheduler,
        num_trajectories=trajectories,
        num_inference_steps=steps,
        batch_size=batch_size,
        seed=seed,
        sample_shape=source.sample_shape,
        conditions=source.conditions(trajectories, seed),
    )


def quantize_to_folder(
    source: Source,
    config: MPQConfig,
    *,
    backend: Backend,
    output: Path,
    trajectories: int = 16,
    steps: int = 20,
    samples: int = 16,
    subfolder: str | None = None,
) -> QuantizeResult:
    """Quantize a source and write everything that belongs to it into one folder.

    Args:
        source: Model and scheduler.
        config: Settings.
        backend: `"xnnpack"` also writes `unet.pte`; `"torch_ao"` also checks that conversion
            succeeds and times it; packed weights are always written.
        output: Folder; it appears whole or not at all.
        trajectories: Denoising runs to calibrate on.
        steps: Steps of each.
        samples: Images in the grid, drawn by what the backend runs.
        subfolder: Part of a pipeline folder that the source came from.

    Raises:
        MPQError: One of the steps cannot be done; nothing is left behind.
    """
    data = calibration_of(source, trajectories=trajectories, steps=steps, seed=config.seed)
    quantized = quantize(source.model, config, data)
    with staged_directory(output) as stage:
        write_model(quantized, stage)
        source.scheduler.save_pretrained(stage / "scheduler")
        origin = {"model": source.name, "subfolder": subfolder}
        (stage / SOURCE).write_text(json.dumps(origin), encoding="utf-8")
        runner: Denoiser = quantized
        program: dict[str, Any] | None = None
        if backend == "xnnpack":
            lowered = lower(quantized, "xnnpack", output=stage / PROGRAM)
            program = lowered.to_dict()
            runner = _program_denoiser(stage, quantized)
        elif backend == "torch_ao":
            runner = _positional(lower(quantized, "torch_ao"), quantized)
        summary = _summarise(source, quantized, runner, backend, data)
        summary["program"] = program
        if samples:
            images = draw(source, runner, num=samples, steps=steps, seed=0)
            save_grid(images, stage / GRID, columns=max(1, round(samples**0.5)))
        summary["files"] = {
            path.name: path.stat().st_size for path in sorted(stage.iterdir()) if path.is_file()
        }
        (stage / SUMMARY).write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return QuantizeResult(directory=output, quantized=quantized, summary=summary)


def _summarise(
    source: Source, quantized: QuantizedModel, runner: Denoiser, backend: str, data: Trajectories
) -> dict[str, Any]:
    held_out = calibration_of(source, trajectories=4, steps=20, seed=EVALUATION_SEED)
    plan = quantized.plan
    one = next(iter(data))
    single = {name: _first_row(value) for name, value in one.items()}
    timing = time_per_step({"float": source.model, backend: runner}, single)
    return {
        "backend": backend,
        "settings": quantized.settings.to_dict(),
        "mean_bits": plan.mean_bits,
        "effective_bits": plan.effective_bits,
        "num_weights": plan.num_weights,
        "weight_bytes": plan.weight_bytes,
        "float_remainder_bytes": plan.float_bytes,
        "float32_bytes": 4
        * (plan.num_weights + sum(t.numel for t in plan.floats if not t.is_weight)),
        "epsilon_sqnr_db": epsilon_sqnr(source.model, quantized, held_out),
        "backend_epsilon_sqnr_db": epsilon_sqnr(source.model, runner, held_out),
        "milliseconds_per_step": timing,
        "threads": torch.get_num_threads(),
        "seconds_to_quantize": quantized.report.seconds,
    }


def time_per_step(
    models: dict[str, Denoiser], inputs: dict[str, Any], *, rounds: int = 21
) -> dict[str, float]:
    """Median milliseconds of one call of each model, interleaved, after a warm-up call each.

    Args:
        models: Callables by name.
        inputs: Keyword arguments of the call.
        rounds: Timed calls of each.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for index in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(**inputs)
                if index:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _first_row(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _first_row(entry) for key, entry in value.items()}
    return value[:1]


def _positional(graph_module: Callable[..., Any], quantized: QuantizedModel) -> Denoiser:
    """A lowered graph behind the model's keyword arguments."""

    def call(**kwargs: Any) -> Any:
        return graph_module(**quantized.signature.normalize((), kwargs))

    return call


def _program_denoiser(folder: Path, quantized: QuantizedModel) -> Denoiser:
    """The folder's `.pte` behind the model's keyword arguments, any batch, one row a call."""
    from mpqdm_fx.backends.xnnpack import XnnpackRunner

    runner = XnnpackRunner(folder / PROGRAM)

    def call(**kwargs: Any) -> tuple[Tensor, ...]:
        inputs = quantized.signature.normalize((), kwargs)
        rows = next(iter(inputs.values())).shape[0]
        outputs = [
            runner(*[_row(value, index) for value in inputs.values()]) for index in range(rows)
        ]
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    return call


def _row(value: Any, index: int) -> Any:
    if isinstance(value, dict):
        return {key: _row(entry, index) for key, entry in value.items()}
    return value[index : index + 1]


def open_denoiser(name: str, subfolder: str | None, form: str) -> tuple[Source, Denoiser]:
    """What `sample` runs: the float model, a folder's packed weights, or its `.pte`.

    Args:
        name: A model (see `load_source`) or a folder written by `quantize`.
        subfolder: Part of a pipeline folder.
        form: `"auto"` (the `.pte` if there is one), `"pte"`, `"packed"` or `"float"`.

    Raises:
        ConfigError: The form is unknown.
        ArtifactError: The folder lacks that form or is damaged.
    """
    if form not in ("auto", "pte", "packed", "float"):
        raise ConfigError(f"--from {form}: choose auto, pte, packed or float")
    folder = Path(name)
    if not (folder / MANIFEST).exists():
        if form in ("pte", "packed"):
            raise ArtifactError(f"{name} was not written by mpqdm-fx quantize; it has no {form}")
        source = load_source(name, subfolder)
        return source, source.model
    quantized = load(folder)
    if form == "float":
        source = source_of(folder)
        return source, source.model
    source = _source_from_folder(folder, quantized)
    if form == "packed" or (form == "auto" and not (folder / PROGRAM).exists()):
        return source, quantized
    if not (folder / PROGRAM).exists():
        raise ArtifactError(f"{folder} has no {PROGRAM}; quantize with --backend xnnpack")
    return source, _program_denoiser(folder, quantized)


def _source_from_folder(folder: Path, quantized: QuantizedModel) -> Source:
    """Shapes and scheduler as saved: sampling needs no float model."""
    from mpqdm_fx.graph.calling import example_inputs

    config = read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler = diffusers_class(config["_class_name"]).from_pretrained(folder / "scheduler")
    inputs = example_inputs(quantized.signature)
    classes = int((quantized.config or {}).get("num_class_embeds") or 0)
    return Source(
        name=str(folder),
        model=quantized,
        scheduler=scheduler,
        example_inputs=inputs,
        sample_shape=tuple(inputs["sample"].shape[1:]),
        classes=classes,
    )


def source_of(folder: Path, model: str | None = None, subfolder: str | None = None) -> Source:
    """The float model that a folder was made from.

    Raises:
        ArtifactError: It cannot be found; give `model`.
    """
    read_manifest(folder)
    origin = read_json(folder / SOURCE)
    try:
        return load_source(model or origin["model"], subfolder or origin["subfolder"])
    except ConfigError as error:
        raise ArtifactError(
            f"the float model of {folder} is gone ({error}); give --model"
        ) from None


def draw(
    source: Source, denoiser: Denoiser, *, num: int, steps: int, seed: int, batch_size: int = 16
) -> Tensor:
    """Draw samples from seeded noise.

    Args:
        source: Shapes, scheduler and conditions.
        denoiser: What predicts the noise.
        num: Number of samples.
        steps: Steps of the scheduler.
        seed: Seed of the noise and of random conditions.
        batch_size: Samples in one call.

    Returns:
        Samples [num, *sample_shape].
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num, *source.sample_shape, generator=generator)
    conditions = source.conditions(num, seed)
    parts = []
    with torch.no_grad():
        for start in range(0, num, batch_size):
            rows = slice(start, start + batch_size)
            parts.append(
                denoise(
                    denoiser,
                    source.scheduler,
                    noise[rows],
                    num_inference_steps=steps,
                    seed=seed,
                    conditions={name: _rows(value, rows) for name, value in conditions.items()},
                    progress=True,
                )
            )
    return torch.cat(parts)


def _rows(value: Any, rows: slice) -> Any:
    if isinstance(value, dict):
        return {key: _rows(entry, rows) for key, entry in value.items()}
    return value[rows]


def evaluate_folder(
    folder: Path, *, model: str | None = None, num: int = 256, steps: int = 20, seed: int
) -> dict[str, Any]:
    """Measure a saved model against the float model that it came from.

    Args:
        folder: Folder written by `quantize`.
        model: The float model, if it is no longer where it was.
        num: Samples of the free-running metrics.
        steps: Steps of the scheduler.
        seed: Seed of noise and held-out trajectories.

    Returns:
        Metrics by name; Frechet distance and accuracy only for the bundled model, whose
        classifier is bundled too.
    """
    source = source_of(folder, model)
    quantized = load(folder)
    if source.name == "digits":
        return evaluate_denoiser(
            source.model,
            quantized,
            source.scheduler,
            load_digits_classifier(),
            num_samples=num,
            num_inference_steps=steps,
            seed=seed,
        ).to_dict()
    held_out = calibration_of(source, trajectories=4, steps=steps, seed=seed)
    expected = draw(source, source.model, num=num, steps=steps, seed=seed + 1)
    found = draw(source, quantized, num=num, steps=steps, seed=seed + 1)
    return {
        "epsilon_sqnr": epsilon_sqnr(source.model, quantized, held_out),
        "x0_sqnr": x0_sqnr(expected, found),
        "num_samples": num,
        "num_inference_steps": steps,
        "seed": seed,
    }
