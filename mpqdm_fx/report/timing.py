"""Times of calls."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["milliseconds_by_round", "time_per_step"]


def time_per_step(
    models: Mapping[str, Callable[..., Any]], inputs: Mapping[str, Any], *, rounds: int = 21
) -> dict[str, float]:
    """Median milliseconds of one call of each model, interleaved, after a warm-up call each.

    Args:
        models: Callables by name.
        inputs: Keyword arguments of the call.
        rounds: Timed calls of each.
    """
    times = milliseconds_by_round(models, inputs, rounds=rounds)
    return {name: statistics.median(values) for name, values in times.items()}


def milliseconds_by_round(
    models: Mapping[str, Callable[..., Any]], inputs: Mapping[str, Any], *, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every timed call of each model, as `time_per_step` times them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for index in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(**inputs)
                if index:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times
