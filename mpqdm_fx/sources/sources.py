"""From a name on the command line to a model, its scheduler and the inputs it can be run on."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import torch

from mpqdm_fx.calibration.conventions import convention_of
from mpqdm_fx.calibration.schedulers import check_scheduler, check_scheduler_config
from mpqdm_fx.digits import bundled
from mpqdm_fx.errors import ArtifactError, CalibrationError, ConfigError, first_line
from mpqdm_fx.io.classes import diffusers_class
from mpqdm_fx.io.folders import MANIFEST, SCHEDULER_CONFIG, refuse_other_results
from mpqdm_fx.io.model_config import read_model_config
from mpqdm_fx.io.progress import stage
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.sources.config_fields import check_fields
from mpqdm_fx.sources.example_inputs import ModelInputs
from mpqdm_fx.sources.extra_channels import ExtraChannels, extra_channels_of
from mpqdm_fx.sources.functions import calls_of, model_of
from mpqdm_fx.sources.model_names import BUNDLED, check_name, is_function
from mpqdm_fx.sources.source import Source
from mpqdm_fx.sources.weight_files import load_weights

__all__ = [
    "load_source",
    "load_with_calls",
    "make_source",
    "scheduler_from_config",
]

logger = logging.getLogger(__name__)


def load_source(model: str, subfolder: str | None = None, variant: str | None = None) -> Source:
    """Load a model by name or path.

    Args:
        model: `"digits"`, a diffusers model folder (config.json and safetensors), a pipeline
            folder together with `subfolder`, or a function that returns a module (`module:function`
            or `path/to/file.py:function`; it has no scheduler and no inputs of its own).
        subfolder: Folder of the denoiser inside a pipeline folder, for example `"unet"`.
        variant: Variant of the weight files, for example `"fp16"`; computed in float32 all the
            same.

    Raises:
        ConfigError: No such model or variant, or its inputs are not known.
        ArtifactError: The folder is damaged.
        CalibrationError: The scheduler's numbers are no schedule.
    """
    if model == BUNDLED:
        if variant is not None:
            raise ConfigError(f"the bundled model has no variant {variant!r}; leave it out")
        return make_source(BUNDLED, bundled.load_digits_unet(), bundled.load_digits_scheduler())
    if is_function(model):
        if subfolder is not None or variant is not None:
            raise ConfigError(f"{model} is a function; leave --subfolder and --variant out")
        return Source(
            name=model, model=model_of(model), scheduler=None, example_inputs={}, sample_shape=()
        )
    check_name(model)
    root = Path(model)
    if (root / MANIFEST).exists():
        raise ConfigError(
            f"{model} was written by mpqdm-fx quantize; give the float model that it was made of"
        )
    refuse_other_results(root)
    if (root / "model_index.json").exists() and subfolder is None:
        raise ConfigError(
            f"{model} is a pipeline folder; say which part to quantize, e.g. --subfolder unet"
        )
    with stage("loading float model"):
        scheduler = _scheduler_of(root)
        loaded = _load_model(root / subfolder if subfolder else root, variant)
    return make_source(model, loaded, scheduler, root=root, variant=variant)


def load_with_calls(
    model: str,
    subfolder: str | None = None,
    variant: str | None = None,
    inputs: str | None = None,
    held_out: int | None = None,
) -> Source:
    """Load a model, and the calls of the user's own where there are some.

    Args:
        model: As of `load_source`.
        subfolder: As of `load_source`.
        variant: As of `load_source`.
        inputs: Function that gives the calls, as of `calls_of`; needed where a function makes the
            model.
        held_out: As of `calls_of`.

    Raises:
        ConfigError: See `load_source` and `calls_of`; or what is needed is not given.
        CalibrationError: The calls cannot be used.
    """
    if inputs is None and held_out is not None:
        raise ConfigError("--held-out counts calls of --inputs; give these too, or leave it out")
    if inputs is None and is_function(model):
        raise ConfigError(
            f"{model} is a function, and it is not known what its model is called with; give calls "
            f"with --inputs module:function"
        )
    source = load_source(model, subfolder, variant)
    if inputs is None:
        return source
    return source.with_calls(calls_of(inputs, source.model, held_out))


def _load_model(folder: Path, variant: str | None) -> Any:
    model_class, config = read_model_config(folder)
    check_fields(model_class.__name__, config)
    return load_weights(model_class, config, folder, variant)


def scheduler_from_config(config: Mapping[str, Any], place: str) -> Any:
    """The scheduler that a config describes.

    Args:
        config: A parsed scheduler_config.json.
        place: The file, for messages.

    Raises:
        ArtifactError: It names no scheduler of diffusers, or one that refuses it.
        CalibrationError: Its numbers are no schedule.
    """
    scheduler_class = diffusers_class("scheduler", config.get("_class_name"), place)
    check_scheduler_config(config, place)
    try:
        scheduler = scheduler_class.from_config(config)
    except Exception as error:  # constructors trust their arguments
        reason = first_line(error)
        raise ArtifactError(f"{place}: {scheduler_class.__name__} refuses it: {reason}") from None
    try:
        check_scheduler(scheduler)
    except CalibrationError as error:
        raise CalibrationError(f"{place}: {error}") from None
    return scheduler


def _scheduler_of(root: Path) -> Any:
    """The folder's own scheduler, or DDIM over the usual 1000 steps."""
    path = root / SCHEDULER_CONFIG
    if path.exists():
        return scheduler_from_config(read_json(path, finite=False), str(path))
    logger.warning("%s has no scheduler folder: DDIM with its default schedule is used", root)
    return diffusers_class("scheduler", "DDIMScheduler")()


def make_source(
    name: str,
    model: Any,
    scheduler: Any,
    *,
    class_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    root: Path | None = None,
    aesthetic: bool | None = None,
    variant: str | None = None,
) -> Source:
    """A source of a model in memory, or of what is called like one.

    Args:
        name: What the user called it.
        model: A UNet or transformer of diffusers, or what is called like it.
        scheduler: A diffusers scheduler; None for a model that a function made.
        class_name: Name of its class; by default the model's.
        config: Its settings; by default the model's.
        root: Pipeline folder that it came from, which may tell more.
        aesthetic: Whether sizes end with an aesthetic score; by default as `root` says.
        variant: Variant of its weight files.

    Raises:
        ConfigError: The class or a setting is not known.
    """
    inputs = ModelInputs(
        class_name=class_name or type(model).__name__,
        config=dict(model.config if config is None else config),
        text_width=_stored(root, "text_encoder_2/config.json", "projection_dim", int),
        aesthetic=aesthetic
        if aesthetic is not None
        else _stored(root, "model_index.json", "requires_aesthetics_score", bool),
    )
    example = inputs.example()
    noisy = convention_of(inputs.class_name, inputs.config).sample
    shape, extra = tuple(example.get(noisy, torch.empty(0)).shape[1:]), None
    if inputs.is_denoiser:
        extra = _extra_of(inputs, scheduler, root)
        shape = shape if extra is None else (extra.noise, *shape[1:])
    return Source(
        name=name,
        model=model,
        scheduler=scheduler,
        example_inputs=example,
        sample_shape=shape,
        inputs=inputs,
        extra=extra,
        variant=variant,
    )


def _extra_of(inputs: ModelInputs, scheduler: Any, root: Path | None) -> ExtraChannels | None:
    variance = str(getattr(scheduler.config, "variance_type", ""))
    extra = extra_channels_of(
        inputs.config,
        learned_variance=variance.startswith("learned"),
        scaling=_stored(root, "vae/config.json", "scaling_factor", int | float),
    )
    pipeline = _stored(root, "model_index.json", "_class_name", str)
    if extra is not None and pipeline is not None and pipeline.startswith("Marigold"):
        raise ConfigError(
            f"a {pipeline} has its picture before the noisy channels; use the Python interface "
            f"with calls of your own: mpqdm_fx.quantize(model, config, calls)"
        )
    return extra


def _stored(root: Path | None, file: str, name: str, kind: type | UnionType) -> Any:
    """What another file of a pipeline's folder says; None if it does not, or nothing of use."""
    if root is None or not (root / file).is_file():
        return None
    value = read_json(root / file, finite=False).get(name)
    return value if isinstance(value, kind) else None
