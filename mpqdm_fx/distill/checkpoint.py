"""The state of a training run on disk: what an interrupted run needs to go on to the same bits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.exchange import sweep_leftovers
from mpqdm_fx.io.schema import Count, Strict, Whole, plain, validated
from mpqdm_fx.io.tensors import read_record, write_record
from mpqdm_fx.io.unfinished import refuse_another_run, refuse_foreign_folder

__all__ = [
    "RESTART",
    "History",
    "Numbers",
    "State",
    "check_tensors",
    "has_state",
    "load_state",
    "optimiser_tensors",
    "restore_optimiser",
    "save_state",
    "state_path",
]

_FILE = "distill.safetensors"
_KIND, _VERSION = "distillation", 1
RESTART = "delete it to start anew"
"""What to do with a state that cannot be used."""

_Amount = Annotated[float, Field(ge=0)]


@dataclass(kw_only=True)
class History:
    """What a run did.

    Attributes:
        updates: Updates made, before and after interruptions.
        seconds: Wall time of training, likewise.
        losses: Mean task loss of every hundred updates (noise error as a share of its energy).
        resumed: Update at which the last interruption was taken up; 0 without one.
    """

    updates: Count = 0
    seconds: _Amount = 0.0
    losses: list[_Amount] = field(default_factory=list)
    resumed: Count = 0


class Numbers(Strict):
    """What a state holds beside tensors.

    Attributes:
        history: What the run did.
        weight: Weight of the second loss.
        recent: Task losses since the last mean, fewer than a hundred.
    """

    history: Annotated[History, Whole()]
    weight: _Amount
    recent: Annotated[tuple[_Amount, ...], Field(max_length=99)]


@dataclass(frozen=True, kw_only=True)
class State:
    """What was read.

    Attributes:
        tensors: By name.
        numbers: The rest.
    """

    tensors: Mapping[str, Tensor]
    numbers: Numbers


class _Head(Strict):
    identity: dict[str, Any]
    numbers: Numbers


def state_path(directory: Path) -> Path:
    """The file in a folder."""
    return directory / _FILE


def save_state(
    directory: Path, identity: Mapping[str, Any], tensors: Mapping[str, Tensor], **numbers: Any
) -> None:
    """Write a state; the one before stays until the new one is whole.

    Args:
        directory: Folder; made if it is not there.
        identity: What the run is, plain JSON types.
        tensors: Everything that is a tensor.
        numbers: Everything else, the fields of `Numbers`.
    """
    head = {"identity": plain(identity), "numbers": numbers}
    write_record(state_path(directory), _KIND, _VERSION, head, tensors)


def has_state(directory: Path) -> bool:
    """Whether a folder holds the state of a run."""
    return state_path(directory).exists()


def load_state(directory: Path, identity: Mapping[str, Any]) -> State | None:
    """Read a state; None if there is none.

    Raises:
        ConfigError: The folder holds another run; the first difference is named.
        ArtifactError: The file is damaged, or the folder holds something else.
    """
    path = state_path(directory)
    sweep_leftovers(directory)
    if not path.exists():
        refuse_foreign_folder(directory, _FILE)
        return None
    record = read_record(path, _KIND, _VERSION, fix=RESTART)
    head = validated(_Head, record.head, path, fix=RESTART)
    refuse_another_run(path, head.identity, identity)
    return State(tensors=record.tensors, numbers=head.numbers)


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Refuse tensors that are not those of a run.

    Args:
        path: File that they were read from.
        tensors: What was read.
        expected: Tensors of the shapes and dtypes that there are to be.

    Raises:
        ArtifactError: One is missing, is too many, has another shape or dtype, or is not finite.
    """
    for name in sorted({*tensors} ^ {*expected}):
        state = "is missing" if name in expected else "has no place in this run"
        raise ArtifactError(f"{path} is damaged: {name[:100]!r} {state}; {RESTART}")
    for name, tensor in tensors.items():
        reference = expected[name]
        if tensor.dtype != reference.dtype or tensor.shape != reference.shape:
            raise ArtifactError(
                f"{path} is damaged: {name!r} is {tensor.dtype} {list(tensor.shape)}, this run has "
                f"{reference.dtype} {list(reference.shape)}; {RESTART}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{path} is damaged: {name!r} holds NaN or infinity; {RESTART}")


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
