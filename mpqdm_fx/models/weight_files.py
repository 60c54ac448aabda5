"""A model folder's weights: safetensors alone, one file or several, in one of their variants."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.sealed import read_json

__all__ = ["count_numbers", "weight_files"]

_STEM = "diffusion_pytorch_model"
_SINGLE, _INDEX = f"{_STEM}.safetensors", f"{_STEM}.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # as safetensors itself has it


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
        return _shards(index)
    single = folder / _with_variant(_SINGLE, variant)
    if single.is_file():
        return [single]
    raise _missing(folder, variant)


def _with_variant(name: str, variant: str | None) -> str:
    """The name with the variant before its last part, as diffusers writes it."""
    stem, _, end = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{end}"


def _shards(index: Path) -> list[Path]:
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
    wanted = _with_variant(_SINGLE, variant)
    found = sorted({_variant_of(file.name) for file in folder.glob(f"{_STEM}*.safetensors*")})
    if found:
        others = " or ".join(f"--variant {name}" if name else "no --variant" for name in found)
        return ConfigError(f"{folder} has no {wanted}; it has other files: give {others}")
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles:
        return ConfigError(
            f"{folder} has its weights as a pickle ({pickles[0]}), which can run any code and is "
            f"not read; load it where you trust it and write it again: "
            f"model.save_pretrained(folder, safe_serialization=True)"
        )
    return ArtifactError(f"{folder} has no {wanted}")


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
    return sum(count for file in files for count in _counts(file))


def _counts(file: Path) -> Iterator[int]:
    try:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                yield prod(int(side) for side in entry["shape"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise ArtifactError(f"{file} is damaged or no safetensors file; copy it again") from None


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(_LONGEST_HEADER, file.stat().st_size):
            raise ValueError
        header: dict[str, Any] = json.loads(stream.read(length))
    return header
