"""A model folder's weights: safetensors alone, one file or several, in one of their variants."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from mpqdm_fx.errors import ArtifactError, ConfigError, first_line
from mpqdm_fx.io.folders import MODEL_CONFIG
from mpqdm_fx.io.model_config import count_parameters
from mpqdm_fx.io.sealed import read_json

__all__ = ["count_numbers", "files_of_index", "load_weights", "refuse_missing", "weight_files"]

_STEM = "diffusion_pytorch_model"
_SINGLE, _INDEX = f"{_STEM}.safetensors", f"{_STEM}.safetensors.index.json"


def load_weights(
    model_class: Any, config: Mapping[str, Any], folder: Path, variant: str | None = None
) -> nn.Module:
    """A folder's model in float32 and evaluation mode, every weight of it from the files.

    Args:
        model_class: Class of the model, one of diffusers.
        config: Its configuration.
        folder: Has config.json and the weights.
        variant: As of `weight_files`.

    Raises:
        ConfigError: As of `weight_files`.
        ArtifactError: As of `weight_files` and `count_parameters`; or the files do not hold the
            model's weights.
    """
    files = weight_files(folder, variant)
    place = str(folder / MODEL_CONFIG)
    parameters, stored = count_parameters(model_class, config, place), count_numbers(files)
    if parameters > stored:
        raise ArtifactError(
            f"{place} describes a model of {parameters} numbers, and {files[0].name} and its like "
            f"hold {stored}: they do not belong together"
        )
    try:
        loaded, information = model_class.from_pretrained(
            folder,
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            variant=variant,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}: diffusers could not load it: {first_line(error)}") from None
    refuse_missing(information, folder)
    model: nn.Module = loaded.float().eval()
    return model


def refuse_missing(information: Mapping[str, Any], folder: Path) -> None:
    """Refuse a loaded model with weights that no file gave: they are random numbers.

    Args:
        information: What `from_pretrained(output_loading_info=True)` says.
        folder: The model's folder, for the message.

    Raises:
        ArtifactError: Names the first of them.
    """
    missing = sorted(information["missing_keys"])
    if missing:
        raise ArtifactError(
            f"{folder}: its weight files lack {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; they belong to another "
            f"model, or their names were changed: write them again with save_pretrained"
        )


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that hold a model's weights.

    Args:
        folder: Folder written by diffusers.
        variant: For example `"fp16"`; None for the files without one.

    Raises:
        ConfigError: There are weights, but of another variant, or only as pickles.
        ArtifactError: There are none, or an index names what is no file of the folder.
    """
    if variant is not None and not variant.isidentifier():
        raise ConfigError(f"variant {variant!r}: give the word in the files' names, such as fp16")
    index = folder / _with_variant(_INDEX, variant)
    if index.is_file():
        return files_of_index(index)
    single = folder / _with_variant(_SINGLE, variant)
    if single.is_file():
        return [single]
    raise _missing(folder, variant)


def _with_variant(name: str, variant: str | None) -> str:
    """The name with the variant before its last part, as diffusers writes it."""
    stem, _, end = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{end}"


def files_of_index(index: Path) -> list[Path]:
    """The files that an index of shards names.

    Args:
        index: `*.safetensors.index.json`.

    Raises:
        ArtifactError: The index is damaged, or names what is no file of its folder.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ArtifactError(f"{index} has no weight_map: it is damaged; copy the folder again")
    files = []
    for name in sorted({str(name) for name in names.values()}):
        file = index.parent / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ArtifactError(
                f"{index} names {name[:80]!r}; only safetensors files of the same folder are read"
            )
        if not file.is_file():
            raise ArtifactError(f"{file} is missing, and {index.name} names it")
        files.append(file)
    return files


def _missing(folder: Path, variant: str | None) -> ArtifactError | ConfigError:
    """Say what there is instead."""
    expected = _with_variant(_SINGLE, variant)
    variants = sorted({_variant_of(file.name) for file in folder.glob(f"{_STEM}*.safetensors*")})
    if variants:
        options = " or ".join(f"--variant {name}" if name else "no --variant" for name in variants)
        return ConfigError(f"{folder} has no {expected}; it has other files: give {options}")
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles:
        return ConfigError(
            f"{folder} has its weights as a pickle ({pickles[0]}), which can run any code and is "
            f"not read; load it where you trust it and write it again: "
            f"model.save_pretrained(folder, safe_serialization=True)"
        )
    return ArtifactError(f"{folder} has no {expected}")


def _variant_of(name: str) -> str:
    """`fp16` of `diffusion_pytorch_model.fp16-00001-of-00002.safetensors` and the like."""
    words = name.removeprefix(_STEM).replace(".index", "").replace(".json", "").split(".")
    variants = [word.partition("-")[0] for word in words if word and word != "safetensors"]
    return next((word for word in variants if word), "")


def count_numbers(files: list[Path]) -> int:
    """Numbers in all tensors, by the files' headers.

    Raises:
        ArtifactError: A header is damaged.
    """
    return sum(_count(file) for file in files)


def _count(file: Path) -> int:
    try:
        with safe_open(file, "pt") as tensors:
            return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        raise ArtifactError(f"{file} is damaged or no safetensors file; copy it again") from None
