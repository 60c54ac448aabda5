"""Lengths that a model reads off its masks, fixed to those of the example.

Models ask a mask how long each prompt is (`mask.sum(1).tolist()`) and cut tensors by the answer. A
graph has no such questions: it is written for the answers that the example gives, and holds for
inputs that give the same. What timesteps, images and weights answer is not fixed, because it
differs from call to call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.nested import tensors_of
from mpqdm_fx.graph.noise_names import TIMESTEP_NAMES
from mpqdm_fx.graph.signature import tensor_leaves

__all__ = ["FixedReads", "fixed_reads"]

_ITEM = "item()"
_READS = {
    Tensor.tolist: "tolist()",
    Tensor.item: _ITEM,
    Tensor.__bool__: "bool()",
    Tensor.__int__: "int()",
    Tensor.__float__: "float()",
    Tensor.__index__: "index()",
}


@dataclass(frozen=True, kw_only=True)
class FixedReads:
    """What a model read off its masks in one call, in order.

    Attributes:
        inputs: Names of the inputs that all answers come from.
        answers: Kind of question and answer.
    """

    inputs: tuple[str, ...]
    answers: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        values = ", ".join(dict.fromkeys(str(answer) for _, answer in self.answers))
        names = ", ".join(self.inputs)
        if all(isinstance(answer, bool) for _, answer in self.answers):
            return (
                f"the graph holds for inputs whose {names} answers the model's comparisons as the "
                f"example does ({values}), because the model branches on them"
            )
        return (
            f"the graph holds for inputs whose {names} has the lengths of the example ({values}), "
            f"because the model cuts tensors by them"
        )

    def given(self) -> TorchFunctionMode:
        """A context in which the model gets the same answers in the same order."""
        return _Replay(self.answers)


def fixed_reads(model: nn.Module, call: Mapping[str, Any]) -> FixedReads | None:
    """Run a model and note what it reads off its masks.

    Args:
        model: The model.
        call: Its arguments by name.

    Returns:
        The answers; None if it reads nothing, or reads what depends on more than inputs of whole
        numbers or truth values other than timesteps.
    """
    masks = {name: t for name, t in tensor_leaves(call) if _is_mask(name, t)}
    record = _Record(masks)
    with record, torch.no_grad():
        model(**call)
    if record.refused or not record.answers or not record.read:
        return None
    names = tuple(name for name in masks if name in record.read)
    return FixedReads(inputs=names, answers=tuple(record.answers))


def _is_mask(name: str, tensor: Tensor) -> bool:
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    return whole and name.split(".")[0] not in TIMESTEP_NAMES


class _Record(TorchFunctionMode):
    """Follows which masks each tensor comes from; a tensor that comes from others is unknown."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.answers: list[tuple[str, Any]] = []
        self.read: set[str] = set()
        self.refused = False
        # tensors beside their origins, so that no id is taken twice
        self._origins = {id(tensor): (tensor, {name}) for name, tensor in masks.items()}

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        origins = self._of(list(tensors_of((args, dict(kwargs or {})))))
        if func in _READS and isinstance(args[0], Tensor):
            self.refused |= origins is None
            # tolist() of a fake tensor asks each of its elements
            kind = _ITEM if func is Tensor.tolist else _READS[func]
            self.answers += [(kind, answer) for answer in pytree.tree_leaves(result)]
            self.read |= origins or set()
        elif origins is not None:
            for tensor in tensors_of(result):
                self._origins[id(tensor)] = (tensor, origins)
        elif isinstance(args[0] if args else None, Tensor) and _writes(func):
            self._origins.pop(id(args[0]), None)
        return result

    def _of(self, tensors: Sequence[Tensor]) -> set[str] | None:
        """Masks that tensors come from; None if one comes from anything else."""
        known = [self._origins.get(id(tensor)) for tensor in tensors]
        if any(entry is None for entry in known):
            return None
        return set[str]().union(*(entry[1] for entry in known if entry is not None))


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


class _Replay(TorchFunctionMode):
    def __init__(self, answers: Sequence[tuple[str, Any]]) -> None:
        super().__init__()
        self._answers = list(answers)

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in _READS or func is Tensor.tolist or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        if not self._answers or self._answers[0][0] != _READS[func]:
            raise TraceError(f"the model reads {_READS[func]} where its first run did not")
        return self._answers.pop(0)[1]
