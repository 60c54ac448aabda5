"""Sensitivities of grouped layers, whose rows are parted by group."""

import pytest
import torch
from torch import nn

from mpqdm_fx.bits.sensitivity import measure_sensitivity
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.records.config import MPQConfig


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_layer_with_a_bias_has_sensitivities(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=groups), nn.Conv2d(4, 2, 1))
    calls = [{"input": torch.randn(2, 4, 5, 5)} for _ in range(4)]
    graph = normalized(model, calls[0], MPQConfig())
    table = measure_sensitivity(graph, calls)
    (grouped, _) = table.layers
    # wider channels err less
    assert bool((grouped.uniform.diff(dim=1) < 0).all())
