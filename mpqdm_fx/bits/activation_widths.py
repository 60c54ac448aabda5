"""How many bits each input gets, below eight: by what its rounding costs, at a given average."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
from torch import fx

from mpqdm_fx.bits.pinning import ends_in_float
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.graph.same_values import value_key
from mpqdm_fx.numerics.bits.knapsack import choose_options
from mpqdm_fx.records.config import ActivationMode, MPQConfig
from mpqdm_fx.records.report import ActivationChoice, ActivationKind
from mpqdm_fx.run.cost import elements, node_cost
from mpqdm_fx.run.speed import InputOption

__all__ = ["choose_widths", "width_options"]

_KINDS: Mapping[ActivationMode, tuple[ActivationKind, ...]] = {
    "static": ("static",),
    "timestep": ("timestep",),
    "dynamic": ("dynamic",),
    "measured": ("static", "dynamic"),
}
_WIDTHS = (1, 2, 3, 4, 5, 6, 8)
_NARROWEST = 3  # below it an error is no small one, and its cost is measured to first order


def width_options(settings: MPQConfig) -> tuple[InputOption, ...]:
    """What is chosen between for every input, where widths are measured.

    Args:
        settings: Mode and average width.
    """
    narrowest = min(_NARROWEST, max(1, settings.activation_bits - 1))
    return tuple(
        InputOption(kind=kind, bits=bits)
        for bits in sorted({*_WIDTHS, settings.activation_bits})
        if bits >= narrowest
        for kind in _KINDS[settings.activation_mode]
    )


def choose_widths(
    graph_module: fx.GraphModule,
    units: Mapping[str, Sequence[str]],
    costs: Mapping[str, Mapping[InputOption, float]],
    energy: float,
    settings: MPQConfig,
    sizes: Mapping[sympy.Symbol, int],
    skipped: Collection[str] = (),
) -> tuple[ActivationChoice, ...]:
    """Choose the width of every input so that the output's error is least at the average width.

    The average is over the elements that layers read, each once: `settings.activation_bits` at the
    most. Inputs of the model's ends stay in float and those of an override at its width, as without
    a choice; neither counts.

    Args:
        graph_module: Normalized float graph.
        units: Layers that get one width.
        costs: Cost of each option by unit; see `ActivationCosts.costs`.
        energy: Mean energy of the model's output.
        settings: Mode and average.
        sizes: Symbols of the graph's shapes; see `cost.bind_sizes`.
        skipped: Layers that are in float whatever is chosen.
    """
    layers = weight_layers(graph_module)
    ends = ends_in_float(graph_module, settings.activation_mode)
    energy = energy or 1.0  # a model that writes zeros: nothing costs anything
    menus = []
    for unit, names in units.items():
        members = [layers[name] for name in names if name not in skipped]
        if members:
            menus.append(_menu(graph_module, members, costs[unit], settings, sizes, ends))
    free = [menu for menu in menus if len(menu.options) > 1]
    least = [min(option.bits or 0 for option in menu.options) for menu in free]
    numbers = [float(menu.elements) for menu in free]
    budget = sum(
        (settings.activation_bits - low) * number
        for low, number in zip(least, numbers, strict=True)
    )
    chosen = choose_options(
        [[menu.costs[option] for option in menu.options] for menu in free],
        [
            [((option.bits or 0) - low) * number for option in menu.options]
            for menu, low, number in zip(free, least, numbers, strict=True)
        ],
        budget,
    )
    picked = {id(m): m.options[index] for m, index in zip(free, chosen, strict=True)}
    return tuple(
        menu.choice(picked.get(id(menu), menu.options[0]), settings, energy) for menu in menus
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Menu:
    """What one unit can have.

    Attributes:
        layers: Its layers.
        options: What there is; a single one is taken.
        costs: Squared error of the output, by option.
        elements: Numbers that its layers read, each once.
        multiply_adds: Of its layers, in one call.
    """

    layers: tuple[str, ...]
    options: tuple[InputOption, ...]
    costs: Mapping[InputOption, float]
    elements: int
    multiply_adds: int

    def choice(self, option: InputOption, settings: MPQConfig, energy: float) -> ActivationChoice:
        """The record of a choice."""
        plain = min(
            cost for other, cost in self.costs.items() if other.bits == settings.activation_bits
        )
        return ActivationChoice(
            layers=self.layers,
            kind=option.kind,
            bits=option.bits or settings.activation_bits,
            exponent=0.0,
            quantized_cost=plain / energy,
            cost=0.0 if option.kind == "float" else self.costs[option] / energy,
            slowdown=0.0,
            elements=self.elements,
            multiply_adds=self.multiply_adds,
        )


def _menu(
    graph_module: fx.GraphModule,
    layers: Sequence[WeightLayer],
    costs: Mapping[InputOption, float],
    settings: MPQConfig,
    sizes: Mapping[sympy.Symbol, int],
    ends: Collection[str],
) -> _Menu:
    sources = [call.args[0] for layer in layers for call in layer.nodes]
    read = {
        value_key(graph_module, source): elements(source, sizes)
        for source in sources
        if isinstance(source, fx.Node)
    }
    own = settings.own_activation_bits(layers[0].name)  # the same for all, as units are made
    options = tuple(costs)
    if own is not None:  # all options were measured at that width
        best = min(costs, key=lambda option: costs[option])
        options = (InputOption(kind=best.kind, bits=own),)
        costs = {**costs, options[0]: costs[best]}
    elif any(layer.name in ends for layer in layers):
        options = (InputOption(kind="float"),)
    return _Menu(
        layers=tuple(layer.name for layer in layers),
        options=options,
        costs=costs,
        elements=sum(read.values()),
        multiply_adds=sum(
            node_cost(graph_module, call, sizes) for layer in layers for call in layer.nodes
        ),
    )
