"""torch.ao: a QConfigMapping for stock FX quantization, and the lowering to its int8 kernels."""

import logging
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

import torch
from torch import fx, nn

from mpqdm_fx.backends import ao
from mpqdm_fx.backends.fit_channels import fit_channels
from mpqdm_fx.backends.observers import (
    GridWeightObserver,
    UnresolvedRangeObserver,
    check_names,
    given_activations,
    weight_grids,
)
from mpqdm_fx.errors import ConfigError, LoweringError
from mpqdm_fx.graph.calling import TracedGraph
from mpqdm_fx.graph.editing import (
    copy_graph_module,
    keep_fetched,
    replace_module,
    shallow_clone,
)
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.records.activations import (
    Activation,
    ActivationRange,
    StaticActivation,
    static_ranges,
)

__all__ = ["ENGINES", "check_ranges", "lower_torch_ao", "set_ranges", "to_qconfig_mapping"]

logger = logging.getLogger(__name__)

#: torch.ao engines that this module lowers to. `x86` is `onednn` or `fbgemm`, by shape.
ENGINES = ("onednn", "fbgemm", "qnnpack")

# torch.ao codes are unsigned: the int8 convention plus 128.
_SHIFT = 128


def to_qconfig_mapping(
    graph: fx.GraphModule,
    ranges: Mapping[str, Activation] | Literal["observe"] | None = None,
    *,
    engine: str = "onednn",
    activation_observer: Callable[[], nn.Module] | None = None,
) -> ao.QConfigMapping:
    """Settings for stock `prepare_fx` and `convert_fx` that keep the weights' integers.

    Every rounded convolution and linear layer gets one QConfig; everything else stays in float.

    Example:
        mapping = to_qconfig_mapping(quantized.rounded)
        prepared = prepare_fx(quantized.rounded, mapping, inputs)
        converted = convert_fx(set_ranges(prepared, quantized.ranges))

    Args:
        graph: Module-level graph after `RoundWeights`, such as `QuantizedModel.rounded`.
        ranges: Activation ranges by layer; layers without an entry stay in float. Default: what the
            graph says of its layers (`passes.AssignQConfigs`), as every `QuantizedModel.rounded`
            does. A QConfig has no place for two ranges of one layer, so `set_ranges` puts
            them into the prepared graph; without it `convert_fx` is refused. `"observe"`: observers
            find ranges of their own in what the prepared graph is called with, which has to be all
            of the calibration data.
        engine: torch.ao engine that will run it: `onednn`, `fbgemm` or `qnnpack`. All of them get
            the full 8-bit activation range (no `reduce_range`).
        activation_observer: Constructor of the observer of `"observe"`. Default: a histogram over
            all 256 codes.

    Raises:
        ConfigError: No layer of `graph` is rounded, or `ranges` are none or name another layer.
        LoweringError: torch was built without the engine, or a range is not static and 8 bits wide.
    """
    _check_engine(engine)
    grids = weight_grids(graph)
    layers = weight_layers(graph)
    fixed = given_activations(graph, ranges)
    if fixed is not None:
        fixed = check_ranges(fixed, grids, "torch.ao")
        grids = {name: grid for name, grid in grids.items() if name in fixed}
    mapping = ao.QConfigMapping()
    for name, grid in grids.items():
        activation: Any = activation_observer or ao.HistogramObserver.with_args(
            dtype=torch.quint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=255
        )
        if fixed is not None:
            activation = UnresolvedRangeObserver.with_args(layer=name)
        weight = GridWeightObserver.with_args(grid=grid)
        qconfig = ao.QConfig(activation=activation, weight=weight)  # type: ignore[no-untyped-call]
        # Tied layers are called under several names; torch.ao looks up each.
        for target in dict.fromkeys(str(node.target) for node in layers[name].nodes):
            mapping.set_module_name(target, qconfig)
    return mapping


def set_ranges(prepared: fx.GraphModule, ranges: Mapping[str, Activation]) -> fx.GraphModule:
    """Put fixed ranges into a graph prepared with `to_qconfig_mapping(graph, ranges)`.

    An observer behind a weight layer gets that layer's output range, any other one the input range
    of the first weight layer that reads it.

    Args:
        prepared: Result of `prepare_fx`; its observers are replaced in place.
        ranges: Ranges by layer name.

    Returns:
        `prepared`.

    Raises:
        ConfigError: An observer belongs to no layer of `ranges`.
        LoweringError: A range is not static.
    """
    static = static_ranges(ranges, "torch.ao")
    calls = {n: name for name, la in weight_layers(prepared).items() for n in la.nodes}
    for node in prepared.graph.nodes:
        if node.op != "call_module":
            continue
        if not isinstance(prepared.get_submodule(node.target), UnresolvedRangeObserver):
            continue
        source = node.args[0]
        readers = [calls[user] for user in node.users if user in calls]
        if calls.get(source) in static:
            chosen = static[calls[source]].output
        elif readers and readers[0] in static:
            chosen = static[readers[0]].input
        else:
            raise ConfigError(
                f"the observer {node.target} of {source} belongs to no layer that has ranges; give "
                f"set_ranges the ranges that to_qconfig_mapping was given"
            )
        setattr(prepared, node.target, _fixed_observer(chosen))
    return prepared


def lower_torch_ao(
    graph: fx.GraphModule,
    ranges: Mapping[str, Activation],
    example_inputs: Mapping[str, Any] | Sequence[Any],
    engine: str = "onednn",
) -> fx.GraphModule:
    """Lower a rounded graph to torch.ao's int8 convolutions and linear layers.

    Stock `prepare_fx` and `convert_fx`, with the ranges set between the two. The result is called
    like `graph`. Its integers are the graph's `weight_codes` (but for degenerate channels on fbgemm
    and qnnpack, see `fit_channels`). They are packed for `engine` and run on it whatever
    `torch.backends.quantized.engine` says; a `copy.deepcopy` of it packs anew for that setting.

    Args:
        graph: Module-level graph after `RoundWeights`; it is not changed.
        ranges: Input and output range by layer name, 8 bits. Layers without an entry stay in
            float, with their rounded weights.
        example_inputs: Inputs of `graph`.
        engine: `onednn`, `fbgemm` or `qnnpack`.

    Raises:
        ConfigError: No layer is rounded, or `ranges` names a layer that is not.
        LoweringError: A range is not static and 8 bits wide, or the engine is missing or lacks a
            kernel.
    """
    static = check_ranges(ranges, weight_grids(graph), "torch.ao")
    if engine != "onednn":  # onednn adds the bias in float
        graph = fit_channels(graph, static)
    mapping = to_qconfig_mapping(graph, static, engine=engine)
    layers = weight_layers(graph)
    for name in ranges:
        _check_kernel(name, layers[name].module, engine)
    quantized = mapping.module_name_qconfigs.keys()
    custom = ao.PrepareCustomConfig().set_non_traceable_module_classes([_Opaque])
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    with ao.quiet(), ao.quantized_engine(engine):
        prepared = ao.prepare_fx(
            _for_prepare(graph, quantized),
            mapping,
            tuple(values),
            prepare_custom_config=custom,
            backend_config=_backend_config(),
        )
        set_ranges(prepared, static)
        lowered = ao.convert_fx(prepared, backend_config=_backend_config())
    for name, module in list(lowered.named_modules(remove_duplicate=False)):
        if isinstance(module, _Opaque):
            lowered.set_submodule(name, module.hidden[0])
    for name in ranges:
        kind = type(lowered.get_submodule(name))
        if not kind.__module__.startswith("torch.ao.nn.quantized"):
            raise LoweringError(f"{name}: torch.ao left it a float {kind.__name__}")
    if "signature" in graph.meta:
        lowered = TracedGraph(lowered, lowered.graph, type(lowered).__name__)
        lowered.meta["signature"] = graph.meta["signature"]
    logger.info("torch.ao: %d layers on %s", len(ranges), engine)
    return lowered


def check_ranges(
    ranges: Mapping[str, Activation], rounded: Mapping[str, object], backend: str
) -> dict[str, StaticActivation]:
    """Check that ranges name rounded layers and that static int8 kernels can hold them.

    Args:
        ranges: Ranges by layer name.
        rounded: Rounded layers by name.
        backend: Its name, for the message.

    Returns:
        The ranges.

    Raises:
        ConfigError: A name is no rounded layer, or `ranges` is empty.
        LoweringError: A range is not static, or not 8 bits wide.
    """
    if not ranges:
        raise ConfigError(
            f"{backend} got no activation ranges, and weights alone have no int8 form there: "
            f'quantize with activation_mode="static" (a model with "float" has no ranges, nor '
            f"have its end layers, and any that `slowdown` leaves in float)"
        )
    static = static_ranges(ranges, backend)
    check_names(static, rounded)
    for name, activation in static.items():
        for side, chosen in (("input", activation.input), ("output", activation.output)):
            if chosen.bits != 8:
                raise LoweringError(
                    f"{name}: its {side} range has {chosen.bits} bits, but {backend} kernels clamp "
                    f"at the int8 range only; quantize with activation_bits=8, or evaluate "
                    f"narrower activations with the fake-quantized graph"
                )
    return static


def _check_engine(engine: str) -> None:
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: choose one of {', '.join(ENGINES)}")
    supported = torch.backends.quantized.supported_engines
    if engine not in supported:
        raise LoweringError(
            f"this torch was built without the engine {engine!r}; it has {', '.join(supported)}"
        )
    if engine == "fbgemm" and not torch.cpu._is_vnni_supported():
        logger.warning(
            "this CPU has no VNNI: fbgemm's 8-bit products may saturate at full activation range; "
            "use the engine onednn"
        )


def _check_kernel(name: str, module: nn.Module, engine: str) -> None:
    if isinstance(module, nn.Conv3d) and engine == "qnnpack":
        raise LoweringError(f"{name}: qnnpack has no Conv3d; use the engine onednn or fbgemm")
    if getattr(module, "padding_mode", "zeros") not in ("zeros", "reflect"):
        raise LoweringError(
            f"{name}: torch.ao has no int8 convolution with padding_mode="
            f"{module.padding_mode!r}; leave the layer out of `ranges`"
        )


def _fixed_observer(chosen: ActivationRange) -> nn.Module:
    return ao.FixedQParamsObserver(  # type: ignore[no-untyped-call]
        scale=chosen.scale,
        zero_point=chosen.zero_point + _SHIFT,
        dtype=torch.quint8,
        quant_min=chosen.quant_min + _SHIFT,
        quant_max=chosen.quant_max + _SHIFT,
    )


class _Opaque(nn.Module):
    """Hides a float module's class from torch.ao.

    It would run ReLU, pooling and the like on the int8 values around them and drop the quantize
    node behind them, and so compute other numbers than the fake-quantized graph.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # outside `_modules`: torch.ao replaces children by their class
        self.hidden = (module,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.hidden[0](*args, **kwargs)


def _for_prepare(graph: fx.GraphModule, quantized: AbstractSet[str]) -> fx.GraphModule:
    """Copy a graph so that torch.ao writes its `qconfig` into clones and sees no float module."""
    result = copy_graph_module(graph)
    for name in dict.fromkeys(str(n.target) for n in graph.graph.find_nodes(op="call_module")):
        module = result.get_submodule(name)
        if module is graph.get_submodule(name):  # not replaced yet under another of its names
            clone = shallow_clone(module) if name in quantized else _Opaque(module)
            keep_fetched(result, name)
            replace_module(result, name, clone)
    result.recompile()
    return result.eval()


def _backend_config() -> ao.BackendConfig:
    """Int8 convolutions and linear layers, each alone.

    The stock config also fuses ReLU into them, which would put a layer's output range behind the
    ReLU, where it was not measured.
    """
    dtypes = ao.DTypeConfig(
        input_dtype=torch.quint8,
        output_dtype=torch.quint8,
        weight_dtype=torch.qint8,
        bias_dtype=torch.float,
    )
    reference = {
        nn.Conv1d: ao.reference.Conv1d,
        nn.Conv2d: ao.reference.Conv2d,
        nn.Conv3d: ao.reference.Conv3d,
        nn.Linear: ao.reference.Linear,
    }
    patterns = [
        ao.BackendPatternConfig(kind)
        .set_observation_type(ao.ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
        .set_dtype_configs([dtypes])
        .set_root_module(kind)
        .set_reference_quantized_module(quantized)
        for kind, quantized in reference.items()
    ]
    return ao.BackendConfig("mpqdm_fx").set_backend_pattern_configs(patterns)
