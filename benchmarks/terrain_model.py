"""A model that nobody here trained: a UNet of terrain heights, rebuilt from a public package.

adaptive-terrain-diffusion 0.4.2 (MIT) ships the weights as ONNX: a consistency model (Song et al.
2023) of 10.5 M parameters that makes a 128x128 height map in one call. Its network is of guided
diffusion's family (Dhariwal and Nichol 2021): residual blocks with scale and shift, resampling
inside blocks, attention over all pixels. It is told a float sigma, 80 to 0.002, and a difficulty in
0..1, and preconditioned (Karras et al. 2022). No class of diffusers. The module here returns what
the ONNX file returns, to 2.4e-6.

    mpqdm-fx quantize benchmarks/terrain_model.py:model --inputs benchmarks/terrain_model.py:calls

Reading the file takes the package `onnx`.
"""

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SIGMAS", "Renoising", "TerrainUNet", "calls", "calls_along", "load_terrain", "model"]

SIGMAS = (80.0, 20.0, 5.0, 1.0, 0.3)
"""Noise levels at which the model is calibrated and measured."""

PACKAGE, VERSION = "adaptive-terrain-diffusion", "0.4.2"
SIZE = 128

_WEIGHTS = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
_SIGMA_MIN, _SIGMA_DATA = 0.002, 0.5
_WIDTH, _EMBEDDING, _GROUPS = 32, 128, 32
_MULTIPLIERS, _BLOCKS, _ATTENTION_FROM = (1, 1, 2, 3, 4), 4, 2  # attention from that level on


class ResidualBlock(nn.Module):
    """Two convolutions, resampled before the first, scaled and shifted by the embedding."""

    def __init__(self, channels: int, out_channels: int, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.resample = nn.Identity() if resample is None else resample
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(_EMBEDDING, 2 * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps [B, C, H, W] and the embedding [B, 128] to [B, C', H', W']."""
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        norm, act, dropout, conv = self.out_layers
        h = conv(dropout(act(norm(h) * (1 + scale) + shift)))
        return self.skip_connection(self.resample(x)) + h


class Attention(nn.Module):
    """Self-attention over all pixels, heads of 32 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32)
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to the same."""
        batch, channels, height, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(batch, 3 * channels, height * width).chunk(3, dim=1)
        depth = channels // self.heads
        scale = 1 / math.sqrt(math.sqrt(depth))
        queries, keys, values = (
            part.reshape(batch * self.heads, depth, height * width)
            for part in (parts[0] * scale, parts[1] * scale, parts[2])
        )
        weights = torch.softmax(torch.einsum("bct,bcs->bts", queries, keys), dim=-1)
        mixed = torch.einsum("bts,bcs->bct", weights, values)
        return x + self.proj_out(mixed.reshape(batch, channels, height, width))


class TerrainUNet(nn.Module):
    """The network with its preconditioning: predicts the clean heights."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = _two_layers(_WIDTH)
        self.label_emb = _two_layers(1)
        self.register_buffer("frequencies", torch.zeros(_WIDTH // 2))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(1, _WIDTH, 3, padding=1)])])
        channels, skips = _WIDTH, [_WIDTH]
        for level, multiplier in enumerate(_MULTIPLIERS):
            for _ in range(_BLOCKS):
                self.input_blocks.append(_block(channels, multiplier * _WIDTH, level))
                channels = multiplier * _WIDTH
                skips.append(channels)
            if level < len(_MULTIPLIERS) - 1:
                halved = ResidualBlock(channels, channels, nn.AvgPool2d(2))
                self.input_blocks.append(nn.ModuleList([halved]))
                skips.append(channels)
        self.middle_block = nn.ModuleList(
            [
                ResidualBlock(channels, channels),
                Attention(channels),
                ResidualBlock(channels, channels),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed([*enumerate(_MULTIPLIERS)]):
            for index in range(_BLOCKS + 1):
                block = _block(channels + skips.pop(), multiplier * _WIDTH, level)
                channels = multiplier * _WIDTH
                if level and index == _BLOCKS:
                    doubled = nn.Upsample(scale_factor=2, mode="nearest")
                    block.append(ResidualBlock(channels, channels, doubled))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1)
        )

    def forward(self, noisy: Tensor, sigma: Tensor, difficulty: Tensor) -> Tensor:
        """Predict clean heights.

        Args:
            noisy: [B, 1, 128, 128], heights of about unit range and noise of `sigma`.
            sigma: [B], standard deviation of the noise.
            difficulty: [B], 0..1.

        Returns:
            [B, 1, 128, 128], in -1..1.
        """
        total = sigma**2 + _SIGMA_DATA**2
        skip = _SIGMA_DATA**2 / ((sigma - _SIGMA_MIN) ** 2 + _SIGMA_DATA**2)
        scale = _SIGMA_DATA * (sigma - _SIGMA_MIN) / total.sqrt()
        angles = (sigma.log() * 250.0)[:, None] * self.frequencies[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding = self.time_embed(waves) + self.label_emb(difficulty[:, None])
        h = (1 / total.sqrt())[:, None, None, None] * noisy
        skips = []
        for block in self.input_blocks:
            h = _run(block, h, embedding)
            skips.append(h)
        h = _run(self.middle_block, h, embedding)
        for block in self.output_blocks:
            h = _run(block, torch.cat([h, skips.pop()], dim=1), embedding)
        heights = scale[:, None, None, None] * self.out(h) + skip[:, None, None, None] * noisy
        return heights.clamp(-1, 1)


def _two_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, _EMBEDDING), nn.SiLU(), nn.Linear(_EMBEDDING, _EMBEDDING))


def _block(channels: int, out_channels: int, level: int) -> nn.ModuleList:
    layers: list[nn.Module] = [ResidualBlock(channels, out_channels)]
    if level >= _ATTENTION_FROM:
        layers.append(Attention(out_channels))
    return nn.ModuleList(layers)


def _run(block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
    for layer in block:  # type: ignore[attr-defined]
        h = layer(h, embedding) if isinstance(layer, ResidualBlock) else layer(h)
    return h


def load_terrain(path: str | Path | None = None) -> TerrainUNet:
    """The network with the package's weights, in evaluation mode.

    Args:
        path: The ONNX file; None takes that of the installed package, else downloads its wheel.
    """
    import onnx
    from onnx import numpy_helper

    if path is None:
        installed = installed_weights()
        if installed is None:
            with tempfile.TemporaryDirectory() as folder:
                return load_terrain(download(Path(folder)))
        path = installed
    graph = onnx.load(path).graph
    stored = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    network = TerrainUNet()
    state = {
        name: stored[f"network.{name}"]
        for name in network.state_dict()
        if f"network.{name}" in stored
    }
    # a block's modules are registered in the order in which they run
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)]
    for name, (weight, bias) in zip(norms, _norms_of(graph, stored), strict=True):
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias
    state["frequencies"] = _frequencies_of(graph, stored)
    network.load_state_dict(state)
    return network.eval()


def _norms_of(graph: Any, stored: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of every group norm in running order.

    The exporter wrote each as InstanceNormalization, Reshape, Mul and Add.
    """

    def next_of(kind: str, name: str) -> tuple[Any, str]:
        node = next(n for n in graph.node if n.op_type == kind and name in n.input)
        return node, next((argument for argument in node.input if argument != name), "")

    norms = []
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            reshaped, _ = next_of("Reshape", node.output[0])
            scaled, weight = next_of("Mul", reshaped.output[0])
            _, bias = next_of("Add", scaled.output[0])
            norms.append((stored[weight].flatten(), stored[bias].flatten()))
    return norms


def _frequencies_of(graph: Any, stored: Mapping[str, Tensor]) -> Tensor:
    """The frequencies of the embedding: the constant in front of the first cosine."""
    cosine = next(node for node in graph.node if node.op_type == "Cos")
    product = next(node for node in graph.node if cosine.input[0] in node.output)
    return next(stored[name] for name in product.input if name in stored).flatten()


def installed_weights() -> Path | None:
    """The ONNX file of the installed package, or None; the package is not imported."""
    spec = importlib.util.find_spec("terrain_diffusion")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parents[1] / _WEIGHTS


def download(folder: Path) -> Path:
    """Download the package's wheel with pip and unpack its ONNX file (42 MB).

    Args:
        folder: Where to.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(_WEIGHTS, folder))


class Renoising:
    """A sampling loop: one call at the largest sigma; noise again, and a call, at each further one.

    Args:
        sigmas: Noise levels, largest first; the default first one alone makes a terrain.
    """

    def __init__(self, sigmas: Sequence[float] = SIGMAS[:1]) -> None:
        self.sigmas = sigmas

    def sample(
        self,
        model: Callable[..., Tensor],
        noise: Tensor,
        conditions: Mapping[str, Any],
        generator: torch.Generator,
    ) -> Tensor:
        """Heights [N, 1, 128, 128]; see `mpqdm_fx.calibration.samplers.Sampler`."""
        noisy, heights = noise * self.sigmas[0], noise
        for index, sigma in enumerate(self.sigmas):
            if index:
                noisy = heights + sigma * torch.randn(noise.shape, generator=generator)
            heights = model(noisy=noisy, sigma=torch.full((len(noise),), sigma), **conditions)
        return heights


@torch.no_grad()
def calls_along(
    network: nn.Module, count: int, seed: int, batch: int = 2
) -> list[dict[str, Tensor]]:
    """Inputs at all noise levels: noise, then noise on top of the terrains that are made of it.

    Args:
        network: The float model.
        count: Batches of terrains; each gives a call at every sigma of `SIGMAS`.
        seed: Of the noise and the difficulties.
        batch: Rows in a call.

    Returns:
        `count` times five calls.
    """
    generator = torch.Generator().manual_seed(seed)
    calls: list[dict[str, Tensor]] = []
    for _ in range(count):
        difficulty = torch.randint(0, 100, (batch,), generator=generator).float() / 99
        noisy = torch.randn(batch, 1, SIZE, SIZE, generator=generator) * SIGMAS[0]
        sigma = torch.full((batch,), SIGMAS[0])
        calls.append({"noisy": noisy, "sigma": sigma, "difficulty": difficulty})
        heights = network(**calls[-1])
        for level in SIGMAS[1:]:
            noisy = heights + level * torch.randn(heights.shape, generator=generator)
            sigma = torch.full((batch,), level)
            calls.append({"noisy": noisy, "sigma": sigma, "difficulty": difficulty})
    return calls


def model() -> TerrainUNet:
    """For the command line's MODEL; `TERRAIN_ONNX` may say where the file is."""
    return load_terrain(os.environ.get("TERRAIN_ONNX"))


def calls() -> list[dict[str, Tensor]]:
    """For the command line's `--inputs`: 15 calls of two terrains."""
    return calls_along(model(), 3, seed=1)
