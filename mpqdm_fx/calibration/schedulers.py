"""Refuse schedulers whose numbers cannot be those of a noise schedule."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.nested import named_leaves

__all__ = ["check_scheduler", "check_scheduler_config"]

_MOST_STEPS = 100_000
_LARGEST = 1e6

#: Smallest and largest value of fields that have narrower ones than all numbers.
_RANGES: Mapping[str, tuple[float, float]] = {
    "num_train_timesteps": (1, _MOST_STEPS),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "trained_betas": (0, 1),
    "solver_order": (1, 3),
    "steps_offset": (0, _MOST_STEPS),
    "original_inference_steps": (1, _MOST_STEPS),
    "sigma_min": (0, _LARGEST),
    "sigma_max": (0, _LARGEST),
    "sigma_data": (0, _LARGEST),
    "rho": (0, _LARGEST),
    "clip_sample_range": (0, _LARGEST),
    "sample_max_value": (0, _LARGEST),
    "dynamic_thresholding_ratio": (0, 1),
    "lambda_min_clipped": (-math.inf, _LARGEST),
}

#: What a scheduler computes from its settings; other tables may have NaN in places nobody reads.
_TABLES = ("betas", "alphas", "alphas_cumprod", "sigmas", "timesteps")


def check_scheduler_config(config: Mapping[str, Any], place: str) -> None:
    """Refuse numbers that are not finite, negative counts, and sizes that no schedule has.

    Args:
        config: Settings of a diffusers scheduler.
        place: Where they are from, for the message.

    Raises:
        CalibrationError: A number is out of its range; names it.
    """
    for name, value in named_leaves(config):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        field = name.partition(".")[0]
        low, high = _RANGES.get(field, (-_LARGEST, _LARGEST))
        if not low <= value <= high:  # NaN lies in no range
            raise CalibrationError(
                f"{place}: {name} is {str(value)[:40]}; it must be a number from {low:g} to "
                f"{high:g}"
            )
    betas = config.get("trained_betas")
    if isinstance(betas, list | tuple) and len(betas) > _MOST_STEPS:
        raise CalibrationError(
            f"{place}: trained_betas has {len(betas)} entries; at most {_MOST_STEPS} are read"
        )


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose settings or tables are not those of a noise schedule.

    Args:
        scheduler: A diffusers scheduler, before or after `set_timesteps`.

    Raises:
        CalibrationError: A setting is out of range, or a table holds NaN; names it.
    """
    place = type(scheduler).__name__
    check_scheduler_config(dict(getattr(scheduler, "config", {})), place)
    for name in _TABLES:
        table = getattr(scheduler, name, None)
        if isinstance(table, Tensor) and table.is_floating_point() and bool(table.isnan().any()):
            first = int(torch.nonzero(table.isnan().flatten())[0])
            raise CalibrationError(
                f"{place}: {name} holds NaN (first at index {first}); check the betas of its config"
            )
