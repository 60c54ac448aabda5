"""Measured sensitivities of a model's channels: a file from which any budget is solved in seconds.

The expensive part of `allocation="measured"` is measured once: what an error in a channel's output
does to the model's output, and how large that error is at each width. Their products are the costs
that `numerics.bits.budget.allocate_budget` shares a budget by.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, fx

from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.io.schema import Count, Name, Shape, Strict, validated
from mpqdm_fx.io.sealed import digest_of
from mpqdm_fx.io.tensors import hash_tensor, read_record, write_record
from mpqdm_fx.numerics.bits.budget import LayerCosts
from mpqdm_fx.numerics.levels.codebook import LevelKind
from mpqdm_fx.numerics.levels.grids import CODEBOOK_MAX_BITS, MAX_BITS
from mpqdm_fx.records.activations import NoiseLevels

__all__ = ["LayerSensitivity", "SensitivityTable"]

_KIND, _VERSION = "sensitivities", 3
_FIX = "delete it, and it is measured anew"

#: Shape of each tensor of an entry: "O" stands for the layer's channels, "G" for noise levels.
_SHAPES: Mapping[str, tuple[str | int, ...]] = {
    "sensitivity": ("O",),
    "by_group": ("G",),
    "uniform": ("O", MAX_BITS),
    "codebook": ("O", CODEBOOK_MAX_BITS),
    "uniform_gain": (MAX_BITS,),
    "codebook_gain": (CODEBOOK_MAX_BITS,),
}


class _TableHead(Strict):
    """What a file says beside the tensors."""

    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    run: Name | None
    seed: Count
    probes: Annotated[int, Field(ge=1, lt=2**31)]
    samples: Annotated[int, Field(ge=1, lt=2**31)]
    boundaries: tuple[float, ...]
    argument: Name | None
    layers: tuple[tuple[Name, Shape], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSensitivity:
    """What was measured of one weight layer.

    Attributes:
        name: Layer's fully qualified name.
        shape: Shape of its weight; axis 0 runs over channels O (rows, for an embedding table).
        sensitivity: Squared error of the model's output per squared error of the channel's output,
            summed over the positions of one sample, mean over samples; float64 [O].
        by_group: The same summed over channels, in each group of noise levels, float64 [G].
        uniform: Mean squared error of the channel's output with uniform levels at 1..8 bits, its
            weights rounded to nearest, float64 [O, 8].
        codebook: The same with fitted levels at 1..4 bits, float64 [O, 4], or None.
        uniform_gain: Share of the layer's error that GPTQ's feedback leaves at each width,
            float64 [8].
        codebook_gain: The same with fitted levels, float64 [4], or None.
    """

    name: str
    shape: tuple[int, ...]
    sensitivity: Tensor
    by_group: Tensor
    uniform: Tensor
    uniform_gain: Tensor
    codebook: Tensor | None = None
    codebook_gain: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.codebook is None) != (self.codebook_gain is None):
            raise ConfigError(f"{self.name}: codebook and codebook_gain belong together")
        if not self.shape:
            raise ConfigError(f"{self.name}: a weight has at least one axis")
        for key, symbols in _SHAPES.items():
            values = getattr(self, key)
            if values is None:
                if key.startswith("codebook"):
                    continue
                raise ConfigError(f"{self.name}: {key} is missing")
            sizes = {"O": self.shape[0], "G": len(values) if values.dim() else 0}
            shape = tuple(sizes[s] if isinstance(s, str) else s for s in symbols)
            if values.shape != shape or values.dtype != torch.float64:
                raise ConfigError(
                    f"{self.name}: {key} is {values.dtype} {tuple(values.shape)}, a weight of "
                    f"shape {self.shape} needs float64 {shape}"
                )
            if not bool((torch.isfinite(values) & (values >= 0)).all()):
                raise ConfigError(f"{self.name}: {key} holds negative, NaN or infinite values")

    @property
    def width(self) -> int:
        """Weights of one channel."""
        return math.prod(self.shape[1:])

    def costs(
        self, levels: LevelKind, *, fixed: int | None = None, feedback: bool = True
    ) -> LayerCosts:
        """Expected squared error of the model's output from each channel at each width.

        Args:
            levels: `"codebook"` gives the costs of fitted levels too.
            fixed: Width that is decided already.
            feedback: Whether weights will be rounded with GPTQ's feedback, or to nearest.

        Raises:
            ConfigError: Fitted levels are asked for, and were not measured.
        """
        if levels == "codebook" and self.codebook is None:
            raise ConfigError(
                f"{self.name}: the sensitivity table was measured without fitted levels, so it "
                f'cannot share bits with levels="codebook"; measure it anew with codebooks=True '
                f'(delete the file), or use levels="uniform"'
            )

        def cost(errors: Tensor, gain: Tensor) -> Tensor:
            return self.sensitivity[:, None] * (errors * gain if feedback else errors)

        codebook = None
        if levels == "codebook" and self.codebook is not None and self.codebook_gain is not None:
            codebook = cost(self.codebook, self.codebook_gain)
        return LayerCosts(
            name=self.name,
            channels=self.shape[0],
            width=self.width,
            uniform=cost(self.uniform, self.uniform_gain),
            codebook=codebook,
            fixed=fixed,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityTable:
    """Sensitivities of all weight layers of a graph, in graph order.

    Attributes:
        layers: One entry per layer, embedding tables included.
        fingerprint: `graph_fingerprint` of the graph that was measured.
        seed: Seed of the probes and of the sampled rows.
        probes: Random directions of the output per sample.
        samples: Samples that were probed.
        groups: Groups of noise levels of `LayerSensitivity.by_group`.
        run: Identity of the run that measured them, where it is one that can be resumed.
    """

    layers: tuple[LayerSensitivity, ...]
    fingerprint: str
    seed: int
    probes: int
    samples: int
    groups: NoiseGroups
    run: str | None = None
    _by_name: Mapping[str, LayerSensitivity] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_name = {layer.name: layer for layer in self.layers}
        if len(by_name) != len(self.layers):
            raise ConfigError("a sensitivity table names one layer twice")
        for layer in self.layers:
            if len(layer.by_group) != self.groups.count:
                raise ConfigError(
                    f"{layer.name}: by_group has {len(layer.by_group)} groups of noise levels, "
                    f"the table {self.groups.count}"
                )
        object.__setattr__(self, "_by_name", by_name)

    def layer(self, name: str) -> LayerSensitivity:
        """The entry of the layer called `name`.

        Raises:
            ConfigError: There is none.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise ConfigError(f"the sensitivity table has no layer {name!r}") from None

    def costs(
        self,
        levels: LevelKind = "uniform",
        *,
        fixed: Mapping[str, int] | None = None,
        skip: Collection[str] = (),
        feedback: bool = True,
    ) -> list[LayerCosts]:
        """Costs for `allocate_budget`, in graph order.

        Args:
            levels: `"codebook"` lets each layer choose between fitted and uniform levels.
            fixed: Width of layers that are decided already; their bits count.
            skip: Layers that stay in floating point; they are left out.
            feedback: Whether weights will be rounded with GPTQ's feedback, or to nearest.

        Raises:
            ConfigError: `fixed` or `skip` names a layer that the table does not have, or fitted
                levels are asked for and were not measured.
        """
        pinned = dict(fixed or {})
        for name in (*pinned, *skip):
            self.layer(name)
        return [
            layer.costs(levels, fixed=pinned.get(layer.name), feedback=feedback)
            for layer in self.layers
            if layer.name not in skip
        ]

    def check(self, graph_module: fx.GraphModule) -> None:
        """Refuse a graph other than the one that was measured.

        Raises:
            ArtifactError: The graph has other layers or other weights.
        """
        if graph_fingerprint(graph_module) != self.fingerprint:
            raise ArtifactError(
                "the sensitivity table was measured on another model (or on the same one prepared "
                "with other settings): its layers or weights differ; measure it again"
            )

    def save(self, path: str | Path) -> Path:
        """Write the table to one safetensors file, or replace the one that is there.

        Args:
            path: The file; its folder is made if it is missing.

        Returns:
            The path.
        """
        target = Path(path)
        write_record(target, _KIND, _VERSION, {**self._head(), "run": self.run}, self._tensors())
        return target

    def digest(self) -> str:
        """SHA-256 of what was measured, whatever run measured it; hexadecimal."""
        digest = hashlib.sha256(digest_of(self._head()).encode())
        for name, tensor in self._tensors().items():
            digest.update(f"{name}\0".encode())
            hash_tensor(digest, tensor)
        return digest.hexdigest()

    def _head(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "probes": self.probes,
            "samples": self.samples,
            "boundaries": list(self.groups.levels.boundaries),
            "argument": self.groups.levels.argument,
            "layers": [[layer.name, list(layer.shape)] for layer in self.layers],
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{index}.{key}": getattr(layer, key)
            for index, layer in enumerate(self.layers)
            for key in _SHAPES
            if getattr(layer, key) is not None
        }

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table.

        Raises:
            ArtifactError: The file is missing, damaged, of a newer version, or no such table.
        """
        record = read_record(Path(path), _KIND, _VERSION, fix=_FIX)
        head = validated(_TableHead, record.head, path, fix=_FIX)
        names = {f"{index}.{key}" for index in range(len(head.layers)) for key in _SHAPES}
        if not set(record.tensors) <= names:
            raise ArtifactError(f"{path} is damaged: it holds tensors of no layer; {_FIX}")
        try:
            layers = tuple(
                LayerSensitivity(
                    name=name,
                    shape=shape,
                    **{key: record.tensors.get(f"{index}.{key}") for key in _SHAPES},  # type: ignore[arg-type]
                )
                for index, (name, shape) in enumerate(head.layers)
            )
            return cls(
                layers=layers,
                fingerprint=head.fingerprint,
                seed=head.seed,
                probes=head.probes,
                samples=head.samples,
                groups=NoiseGroups(
                    levels=NoiseLevels(boundaries=head.boundaries, argument=head.argument)
                ),
                run=head.run,
            )
        except ConfigError as error:
            raise ArtifactError(f"{path} is damaged: {error}; {_FIX}") from None
