"""Ranges by noise level serve values whose rows follow one another sample by sample, and no others.

Rows of others would be rounded with the ranges of other samples' noise levels.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpqdm_fx.api import quantize
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.graph.quantizer_sites import follows_batch
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.records.config import MPQConfig

Way = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]


def own_rows(h: Tensor) -> Tensor:
    b, t, c = h.shape
    return h.reshape(b, t, 2, c // 2).permute(0, 2, 1, 3).reshape(2 * b, t, c // 2).repeat(1, 1, 2)


# into more rows, and back to those of the batch
FOLLOWING: dict[str, Way] = {
    "as it is": (lambda h: h, lambda h, b: h),
    "rows repeated": (lambda h: h.repeat_interleave(2, 0), lambda h, b: h[::2]),
    "pairs": (lambda h: torch.stack([h, -h], 1).flatten(0, 1), lambda h, b: h[::2]),
    "frames": (
        lambda h: h[:, None].expand(-1, 3, -1, -1).flatten(0, 1),
        lambda h, b: h.unflatten(0, (b, 3)).mean(1),
    ),
    "heads": (own_rows, lambda h, b: h[::2] + h[1::2]),
    "tokens": (lambda h: h.flatten(0, 1), lambda h, b: h.unflatten(0, (b, 5))),
}
OTHERS: dict[str, Way] = {
    "batch repeated": (lambda h: h.repeat(2, 1, 1), lambda h, b: h[:b] + h[b:]),
    "halves joined": (lambda h: torch.cat([h, -h]), lambda h, b: h[:b] - h[b:]),
    "halves stacked": (lambda h: torch.stack([h, -h]).flatten(0, 1), lambda h, b: h[:b] - h[b:]),
    "tokens first": (lambda h: h.transpose(0, 1), lambda h, b: h.transpose(0, 1)),
    "tokens folded first": (
        lambda h: h.transpose(0, 1).flatten(0, 1),
        lambda h, b: h.unflatten(0, (5, b)).transpose(0, 1),
    ),
}


class Moved(nn.Module):
    """Two layers between which and around which the rows are others."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.way = way

    def forward(self, sample: Tensor, sigma: Tensor) -> Tensor:
        h = self.first(sample) * (1 + sigma[:, None, None])
        into, back = self.way
        return self.last(h + back(self.b(torch.tanh(self.a(into(h)))), h.shape[0]))


def call(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0.1, 1.0, 10.0, 100.0])
    return {
        "sample": torch.randn(4, 5, 6, generator=generator),
        "sigma": levels[torch.randperm(4, generator=generator)],
    }


@pytest.mark.parametrize("name", [*FOLLOWING, *OTHERS])
def test_values_follow_the_batch_where_a_samples_rows_follow_one_another(name: str) -> None:
    torch.manual_seed(0)
    graph = normalized(Moved({**FOLLOWING, **OTHERS}[name]), call(0), MPQConfig())
    argument = find_noise_argument(graph)
    assert argument is not None
    for layer in ("a", "b"):
        (node,) = weight_layers(graph)[layer].nodes
        for value in (node, node.args[0]):
            assert follows_batch(value, argument) == (name in FOLLOWING)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rows repeated", "batch repeated", "halves stacked"])
def test_each_sample_is_rounded_as_it_is_alone(name: str) -> None:
    torch.manual_seed(0)
    calls = [call(seed) for seed in range(6)]
    config = MPQConfig(activation_mode="timestep", timestep_groups=4, judge=False)
    quantized = quantize(Moved({**FOLLOWING, **OTHERS}[name]), config, calls)
    together = quantized(**calls[0])
    for row in range(4):
        alone = quantized(**{key: value[row : row + 1] for key, value in calls[0].items()})
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-4)
