"""Parameter groups with rates that fit their scales."""

from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.student import Student
from mpqdm_fx.distill.trainable import TrainableLayer
from mpqdm_fx.distill.trainable_ranges import TrainableLevels
from mpqdm_fx.errors import ConfigError

__all__ = ["level_distance", "make_optimiser", "set_progress"]

_WARM_UP = 0.02
_ZERO_POINT_FACTOR = 16.0
_EPS = 1e-12  # gradients of steps can be tiny; Adam's usual 1e-8 would damp them


def level_distance(layer: TrainableLayer) -> float:
    """Mean distance between neighbouring levels of a layer, in units of its weights."""
    gap = torch.where(layer.bits == 8, 1.0, 2.0)
    if len(layer.table_rows):
        table = layer.levels.detach()
        gaps = layer.table_places[:, -1].clamp_min(1)
        spread = (table[:, -1] - table[:, 0]) / gaps
        gap = gap.index_copy(0, layer.table_rows, spread.clamp_min(1.0))
    return float((gap * layer.start_scale).mean())


def make_optimiser(student: Student, config: DistillConfig) -> torch.optim.Optimizer:
    """Adam with a group for each kind of parameter of each layer; nothing decays.

    A change of the weight matters when it crosses a rounding boundary, so factors move in units of
    the distance between levels (EfficientDM's scale-aware rates; under Adam the rate is scaled, not
    the gradient).

    Raises:
        ConfigError: No part has a rate.
    """
    groups: list[dict[str, Any]] = []

    def add(rate: float, parameters: list[Tensor]) -> None:
        trained = [p for p in parameters if p.requires_grad]
        if trained and rate > 0:
            groups.append({"params": trained, "lr": rate, "base_rate": rate})

    for layer in student.layers.values():
        if layer.rank:
            # `up` starts at zero, and `down` at about 1 over the square root of the row's length
            add(config.weight_rate * level_distance(layer), [layer.up, layer.down])
        size = float(layer.start_scale.mean()) if config.absolute_rates else 1.0
        add(config.scale_rate / size, [layer.log_scale])
        add(config.level_rate, [layer.levels])
        if layer.bias is not None:
            size = float(layer.bias.detach().square().mean().sqrt())
            add(config.bias_rate * max(size, 1e-3), [layer.bias])
    for activation in student.ranges.values():
        size = float(activation.start_scale.mean()) if config.absolute_rates else 1.0
        add(config.range_rate / size, [activation.log_scale])
        codes = 1.0 if config.absolute_rates else _ZERO_POINT_FACTOR
        if isinstance(activation, TrainableLevels):
            add(config.range_rate * codes * activation.gap, [activation.levels])
        else:
            add(config.range_rate * codes, [activation.shift])
    if not groups:
        raise ConfigError("nothing is trained: give a rate above 0 for a part that the model has")
    return torch.optim.Adam(groups, eps=_EPS)


def set_progress(optimiser: torch.optim.Optimizer, progress: float) -> None:
    """Set the rates for a share of the run, 0 to 1: a short rise, then linearly to 0."""
    factor = min(1.0, progress / _WARM_UP + 0.05) * max(0.0, 1.0 - progress)
    for group in optimiser.param_groups:
        group["lr"] = group["base_rate"] * factor
