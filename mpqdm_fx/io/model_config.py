"""Read a model's config.json and refuse, before anything is built, what cannot be a model.

A few bytes of a config can ask for hours and terabytes. So its integers are bounded, and the model
is built once without memory, counted as it grows, before it is built in earnest.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from mpqdm_fx.errors import ArtifactError, first_line
from mpqdm_fx.io.classes import diffusers_class
from mpqdm_fx.io.folders import MODEL_CONFIG
from mpqdm_fx.io.sealed import read_json

__all__ = [
    "checked_model_config",
    "count_parameters",
    "model_from_config",
    "read_model_config",
]

_LARGEST = 2**20  # vocabularies and lengths of audio are the largest sizes that models have
_DEEPEST = 256  # layers or blocks that one field asks for
_LONGEST = 1024  # entries of a list
_MOST_MODULES = 10_000  # the largest models of diffusers have about 3,000
_MOST_PARAMETERS = 2**36


def read_model_config(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A folder's model class and its configuration, checked.

    Args:
        folder: Has the config.json.

    Returns:
        A subclass of diffusers' `ModelMixin`, and the whole config.

    Raises:
        ArtifactError: The file is missing or damaged, names no model of diffusers, or has sizes
            that no model has.
    """
    path = folder / MODEL_CONFIG
    config = read_json(path, finite=False)
    return checked_model_config(config, str(path)), config


def checked_model_config(config: Mapping[str, Any], place: str) -> Any:
    """The model class of diffusers that a config names; see `read_model_config`.

    Args:
        config: A parsed config.json.
        place: The file, for messages.
    """
    if "_class_name" not in config:
        raise ArtifactError(f"{place} has no _class_name: not a diffusers model")
    model_class = diffusers_class("model", config["_class_name"], place)
    for name, value in config.items():
        _check_sizes(value, name, place)
    return model_class


def model_from_config(config: Mapping[str, Any], place: str) -> nn.Module:
    """A model of a config's architecture with arbitrary values, in evaluation mode.

    Args:
        config: A parsed config.json.
        place: The file, for messages.

    Raises:
        ArtifactError: As of `read_model_config`; or the class refuses the config.
    """
    model_class = checked_model_config(config, place)
    count_parameters(model_class, config, place)
    model: nn.Module = model_class.from_config(config)
    return model.eval()


def count_parameters(model_class: Any, config: Mapping[str, Any], place: str) -> int:
    """Numbers that a file of a model's weights holds, counted without allocating them.

    Args:
        model_class: Class of the model.
        config: Its configuration.
        place: The file, for messages.

    Raises:
        ArtifactError: The model is larger than any that diffusers has, or the class refuses the
            config.
    """
    try:
        with _counted(place), torch.device("meta"):
            model = model_class.from_config(dict(config))
    except ArtifactError:
        raise
    except Exception as error:  # constructors trust their arguments
        reason = first_line(error)
        raise ArtifactError(f"{place}: {model_class.__name__} refuses it: {reason}") from None
    # buffers that are made anew are in no file, and tied weights once
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in tensors.values())


@contextlib.contextmanager
def _counted(place: str) -> Iterator[None]:
    """Stop the construction of a model that grows beyond all measure."""
    modules = parameters = 0

    def count_module(*_: object) -> None:
        nonlocal modules
        modules += 1
        if modules > _MOST_MODULES:
            raise ArtifactError(
                f"{place} describes a model of more than {_MOST_MODULES} modules; correct its "
                f"numbers of layers and blocks"
            )

    def count_parameter(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal parameters
        parameters += 0 if tensor is None else tensor.numel()
        if parameters > _MOST_PARAMETERS:
            raise ArtifactError(
                f"{place} describes a model of more than {_MOST_PARAMETERS} parameters; correct "
                f"its sizes"
            )

    handles = (
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_parameter),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_sizes(value: Any, name: str, place: str) -> None:
    if isinstance(value, Mapping | list | tuple):
        if len(value) > _LONGEST:
            raise ArtifactError(
                f"{place}: {name[:80]} has {len(value)} entries; at most {_LONGEST}"
            )
        entries = value.values() if isinstance(value, Mapping) else value
        for entry in entries:
            _check_sizes(entry, name, place)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # attention is split into as many heads as there are, so only these make modules
        counts = any(word in name for word in ("layer", "block")) and "channels" not in name
        largest = _DEEPEST if counts and isinstance(value, int) else _LARGEST
        if not -largest <= value <= largest:  # NaN neither
            raise ArtifactError(
                f"{place}: {name[:80]} is {str(value)[:40]}; at most {largest} can be"
            )
