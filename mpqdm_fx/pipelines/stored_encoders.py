"""Text encoders whose weights stay in their files until a layer reads them.

T5-XXL takes 19 GB in float32, and its rounded copy as much again; its files have 9.5 in bfloat16.
transformers maps the files and makes nothing of them where it is asked for their own dtype, so a
large encoder is loaded like that: its weights become float32 layer by layer (`StoredTensor`), with
the same bits as if all had been loaded in float32.
"""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.numerics.lazy_tensor import LazyTensor, StoredTensor
from mpqdm_fx.sources.weight_files import count_numbers, files_of_index

__all__ = ["LARGE", "hold_as_stored", "is_held_as_stored", "stored_bytes", "stored_dtype"]

#: Bytes of an encoder in float32 from which it is not loaded whole; CLIP ViT-L has 0.5 GB.
LARGE = 1 << 30

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SMALL = 1 << 16  # numbers of a layer that may as well be there
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that an encoder is to be loaded in, so that its weights stay in its files.

    Args:
        folder: The encoder's.

    Returns:
        None for an encoder that is loaded whole: it is small, or its files have no one dtype.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    files = _files(folder)
    if not files or 4 * count_numbers(files) < LARGE:
        return None
    dtypes = set.union(*map(_dtypes, files))
    return _DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None


def stored_bytes(module: nn.Module) -> int:
    """Bytes that a module's weights take in their files, of those that stay there."""
    held = {id(p): p for p in module.parameters() if isinstance(p, StoredTensor)}
    return sum(parameter.values_as_stored.nbytes for parameter in held.values())


def is_held_as_stored(module: nn.Module) -> bool:
    """Whether weights of a module are read from its files, layer by layer."""
    return any(isinstance(parameter, LazyTensor) for parameter in module.parameters())


def hold_as_stored(model: nn.Module) -> bool:
    """Let an encoder compute in float32 with weights that stay as they were loaded, in place.

    Args:
        model: Loaded in the dtype of its files.

    Returns:
        False if a buffer was rounded when the encoder was made in that dtype and cannot be made
        anew, so that the encoder has to be loaded whole; it is then as it was.
    """
    if not _make_buffers_anew(model):
        return False
    held: dict[int, nn.Parameter] = {}
    layers = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in held:  # tied weights stay tied
                large = id(parameter) in layers and parameter.numel() >= _SMALL
                value = StoredTensor(parameter) if large else parameter.detach().float()
                held[id(parameter)] = nn.Parameter(value, requires_grad=False)
                held[id(held[id(parameter)])] = held[id(parameter)]
            module._parameters[name] = held[id(parameter)]
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.dtype = torch.float32  # what it computes in
    return True


def _make_buffers_anew(model: nn.Module) -> bool:
    """Give buffers that were rounded to the model's dtype their values in float32, in place.

    Gemma scales its embeddings by the root of their width, which no file holds: it is made with the
    model, in the dtype that the model is made in.
    """
    rounded = {
        name
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.dtype != torch.float32
    }
    if not rounded:
        return True
    config: Any = copy.deepcopy(getattr(model, "config", None))
    try:
        # looked up when it is needed: transformers moved it, and may again
        no_init_weights = import_module("transformers.initialization").no_init_weights
        config.dtype = torch.float32
        with no_init_weights():  # memory that nobody writes to is none
            whole = dict(type(model)(config).named_buffers())
    except (ImportError, AttributeError):
        return False
    for name in rounded:
        owner, _, field = name.rpartition(".")
        module = model.get_submodule(owner)
        stored = field not in module._non_persistent_buffers_set
        module._buffers[field] = module.get_buffer(field).float() if stored else whole[name]
    return True


def _files(folder: Path) -> list[Path]:
    """Weight files as transformers writes them; none if there are others, which it may know."""
    if (folder / _INDEX).is_file():
        return files_of_index(folder / _INDEX)
    return [folder / _SINGLE] if (folder / _SINGLE).is_file() else []


def _dtypes(file: Path) -> set[str]:
    try:
        with safe_open(file, "pt") as tensors:
            return {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        raise ArtifactError(f"{file} is damaged or no safetensors file; copy it again") from None
