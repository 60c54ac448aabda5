"""A noise level that all samples of a call share: its layers read one row a call, and use them all.

Models told a sigma as one number (Karras et al. 2022) embed it once for the whole batch.
"""

import torch
from torch import Tensor, nn

from mpqdm_fx.api import quantize
from mpqdm_fx.records.config import MPQConfig


class Preconditioned(nn.Module):
    """Its output weighs noise levels unevenly, as that of Karras' denoiser does."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Linear(2, 4)
        self.inner, self.last = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        scale = 1 / (1 + sigma**2).sqrt()
        angle = sigma.flatten()[:, None].log()
        level = self.level(torch.cat([angle.sin(), angle.cos()], dim=1))
        return sigma * scale * self.last(self.inner(x * scale) + level[:, :, None, None])


def test_no_call_is_left_out_where_its_samples_share_a_row() -> None:
    torch.manual_seed(0)
    levels = torch.logspace(1.9, -1.5, 12).repeat(2)
    calls = [{"x": torch.randn(4, 2, 3, 3) * (1 + s), "sigma": s.clone()} for s in levels]
    quantized = quantize(Preconditioned(), MPQConfig(judge=False), calls)
    rows = {layer.name: layer.rows for layer in quantized.report.layers}
    # two thirds of the calls fit, the others judge
    assert rows == {"level": 16, "inner": 16 * 4 * 9, "last": 16 * 4 * 9}
