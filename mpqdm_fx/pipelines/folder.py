"""A pipeline's folder: its index, and its components, each with every one of its weights.

diffusers would fill weights that no file gives with random numbers, and import whatever the index
names; here a component is one of a few libraries' classes, and complete.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mpqdm_fx.errors import ArtifactError, ConfigError, first_line
from mpqdm_fx.io.classes import diffusers_class, is_model_class
from mpqdm_fx.io.model_config import read_model_config
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.pipelines.stored_encoders import hold_as_stored, stored_dtype
from mpqdm_fx.sources.weight_files import load_weights, refuse_missing

__all__ = [
    "INDEX",
    "load_encoder",
    "load_model",
    "load_part",
    "load_pipeline",
    "part_class",
    "read_index",
]

INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers", "mpqdm_fx.component")
_BESIDE = ("stable_audio",)  # pipelines that have a model of their own; an index names them so


def read_index(root: Path) -> dict[str, Any]:
    """The content of a pipeline's model_index.json.

    Raises:
        ConfigError: The folder has none.
        ArtifactError: It is damaged.
    """
    if not (root / INDEX).is_file():
        raise ConfigError(
            f"{root} is no pipeline folder: {INDEX} is missing; give a folder written by "
            f"save_pretrained of a diffusers pipeline"
        )
    return read_json(root / INDEX)


def load_pipeline(
    root: Path,
    index: Mapping[str, Any],
    *,
    leave_out: Callable[[str], bool],
    variant: str | None = None,
    stored: bool = False,
) -> Any:
    """Load a pipeline without some of its components.

    Args:
        root: The folder.
        index: Its index; names a pipeline class of diffusers.
        leave_out: Told a component's name; those that it answers True for are None.
        variant: Variant of weight files where a component has it, for example `"fp16"`; computed
            in float32 all the same.
        stored: As of `load_encoder`.

    Raises:
        ConfigError: The index names no pipeline of diffusers.
        ArtifactError: The folder lacks a component or is damaged.
    """
    loader = _pipeline_class(index)
    components: dict[str, Any] = {}
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue  # a setting of the pipeline
        if leave_out(part):
            components[part] = None
        elif entry != [None, None]:
            _check_component(root, part, entry)
            model = _loaded(root / part, entry[0], entry[1], variant, stored=stored)
            components |= {} if model is None else {part: model}
    try:
        return loader.from_pretrained(
            root,
            local_files_only=True,
            low_cpu_mem_usage=False,
            dtype=torch.float32,
            use_safetensors=True,
            **components,
        )
    except Exception as error:  # whatever diffusers says to a folder
        raise ArtifactError(f"{root}: diffusers could not load it: {first_line(error)}") from None


def load_model(folder: Path, variant: str | None = None) -> Any:
    """A component of diffusers with weights, in float32 and evaluation mode.

    Args:
        folder: Its folder.
        variant: Variant of its weight files, if it has them.

    Raises:
        MPQError: It is no such model, or damaged.
    """
    model_class, config = read_model_config(folder)
    return load_weights(model_class, config, folder, _variant_of(folder, variant))


def part_class(root: Path, part: str) -> Any:
    """The class of a component, imported, whose weights are not loaded.

    Args:
        root: The pipeline's folder.
        part: The component's name.

    Raises:
        ArtifactError: The index does not name it, or names no such class.
    """
    entry = _entry(root, part)
    if entry[0] == "transformers":
        return getattr(importlib.import_module("transformers"), entry[1], None)
    return diffusers_class("model", entry[1], f"{root / INDEX}: {part}")


def load_part(root: Path, part: str) -> Any:
    """One component with weights; see `load_pipeline`."""
    library, name = _entry(root, part)
    return _loaded(root / part, library, name, None)


def _entry(root: Path, part: str) -> list[str]:
    entry = read_index(root).get(part)
    if not isinstance(entry, list):
        raise ArtifactError(f"{root / INDEX} names no {part}")
    _check_component(root, part, entry)
    return entry


def _pipeline_class(index: Mapping[str, Any]) -> Any:
    name = str(index.get("_class_name"))
    diffusers: Any = importlib.import_module("diffusers")
    pipeline_class = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (
        inspect.isclass(pipeline_class) and issubclass(pipeline_class, diffusers.DiffusionPipeline)
    ):
        raise ConfigError(f"{INDEX}: diffusers has no pipeline class {name[:80]!r}")
    return pipeline_class


def _check_component(root: Path, part: str, entry: list[Any]) -> None:
    """Refuse a component that is no model, scheduler or tokenizer, before diffusers imports it."""
    place = f"{root / INDEX}: {part[:80]}"
    known = len(entry) == 2 and isinstance(entry[1], str)
    if not known or not (
        entry[0] in _LIBRARIES or (entry[0] in _BESIDE and is_model_class(entry[1]))
    ):
        raise ArtifactError(f"{place} is {str(entry)[:80]}; it must be one of diffusers' parts")
    if Path(part).name != part or not (root / part).is_dir():
        raise ArtifactError(
            f"{root} is not whole: {INDEX} names {part!r} ({entry[1]}), and its folder is missing"
        )
    if entry[0] == "diffusers" and not is_model_class(entry[1]):
        diffusers_class("scheduler", entry[1], place)


def _loaded(
    folder: Path, library: str, name: str, variant: str | None, *, stored: bool = False
) -> Any:
    """A component with weights, every one of them from its files; None for other components."""
    if library in ("diffusers", *_BESIDE) and is_model_class(name):
        return load_model(folder, variant)
    if library != "transformers":
        return None
    return load_encoder(folder, name, variant, stored=stored)


def load_encoder(folder: Path, name: str, variant: str | None, *, stored: bool = False) -> Any:
    """A model of transformers in evaluation mode, float32; None for a tokenizer and the like.

    Args:
        folder: Where it is.
        name: Its class.
        variant: Variant of its weight files, if it has it.
        stored: Leave the weights of a large one in its files (`stored_encoders`), where it has no
            variant.

    Raises:
        ArtifactError: It cannot be loaded, or lacks weights.
    """
    transformers: Any = importlib.import_module("transformers")
    encoder_class: Any = getattr(transformers, name, None)
    is_model = inspect.isclass(encoder_class) and issubclass(
        encoder_class, transformers.PreTrainedModel
    )
    if not is_model:
        return None
    variant = _variant_of(folder, variant)
    dtype = stored_dtype(folder) if stored and variant is None else None
    if dtype is not None:
        model = _from_files(encoder_class, folder, None, dtype)
        if hold_as_stored(model):
            return model
        del model
    return _from_files(encoder_class, folder, variant, torch.float32)


def _from_files(encoder_class: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    try:
        model, information = encoder_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            variant=variant,
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers says to a folder
        raise ArtifactError(
            f"{folder}: transformers could not load it: {first_line(error)}"
        ) from None
    refuse_missing(information, folder)
    return model.eval()


def _variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant, if a component's folder has it: often the denoiser alone does."""
    return variant if variant and any(folder.glob(f"*.{variant}.*")) else None
