"""The trainable form of a quantized graph, and back."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.trainable import TrainableLayer, cell_base, row_tables
from mpqdm_fx.distill.trainable_ranges import (
    DynamicRange,
    TrainableLevels,
    TrainableRange,
    trainable_range,
)
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.editing import add_module, copy_graph_module, free_name, inherit_meta, prune
from mpqdm_fx.graph.layers import replace_module, weight_layers, weight_rows
from mpqdm_fx.graph.qdq import is_dequantize
from mpqdm_fx.graph.quantizer_sites import (
    QuantizerSite,
    quantizer_sites,
    read_activations,
    set_site_ranges,
    site_ranges,
)
from mpqdm_fx.graph.quantizers import DynamicQuantizer
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.records.report import QuantizationReport

__all__ = ["Student", "freeze", "make_student"]

_FOLDER = "trained_ranges"


class Student(nn.Module):
    """A quantized graph with trainable roundings.

    Attributes:
        graph_module: The graph; it computes what the quantized model computes, bit for bit, until
            it is trained.
        layers: Trainable layers by name.
        ranges: Trainable ranges by (layer, side); quantizers of one key share one.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        layers: Mapping[str, TrainableLayer],
        ranges: Mapping[tuple[str, str], TrainableRange | TrainableLevels],
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.layers = dict(layers)
        self.ranges = dict(ranges)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained, in a fixed order."""
        for name, layer in self.layers.items():
            for key, value in layer.named_parameters(recurse=False):
                if value.requires_grad:
                    yield f"{name}.{key}", value
        for (name, side), activation in self.ranges.items():
            for key, value in activation.named_parameters(recurse=False):
                yield f"{name}.{side}.{key}", value

    @contextlib.contextmanager
    def rounded_by(self, seed: int | None) -> Iterator[None]:
        """Round weights stochastically inside, by draws of a seed; None leaves nearest rounding."""
        for index, layer in enumerate(self.layers.values()):
            layer.draw = None if seed is None else seed + index
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.draw = None


def make_student(
    quantized: QuantizedModel, teacher: fx.GraphModule, config: DistillConfig
) -> Student:
    """Put trainable roundings where a quantized model has fixed ones.

    Entropy-coded layers train their steps and biases alone: their codes stay what they are.

    Args:
        quantized: The model to start from; it is not changed.
        teacher: The normalized float graph that it was quantized from: its weights.
        config: What is trained.

    Raises:
        ConfigError: The teacher has other layers than the quantized model.
    """
    graph_module = copy_graph_module(quantized.graph_module)
    ranges = _install_ranges(graph_module)
    generator = torch.Generator().manual_seed(config.seed)
    float_layers = weight_layers(teacher, embeddings=True)
    layers: dict[str, TrainableLayer] = {}
    for planned in quantized.plan.layers:
        source = float_layers.get(planned.name)
        if source is None or tuple(source.weight.shape) != planned.shape:
            raise ConfigError(
                f"{planned.name}: the float model has no such layer of shape {planned.shape}; give "
                f"the model that was quantized"
            )
        rounded = graph_module.get_submodule(planned.name)
        # entropy-coded weights keep their codes: others would take another number of bytes
        kind = config.base if planned.coded is None else "codes"
        base = _base(rounded, weight_rows(source.module), kind, planned)
        layers[planned.name] = TrainableLayer(
            rounded,
            planned,
            base,
            rank=config.rank if planned.coded is None else 0,
            train_levels=config.level_rate > 0,
            generator=generator,
        )
        replace_module(graph_module, planned.name, layers[planned.name])
    graph_module.recompile()
    return Student(graph_module, layers, ranges)


def _base(
    rounded: nn.Module, weight: torch.Tensor, kind: str, planned: LayerPlan
) -> torch.Tensor | None:
    codes, scale = rounded.weight_codes, rounded.weight_scale
    assert isinstance(codes, torch.Tensor)
    assert isinstance(scale, torch.Tensor)
    if kind == "float":
        return weight.float().clone()
    if kind == "codes":
        return None
    tables = row_tables(planned, rounded)
    return cell_base(codes.flatten(1), scale, weight, planned.bits_tensor(), tables)


def _install_ranges(
    graph_module: fx.GraphModule,
) -> dict[tuple[str, str], TrainableRange | TrainableLevels]:
    """Replace every activation quantizer, in place; those with one key share a module."""
    sites = list(quantizer_sites(graph_module).values())
    ranges: dict[tuple[str, str], TrainableRange | TrainableLevels] = {}
    for site in sites:
        if site.kind == "dynamic":
            module = graph_module.get_submodule(str(site.node.target))
            assert isinstance(module, DynamicQuantizer)
            replace_module(
                graph_module, str(site.node.target), DynamicRange(module.bits, module.axes)
            )
            continue
        fixed = site_ranges(graph_module, site.node)
        assert fixed is not None
        activation = ranges.setdefault(site.key, trainable_range(fixed))
        if site.node is site.result:
            replace_module(graph_module, str(site.node.target), activation)
        else:
            _replace_pair(graph_module, site, activation)
    graph_module.graph.lint()
    prune(graph_module)
    graph_module.recompile()
    return ranges


def _replace_pair(
    graph_module: fx.GraphModule, site: QuantizerSite, module: TrainableRange | TrainableLevels
) -> None:
    layer, side = site.key
    target = free_name(graph_module, f"{_FOLDER}.{layer.replace('.', '_')}_{side}")
    add_module(graph_module, target, module)
    value = site.node.args[0]  # `site.value` may be of a pair that has been replaced
    assert isinstance(value, fx.Node)
    with graph_module.graph.inserting_after(site.node):
        call = graph_module.graph.call_module(target, (value,))
    inherit_meta(call, value)
    for restored in [user for user in site.node.users if is_dequantize(user)]:
        restored.replace_all_uses_with(call)
        graph_module.graph.erase_node(restored)
    graph_module.graph.erase_node(site.node)


def freeze(student: Student, quantized: QuantizedModel) -> QuantizedModel:
    """The quantized model with what was trained; plan and sizes are those of `quantized`.

    Args:
        student: From `make_student(quantized, ...)`.
        quantized: The model that training started from; it is not changed.

    Returns:
        A model that computes what the student computes, bit for bit.
    """
    rounded = copy_graph_module(quantized.rounded)
    for name, layer in student.layers.items():
        trained = layer.frozen()
        module = install_codes(rounded.get_submodule(name), trained.codes, trained.scale)
        if trained.bias is not None:
            module.bias = nn.Parameter(trained.bias, requires_grad=False)
        replace_module(rounded, name, module)
    fitted = copy_graph_module(quantized.graph_module)
    for site in quantizer_sites(fitted).values():
        if site.kind == "dynamic":
            continue
        set_site_ranges(fitted, site.node, student.ranges[site.key].frozen())
    fitted.recompile()
    report = _without_errors(quantized.report)
    return quantized.with_graph(rounded, ranges=read_activations(fitted), report=report)


def _without_errors(report: QuantizationReport) -> QuantizationReport:
    """How layers were solved; their errors were those of other codes."""
    layers = tuple(
        dataclasses.replace(layer, sqnr_db=None, base_sqnr_db=None) for layer in report.layers
    )
    return dataclasses.replace(report, layers=layers)
