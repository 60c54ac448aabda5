"""Small nets in the rounded dialect, and ranges for them: what the doors start from."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.editing import copy_graph_module, replace_module
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.activations import ActivationRange, StaticActivation


class Residual(nn.Module):
    """The traps of a UNet in one: residual, skip concat, norm, direct conv-conv, H != W != C."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.act = nn.SiLU()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=2)
        self.shortcut = nn.Conv2d(channels, channels, 1)
        self.conv_out = nn.Conv2d(2 * channels, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        y = h + self.conv1(self.act(self.norm(h)))
        d = self.down(y)
        d = self.shortcut(d) + d
        u = nn.functional.interpolate(d, scale_factor=2.0, mode="nearest")
        return self.conv_out(torch.cat([u, h], dim=1))

    @staticmethod
    def inputs(batch: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, 3, 12, 20, generator=torch.Generator().manual_seed(1))}


class Attention(nn.Module):
    """Shared input of three projections, a layer called twice, 4-D to 3-D and back."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        t = h.flatten(2).transpose(1, 2)
        q, k, v = self.to_q(t), self.to_k(t), self.to_v(t)
        a = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        a = self.to_out(self.to_out(a))
        return h + a.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))

    @staticmethod
    def inputs(batch: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, 3, 4, 6, generator=torch.Generator().manual_seed(2))}


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(x)))

    @staticmethod
    def inputs(batch: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, 6, generator=torch.Generator().manual_seed(5))}


def round_to_grid(graph: fx.GraphModule, bits: int | Mapping[str, int] = 8) -> fx.GraphModule:
    """Put every weight on a grid: odd integers for narrow widths, -127..127 for 8 bits."""
    graph = copy_graph_module(graph)
    for name, layer in weight_layers(graph).items():
        width = bits if isinstance(bits, int) else bits[name]
        top = 127 if width == 8 else 2**width - 1
        weight = layer.module.weight.detach()
        rows = weight.flatten(1)
        scale = (rows.abs().amax(1) / top).clamp(min=1e-30).to(torch.bfloat16).float()
        codes = rows / scale[:, None]
        codes = codes.round() if width == 8 else 2 * ((codes - 1) / 2).round() + 1
        codes = codes.clamp(-top, top).to(torch.int8).reshape(weight.shape)
        replace_module(graph, name, install_codes(layer.module, codes, scale))
    return graph


def measured_ranges(
    graph: fx.GraphModule, inputs: dict[str, Tensor], bits: int = 8
) -> dict[str, StaticActivation]:
    """Minimum and maximum of each layer's input and output on one call."""
    layers = weight_layers(graph)
    names = {node: name for name, layer in layers.items() for node in layer.nodes}
    records: dict[tuple[str, str], list[Tensor]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n in names:
                records.setdefault((names[n], "input"), []).append(self.env[n.args[0]].flatten())
                records.setdefault((names[n], "output"), []).append(result.flatten())
            return result

    with torch.no_grad():
        Recorder(graph).run(*inputs.values())

    def fit(values: list[Tensor]) -> ActivationRange:
        low = min(0.0, float(torch.cat(values).min()))
        high = max(0.0, float(torch.cat(values).max()))
        scale = max(high - low, 1e-6) / (2**bits - 1)
        zero_point = round(-low / scale) - 2 ** (bits - 1)
        return ActivationRange(scale=scale, zero_point=zero_point, bits=bits)

    return {
        name: StaticActivation(
            input=fit(records[name, "input"]), output=fit(records[name, "output"])
        )
        for name in layers
    }


def rounded(
    net: nn.Module, bits: int = 8, seed: int = 0
) -> tuple[fx.GraphModule, dict[str, StaticActivation], dict[str, Tensor]]:
    """Traced and rounded net, its ranges, and inputs, all reproducible."""
    torch.manual_seed(seed)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    inputs = net.inputs()
    graph = round_to_grid(trace(net.eval(), inputs), bits)
    return graph, measured_ranges(graph, inputs), inputs


class SharedOutput(nn.Module):
    """Smallest net whose dequantized conv output is read by an int8 sum and by a float product."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        # XNNPACK has no round: the product is in another part of the program than the convolutions
        return torch.round(self.conv3(h + self.conv2(h)) * 16) * h

    @staticmethod
    def inputs(batch: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, 16, 16, 24, generator=torch.Generator().manual_seed(3))}


class MovedOutput(nn.Module):
    """An int8 value that is moved, then quantized with other parameters for the next layer."""

    def __init__(self, move: str) -> None:
        super().__init__()
        self.move = move
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        channels = {"cat": 16, "permute": 8, "view": 60}.get(move, 8)
        layer = nn.Linear if move in ("permute", "view") else nn.Conv2d
        self.after = layer(channels, 5, *(() if layer is nn.Linear else (1,)))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        moved = {
            "cat": lambda: torch.cat([a, self.b(x)], dim=1),
            "slice": lambda: a[:, :, 1:, :],
            "relu": lambda: torch.relu(a),
            "clamp": lambda: a.clamp(-0.3, 0.5),
            "permute": lambda: a.permute(0, 2, 3, 1),
            "view": lambda: a.flatten(2),
        }
        return self.after(moved[self.move]())

    @staticmethod
    def inputs(batch: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, 3, 6, 10, generator=torch.Generator().manual_seed(4))}


def widen_inputs(
    ranges: dict[str, StaticActivation], names: tuple[str, ...]
) -> dict[str, StaticActivation]:
    """The same ranges with wider inputs of some layers, so that no two scales agree by chance."""
    result = dict(ranges)
    for name in names:
        old = ranges[name].input
        wide = ActivationRange(scale=1.3 * old.scale, zero_point=old.zero_point)
        result[name] = StaticActivation(input=wide, output=ranges[name].output)
    return result
