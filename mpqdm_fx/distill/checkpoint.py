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

__all__ = ["load_state", "optimiser_tensors", "restore_optimiser", "save_state"]

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
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{_FILE}.partial"
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    head = {"identity": json.dumps(identity, sort_keys=True), "numbers": json.dumps(numbers)}
    save_file(plain, partial, metadata=head)
    partial.rename(directory / _FILE)


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
    found = json.loads(head["identity"])
    wanted = json.loads(json.dumps(identity, sort_keys=True))
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise ConfigError(
                f"{path} is of a run with {key}={found.get(key)!r}, and this one has "
                f"{wanted.get(key)!r}; use the same settings, or another folder"
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
