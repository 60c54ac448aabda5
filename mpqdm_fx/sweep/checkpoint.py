"""Solved layers on disk: a sweep that was killed goes on where it stopped, with the same bits."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.layers import WeightLayer
from mpqdm_fx.io.schema import Count, Ratio, Strict, Whole, plain, validated
from mpqdm_fx.io.tensors import Record, read_record, write_record
from mpqdm_fx.io.unfinished import UnfinishedRun
from mpqdm_fx.numerics.levels.grids import round_scale
from mpqdm_fx.numerics.levels.packing import pack_layer
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.sweep.solve import LayerSolution

__all__ = ["HEADER", "Checkpoint"]

HEADER = "sweep.json"
"""File that says what a run is."""

_KIND, _VERSION = "solved layer", 1
_FIX = "delete this file and resume"
_LAYERS = "layer-*.safetensors"
_LONGEST = 80  # characters of a layer's name that its file's name repeats

_Amount = Annotated[float, Field(ge=0)]


class _Head(Strict):
    """What a file says of its layer, beside the tensors."""

    run: str
    plan: Annotated[LayerPlan, Whole(lacking=("coded",))]
    alpha: float
    beta: float
    damping: _Amount
    mismatch: Ratio
    base_error: Ratio
    error: Ratio
    rows: Count
    seconds: _Amount


_NUMBERS = [name for name in _Head.model_fields if name not in ("run", "plan")]


class Checkpoint:
    """A folder with one file per solved layer.

    Args:
        directory: The folder; made if it is not there.
        identity: What the run is: settings, model, calibration data, versions; plain JSON types.
        resume: Go on with what is there. Otherwise a folder with solved layers is refused.
        fix: What to do about a damaged file of a layer; ends the message.

    Attributes:
        directory: The folder.
        run: SHA-256 of the identity, which every file of the run carries.

    Raises:
        ConfigError: The folder holds another run (the first difference is named), or a run and
            `resume` is False.
        ArtifactError: The folder is damaged, or none of a run.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: Mapping[str, Any],
        *,
        resume: bool = False,
        fix: str = _FIX,
    ) -> None:
        run = UnfinishedRun(Path(directory), HEADER, identity, resume=resume, solved=_LAYERS)
        self.directory, self.run = run.directory, run.digest
        self._fix = fix

    def holds_layers(self) -> bool:
        """Whether a layer was solved already."""
        return any(self.directory.glob(_LAYERS))

    def load(self, layer: WeightLayer) -> LayerSolution | None:
        """The solution of a layer, or None if it was not solved yet.

        Args:
            layer: The float layer; what is read has to fit it.

        Raises:
            ArtifactError: Its file is damaged, of another run, or of another layer.
        """
        path = self._path(layer.name)
        if not path.exists():
            return None
        head, record = self._read(path)
        try:
            _check_layer(head.plan, layer)
            _check_tensors(record.tensors, head.plan, layer)
        except ValueError as error:
            raise ArtifactError(f"{path} does not fit {layer.name}: {error}; {self._fix}") from None
        return LayerSolution(
            plan=head.plan,
            codes=record.tensors["codes"],
            scale=record.tensors["scale"],
            bias=record.tensors.get("bias"),
            **{name: getattr(head, name) for name in _NUMBERS},
        )

    def plan(self, name: str) -> LayerPlan | None:
        """The plan that a layer was solved with, or None if it was not solved yet.

        Args:
            name: The layer's name.

        Raises:
            ArtifactError: Its file is damaged, or of another run.
        """
        path = self._path(name)
        return self._read(path)[0].plan if path.exists() else None

    def _read(self, path: Path) -> tuple[_Head, Record]:
        """A layer's file, whatever layer it is of."""
        record = read_record(path, _KIND, _VERSION, fix=self._fix)
        head = validated(_Head, record.head, path, fix=self._fix)
        if head.run != self.run:
            raise ArtifactError(f"{path} is of another run than {HEADER} beside it; {self._fix}")
        return head, record

    def save(self, solution: LayerSolution) -> None:
        """Write a layer's solution, so that no half of it is ever seen.

        Args:
            solution: The solved layer.
        """
        tensors = {"codes": solution.codes, "scale": solution.scale}
        if solution.bias is not None:
            tensors["bias"] = solution.bias
        head = plain({name: getattr(solution, name) for name in _NUMBERS})
        head |= {"run": self.run, "plan": solution.plan.to_dict()}
        write_record(self._path(solution.plan.name), _KIND, _VERSION, head, tensors)

    def _path(self, name: str) -> Path:
        """A name of bounded length that no other layer has, where case does not count either."""
        readable = re.sub(r"[^A-Za-z0-9_.]", "_", name)[:_LONGEST]
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        return self.directory / f"layer-{readable}-{digest}.safetensors"


def _check_layer(plan: LayerPlan, layer: WeightLayer) -> None:
    """Raise ValueError if a plan is another layer's."""
    shape, kind = tuple(layer.weight.shape), type(layer.module).__name__
    if (plan.name, plan.kind, plan.shape) != (layer.name, kind, shape):
        raise ValueError(f"it is of {plan.name!r}, a {plan.kind} of shape {list(plan.shape)}")


def _check_tensors(tensors: Mapping[str, Tensor], plan: LayerPlan, layer: WeightLayer) -> None:
    """Raise ValueError unless a layer can have these codes, scales and bias under a plan."""
    forms = {"codes": (torch.int8, plan.shape), "scale": (torch.float32, plan.shape[:1])}
    bias = getattr(layer.module, "bias", None)
    if isinstance(bias, Tensor) and "bias" in tensors:
        forms["bias"] = (bias.dtype, tuple(bias.shape))
    if set(tensors) != set(forms):
        raise ValueError(f"it holds {', '.join(sorted(tensors))}"[:200])
    for name, (dtype, size) in forms.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, wanted is {dtype} {list(size)}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity")
    if not torch.equal(tensors["scale"], round_scale(tensors["scale"])):
        raise ValueError("scale holds numbers that are no positive bfloat16 values")
    # refuses what is no level of its channel
    pack_layer(tensors["codes"].flatten(1), plan.bits_tensor(), plan.levels)
