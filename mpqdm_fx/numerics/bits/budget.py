"""Bits of every channel of every layer under one budget: a global Lagrangian, counted exactly.

Minimise the sum of the channels' costs subject to stored bits <= budget. For a price per bit every
channel takes the width of least ``cost + price * bits`` (Everett 1963; Shoham and Gersho 1988), so
the widths of one price are optimal for the bits that they use. The price is bisected to the last
bit of a float; what is left of the budget is then spent on the best single steps.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.bits.curves import CurvePoint, LayerCurves, Option
from mpqdm_fx.numerics.levels.codebook import LevelKind
from mpqdm_fx.numerics.levels.grids import CODEBOOK_MAX_BITS, MAX_BITS
from mpqdm_fx.numerics.levels.packing import storage_bits

__all__ = ["LayerChoice", "LayerCosts", "allocate_budget", "total_bits", "total_cost"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCosts:
    """What each channel of a layer costs at each width.

    Attributes:
        name: Layer's name, for messages.
        channels: Output channels O.
        width: Weights of one channel K.
        uniform: Cost of each channel with uniform levels at 1..8 bits, float64 [O, 8].
        codebook: Cost with fitted levels at 1..4 bits, float64 [O, 4] (wider channels of such a
            layer are uniform); None where the layer must have uniform levels.
        fixed: Width that all channels have whatever they cost, with uniform levels; its bits count
            against the budget.

    Raises:
        ConfigError: Shapes or widths are wrong.
        CalibrationError: A cost is negative, NaN or infinite.
    """

    name: str
    channels: int
    width: int
    uniform: Tensor
    codebook: Tensor | None = None
    fixed: int | None = None

    def __post_init__(self) -> None:
        tables = [(self.uniform, MAX_BITS)]
        if self.codebook is not None:
            tables.append((self.codebook, CODEBOOK_MAX_BITS))
        for costs, columns in tables:
            whole = _is_whole(self.channels) and _is_whole(self.width)
            positive = whole and self.channels >= 1 and self.width >= 1
            if not positive or costs.shape != (self.channels, columns):
                raise ConfigError(
                    f"{self.name}: costs of shape {tuple(costs.shape)} do not fit {self.channels} "
                    f"channels of {self.width} weights; give [{self.channels}, {columns}]"
                )
            if not bool((torch.isfinite(costs) & (costs >= 0)).all()):
                raise CalibrationError(
                    f"{self.name}: a cost is negative, NaN or infinite; check the calibration data"
                )
        if self.fixed is not None and not (_is_whole(self.fixed) and 1 <= self.fixed <= MAX_BITS):
            raise ConfigError(f"{self.name}: fixed={self.fixed!r}; use 1 to {MAX_BITS}")


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerChoice:
    """What `allocate_budget` decided for one layer.

    Attributes:
        bits: Width of each output channel, int64 [O].
        levels: ``"uniform"`` or ``"codebook"``.
    """

    bits: Tensor
    levels: LevelKind


def _is_whole(value: object) -> bool:
    """Whether a value is an integer; NaN, which no comparison stops, is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def total_bits(layers: Sequence[LayerCosts], choices: Sequence[LayerChoice]) -> int:
    """Count the stored bits of all layers: codes, scales, tables and width tags."""
    return sum(
        storage_bits((layer.channels, layer.width), choice.bits, choice.levels).total
        for layer, choice in zip(layers, choices, strict=True)
    )


def total_cost(layers: Sequence[LayerCosts], choices: Sequence[LayerChoice]) -> float:
    """Sum the costs of all channels, layers of fixed width among them."""
    total = 0.0
    for layer, choice in zip(layers, choices, strict=True):
        costs = layer.uniform.to(torch.float64)
        if choice.levels == "codebook" and layer.codebook is not None:
            narrow = layer.codebook.to(torch.float64)
            costs = torch.cat([narrow, costs[:, CODEBOOK_MAX_BITS:]], dim=1)
        total += float(costs.gather(1, choice.bits[:, None] - 1).sum())
    return total


def allocate_budget(
    layers: Sequence[LayerCosts], budget_bits: int, *, align: int = 1
) -> list[LayerChoice]:
    """Choose the widths of all channels and the kind of levels of all layers.

    1. The result stores at most ``budget_bits``, counted by `storage_bits`: whole bytes of codes,
       16-bit scales, tables, and width tags where a layer is mixed.
    2. It costs at most what the best assignment of a single price costs that fits; for a budget
       that such an assignment uses up it is optimal (up to the padding of codes to whole bytes).
    3. No step that still fits lowers the cost: one block of channels to another width, or a layer
       to the other kind of levels.
    4. Equal input gives equal output; of equal channels the earlier one is widened first.

    Args:
        layers: Costs of each layer. They need be neither convex nor monotone in the width.
        budget_bits: Stored bits of all layers together.
        align: Channels of a layer get their widths in blocks of so many, formed in the order of
            their costs; the block of the cheapest channels may be smaller.

    Returns:
        One choice per layer, in their order.

    Raises:
        ConfigError: The budget is below the smallest that can hold, or it or ``align`` is no
            whole number of the right size.
    """
    if not _is_whole(budget_bits):
        raise ConfigError(f"budget_bits={budget_bits!r}; give a whole number of bits")
    if not (_is_whole(align) and align >= 1):
        raise ConfigError(f"align={align!r}; blocks have at least 1 channel")
    chosen: dict[int, LayerChoice] = {}
    rest = budget_bits
    free: list[int] = []
    for index, layer in enumerate(layers):
        if layer.fixed is None:
            free.append(index)
            continue
        bits = torch.full((layer.channels,), layer.fixed, dtype=torch.int64)
        chosen[index] = LayerChoice(bits=bits, levels="uniform")
        rest -= storage_bits((layer.channels, layer.width), bits, "uniform").total
    curves = [
        LayerCurves(
            layers[index].width,
            layers[index].uniform.detach().to("cpu", torch.float64),
            None
            if (codebook := layers[index].codebook) is None
            else codebook.detach().to("cpu", torch.float64),
            align,
        )
        for index in free
    ]
    least = sum(curve.at_price(math.inf).size for curve in curves)
    if least > rest:
        raise ConfigError(
            f"a budget of {budget_bits} bits cannot hold these layers even at 1 bit a weight: the "
            f"smallest that can is {budget_bits - rest + least} bits (codes, scales, fixed layers)"
        )
    options = _spend(curves, *_bisect(curves, rest), rest)
    for index, curve, option in zip(free, curves, options, strict=True):
        chosen[index] = LayerChoice(bits=curve.bits(option), levels=option.levels)
    return [chosen[index] for index in range(len(layers))]


def _bisect(curves: Sequence[LayerCurves], budget: int) -> tuple[list[Option], list[Option]]:
    """Return the options of the lowest price that fits, and of the float just below it."""

    def price_of(pattern: int) -> float:
        # The bit patterns of positive floats are ordered as they are: 63 halvings find neighbours.
        return float(torch.tensor(pattern, dtype=torch.int64).view(torch.float64))

    def points(pattern: int) -> list[CurvePoint]:
        price = price_of(pattern)
        return [curve.at_price(price) for curve in curves]

    def options(selection: list[CurvePoint]) -> list[Option]:
        return [curve.option(point) for curve, point in zip(curves, selection, strict=True)]

    low = 0
    too_large = points(low)
    if sum(point.size for point in too_large) <= budget:
        return options(too_large), options(too_large)
    high = int(torch.tensor(math.inf, dtype=torch.float64).view(torch.int64))
    fitting = points(high)
    while high - low > 1:
        middle = (low + high) // 2
        selection = points(middle)
        if sum(point.size for point in selection) <= budget:
            high, fitting = middle, selection
        else:
            low, too_large = middle, selection
    return options(fitting), options(too_large)


def _spend(
    curves: Sequence[LayerCurves], start: list[Option], beyond: list[Option], budget: int
) -> list[Option]:
    """Spend what is left of the budget on the steps that lower the cost most per bit."""
    current = list(start)
    rest = budget - sum(option.size for option in current)
    moved = True
    while moved:  # a step may free bits, and then layers that had no step that fits have one
        moved = False
        waiting: list[tuple[float, int, Option]] = []

        def offer(index: int, rest: int, waiting: list[tuple[float, int, Option]]) -> None:
            step = curves[index].best_step(current[index], beyond[index], rest)
            if step is not None:
                heapq.heappush(waiting, (-step[0], index, step[1]))

        for index in range(len(curves)):
            offer(index, rest, waiting)
        while waiting:
            _, index, option = heapq.heappop(waiting)
            growth = option.size - current[index].size
            if growth <= rest:
                current[index], rest, moved = option, rest - growth, True
            offer(index, rest, waiting)
    return current
