"""The cheapest way to sort things into two groups: a minimum cut (Edmonds and Karp 1972)."""

from collections import deque
from collections.abc import Hashable

__all__ = ["SOURCE", "TARGET", "MinimumCut"]

SOURCE, TARGET = "source", "target"
"""The two things whose groups are given."""


class MinimumCut:
    """Things that are to be sorted into the group of `SOURCE` and that of `TARGET`.

    An edge costs its weight if it leads from the first group to the second. Among the cheapest
    ways, `solve` takes the one with the fewest things in the group of `SOURCE`.
    """

    def __init__(self) -> None:
        self._left: dict[Hashable, dict[Hashable, float]] = {SOURCE: {}, TARGET: {}}

    def add(self, start: Hashable, end: Hashable, weight: float) -> None:
        """Add an edge; weights of edges with the same ends add up.

        Args:
            start: Where it leads from.
            end: Where it leads to.
            weight: What it costs, 0 or more; infinity for what must not be.
        """
        forward = self._left.setdefault(start, {})
        forward[end] = forward.get(end, 0.0) + weight
        self._left.setdefault(end, {}).setdefault(start, 0.0)

    def solve(self) -> set[Hashable]:
        """The group of `SOURCE`, for least cost. Edges are used up: solve once."""
        while True:
            before = self._reached()
            if TARGET not in before:
                return set(before)
            path = [TARGET]
            while path[-1] != SOURCE:
                path.append(before[path[-1]])  # type: ignore[arg-type]
            steps = list(zip(path[1:], path[:-1], strict=True))
            amount = min(self._left[start][end] for start, end in steps)
            for start, end in steps:
                self._left[start][end] -= amount
                self._left[end][start] += amount

    def _reached(self) -> dict[Hashable, Hashable]:
        """Everything that unused edges lead to, with the step before, up to `TARGET`."""
        before: dict[Hashable, Hashable] = {SOURCE: SOURCE}
        waiting: deque[Hashable] = deque([SOURCE])
        while waiting:
            start = waiting.popleft()
            for end, left in self._left[start].items():
                if left > 0 and end not in before:
                    before[end] = start
                    if end == TARGET:
                        return before
                    waiting.append(end)
        return before
