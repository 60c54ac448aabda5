"""A net that returns what few do: a mask with infinities, complex numbers, flags and indices."""

from typing import Any

import torch
from torch import Tensor, nn


class RareOutputs(nn.Module):
    """Three linear layers; 16 features in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.begin = nn.Linear(16, 32)
        self.body = nn.Linear(32, 32)
        self.end = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.body(self.begin(x).relu())
        image = self.end(hidden)
        return {
            "loss": None,
            "image": image,
            "mask": torch.where(torch.arange(32) > 16, float("-inf"), hidden),
            "wave": torch.view_as_complex(hidden.unflatten(-1, (16, 2))),
            "flags": hidden > 0,
            "best": image.argmax(-1),
            "mean": image.mean(),
        }


def rare_calls(calls: int = 4) -> list[dict[str, Tensor]]:
    """Inputs of a few calls."""
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 16, generator=generator)} for _ in range(calls)]
