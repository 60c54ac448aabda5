"""An earlier run's solved layers, for a model that has some of that run's weights.

A run with a folder writes down there what it decided before the first layer was solved, and a
digest of each layer's float weight and bias. A run that starts from the folder takes the layers
whose digest is the same, and solves the others at the bits that they had.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field
from torch import Tensor, nn

from mpqdm_fx.bits.allocate import Limits
from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.row_weights import RowWeights
from mpqdm_fx.bits.sensitivity_table import SensitivityTable
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.graph.layers import WeightLayer
from mpqdm_fx.io.files import first_difference
from mpqdm_fx.io.schema import Name, Strict, plain, validated
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.io.tensors import Record, hash_tensor, read_record, write_record
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.records.report import ActivationChoice
from mpqdm_fx.sweep.checkpoint import HEADER, Checkpoint
from mpqdm_fx.sweep.measured_bits import TABLE
from mpqdm_fx.sweep.solve import LayerSolution

__all__ = ["StoredRun", "keep_decisions", "layer_digests", "shares_a_layer"]

_DECISIONS = "decisions.safetensors"
_KIND, _VERSION = "decisions of a run", 1
_FIX = "run anew what it is of"
_GROWN = 8.0  # far more than rounding, or a LoRA, changes the size of a layer's weights

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class _Head(Strict):
    """What the file says beside the tensors: factors and energies of the layers that it names."""

    run: str
    layers: dict[Name, _Digest]
    choices: tuple[ActivationChoice, ...]
    boundaries: tuple[float, ...]
    argument: Name | None
    scaled: tuple[Name, ...]
    weighed: tuple[Name, ...]
    # since weights without widths; files of before tell none
    inputs: dict[Name, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None


def layer_digests(layers: Mapping[str, WeightLayer]) -> dict[str, str]:
    """Digest of each layer's float weight and bias: equal where all of their bits are.

    Args:
        layers: Layers of a float graph whose inputs are not scaled yet.
    """
    return {name: _digest(layer.module) for name, layer in layers.items()}


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in (module.weight, getattr(module, "bias", None)):
        if isinstance(tensor, Tensor):
            hash_tensor(digest, tensor)
    return digest.hexdigest()[:32]


def keep_decisions(
    checkpoint: Checkpoint,
    digests: Mapping[str, str],
    *,
    choices: Sequence[ActivationChoice],
    factors: Mapping[str, Tensor],
    row_weights: RowWeights,
    input_energies: Mapping[str, float],
) -> None:
    """Write down what a run decided, for runs that start from it.

    Args:
        checkpoint: The run's folder.
        digests: `layer_digests` of the layers that the run quantizes.
        choices: How each input is quantized, where that was measured.
        factors: Factors of scaled inputs by layer, as of `ScaleInputs`.
        row_weights: How much the rows of each noise level count.
        input_energies: As of `CodedBudget.energy`; empty where widths are fixed.
    """
    energies = row_weights.energies
    levels = row_weights.groups.levels
    head = {
        "run": checkpoint.run,
        "layers": dict(digests),
        "choices": [asdict(choice) for choice in choices],
        "boundaries": list(levels.boundaries),
        "argument": levels.argument,
        "scaled": list(factors),
        "weighed": list(energies),
        "inputs": dict(input_energies),
    }
    tensors = {f"factor.{index}": factor for index, factor in enumerate(factors.values())}
    tensors |= {f"energy.{index}": energy for index, energy in enumerate(energies.values())}
    write_record(checkpoint.directory / _DECISIONS, _KIND, _VERSION, head, tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredRun:
    """A run that another one starts from.

    Attributes:
        checkpoint: Its solved layers.
        plans: Bits and levels of every layer, as that run has them.
        same: Layers whose float weight and bias have the very bits that they had there.
        choices: How each input was quantized, where that was measured.
        factors: Factors of scaled inputs by layer.
        row_weights: How much the rows of each noise level counted.
        input_energies: Mean square of the inputs of each layer without widths.
    """

    checkpoint: Checkpoint
    plans: Mapping[str, LayerPlan]
    same: frozenset[str]
    choices: tuple[ActivationChoice, ...]
    factors: Mapping[str, Tensor]
    row_weights: RowWeights
    input_energies: Mapping[str, float]

    @classmethod
    def open(
        cls,
        directory: Path,
        layers: Mapping[str, WeightLayer],
        digests: Mapping[str, str],
        identity: Mapping[str, Any],
    ) -> Self:
        """Read all of a run; a damaged file is told before anything is solved.

        Args:
            directory: `RunOptions.directory` of that run.
            layers: Layers that are to be quantized now, before inputs are scaled.
            digests: Their `layer_digests`.
            identity: What both runs have to be alike in, plain JSON types.

        Raises:
            ConfigError: That run has other settings, another model, or was not finished.
            ArtifactError: The folder is none of a run, or damaged.
        """
        stored = _identity_in(directory)
        alike = {key: stored.get(key) for key in identity}
        if difference := first_difference(alike, plain(identity)):
            raise ConfigError(
                f"{directory} is of a run with other settings: {difference}; ask for what it was "
                f"made with, or start from another run"
            )
        checkpoint = Checkpoint(directory, stored, resume=True, fix=_FIX)
        head, tensors = _decisions(directory, checkpoint.run)
        _check_names(directory, head, layers)
        return cls(
            checkpoint=checkpoint,
            plans={name: _plan(checkpoint, layer) for name, layer in layers.items()},
            same=_same(directory, head, digests),
            choices=head.choices,
            factors={name: tensors[f"factor.{i}"] for i, name in enumerate(head.scaled)},
            row_weights=RowWeights(
                groups=NoiseGroups(
                    levels=NoiseLevels(boundaries=head.boundaries, argument=head.argument)
                ),
                energies={name: tensors[f"energy.{i}"] for i, name in enumerate(head.weighed)},
            ),
            input_energies=head.inputs or {},
        )

    def limits(self, skipped: Mapping[str, str]) -> Limits:
        """Layers that were off that run's budget, whatever the calls of this one say.

        Args:
            skipped: Layers left in float, which follow from the settings.
        """
        plans = self.plans.values()
        fixed = {p.name: (p.bits[0], p.reason) for p in plans if p.reason is not None}
        return Limits(fixed=fixed, skipped=skipped)

    def load(self, layer: WeightLayer) -> LayerSolution:
        """The solution that the run has for a layer.

        Args:
            layer: The float layer.
        """
        solution = self.checkpoint.load(layer)
        assert solution is not None  # its plan was read
        return solution

    def check_sizes(self, layers: Mapping[str, WeightLayer]) -> None:
        """Refuse weights beside which those of the run were next to nothing.

        What an error of such a layer does, and so its bits, was measured where it did nothing: of
        layers that began at zero, for example.

        Args:
            layers: The layers now, inputs scaled as that run scaled them.

        Raises:
            ConfigError: A layer is so; names it.
        """
        for name, plan in self.plans.items():
            if name in self.same or plan.reason is not None:
                continue
            solution = self.load(layers[name])
            codes = solution.codes.flatten(1).float()
            # where all codes are zero, weights were up to half a step
            codes = codes if bool(codes.any()) else codes + 0.5
            before = _size(codes * solution.scale.float()[:, None])
            now = _size(layers[name].weight.detach())
            if now > _GROWN * before:
                raise ConfigError(
                    f"{name}: its weights were next to nothing in the run of "
                    f"{self.checkpoint.directory} (a size of {before:.0e}, and now {now:.0e}), and "
                    f"what they do was measured there; leave start_from out, so that it is "
                    f"measured anew"
                )

    def table(self) -> SensitivityTable:
        """The sensitivities that the run measured, or was given.

        Raises:
            ArtifactError: The file is missing, damaged, or of another run.
        """
        path = self.checkpoint.directory / TABLE
        table = SensitivityTable.load(path)
        if table.run != self.checkpoint.run:
            raise ArtifactError(f"{path} is of another run than {HEADER} beside it; {_FIX}")
        return table


def shares_a_layer(directory: Path, module: nn.Module) -> bool:
    """Whether a model has a layer whose weight and bias are those of a run; one is looked for.

    Args:
        directory: `RunOptions.directory` of the run.
        module: The model, whose layers have their names in the graph; others are passed over.

    Raises:
        ArtifactError: The folder is none of a run, or damaged.
    """
    head, _ = _decisions(directory, None)
    children = dict(module.named_modules())
    return any(name in children and _digest(children[name]) == d for name, d in head.layers.items())


def _size(weights: Tensor) -> float:
    """Root mean square."""
    return float(weights.double().square().mean().sqrt())


def _identity_in(directory: Path) -> dict[str, Any]:
    path = directory / HEADER
    if not path.is_file():
        raise ArtifactError(
            f"{directory} holds no solved layers: {HEADER} is missing; give the folder that a run "
            f"kept them in"
        )
    return dict(read_json(path, fix=_FIX))


def _decisions(directory: Path, run: str | None) -> tuple[_Head, Mapping[str, Tensor]]:
    path = directory / _DECISIONS
    if not path.is_file():
        raise ArtifactError(
            f"{directory} cannot be started from: {path.name} is missing; {_FIX}, with this version"
        )
    record: Record = read_record(path, _KIND, _VERSION, fix=_FIX)
    head = validated(_Head, record.head, path, fix=_FIX)
    if run is not None and head.run != run:
        raise ArtifactError(f"{path} is of another run than {HEADER} beside it; {_FIX}")
    wanted = {f"factor.{i}" for i in range(len(head.scaled))}
    wanted |= {f"energy.{i}" for i in range(len(head.weighed))}
    if wanted != set(record.tensors):
        raise ArtifactError(f"{path} is damaged: it holds tensors of no layer; {_FIX}")
    return head, record.tensors


def _check_names(directory: Path, head: _Head, layers: Mapping[str, WeightLayer]) -> None:
    for name in head.layers:
        if name not in layers:
            raise ConfigError(
                f"{directory} is of a run with another model: it has a layer {name}, which is not "
                f"here; start from a run of this model"
            )
    for name in layers:
        if name not in head.layers:
            raise ConfigError(
                f"{directory} is of a run with another model: it has no layer {name}; start from a "
                f"run of this model"
            )


def _plan(checkpoint: Checkpoint, layer: WeightLayer) -> LayerPlan:
    """The plan that a layer had; its shape is told before its codes are judged by it."""
    plan = checkpoint.plan(layer.name)
    if plan is None:
        raise ConfigError(
            f"{checkpoint.directory} is of a run that was not finished: {layer.name} was not "
            f"solved; go on with that run first"
        )
    shape = tuple(layer.weight.shape)
    if plan.shape != shape:
        raise ConfigError(
            f"{layer.name}: its weight is {list(shape)}, and {list(plan.shape)} in the run of "
            f"{checkpoint.directory}; start from a run of this model"
        )
    return plan


def _same(directory: Path, head: _Head, digests: Mapping[str, str]) -> frozenset[str]:
    same = frozenset(name for name, digest in digests.items() if head.layers[name] == digest)
    if not same:
        raise ConfigError(
            f"{directory} is of a run with another model: no layer has the weights that it had "
            f"there, so that there is nothing to take; leave start_from out"
        )
    return same
