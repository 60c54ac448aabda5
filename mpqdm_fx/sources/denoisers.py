"""What predicts the noise: a float model, packed weights, or a program; and drawing with it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpqdm_fx.calibration.conventions import convention_of
from mpqdm_fx.calibration.sampling import denoise_in_batches
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.graph.calling import example_inputs, split_batch
from mpqdm_fx.graph.nested import take_rows
from mpqdm_fx.graph.signature import InputSpec, Signature
from mpqdm_fx.io.folders import MANIFEST, MODEL_CONFIG, SCHEDULER_CONFIG
from mpqdm_fx.io.model_config import checked_model_config
from mpqdm_fx.io.schema import Name, Strict, read_listed
from mpqdm_fx.io.sealed import hashed_file
from mpqdm_fx.model.folder import ModelFolder, open_folder
from mpqdm_fx.model.storage import load
from mpqdm_fx.records.validation import Count, DerivedSeed, checked
from mpqdm_fx.sources.config_fields import CLASSES
from mpqdm_fx.sources.model_names import is_function
from mpqdm_fx.sources.source import Source
from mpqdm_fx.sources.sources import load_source, make_source, scheduler_from_config

if TYPE_CHECKING:
    from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner

__all__ = [
    "FORMS",
    "PROGRAM",
    "SOURCE",
    "Denoiser",
    "Origin",
    "as_pictures",
    "draw",
    "open_denoiser",
    "open_program",
    "origin_of",
    "pictures",
    "program_denoiser",
    "program_files",
    "program_names",
    "runner_denoiser",
    "saved_source",
    "source_of",
    "zoom_of",
]

PROGRAM = "unet.pte"
PROGRAM_WEIGHTS = "unet.ptd"
SOURCE = "source.json"

FORMS = ("auto", "pte", "packed", "float")
"""What `open_denoiser` opens."""

Denoiser = Callable[..., Any]
"""Called with the model's keyword arguments."""


class Origin(Strict):
    """Content of `source.json`: where the float model is.

    Attributes:
        model: Its name or folder.
        subfolder: Part of a pipeline folder.
        variant: Variant of its weight files; older folders do not say.
        prompts: Prompts that were calibrated on; None where nothing encoded them.
        guidance: Guidance scale of these runs.
    """

    model: Name
    subfolder: Name | None
    variant: Name | None = None
    prompts: tuple[str, ...] | None = None
    guidance: float | None = None

    @classmethod
    def of(cls, source: Source, subfolder: str | None) -> "Origin":
        """Where a source came from, and what its runs were conditioned on."""
        beside = source.components
        conditioner = beside if beside is not None and beside.prompts else None
        return cls(
            model=source.name,
            subfolder=subfolder,
            variant=source.variant,
            prompts=None if conditioner is None else conditioner.prompts,
            guidance=None if conditioner is None else conditioner.scale,
        )


def program_denoiser(folder: ModelFolder) -> Denoiser:
    """A folder's `.pte` behind the model's keyword arguments: any batch, one row a call.

    Args:
        folder: Folder that has a program.

    Raises:
        ArtifactError: It has none, or it is not what was written.
    """
    return runner_denoiser(open_program(folder), folder.manifest.signature)


def runner_denoiser(runner: "XnnpackRunner", signature: Signature) -> Denoiser:
    """A loaded program behind the model's keyword arguments: any batch, one row a call.

    Args:
        runner: The program, made for batch 1.
        signature: Signature of the graph that it was made of.
    """

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


def program_names(folder: ModelFolder) -> tuple[str, ...]:
    """A folder's program, plain or compressed, then its weights if they are apart; or nothing."""
    names = (PROGRAM, f"{PROGRAM}.xz"), (PROGRAM_WEIGHTS, f"{PROGRAM_WEIGHTS}.xz")
    files = [next((name for name in pair if name in folder.files), None) for pair in names]
    return tuple(name for name in files if name is not None) if files[0] else ()


@contextlib.contextmanager
def program_files(folder: ModelFolder) -> Iterator[tuple[Path, Path | None]]:
    """Paths to a folder's program and its weights (None if they are not apart), both plain.

    What is behind them was hashed and found right; they are gone afterwards. Compressed files are
    expanded once, to hidden files beside them.

    Raises:
        ArtifactError: There is no program, or a file is not what was written.
    """
    from mpqdm_fx.backends.compressed import expand_program

    names = program_names(folder)
    if not names:
        raise ArtifactError(f"{folder.root} has no {PROGRAM}; quantize with --backend xnnpack")
    expanded = {} if folder.manifest.program is None else folder.manifest.program.expanded
    with contextlib.ExitStack() as stack:
        paths = []
        for name in names:
            path = stack.enter_context(folder.files.opened(name))
            if name.endswith(".xz"):
                if name not in expanded:
                    raise ArtifactError(
                        f"{folder.files.manifest} does not say what {name} expands to; it is "
                        f"damaged, or of an older version: quantize again"
                    )
                content = expanded[name]
                plain = expand_program(
                    folder.root / name,
                    content=content,
                    source=path,
                    sha256=folder.files.entries[name].sha256,  # which `opened` found right
                )
                path = stack.enter_context(hashed_file(plain, content))
            paths.append(path)
        yield paths[0], paths[1] if len(paths) > 1 else None


def open_program(folder: ModelFolder) -> "XnnpackRunner":
    """Load a folder's program; ExecuTorch gets it only after its hash was found right.

    Raises:
        ArtifactError: There is none, or a file is not what was written.
        LoweringError: ExecuTorch is not installed.
    """
    from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner

    with program_files(folder) as (program, weights):
        name = str(folder.root / program_names(folder)[0])
        return XnnpackRunner(program, weights=weights, name=name)


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
        ConfigError: The form is unknown, or there is no scheduler to draw with.
        ArtifactError: The folder lacks that form or is damaged.
    """
    if form not in FORMS:
        raise ConfigError(f"--from {form}: choose one of {', '.join(FORMS)}")
    root = Path(name)
    if not (root / MANIFEST).exists():
        if form in ("pte", "packed"):
            raise ArtifactError(f"{name} was not written by mpqdm-fx quantize; it has no {form}")
        source = load_source(name, subfolder, variant)
        return source, source.model
    if form == "float":
        source = source_of(root)
        return source, source.model
    folder = open_folder(root)
    names = program_names(folder)
    if form == "pte" and not names:
        raise ArtifactError(f"{root} has no {PROGRAM}; quantize with --backend xnnpack")
    if SCHEDULER_CONFIG not in folder.files and is_function(origin_of(root).model):
        raise ConfigError(
            f"the float model of {root} was made by a function, and has no scheduler to draw with; "
            f"draw in Python with a loop of your own: mpqdm_fx.calibration.sampling.denoise"
        )
    denoiser = load(root) if form == "packed" or not names else program_denoiser(folder)
    return saved_source(folder, denoiser), denoiser


def saved_source(folder: ModelFolder, model: Denoiser) -> Source:
    """Inputs and scheduler as saved: sampling needs no float model."""
    folder.require(SCHEDULER_CONFIG)
    place = str(folder.root / SCHEDULER_CONFIG)
    scheduler = scheduler_from_config(folder.files.read_json(SCHEDULER_CONFIG, finite=False), place)
    signature = folder.manifest.signature
    if MODEL_CONFIG in folder.files and signature.model_class in CLASSES:
        config = folder.files.read_json(MODEL_CONFIG, finite=False)
        checked_model_config(config, str(folder.root / MODEL_CONFIG))
        times = next((spec.shape[-1] for spec in signature.inputs if _is_time_ids(spec)), 0)
        source = make_source(
            str(folder.root),
            model,
            scheduler,
            class_name=signature.model_class,
            config=config,
            aesthetic=times == 5,
        )
        return _as_traced(source, signature)
    inputs = example_inputs(signature)
    return Source(
        name=str(folder.root),
        model=model,
        scheduler=scheduler,
        example_inputs=inputs,
        sample_shape=tuple(inputs[convention_of(signature.model_class, {}).sample].shape[1:]),
    )


def origin_of(folder: Path, model: str | None = None) -> Origin:
    """Where a folder says that its float model is.

    Args:
        folder: The folder.
        model: Where it is, if the folder does not say.

    Raises:
        ArtifactError: It does not say, and no model is given.
    """
    opened = open_folder(folder)
    if model is not None and SOURCE not in opened.files:
        return Origin(model=model, subfolder=None)
    opened.require(SOURCE)
    return read_listed(Origin, opened.files, SOURCE)


def _as_traced(source: Source, signature: Signature) -> Source:
    """A source with texts as long as those that a graph was traced for."""
    text = next((spec for spec in signature.inputs if spec.name == "encoder_hidden_states"), None)
    return source if text is None or len(text.shape) != 3 else source.with_context(text.shape[1])


def _is_time_ids(spec: InputSpec) -> bool:
    return spec.name == "added_cond_kwargs.time_ids"


def source_of(folder: Path, model: str | None = None) -> Source:
    """The float model that a folder was made from.

    Args:
        folder: The folder.
        model: Where the model is, if not where the folder says, or if it does not say.

    Raises:
        ArtifactError: It cannot be found, or is made by a function, which is not called on a
            folder's word; give `model`.
    """
    origin = origin_of(folder, model)
    if model is None and is_function(origin.model):
        raise ArtifactError(
            f"the float model of {folder} was made by the function {origin.model}, which is called "
            f"only if you say so: --model {origin.model}"
        )
    try:
        source = load_source(model or origin.model, origin.subfolder, origin.variant)
    except ConfigError as error:
        raise ArtifactError(
            f"the float model of {folder} is gone ({error}); give --model"
        ) from None
    return _as_traced(source, open_folder(folder).manifest.signature)


@checked
def draw(
    source: Source,
    denoiser: Denoiser,
    *,
    num: Count,
    steps: Count,
    seed: DerivedSeed,
    batch_size: Count = 16,
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
        **source.runs(num, seed),
        convention=source.convention,
        batch_size=batch_size,
        progress="drawing",
    )


def pictures(samples: Tensor, source: Source) -> Tensor:
    """Samples as images: latents decoded by the pipeline's VAE.

    Without a decoder, what has 1 or 3 channels is shown as it is, of latents the first channel.

    Args:
        samples: [N, C, H, W].
        source: What drew them, with the components of its pipeline.

    Returns:
        [N, 1 or 3, H', W']; a first channel is scaled to the range -1..1 over all samples.
    """
    return as_pictures([samples], source)[0][0]


def as_pictures(rows: Sequence[Tensor], source: Source) -> tuple[list[Tensor], str]:
    """Samples of several denoisers as images, on one scale; see `pictures`.

    Args:
        rows: [N, C, H, W] each; the first one gives the scale of a first channel.
        source: What drew them.

    Returns:
        The images, and what is to be said of them, or "".
    """
    pictures = [source.pictures(samples) for samples in rows]
    if all(images is not None for images in pictures):
        return [images for images in pictures if images is not None], ""
    scale = rows[0][:, :1].abs().max().clamp_min(1e-6)
    note = f"These are latents, their first channel: {source.no_pictures}."
    return [samples[:, :1] / scale for samples in rows], note


def zoom_of(images: Tensor) -> int:
    """Side of one pixel in a grid: small pictures are enlarged to 256 pixels and four times."""
    return min(4, max(1, 256 // max(images.shape[2:])))
