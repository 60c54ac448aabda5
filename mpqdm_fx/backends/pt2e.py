"""PT2E: a torchao Quantizer that hands over a plan, and the conversion built on it."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.backends import ao
from mpqdm_fx.backends.observers import WeightGrid, check_names, given_activations, weight_grids
from mpqdm_fx.backends.pt2e_observers import PT2EGridWeightObserver
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.dynamic_chain import EPS
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.stand_ins import stand_ins
from mpqdm_fx.numerics.lazy_tensor import LazyTensor, plain
from mpqdm_fx.passes.quantize.quantize_activations import activation_sites
from mpqdm_fx.records.activations import (
    Activation,
    ActivationRange,
    DynamicActivation,
    KernelActivation,
    StaticActivation,
    kernel_activations,
)

__all__ = ["WEIGHT_OPS", "PlanQuantizer", "convert_pt2e_graph", "export_graph", "to_quantizer"]

logger = logging.getLogger(__name__)

_aten = torch.ops.aten

#: aten ops whose `args[0]` is an activation and whose `args[1]` is the layer's weight.
WEIGHT_OPS = frozenset(
    {
        _aten.conv1d.default,
        _aten.conv1d.padding,
        _aten.conv2d.default,
        _aten.conv2d.padding,
        _aten.conv3d.default,
        _aten.conv3d.padding,
        _aten.linear.default,
    }
)


class PlanQuantizer(ao.Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Annotates the weight layers of an exported rounded graph, by their module names.

    1. A call of a rounded layer is an aten convolution or linear op whose innermost
       `nn_module_stack` entry has the layer's name. A layer called twice has two.
    2. Its weight gets int8 codes per channel with the grid's scales; the weight is checked against
       the grid, so a weight that was changed after rounding (batch-norm folding) is refused.
    3. Its input and its output get int8 affine codes per tensor: the fixed range of the value's
       site (`passes.quantize.quantize_activations.activation_sites`), or an observer.
    4. The input of a layer with a `DynamicActivation` gets int8 affine codes per tensor whose range
       is chosen at run time, by the spec of ExecuTorch's XNNPACK quantizer; its output stays float.
    5. Nothing else is annotated, and no annotation of another quantizer is changed, so it works
       inside a `ComposableQuantizer`.

    Args:
        grids: Weight grids by the names under which layers are called.
        activations: Under the same names, static or dynamic; None lets `activation_observer`
            calibrate.
        activation_observer: Constructor of activation observers (a torchao `with_args` wrapper).
    """

    def __init__(
        self,
        grids: Mapping[str, WeightGrid],
        activations: Mapping[str, KernelActivation] | None,
        activation_observer: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.grids = dict(grids)
        self.activations = None if activations is None else dict(activations)
        self.activation_observer = activation_observer

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Write annotations into node meta.

        Raises:
            ConfigError: A planned layer is not in the graph, or its weight is off its grid.
        """
        calls = {node: name for node in model.graph.nodes if (name := self._layer(node))}
        missing = set(self.grids) - set(calls.values())
        if missing:
            raise ConfigError(
                f"the exported graph has no convolution or linear op of the layer "
                f"{min(missing)!r}; export the rounded graph itself, with its module names"
            )
        calls = {node: name for node, name in calls.items() if not _is_annotated(node)}
        inputs: dict[fx.Node, dict[fx.Node, Any]] = {node: {} for node in calls}
        outputs: dict[fx.Node, Any] = {}
        for node, name in calls.items():
            weight = cast(fx.Node, node.args[1])
            self.grids[name].codes(_constant(model, weight))
            inputs[node][weight] = _weight_spec(self.grids[name])
        self._annotate_activations(calls, inputs, outputs)
        for node, specs in inputs.items():
            node.meta[ao.Q_ANNOTATION_KEY] = ao.QuantizationAnnotation(
                input_qspec_map=specs, output_qspec=outputs.get(node), _annotated=True
            )
        logger.debug("PT2E: annotated %d calls of %d layers", len(calls), len(self.grids))
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing is left to check after `annotate`."""

    def _annotate_activations(
        self,
        calls: Mapping[fx.Node, str],
        inputs: dict[fx.Node, dict[fx.Node, Any]],
        outputs: dict[fx.Node, Any],
    ) -> None:
        if self.activations is None:
            for node in calls:
                spec = _observed_spec(self.activation_observer)
                inputs[node][cast(fx.Node, node.args[0])] = spec
                outputs[node] = spec
            return
        fixed = {n: a for n, a in self.activations.items() if isinstance(a, StaticActivation)}
        sites = activation_sites(calls, fixed)
        for site in sites:
            spec = _fixed_spec(site.range)
            if site.calls is None:
                outputs[site.value] = spec
            readers = site.value.users if site.calls is None else site.calls
            for call in readers:
                if calls.get(call) in fixed and call.args[0] is site.value:
                    inputs[call][site.value] = spec
        for call, name in calls.items():
            activation = self.activations.get(name)
            if isinstance(activation, DynamicActivation):
                inputs[call][cast(fx.Node, call.args[0])] = _dynamic_spec(activation)

    def _layer(self, node: fx.Node) -> str | None:
        """Name of the rounded layer that the node is a call of."""
        if node.op != "call_function" or node.target not in WEIGHT_OPS:
            return None
        stack = node.meta.get("nn_module_stack") or {}
        name = next((entry[0] for entry in reversed(stack.values())), None)
        return name if name in self.grids else None


def to_quantizer(
    graph: fx.GraphModule,
    ranges: Mapping[str, Activation] | Literal["observe"] | None = None,
    *,
    activation_observer: Callable[..., nn.Module] | None = None,
    four_bit: Collection[str] = (),
) -> PlanQuantizer:
    """A Quantizer for stock `prepare_pt2e` and `convert_pt2e` that keeps the weights' integers.

    Example:
        exported = torch.export.export(quantized.rounded, inputs).module()
        quantizer = to_quantizer(quantized.rounded)
        converted = convert_pt2e(prepare_pt2e(exported, quantizer))

    Args:
        graph: Module-level graph after `RoundWeights`, such as `QuantizedModel.rounded`; export it
            and prepare the export.
        ranges: Activation ranges by layer; layers without an entry stay in float. Default: what the
            graph says of its layers (`passes.AssignQConfigs`), as every `QuantizedModel.rounded`
            does. `"observe"`: an observer finds ranges of its own in what the prepared
            graph is called with, which has to be all of the calibration data.
        activation_observer: Constructor of that observer. Default: torchao's histogram.
        four_bit: Linear layers whose codes are all within -8..7 and get that range, by which
            ExecuTorch knows weights that XNNPACK can store at four bits.

    Raises:
        ConfigError: No layer of `graph` is rounded, or `ranges` are none or name another layer.
        LoweringError: An activation is neither static nor dynamic.
    """
    grids = weight_grids(graph)
    activations = given_activations(graph, ranges)
    kinds = None if activations is None else kernel_activations(activations, "PT2E")
    if kinds is not None:
        if not kinds:
            raise ConfigError(
                "`ranges` is empty, and weights alone have no int8 form: quantize with "
                'activation_mode="static" or "dynamic" (a model with "float" has no ranges, nor '
                "have its end layers, and any that `slowdown` leaves in float)"
            )
        check_names(kinds, grids)
        grids = {name: grid for name, grid in grids.items() if name in kinds}
    grids = {name: replace(grid, four_bit=name in four_bit) for name, grid in grids.items()}
    # Tied layers are called under several names; the export shows each.
    names = {
        str(node.target): name
        for name, layer in weight_layers(graph).items()
        if name in grids
        for node in layer.nodes
    }
    return PlanQuantizer(
        {target: grids[name] for target, name in names.items()},
        None if kinds is None else {target: kinds[name] for target, name in names.items()},
        activation_observer or ao.PT2EHistogramObserver,
    )


def export_graph(
    graph: fx.GraphModule,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    lazy: bool = False,
) -> torch.export.ExportedProgram:
    """Export a module-level graph at the shapes of its example inputs, keeping module names.

    Args:
        graph: Module-level graph in evaluation mode.
        example_inputs: Its inputs by argument name, or in order.
        lazy: Leave lazy weights lazy, for what turns them into integers one by one; else the
            program holds their numbers.
    """
    args = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    with torch.no_grad(), ao.quiet():
        with stand_ins(graph):
            exported = torch.export.export(graph, tuple(args), strict=False)
        for name, tensor in graph.state_dict(keep_vars=True).items():
            if isinstance(tensor, LazyTensor) and name in exported.state_dict:
                exported.state_dict[name] = tensor if lazy else _parameter(plain(tensor))
        return exported


def convert_pt2e_graph(
    rounded: fx.GraphModule,
    ranges: Mapping[str, KernelActivation],
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    four_bit: Collection[str] = (),
) -> fx.GraphModule:
    """Convert a rounded graph to int8 weights and q/dq ops, through stock PT2E.

    The weights' integers equal `weight_codes`. With static ranges the outputs equal those of
    `QuantizeActivations(ranges=ranges)` on the same graph bit for bit. With dynamic ones they do
    not: PT2E writes one range per tensor, where backends that run the pattern (and
    `QuantizeActivations`) have one per row or per sample.

    Args:
        rounded: Module-level graph after `RoundWeights`; it is not changed.
        ranges: Activation by layer, static or dynamic.
        example_inputs: Inputs of `rounded`; the result takes these shapes only, in this order.
        four_bit: See `to_quantizer`.

    Raises:
        ConfigError: No layer is rounded, or `ranges` names a layer that is not.
    """
    quantizer = to_quantizer(rounded, ranges, four_bit=four_bit)
    exported = export_graph(rounded, example_inputs, lazy=True).module(check_guards=False)
    with torch.no_grad(), ao.quiet():
        prepared = ao.prepare_pt2e(exported, quantizer)
        converted = cast(fx.GraphModule, ao.convert_pt2e(prepared))
    _share_codes(converted, rounded)
    return converted


def _share_codes(converted: fx.GraphModule, rounded: fx.GraphModule) -> None:
    """Let the converted graph hold the very integers of the rounded one, not their copies."""
    known: dict[Any, list[Tensor]] = {}
    for layer in weight_layers(rounded).values():
        codes = getattr(layer.module, "weight_codes", None)
        if isinstance(codes, Tensor):
            known.setdefault(_mark(codes), []).append(codes)
    for name, tensor in list(converted.named_buffers()):
        if tensor.dtype != torch.int8:
            continue
        same = (codes for codes in known.get(_mark(tensor), ()) if torch.equal(codes, tensor))
        codes = next(same, None)
        if codes is not None:
            owner, _, field = name.rpartition(".")
            converted.get_submodule(owner)._buffers[field] = codes


def _mark(codes: Tensor) -> tuple[Any, ...]:
    """What few other matrices have in common with this one."""
    return (codes.shape, int(codes[0].sum()), int(codes[-1].sum()))


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _is_annotated(node: fx.Node) -> bool:
    annotation = node.meta.get(ao.Q_ANNOTATION_KEY)
    return annotation is not None and annotation._annotated


def _constant(model: fx.GraphModule, node: fx.Node) -> Tensor:
    """Tensor that a `get_attr` node fetches."""
    if node.op != "get_attr":
        raise ConfigError(
            f"the weight {node.name!r} is computed by {node.target}; rounded layers have "
            f"constant weights"
        )
    value: Any = model
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def _weight_spec(grid: WeightGrid) -> Any:
    return ao.QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PT2EGridWeightObserver.with_args(grid=grid),
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def _observed_spec(observer: Callable[..., nn.Module]) -> Any:
    return ao.QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=observer,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
    )


def _fixed_spec(chosen: ActivationRange) -> Any:
    return ao.FixedQParamsQuantizationSpec(
        dtype=torch.int8,
        scale=chosen.scale,
        zero_point=chosen.zero_point,
        quant_min=chosen.quant_min,
        quant_max=chosen.quant_max,
        qscheme=torch.per_tensor_affine,
    )


def _dynamic_spec(chosen: DynamicActivation) -> Any:
    return ao.QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=ao.PT2EDynamicObserver.with_args(eps=EPS),
        quant_min=-(1 << (chosen.bits - 1)),
        quant_max=(1 << (chosen.bits - 1)) - 1,
        qscheme=torch.per_tensor_affine,
        is_dynamic=True,
    )
