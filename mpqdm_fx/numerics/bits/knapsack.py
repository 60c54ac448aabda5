"""One option for each of many items, under a budget: the multiple-choice knapsack, by tables."""

from collections.abc import Sequence

import torch

from mpqdm_fx.errors import ConfigError

__all__ = ["choose_options"]

_UNITS = 20_000  # parts of the budget that uses are rounded up to


def choose_options(
    costs: Sequence[Sequence[float]], uses: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """Choose an option of every item so that the costs' sum is least and the uses' in the budget.

    Dynamic programming over the budget in 20,000 parts (Kellerer, Pferschy and Pisinger, Knapsack
    Problems, 2004, section 11.5): exact but for rounding each use up to a whole part. Greedy ratios
    are not good enough here: one item may hold half of all cost and half of the budget.

    Args:
        costs: Cost of each option of each item, finite, not negative.
        uses: What it takes of the budget, finite, not negative; the same shape. Every item has an
            option that takes nothing.
        budget: What may be taken in all, not negative.

    Returns:
        Index of the chosen option of each item.

    Raises:
        ConfigError: Shapes differ, a number is out of range, or an item has no option for free.
    """
    _check(costs, uses, budget)
    parts = [
        [-(-use * _UNITS // budget) if budget else (0.0 if use == 0 else _UNITS + 1) for use in row]
        for row in uses
    ]
    least = torch.zeros(_UNITS + 1, dtype=torch.float64)
    tables = []
    for row, weights in zip(costs, parts, strict=True):
        options = torch.full((len(row), _UNITS + 1), torch.inf, dtype=torch.float64)
        for index, (cost, part) in enumerate(zip(row, weights, strict=True)):
            if part <= _UNITS:
                options[index, int(part) :] = least[: _UNITS + 1 - int(part)] + cost
        least, best = options.min(dim=0)
        tables.append(best.to(torch.int16))
    chosen = []
    capacity = _UNITS
    for table, weights in zip(reversed(tables), reversed(parts), strict=True):
        option = int(table[capacity])
        chosen.append(option)
        capacity -= int(weights[option])
    return chosen[::-1]


def _check(
    costs: Sequence[Sequence[float]], uses: Sequence[Sequence[float]], budget: float
) -> None:
    if [len(row) for row in costs] != [len(row) for row in uses]:
        raise ConfigError("every option needs a cost and a use")
    numbers = torch.tensor([x for rows in (costs, uses) for row in rows for x in row] + [budget])
    if not bool((numbers.isfinite() & (numbers >= 0)).all()):
        raise ConfigError("costs, uses and the budget are finite and not negative")
    for index, row in enumerate(uses):
        if not row or min(row) > 0:
            raise ConfigError(f"item {index} has no option that takes nothing of the budget")
