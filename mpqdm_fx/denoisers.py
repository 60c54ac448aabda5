"""What predicts the noise: a float model, packed weights, or a program; and drawing with it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.calibration.sampling import denoise_in_batches, take_rows
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.files import read_json
from mpqdm_fx.graph.calling import example_inputs, signature_from_dict, split_batch
from mpqdm_fx.graph.signature import InputSpec, Signature
from mpqdm_fx.models.config_fields import CLASSES
from mpqdm_fx.models.model_config import MODEL_CONFIG, read_model_config
from mpqdm_fx.models.sources import Source, load_scheduler, load_source, make_source
from mpqdm_fx.storage import MANIFEST, load, read_manifest

__all__ = [
    "PROGRAM",
    "SOURCE",
    "Denoiser",
    "draw",
    "first_rows",
    "open_denoiser",
    "pictures",
    "program_denoiser",
    "program_files",
    "source_of",
]

PROGRAM = "unet.pte"
SOURCE = "source.json"

Denoiser = Callable[..., Any]
"""Called with the model's keyword arguments."""


def first_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first sample of a batch of keyword arguments, batch 1."""
    return {name: take_rows(value, slice(0, 1)) for name, value in inputs.items()}


def program_denoiser(path: Path, signature: Signature) -> Denoiser:
    """A `.pte` behind the model's keyword arguments: any batch, one row a call.

    Args:
        path: The program, plain or compressed.
        signature: Signature of the graph that it was made of.
    """
    from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner

    runner = XnnpackRunner(path)

    def call(**kwargs: Any) -> tuple[Tensor, ...]:
        outputs = []
        for part in split_batch(signature, kwargs):
            inputs = signature.normalize((), part)
            rows = next(iter(inputs.values())).shape[0]
            outputs += [
                runner(*[take_rows(value, slice(index, index + 1)) for value in inputs.values()])
                for index in range(rows)
            ]
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    return call


def program_files(folder: Path) -> tuple[Path, ...]:
    """A folder's program, plain or compressed, then its weights if they are apart; or nothing."""
    from mpqdm_fx.backends.xnnpack.runner import stored_files

    return stored_files(folder / PROGRAM)


def open_denoiser(
    name: str, subfolder: str | None, form: str, variant: str | None = None
) -> tuple[Source, Denoiser]:
    """What `sample` runs: the float model, a folder's packed weights, or its `.pte`.

    A program is run without loading or tracing any model.

    Args:
        name: A model (see `load_source`) or a folder written by `quantize`.
        subfolder: Part of a pipeline folder.
        form: `"auto"` (the `.pte` if there is one), `"pte"`, `"packed"` or `"float"`.
        variant: Variant of a float model's weight files.

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
        source = load_source(name, subfolder, variant)
        return source, source.model
    if form == "float":
        source = source_of(folder)
        return source, source.model
    files = program_files(folder)
    if form == "pte" and not files:
        raise ArtifactError(f"{folder} has no {PROGRAM}; quantize with --backend xnnpack")
    signature = signature_from_dict(read_manifest(folder)["signature"])
    if form == "packed" or not files:
        quantized = load(folder)
        return _saved_source(folder, signature, quantized), quantized
    denoiser = program_denoiser(files[0], signature)
    return _saved_source(folder, signature, denoiser), denoiser


def _saved_source(folder: Path, signature: Signature, model: Denoiser) -> Source:
    """Inputs and scheduler as saved: sampling needs no float model."""
    scheduler = load_scheduler(folder / "scheduler")
    if (folder / MODEL_CONFIG).exists() and signature.model_class in CLASSES:
        _, config = read_model_config(folder)
        times = next((spec.shape[-1] for spec in signature.inputs if _is_time_ids(spec)), 0)
        return make_source(
            str(folder),
            model,
            scheduler,
            class_name=signature.model_class,
            config=config,
            aesthetic=times == 5,
        )
    inputs = example_inputs(signature)
    return Source(
        name=str(folder),
        model=model,
        scheduler=scheduler,
        example_inputs=inputs,
        sample_shape=tuple(inputs["sample"].shape[1:]),
    )


def _is_time_ids(spec: InputSpec) -> bool:
    return spec.name == "added_cond_kwargs.time_ids"


def source_of(folder: Path, model: str | None = None, subfolder: str | None = None) -> Source:
    """The float model that a folder was made from.

    Raises:
        ArtifactError: It cannot be found; give `model`.
    """
    read_manifest(folder)
    origin = read_json(folder / SOURCE)
    try:
        # older folders have no variant
        return load_source(
            model or origin["model"], subfolder or origin["subfolder"], origin.get("variant")
        )
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
    return denoise_in_batches(
        denoiser,
        source.scheduler,
        noise,
        num_inference_steps=steps,
        seed=seed,
        conditions=source.conditions(num, seed),
        batch_size=batch_size,
        progress=True,
    )


def pictures(samples: Tensor) -> Tensor:
    """Samples as images: what has 1 or 3 channels as it is, of latents the first channel.

    Args:
        samples: [N, C, H, W].

    Returns:
        [N, 1 or 3, H, W]; latents are scaled to the range -1..1 over all samples.
    """
    if samples.shape[1] in (1, 3):
        return samples
    first = samples[:, :1]
    return first / first.abs().max().clamp_min(1e-6)
