"""The state of a training run on disk: what an interrupted run needs to go on to the same bits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.files import differences, replacing

__all__ = ["has_state", "load_state", "optimiser_tensors", "restore_optimiser", "save_state"]

_FILE = "distill.safetensors"


def save_state(
    directory: Path, identity: Mapping[str, Any], tensors: Mapping[str, Tensor], **numbers: Any
) -> None:
    """Write a state; the one before stays until the new one is whole.

    Args:
        directory: Folder; made if it is not there.
        identity: What the run is, plain JSON types.
        tensors: Everything that is a tensor.
        numbers: Everything else, plain JSON types.
    """
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    head = {"identity": json.dumps(identity, sort_keys=True), "numbers": json.dumps(numbers)}
    with replacing(directory / _FILE) as part:
        save_file(plain, part, metadata=head)


def has_state(directory: Path) -> bool:
    """Whether a folder holds the state of a run."""
    return (directory / _FILE).exists()


def load_state(
    directory: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a state; None if there is none.

    Raises:
        ConfigError: The folder holds another run; the first difference is named.
        ArtifactError: The file is damaged.
    """
    path = directory / _FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; delete it to start anew") from None
    for key, old, new in differences(json.loads(head["identity"]), identity):
        raise ConfigError(
            f"{path} is of a run with {key}={old!r}, and this one has {new!r}; use the same "
            f"settings, or another folder"
        )
    return tensors, json.loads(head["numbers"])


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and counts, by number of the parameter."""
    return {
        f"adam.{index}.{key}": value
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimiser_tensors`, in place."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
