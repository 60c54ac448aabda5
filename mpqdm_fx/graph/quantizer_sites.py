"""Find the activation quantizers of a graph, set their ranges, and read all ranges back.

A quantizer is a node: the quantize node of a q/dq pair (static), or a call of a module of
`graph.quantizers`. `passes.quantize.quantize_activations` puts them in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import add_module, free_name, infer_val, inherit_meta, replace_module
from mpqdm_fx.graph.layers import WEIGHT_LAYERS, called_module, is_pointwise
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.graph.qdq import is_dequantize, is_quantize, qdq_parameters
from mpqdm_fx.graph.quantizers import (
    FIXED_QUANTIZERS,
    ActivationQuantizer,
    DynamicQuantizer,
    NoiseLevelGroups,
    fixed_quantizer,
)
from mpqdm_fx.records.activations import (
    Activation,
    ActivationRange,
    DynamicActivation,
    NoiseLevels,
    Side,
    StaticActivation,
    TimestepActivation,
)

__all__ = [
    "QuantizerSite",
    "follows_batch",
    "insert_groups",
    "insert_quantizer",
    "quantizer_sites",
    "read_activations",
    "row_axes",
    "set_site_ranges",
    "site_ranges",
]

_FOLDER = "activation_quantizers"
_aten = torch.ops.aten
_JOINS = frozenset({_aten.cat.default, _aten.stack.default})
_RESHAPES = frozenset(
    {
        _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
        _aten.flatten.using_ints, _aten.unflatten.int, _aten.permute.default,
        _aten.transpose.int,
    }
)  # fmt: skip
"""What makes rows of other axes."""


@dataclass(frozen=True, kw_only=True)
class QuantizerSite:
    """One activation quantizer of a graph.

    Attributes:
        node: The quantize node of a pair, or the call of a quantizer module (a range by noise
            level, a range of the moment, or fitted levels).
        kind: `"static"`, `"timestep"` or `"dynamic"`. A dynamic quantizer has no range to set.
        value: Node that it reads: the value that is quantized.
        result: Node that has the quantized value: the dequantize node of a pair, else `node`.
        bits: Width of its codes.
        writer: Target of the weight-layer call whose output the value is, or None.
        readers: Targets of the weight-layer calls that read the result as their input.
    """

    node: fx.Node
    kind: Literal["static", "timestep", "dynamic"]
    value: fx.Node
    result: fx.Node
    bits: int
    writer: str | None
    readers: tuple[str, ...]

    @property
    def key(self) -> tuple[str, Side]:
        """Whose range it is: (layer, side).

        Sites with one key share one range: those of a layer that is called several times.
        """
        if self.writer is not None and self.kind != "dynamic":
            return self.writer, "output"
        return self.readers[0], "input"


def quantizer_sites(graph_module: fx.GraphModule) -> dict[fx.Node, QuantizerSite]:
    """Find the activation quantizers of a module-level graph, in graph order.

    Returns:
        Quantizer node to site. Quantizers around nothing (no weight layer writes their value or
        reads their result) are left out: they belong to somebody else.
    """
    sites = (_site(graph_module, node) for node in graph_module.graph.nodes)
    return {site.node: site for site in sites if site is not None and (site.writer or site.readers)}


def _site(graph_module: fx.GraphModule, node: fx.Node) -> QuantizerSite | None:
    result, kind, bits = node, "static", 0
    if is_quantize(node):
        restored = [user for user in node.users if is_dequantize(user)]
        if not restored:
            return None
        result = restored[0]
        low, high = qdq_parameters(node)[2:4]
        bits = (high - low + 1).bit_length() - 1
    else:
        module = called_module(graph_module, node, *FIXED_QUANTIZERS, DynamicQuantizer)
        if module is None:
            return None
        if isinstance(module, DynamicQuantizer):
            kind = "dynamic"
        elif len(node.args) > 1:
            kind = "timestep"
        bits = int(module.bits)  # type: ignore[arg-type]
    value = node.args[0]
    assert isinstance(value, fx.Node)
    readers = [user for user in result.users if _is_layer_call(graph_module, user)]
    return QuantizerSite(
        node=node,
        kind=kind,  # type: ignore[arg-type]
        value=value,
        result=result,
        bits=bits,
        writer=str(value.target) if _is_layer_call(graph_module, value) else None,
        readers=tuple(dict.fromkeys(str(r.target) for r in readers if r.args[0] is result)),
    )


def _is_layer_call(graph_module: fx.GraphModule, node: object) -> bool:
    return called_module(graph_module, node, *WEIGHT_LAYERS) is not None


def site_ranges(graph_module: fx.GraphModule, node: object) -> tuple[ActivationRange, ...] | None:
    """Ranges of a fixed quantizer: one, or one for each group of noise levels.

    Args:
        graph_module: The node's graph.
        node: Any node.

    Returns:
        None of what is no fixed quantizer.
    """
    module = called_module(graph_module, node, *FIXED_QUANTIZERS)
    if module is not None:
        ranges: tuple[ActivationRange, ...] = module.ranges  # type: ignore[assignment]
        return ranges
    if isinstance(node, fx.Node) and (is_quantize(node) or is_dequantize(node)):
        scale, zero_point, low, high = qdq_parameters(node)[:4]
        bits = (high - low + 1).bit_length() - 1
        return (ActivationRange(scale=scale, zero_point=zero_point, bits=bits),)
    return None


def set_site_ranges(
    graph_module: fx.GraphModule, node: fx.Node, ranges: Sequence[ActivationRange]
) -> None:
    """Give a fixed quantizer other ranges, in place; its width and kind stay.

    Args:
        graph_module: The node's graph, edited in place.
        node: The quantize node of a pair, or the call of a module with fixed ranges.
        ranges: Range of each group of noise levels, or the one range; scales are stored as float32,
            as every backend does.

    Raises:
        DialectError: The node is no fixed quantizer, or the number of ranges, their width, or
            whether they have fitted levels differs.
    """
    old = site_ranges(graph_module, node)
    if old is None or is_dequantize(node):
        raise DialectError(f"{node.name} ({node.target}) is no quantizer with a fixed range")
    if len(ranges) != len(old) or {(r.bits, bool(r.levels)) for r in ranges} != {
        (r.bits, bool(r.levels)) for r in old
    }:
        raise DialectError(
            f"{node.target}: it has {_told(old)}, and the new ranges are {_told(ranges)}"
        )
    if not is_quantize(node):
        replace_module(graph_module, str(node.target), fixed_quantizer(ranges))
        return
    exact = float(torch.tensor(ranges[0].scale, dtype=torch.float32))
    for each in (node, *(user for user in node.users if is_dequantize(user))):
        each.update_arg(1, exact)
        each.update_arg(2, ranges[0].zero_point)


def _told(ranges: Sequence[ActivationRange]) -> str:
    bits = ", ".join(map(str, sorted({chosen.bits for chosen in ranges})))
    fitted = " with fitted levels" if any(chosen.levels for chosen in ranges) else ""
    return f"{len(ranges)} of {bits} bits{fitted}"


def read_activations(graph_module: fx.GraphModule) -> dict[str, Activation]:
    """Read the activation of every quantized layer back from a graph.

    `QuantizeActivations` with what this returns quantizes the float graph to the same numbers. A
    range that a layer names but that its graph does not use (of three projections with one input,
    two have their own to no effect) comes back as the one that is in use.

    Args:
        graph_module: A graph after `QuantizeActivations`, possibly with other ranges set since.

    Returns:
        Activation by layer, in graph order, under the target of the layer's first quantized call.
    """
    activations: dict[int, tuple[str, Activation]] = {}
    for node in graph_module.graph.nodes:
        module = called_module(graph_module, node, *WEIGHT_LAYERS)
        if module is None or id(module) in activations:
            continue
        activation = _activation_of(graph_module, node)
        if activation is not None:
            activations[id(module)] = (str(node.target), activation)
    return dict(activations.values())


def _activation_of(graph_module: fx.GraphModule, call: fx.Node) -> Activation | None:
    dynamic = called_module(graph_module, call.args[0], DynamicQuantizer)
    if isinstance(dynamic, DynamicQuantizer):
        return DynamicActivation(bits=dynamic.bits)
    read = site_ranges(graph_module, call.args[0])
    written = next(filter(None, (site_ranges(graph_module, user) for user in call.users)), None)
    if read is None or written is None:
        return None
    count = max(len(read), len(written))
    pairs = zip(_repeated(read, count), _repeated(written, count), strict=True)
    groups = tuple(StaticActivation(input=i, output=o) for i, o in pairs)
    return groups[0] if count == 1 else TimestepActivation(groups=groups)


def _repeated(ranges: tuple[ActivationRange, ...], count: int) -> tuple[ActivationRange, ...]:
    return ranges if len(ranges) == count else ranges * count


def follows_batch(value: fx.Node, noise_level: fx.Node) -> bool:
    """Whether a value has a whole number of rows for each sample that a noise level is told of.

    A sample's rows have to follow one another. They do not where whole batches were put behind each
    other (`torch.cat([x, x])`, as guidance inside a model does it) or where another axis was folded
    in before the batch. Values without shape information are taken to follow.

    Args:
        value: What is to be quantized.
        noise_level: The placeholder that tells it.
    """
    levels = noise_level.meta.get("val")
    if not isinstance(levels, torch.Tensor):
        return True
    batch = levels.shape[0] if levels.shape else 1

    def has_rows(node: fx.Node) -> bool:
        first = _first_size(node)
        return first is None or bool(statically_known_true(first % batch == 0))

    if not has_rows(value):
        return False
    waiting, seen = [value], {value}
    while waiting:
        node = waiting.pop()
        first = _first_size(node)
        one_each = batch == 1 or first is None or statically_known_true(first == batch)
        if one_each or not has_rows(node):
            continue
        reshaped = node.target in _RESHAPES and not has_rows(node.all_input_nodes[0])
        if reshaped or _puts_batches_behind(node):
            return False
        waiting += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return True


def _first_size(node: fx.Node) -> int | torch.SymInt | None:
    """The length of a value's first axis; None for what is no tensor, 1 for one without axes."""
    tensor = node.meta.get("val")
    if not isinstance(tensor, torch.Tensor):
        return None
    return tensor.shape[0] if tensor.shape else 1


def _puts_batches_behind(node: fx.Node) -> bool:
    """Whether a node joins values along their first axis, or repeats one along it."""
    if node.target in _JOINS:
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        assert isinstance(axis, int)
        return bool(axis % node.meta["val"].dim() == 0)
    if node.target is _aten.repeat.default:
        times = node.args[1]
        assert isinstance(times, Sequence)
        return bool(times[0] != 1)
    return False


def row_axes(module: nn.Module) -> int | tuple[int, ...]:
    """Axes of a layer's input that share one dynamic range, as XNNPACK's kernels have it.

    1. A linear layer has a range per row, a convolution one per sample.
    2. A Conv2d that is a linear layer over the pixels (kernel 1x1, stride 1, no padding, one group)
       is run as one, and has a range per pixel.

    Args:
        module: A convolution or a linear layer.

    Returns:
        The number of trailing axes, or the axes counted from the end; for `DynamicQuantizer`.
    """
    if isinstance(module, nn.Linear):
        return 1
    if is_pointwise(module):
        return (-3,)
    return 1 + len(module.kernel_size)  # type: ignore[arg-type]


def insert_groups(graph_module: fx.GraphModule, levels: NoiseLevels) -> fx.Node:
    """Insert the node that maps noise levels to groups, behind the placeholders.

    Args:
        graph_module: Private copy to edit, in place, that is told a noise level.
        levels: The groups.

    Raises:
        DialectError: The graph takes no noise level, or the position in a schedule in its place.
        ConfigError: It takes no argument of the name that the groups have.
    """
    if "timesteps" in graph_module.meta:
        raise DialectError(
            "the graph has tables over a schedule and takes the position in it, not the noise "
            "level, so noise levels cannot be told apart; quantize first, then tabulate"
        )
    argument = find_noise_argument(graph_module, levels.argument)
    if argument is None:
        raise DialectError("the graph is told no noise level, so these cannot be told apart")
    return _insert(graph_module, NoiseLevelGroups(levels.boundaries), "noise_level", (argument,))


def insert_quantizer(
    graph_module: fx.GraphModule,
    module: ActivationQuantizer,
    value: fx.Node,
    name: str,
    *extra: fx.Node,
) -> fx.Node:
    """Insert the call of a quantizer module behind a value, without redirecting its users.

    Args:
        graph_module: Private copy to edit, in place.
        module: The quantizer.
        value: What it reads; the new node inherits its provenance.
        name: Readable name, for example a layer's with the side; made free and flat.
        extra: Further arguments; they precede `value`'s users.

    Returns:
        The new node.
    """
    return _insert(graph_module, module, name.replace(".", "_"), (value, *extra))


def _insert(
    graph_module: fx.GraphModule, module: nn.Module, name: str, args: tuple[fx.Node, ...]
) -> fx.Node:
    graph = graph_module.graph
    target = free_name(graph_module, f"{_FOLDER}.{name}")
    add_module(graph_module, target, module)
    after = max(args, key=list(graph.nodes).index)
    if after.op == "placeholder":  # placeholders stay together
        after = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(after):
        node = graph.call_module(target, args)
    inherit_meta(node, args[0])
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    if stack:
        # A module's own entry ends where another module begins; an op's is its surroundings.
        outer = stack[:-1] if args[0].op == "call_module" else stack
        node.meta["nn_module_stack"] = {**dict(outer), target: (target, type(module).__name__)}
    value = args[0].meta.get("val")
    if isinstance(module, ActivationQuantizer) and isinstance(value, FakeTensor):
        with value.fake_mode:  # known by contract, and running it on symbolic shapes is slow
            node.meta["val"] = torch.empty_like(value)
    else:
        infer_val(graph_module, node)
    return node
