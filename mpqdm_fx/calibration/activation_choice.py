"""Which inputs are quantized, and how: by what that costs at the output, under a budget of time."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import sympy  # type: ignore[import-untyped]
from torch import fx

from mpqdm_fx.calibration.activation_costs import ActivationCosts
from mpqdm_fx.calibration.pinning import FIRST_LAYER, LAST_LAYER, pinned_layers
from mpqdm_fx.config import ActivationMode, MPQConfig
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.graph.speed import ActivationKind, layer_time, other_time, weight_bytes
from mpqdm_fx.numerics.knapsack import choose_options

__all__ = ["ActivationChoice", "choose_activations", "ends_in_float", "kinds_of"]

_KINDS: Mapping[ActivationMode, tuple[ActivationKind, ...]] = {
    "static": ("static", "float"),
    "dynamic": ("dynamic", "float"),
    "measured": ("static", "dynamic", "float"),
}


@dataclass(frozen=True, kw_only=True)
class ActivationChoice:
    """What was chosen for the input of some layers.

    Attributes:
        layers: Layers that share the input, in graph order.
        kind: What was chosen.
        quantized_cost: Squared error of the model's output from this input alone, over the output's
            energy, if it is quantized the cheapest way.
        cost: The same as it was chosen.
        slowdown: Time that the choice takes over the fastest one, over the whole program's.
    """

    layers: tuple[str, ...]
    kind: ActivationKind
    quantized_cost: float
    cost: float
    slowdown: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**{**data, "layers": tuple(data["layers"])})


def kinds_of(settings: MPQConfig) -> tuple[ActivationKind, ...]:
    """Kinds that are chosen between; none if the mode or the budget leaves no choice."""
    chosen = settings.slowdown > 1 or settings.activation_mode == "measured"
    return _KINDS.get(settings.activation_mode, ()) if chosen else ()


def choose_activations(
    graph_module: fx.GraphModule,
    costs: ActivationCosts,
    measured: Mapping[str, Mapping[ActivationKind, float]],
    energy: float,
    settings: MPQConfig,
    sizes: Mapping[sympy.Symbol, int],
    skipped: Collection[str] = (),
) -> tuple[ActivationChoice, ...]:
    """Choose the kind of every input so that the output's error is least within the budget.

    The budget is `settings.slowdown` over the program in which every input is quantized the fastest
    way, as `graph.speed` predicts it: so much more time and weight bytes together (a layer with a
    float input has float weights in a program). Inputs of other widths than 8 bits, and those for
    which an override gives the width, are quantized.

    Args:
        graph_module: Normalized float graph.
        costs: The units.
        measured: Cost of each kind by unit; see `ActivationCosts.costs`.
        energy: Mean energy of the model's output.
        settings: Mode and budget.
        sizes: Symbols of the graph's shapes; see `cost.bind_sizes`.
        skipped: Layers that are in float whatever is chosen.
    """
    kinds = kinds_of(settings)
    layers = weight_layers(graph_module)
    units = {
        unit: [layers[name] for name in names if name not in skipped]
        for unit, names in costs.units.items()
    }
    units = {unit: own for unit, own in units.items() if own}
    ends = ends_in_float(graph_module, settings.activation_mode)
    options = {unit: _allowed(own, kinds, settings, ends) for unit, own in units.items()}
    times = {
        unit: {k: sum(layer_time(graph_module, one, k, sizes) for one in own) for k in kinds}
        for unit, own in units.items()
    }
    sizes_of = {
        unit: {k: sum(weight_bytes(one, k) for one in own) for k in kinds}
        for unit, own in units.items()
    }
    fastest = {unit: min(times[unit][k] for k in kinds if k != "float") for unit in units}
    in_all = sum(fastest.values()) + other_time(graph_module, sizes)
    all_bytes = sum(sizes_of[unit][kinds[0]] for unit in units)

    def share(unit: str, kind: ActivationKind) -> float:
        longer = max(0.0, times[unit][kind] - fastest[unit]) / in_all
        larger = (sizes_of[unit][kind] - sizes_of[unit][kinds[0]]) / all_bytes
        return longer + larger

    uses = [[share(unit, kind) for kind in options[unit]] for unit in units]
    # the fastest option is free, also where it has a smaller share of time than of bytes
    uses = [[use - min(row) for use in row] for row in uses]
    chosen = choose_options(
        [[measured[unit][kind] for kind in options[unit]] for unit in units],
        uses,
        settings.slowdown - 1,
    )
    return tuple(
        ActivationChoice(
            layers=tuple(layer.name for layer in units[unit]),
            kind=options[unit][index],
            quantized_cost=min(measured[unit][k] for k in kinds if k != "float") / energy,
            cost=measured[unit][options[unit][index]] / energy,
            slowdown=max(0.0, times[unit][options[unit][index]] - fastest[unit]) / in_all,
        )
        for unit, index in zip(units, chosen, strict=True)
    )


def ends_in_float(graph_module: fx.GraphModule, mode: ActivationMode) -> set[str]:
    """Layers whose activations are float unasked: they read the sample or write the noise.

    Late in a run the noise that is left in the sample is smaller than one step of a range over all
    timesteps: rounding the sample erases what the model is asked to predict. And the output has to
    be as exact as all of the model is; a dynamic quantizer leaves it alone.

    Args:
        graph_module: Normalized graph.
        mode: How activations are quantized.
    """
    ends = {FIRST_LAYER} if mode == "dynamic" else {FIRST_LAYER, LAST_LAYER}
    return {name for name, why in pinned_layers(graph_module).items() if why in ends}


def _allowed(
    layers: Sequence[WeightLayer],
    kinds: Sequence[ActivationKind],
    settings: MPQConfig,
    ends: Collection[str],
) -> list[ActivationKind]:
    """Kinds that a unit may have."""
    given = any(
        rule.activation_bits is not None and rule.matches(layer.name)
        for rule in settings.rules
        for layer in layers
    )
    narrow = any(settings.activation_bits_of(layer.name) != 8 for layer in layers)
    if narrow and any(layer.name in ends for layer in layers):
        return ["float"]
    return [kind for kind in kinds if kind != "float" or not (given or narrow)]
