"""Which inputs are quantized, and how: by what that costs at the output, under a budget of time."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
from torch import fx

from mpqdm_fx.bits.activation_widths import width_options
from mpqdm_fx.bits.pinning import ends_in_float
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.numerics.bits.knapsack import choose_options
from mpqdm_fx.records.config import ActivationMode, MPQConfig
from mpqdm_fx.records.report import ActivationChoice, ActivationKind
from mpqdm_fx.run.speed import (
    InputOption,
    layer_time,
    other_time,
    weight_bytes,
)

__all__ = ["choose_activations", "options_of"]

_QUANTIZED: Mapping[ActivationMode, tuple[ActivationKind, ...]] = {
    "static": ("static",),
    "dynamic": ("dynamic",),
    "measured": ("static", "dynamic"),
}
_EXPONENTS = (0.0, 0.5, 1.0)
_BISECTIONS = 12  # of the price of a byte
_FLOAT = InputOption(kind="float")


def options_of(settings: MPQConfig) -> tuple[InputOption, ...]:
    """What is chosen between for every input; nothing if mode or budget leave no choice."""
    if settings.measures_widths:
        return width_options(settings)
    kinds = _QUANTIZED.get(settings.activation_mode, ())
    if not kinds or (settings.slowdown == 1 and settings.activation_mode != "measured"):
        return ()
    quantized = (InputOption(kind=kind, exponent=e) for e in _EXPONENTS for kind in kinds)
    return (*quantized, _FLOAT)


def choose_activations(
    graph_module: fx.GraphModule,
    units: Mapping[str, Sequence[str]],
    costs: Mapping[str, Mapping[InputOption, float]],
    weights: Mapping[str, Mapping[float, float]],
    energy: float,
    settings: MPQConfig,
    sizes: Mapping[sympy.Symbol, int],
    skipped: Collection[str] = (),
) -> tuple[ActivationChoice, ...]:
    """Choose how every input is treated so that the output's error is least within the budget.

    The budget is `settings.slowdown` over the program in which every input is quantized the fastest
    way, as `run.speed` predicts it: so much more time, and so much more bytes of weights (a layer
    with a float input has float weights in a program). Inputs of other widths than 8 bits, and
    those for which an override gives the width, are quantized as they are.

    Args:
        graph_module: Normalized float graph.
        units: Layers that get one option.
        costs: Cost of each option by unit; see `ActivationCosts.costs`.
        weights: What rounding its weights costs by unit and exponent; see `weight_costs`.
        energy: Mean energy of the model's output.
        settings: Mode and budget.
        sizes: Symbols of the graph's shapes; see `cost.bind_sizes`.
        skipped: Layers that are in float whatever is chosen.
    """
    layers = weight_layers(graph_module)
    ends = ends_in_float(graph_module, settings.activation_mode)
    menus = []
    for unit, names in units.items():
        members = [layers[name] for name in names if name not in skipped]
        if members:
            menus.append(
                _menu(graph_module, members, costs[unit], weights[unit], settings, sizes, ends)
            )
    in_all = sum(menu.fastest for menu in menus) + other_time(graph_module, sizes)
    smallest = sum(menu.smallest for menu in menus)
    energy = energy or 1.0  # a model that writes zeros: nothing costs anything
    chosen = _chosen(menus, (settings.slowdown - 1) * in_all, (settings.slowdown - 1) * smallest)
    return tuple(
        ActivationChoice(
            layers=menu.layers,
            kind=menu.options[index].kind,
            bits=settings.activation_bits_of(menu.layers[0]),  # the same for all, as units are made
            exponent=menu.options[index].exponent,
            quantized_cost=menu.plain / energy,
            cost=menu.errors[index] / energy,
            slowdown=menu.times[index] / in_all,
        )
        for menu, index in zip(menus, chosen, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class _Menu:
    """What one unit can have.

    Attributes:
        layers: Its layers.
        options: What there is.
        errors: Squared error of the output from the input, by option.
        costs: The same from the input and the weights that it meets.
        times: Time over the fastest way to quantize it, by option.
        bytes: Bytes of weights over the smallest, by option.
        plain: Cost of the fastest way.
        fastest: Its time.
        smallest: Its bytes.
    """

    layers: tuple[str, ...]
    options: tuple[InputOption, ...]
    errors: tuple[float, ...]
    costs: tuple[float, ...]
    times: tuple[float, ...]
    bytes: tuple[float, ...]
    plain: float
    fastest: float
    smallest: float


def _menu(
    graph_module: fx.GraphModule,
    layers: Sequence[WeightLayer],
    costs: Mapping[InputOption, float],
    weights: Mapping[float, float],
    settings: MPQConfig,
    sizes: Mapping[sympy.Symbol, int],
    ends: Collection[str],
) -> _Menu:
    def time(option: InputOption) -> float:
        return sum(layer_time(graph_module, layer, option, sizes) for layer in layers)

    def size(option: InputOption) -> int:
        return sum(weight_bytes(layer, option) for layer in layers)

    plain = min(
        (option for option in costs if option.kind != "float" and not option.exponent), key=time
    )
    options = _allowed(layers, tuple(costs), settings, ends)
    least = min(size(option) for option in options)
    fastest = time(plain)
    return _Menu(
        layers=tuple(layer.name for layer in layers),
        options=options,
        errors=tuple(costs[option] for option in options),
        costs=tuple(costs[option] + weights[option.exponent] for option in options),
        # where float is faster than int8 (few outputs of many inputs), it takes nothing
        times=tuple(max(0.0, time(option) - fastest) for option in options),
        bytes=tuple(float(size(option) - least) for option in options),
        plain=costs[plain],
        fastest=fastest,
        smallest=size(plain),
    )


def _chosen(menus: Sequence[_Menu], time: float, size: float) -> list[int]:
    """Options of least cost within the time; what their bytes cost is raised until they fit too."""
    costs = [menu.costs for menu in menus]
    times = [[duration - min(menu.times) for duration in menu.times] for menu in menus]

    def solve(price: float) -> tuple[list[int], float]:
        priced = [
            [cost + price * extra for cost, extra in zip(menu.costs, menu.bytes, strict=True)]
            for menu in menus
        ]
        choice = choose_options(priced, times, time)
        return choice, sum(menu.bytes[i] for menu, i in zip(menus, choice, strict=True))

    choice, growth = solve(0.0)
    if growth <= size:
        return choice
    low, high = 0.0, max(max(row) for row in costs) / max(size, 1.0) or 1.0
    while (upper := solve(high))[1] > size:
        high *= 8
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5 if low else high / 8
        tried = solve(middle)
        if tried[1] > size:
            low = middle
        else:
            high, upper = middle, tried
    return upper[0]


def _allowed(
    layers: Sequence[WeightLayer],
    options: Sequence[InputOption],
    settings: MPQConfig,
    ends: Collection[str],
) -> tuple[InputOption, ...]:
    """What a unit may have."""
    overridden = any(
        rule.activation_bits is not None and rule.matches(layer.name)
        for rule in settings.rules
        for layer in layers
    )
    narrow = any(settings.activation_bits_of(layer.name) != 8 for layer in layers)
    if narrow and any(layer.name in ends for layer in layers):
        return (_FLOAT,)
    if overridden or narrow:
        return tuple(option for option in options if option.kind != "float" and not option.exponent)
    return tuple(options)
