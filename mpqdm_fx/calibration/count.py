"""Count a model's parameters: what is quantized, what stays in float, and what is not stored."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.parameters import first_names, present_tensors
from mpqdm_fx.numerics.halves import stored_float_bits
from mpqdm_fx.records.plan import FLOAT_REASON, BitPlan, FloatTensor, LayerPlan, ParameterFate

__all__ = ["bit_plan", "tell_remarks"]

logger = logging.getLogger(__name__)

_aten = torch.ops.aten
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
_NORMS = (nn.LayerNorm, nn.RMSNorm)  # whose weight may have several axes
_PRODUCTS = {
    _aten.conv1d,
    _aten.conv2d,
    _aten.conv3d,
    _aten.conv_transpose1d,
    _aten.conv_transpose2d,
    _aten.conv_transpose3d,
    _aten.convolution,
    _aten.linear,
    _aten.matmul,
    _aten.mm,
    _aten.bmm,
    _aten.addmm,
    _aten.baddbmm,
    _aten.einsum,
    _aten.bilinear,
    _aten.embedding,
}


def bit_plan(
    source: fx.GraphModule,
    rounded: fx.GraphModule,
    layers: Iterable[LayerPlan],
    skipped: Mapping[str, str],
    *,
    activation_bits: int = 8,
) -> BitPlan:
    """The plan of a graph: its layers, and every other tensor and parameter with its fate.

    What is not known to be a norm, a bias or a constant counts as a weight. Of a layer that is not
    quantized, that is a parameter of two or more axes, unless it is a norm's; of tensors that no
    layer owns, a parameter of two or more axes longer than 1, and whatever has two or more axes and
    multiplies a computed value (a convolution, a matrix product, a look-up), buffers included.

    Args:
        source: Normalized float graph.
        rounded: The same graph with rounded layers, whose other tensors are stored; or `source`.
        layers: Plans of the quantized layers.
        skipped: Reason by name of a layer that an override leaves in float.
        activation_bits: Bits of a layer's input where no override says otherwise.
    """
    layers = tuple(layers)
    weights = [f"{layer.name}.weight" for layer in layers]
    owned = [name for layer in layers for name in layer.tensors]
    state = rounded.state_dict(keep_vars=True)
    first = first_names(rounded, owned)
    reads = _Reads(rounded)
    floats = tuple(
        reads.float_tensor(name, state[name], skipped)
        for name in state
        if first[name] == name and name not in owned
    )
    return BitPlan(
        layers=layers,
        floats=floats,
        activation_bits=activation_bits,
        parameters=_fates(source, first, set(weights), floats),
        copies=_copies(source, [*weights, *(t.name for t in floats if t.is_weight)]),
    )


def _fates(
    source: fx.GraphModule,
    first: Mapping[str, str],
    quantized: set[str],
    floats: Sequence[FloatTensor],
) -> tuple[ParameterFate, ...]:
    """What became of every parameter of the model, by all its names."""
    reasons = {tensor.name: tensor.reason for tensor in floats}
    sizes = {name: tensor.numel() for name, tensor in source.state_dict().items()}
    fates = []
    for parameter, places, folded in present_tensors(source):
        name, numel = parameter.name, parameter.numel
        if parameter.shares is not None:
            fates.append(
                ParameterFate(name=name, numel=numel, fate="shared", note=parameter.shares)
            )
        elif places:
            for place in places:
                size = numel if len(places) == 1 else sizes[place]
                stored = first[place]
                note = f"as {stored}" if stored != name else ""
                if stored in quantized:
                    fates.append(ParameterFate(name=name, numel=size, fate="quantized", note=note))
                else:
                    note = "; ".join(filter(None, (reasons[stored], note)))
                    fates.append(ParameterFate(name=name, numel=size, fate="float", note=note))
        elif folded is not None:
            fates.append(ParameterFate(name=name, numel=numel, fate="folded", note=folded))
        else:
            note = "not read by forward"
            fates.append(ParameterFate(name=name, numel=numel, fate="unused", note=note))
    return tuple(fates)


def _copies(source: fx.GraphModule, stored: Sequence[str]) -> tuple[str, ...]:
    """Stored weights that are the same tensor in the float model as a stored weight before them.

    In the graph they may be two: a pass that multiplies one of two tied weights parts them.
    """
    owners: dict[str, tuple[str, int, int]] = {}
    for parameter, places, _ in present_tensors(source):
        owner = parameter.shares or parameter.name
        owners |= {place: (owner, index, len(places)) for index, place in enumerate(places)}
    first = first_names(source)
    seen: set[object] = set()
    copies = []
    for name in stored:
        same = owners.get(name) or owners.get(first[name]) or first[name]
        if same in seen:
            copies.append(name)
        seen.add(same)
    return tuple(copies)


class _Reads:
    """Which modules a graph calls, and which tensors it reads itself."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes: dict[str, fx.Node] = {}
        self.called: set[str] = set()
        self.computed: set[fx.Node] = set()  # depends on an input
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                self.called.add(str(node.target))
            if node.op == "get_attr":
                self.nodes.setdefault(str(node.target), node)
            if node.op == "placeholder" or not self.computed.isdisjoint(node.all_input_nodes):
                self.computed.add(node)

    def float_tensor(self, name: str, tensor: Tensor, skipped: Mapping[str, str]) -> FloatTensor:
        owner, _, field = name.rpartition(".")
        module = self.graph_module.get_submodule(owner)
        if owner in self.called:
            layer = isinstance(module, _LAYERS) and field == "weight"
            other = isinstance(tensor, nn.Parameter) and not isinstance(module, _NORMS)
            is_weight = layer or (other and tensor.dim() >= 2)
            reason = skipped.get(owner, f"{type(module).__name__} is not quantized")
        else:
            node = self.nodes.get(name)
            # A norm of the model's own may have a gain of shape [1, 1, 1, C].
            wide = isinstance(tensor, nn.Parameter) and sum(n > 1 for n in tensor.shape) >= 2
            multiplied = node is not None and self._is_multiplied(node)
            is_weight = tensor.dim() >= 2 and (wide or multiplied)
            reason = _reader(node)
        return FloatTensor(
            name=name,
            numel=tensor.numel(),
            bits=stored_float_bits(tensor),
            is_weight=is_weight,
            reason=reason if is_weight else FLOAT_REASON,
        )

    def _is_multiplied(self, node: fx.Node) -> bool:
        """Whether a constant, or what is computed of constants alone, multiplies a value."""
        stack, seen = [node], {node}
        while stack:
            for user in stack.pop().users:
                if user not in self.computed:
                    stack.extend({user} - seen)
                    seen.add(user)
                elif getattr(user.target, "overloadpacket", None) in _PRODUCTS:
                    return True
        return False


def _reader(node: fx.Node | None) -> str:
    """Why a tensor that no layer owns stays in float: who reads it."""
    user = next(iter(node.users), None) if node is not None else None
    if user is None:
        return "no layer owns it"
    stack = list((user.meta.get("nn_module_stack") or {}).values())
    kind = stack[-1][1] if stack else "the model"
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"read by {kind.rpartition('.')[2]} as a tensor, not through a layer"


def tell_remarks(plan: BitPlan) -> None:
    """Log what a plan's numbers do not say; weights left in float as a warning."""
    for remark in plan.remarks:
        logger.log(logging.WARNING if remark == plan.float_remark else logging.INFO, "%s", remark)
