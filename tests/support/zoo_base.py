"""The parts of the model zoo: what a case is, and how its inputs are made."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model: how to build it, and keyword arguments for a batch size and a timestep."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        randomize(model)
        return model


def randomize(model: nn.Module) -> None:
    """Replace constant parameters (zero-initialised projections, unit norms) by random ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def class_ids(batch: int) -> torch.Tensor:
    return torch.arange(batch) % 4
