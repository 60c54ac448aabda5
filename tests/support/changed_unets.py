"""Ways to change a model that neither its configuration nor its tensors tell of."""

import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpqdm_fx.capture.trace import same_bits
from mpqdm_fx.errors import ArtifactError, TraceError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.model.quantized import Quantization, QuantizedModel
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.passes.quantize.round_weights import RoundWeights
from mpqdm_fx.records.activations import placeholder_activations
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import BitPlan, LayerPlan
from mpqdm_fx.records.report import QuantizationReport


def rounded_model(model: nn.Module, example: Mapping[str, Any]) -> QuantizedModel:
    """Quantize to four bits by rounding alone: what saving and loading sees, in little time."""
    graph_module = normalized(model, example, MPQConfig())
    layers = weight_layers(graph_module)
    plan = BitPlan(
        layers=tuple(
            LayerPlan(
                name=name,
                kind=type(layer.module).__name__,
                shape=tuple(layer.weight.shape),
                bits=(4,) * layer.weight.shape[0],
            )
            for name, layer in layers.items()
        )
    )
    quantization = Quantization(
        plan=plan,
        ranges=placeholder_activations(dict.fromkeys(layers, 8), "dynamic"),
        settings=MPQConfig(activation_mode="dynamic"),
        report=QuantizationReport(layers=(), calibration_calls=0, seconds=0.0, versions={}),
        config=getattr(model, "config", None),
    )
    return QuantizedModel(RoundWeights(plan=plan)(graph_module).graph_module, quantization)


def returned(quantized: QuantizedModel) -> Any:
    """Outputs of the fake-quantized graph on seeded inputs of the traced shapes."""
    with torch.no_grad():
        return quantized.graph_module(**example_inputs(quantized.signature, seed=3))


def assert_same_or_refused(model: nn.Module, example: Mapping[str, Any], folder: Path) -> bool:
    """Save and load; return whether that was done and not refused."""
    try:
        quantized = rounded_model(model, example)
        save(quantized, folder)
    except (ArtifactError, TraceError) as error:
        refusal = str(error)
    else:
        assert same_bits(returned(load(folder)), returned(quantized))
        return True
    assert len(refusal) > 40
    assert not folder.exists()
    return False


def _each(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def circular_padding(model: nn.Module) -> None:
    for conv in _each(model, nn.Conv2d):
        conv.padding_mode = "circular"


def own_convolution(model: nn.Module) -> None:
    """As scripts for seamless textures do: wrap one axis."""

    def forward(self: nn.Conv2d, x: Any, weight: Any, bias: Any) -> Any:
        pad = self._reversed_padding_repeated_twice
        x = nn.functional.pad(x, (pad[0], pad[1], 0, 0), mode="circular")
        x = nn.functional.pad(x, (0, 0, pad[2], pad[3]))
        return nn.functional.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    for conv in _each(model, nn.Conv2d)[:3]:
        conv._conv_forward = types.MethodType(forward, conv)


def output_scale(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "output_scale_factor"):
            module.output_scale_factor = 1.7


def other_activation(model: nn.Module) -> None:
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.SiLU | nn.Mish):
                setattr(module, name, nn.Softplus(beta=1.5))


def own_activation(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "nonlinearity"):
            del module.nonlinearity  # a child module: torch takes no function in its place
            module.nonlinearity = lambda x: x * torch.sigmoid(1.3 * x)


def norm_epsilon(model: nn.Module) -> None:
    for norm in _each(model, nn.GroupNorm):
        norm.eps = 0.1


def norm_groups(model: nn.Module) -> None:
    for norm in _each(model, nn.GroupNorm):
        norm.num_groups = 1


def output_hook(model: nn.Module) -> None:
    _each(model, nn.Linear)[0].register_forward_hook(lambda module, args, output: 1.25 * output)


def own_forward(model: nn.Module) -> None:
    layer = _each(model, nn.Linear)[-1]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) * 0.5


def replaced_layer(model: nn.Module) -> None:
    """A stock layer that the configuration does not have: a gain in front of the time branch."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.SiLU):
                setattr(module, name, nn.Sequential(nn.LeakyReLU(0.3), child))


CHANGES: tuple[Callable[[nn.Module], None], ...] = (
    circular_padding,
    own_convolution,
    output_scale,
    other_activation,
    own_activation,
    norm_epsilon,
    norm_groups,
    output_hook,
    own_forward,
    replaced_layer,
)

REFUSED = frozenset({"own_convolution", "own_forward", "output_hook"})
"""What runs code of the model's own, which may be refused; the others have to load."""
