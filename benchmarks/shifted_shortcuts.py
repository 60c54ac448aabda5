"""A UNet whose shortcuts read (x - m) / s: what `distill.py` compares as `+shift`.

An unpadded 1x1 convolution of W and b is, in float, the same on (x - m) / s with W diag(s) and
b + W m. One range for all channels then has less to hold (decision 45 says what that brings).
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["with_shifts"]


class _Shifted(nn.Module):
    """A 1x1 convolution behind a shift and a factor for each channel.

    Args:
        convolution: The one that reads x.
        shift: m, float32 [C].
        factor: s, positive, float32 [C].
    """

    def __init__(self, convolution: nn.Conv2d, shift: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.convolution = copy.deepcopy(convolution)
        weight, bias = convolution.weight.detach(), convolution.bias
        assert bias is not None
        with torch.no_grad():
            self.convolution.weight.copy_(weight * factor[:, None, None])
            self.convolution.bias.copy_(bias + weight.flatten(1) @ shift)
        self.register_buffer("shift", shift[:, None, None])
        self.register_buffer("inverse", 1 / factor[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """The convolution's output."""
        result: Tensor = self.convolution((x - self.shift) * self.inverse)
        return result


@torch.no_grad()
def with_shifts(unet: nn.Module, calls: Iterable[Mapping[str, Any]]) -> nn.Module:
    """A copy whose shortcuts are shifted by the means of their inputs.

    Args:
        unet: The float model; it is not changed.
        calls: Keyword arguments that tell means, and the largest distances from them: the factors.
    """
    result = copy.deepcopy(unet)
    seen: dict[str, list[Tensor]] = {}
    names = [name for name, _ in result.named_modules() if name.endswith("conv_shortcut")]
    for name in names:
        result.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(
                inputs[0].transpose(0, 1).flatten(1)
            )
        )
    for call in calls:
        result(**call)
    for name in names:
        values = torch.cat(seen[name], dim=1)
        shift = values.mean(dim=1)
        factor = (values - shift[:, None]).abs().amax(dim=1).clamp_min(1e-6)
        parent, _, last = name.rpartition(".")
        setattr(
            result.get_submodule(parent), last, _Shifted(unet.get_submodule(name), shift, factor)
        )
    return result
