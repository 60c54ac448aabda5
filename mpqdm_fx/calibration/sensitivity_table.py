"""Measured sensitivities of a model's channels: a file from which any budget is solved in seconds.

The expensive part of `allocation="measured"` is measured once: what an error in a channel's output
does to the model's output, and how large that error is at each width. Their products are the costs
that `numerics.budget.allocate_budget` shares a budget by.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.files import check_version, replacing
from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.numerics.budget import LayerCosts
from mpqdm_fx.numerics.codebook import LevelKind
from mpqdm_fx.numerics.grids import CODEBOOK_MAX_BITS, MAX_BITS

__all__ = ["LayerSensitivity", "SensitivityTable"]

_FORMAT = "mpqdm-fx sensitivities"
_VERSION = 1

#: Shape of each tensor of an entry: "O" stands for the layer's channels.
_SHAPES: Mapping[str, tuple[str | int, ...]] = {
    "sensitivity": ("O",),
    "uniform": ("O", MAX_BITS),
    "codebook": ("O", CODEBOOK_MAX_BITS),
    "uniform_gain": (MAX_BITS,),
    "codebook_gain": (CODEBOOK_MAX_BITS,),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSensitivity:
    """What was measured of one weight layer.

    Attributes:
        name: Layer's fully qualified name.
        shape: Shape of its weight; axis 0 runs over channels O (rows, for an embedding table).
        sensitivity: Squared error of the model's output per squared error of the channel's output,
            summed over the positions of one sample, mean over samples; float64 [O].
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
    uniform: Tensor
    uniform_gain: Tensor
    codebook: Tensor | None = None
    codebook_gain: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.codebook is None) != (self.codebook_gain is None):
            raise ConfigError(f"{self.name}: codebook and codebook_gain belong together")
        for key, symbols in _SHAPES.items():
            values = getattr(self, key)
            if values is None and key.startswith("codebook"):
                continue
            wanted = tuple(self.shape[0] if size == "O" else size for size in symbols)
            if values.shape != wanted or values.dtype != torch.float64:
                raise ConfigError(
                    f"{self.name}: {key} is {values.dtype} {tuple(values.shape)}, a weight of "
                    f"shape {self.shape} needs float64 {wanted}"
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
        """

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
    """

    layers: tuple[LayerSensitivity, ...]
    fingerprint: str
    seed: int
    probes: int
    samples: int
    _by_name: Mapping[str, LayerSensitivity] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {layer.name: layer for layer in self.layers})

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
        levels: LevelKind = "codebook",
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
            ConfigError: `fixed` or `skip` names a layer that the table does not have.
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

        The file appears whole: it is written beside `path` and renamed.

        Args:
            path: The file; its folder is made if it is missing.

        Returns:
            The path.
        """
        target = Path(path)
        tensors = {}
        for index, layer in enumerate(self.layers):
            for key in _SHAPES:
                values = getattr(layer, key)
                if values is not None:
                    tensors[f"{index}.{key}"] = values.contiguous()
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "probes": self.probes,
            "samples": self.samples,
            "layers": [[layer.name, list(layer.shape)] for layer in self.layers],
        }
        with replacing(target) as part:
            save_file(tensors, part, metadata={"table": json.dumps(header)})
        return target

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table.

        Raises:
            ArtifactError: The file is missing, damaged, of a newer version, or no such table.
        """
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ArtifactError(f"{path} does not exist") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged or no safetensors file: {error}") from None
        try:
            header = json.loads(metadata["table"])
            if header["format"] != _FORMAT:
                raise KeyError("format")
        except (KeyError, TypeError, ValueError):
            raise ArtifactError(f"{path} is no sensitivity table") from None
        check_version(path, header.get("version"), _VERSION)
        try:
            return cls._of_header(header, tensors)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(f"{path} is damaged: {error}") from None

    @classmethod
    def _of_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        layers = tuple(
            LayerSensitivity(
                name=str(name),
                shape=tuple(shape),
                sensitivity=tensors[f"{index}.sensitivity"],
                uniform=tensors[f"{index}.uniform"],
                uniform_gain=tensors[f"{index}.uniform_gain"],
                codebook=tensors.get(f"{index}.codebook"),
                codebook_gain=tensors.get(f"{index}.codebook_gain"),
            )
            for index, (name, shape) in enumerate(header["layers"])
        )
        return cls(
            layers=layers,
            fingerprint=str(header["fingerprint"]),
            seed=int(header["seed"]),
            probes=int(header["probes"]),
            samples=int(header["samples"]),
        )
