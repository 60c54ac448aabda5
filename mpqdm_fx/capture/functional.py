"""No graph writes into its values: in-place code is rewritten, and state is refused.

Two lanes, several calls and several backends read the same values, so an operator that overwrites
one would change another's. What a forward writes into the model itself would be lost or repeated.
"""

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode

from mpqdm_fx.capture.diagnose import CaptureError, refuse
from mpqdm_fx.capture.foreign_models import own_tensors
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.nested import tensors_of
from mpqdm_fx.numerics.lazy_tensor import LazyTensor

__all__ = ["functionalized", "refuse_autocast", "refuse_counters", "refuse_writes"]


class _InnerGraphError(Exception):
    """A model calls an operator that holds graphs of its own, which no pass enters.

    Attributes:
        suggestion: What to write in its place.
    """

    def __init__(self, name: str, values: Sequence[Any]) -> None:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(list(values)))
        super().__init__(f"{name} of tensors {shapes} runs graphs of its own, which stay untraced")
        self.suggestion = "write it in plain operators"
        if name == "cond":
            self.suggestion = (
                "compute both branches and use torch.where, or choose in Python by a constant"
            )


def functionalized(exported: ExportedProgram) -> ExportedProgram:
    """The program without in-place operators, by torch's own functionalization.

    ``SiLU(inplace=True)``, ``add_``, slice assignment: each becomes an operator that returns a new
    tensor, and whatever read the old one afterwards reads the new one. A program that has none is
    returned as it is.

    Args:
        exported: A program in torch.export's training dialect.
    """
    graphs = [m for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    if not any(_writes(node) for graph in graphs for node in graph.graph.nodes):
        return exported
    for graph in graphs:
        _share_dropped(graph)
    # the only decomposition: layers stay single operators, and `copy` has no derivative
    rewritten: ExportedProgram = exported.run_decompositions({torch.ops.aten.copy.default: _copy})
    return rewritten


def _share_dropped(graph_module: fx.GraphModule) -> None:
    """Take out, in place, what drops nothing and whose value is written into behind it.

    In evaluation a dropout returns the very tensor that it is given, and what is written into one
    is in both; to functionalization its result is a tensor of its own.
    """
    groups: dict[fx.Node, set[fx.Node]] = {}
    last_write: dict[fx.Node, int] = {}
    for index, node in enumerate(graph_module.graph.nodes):
        groups[node] = {node}
        for source in _sources(node):
            joined = groups[source] | groups[node]
            groups.update(dict.fromkeys(joined, joined))
        if _writes(node):
            last_write.update(dict.fromkeys(_sources(node), index))
    for index, node in enumerate(list(graph_module.graph.nodes)):
        if node.target is not _DROPOUT or not _drops_nothing(node):
            continue
        if any(last_write.get(other, -1) > index for other in groups[node]):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()


_DROPOUT = torch.ops.aten.dropout.default


def _drops_nothing(node: fx.Node) -> bool:
    return node.args[2] is False or node.args[1] in (0, 0.0)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory a node's result may be in, or that it writes into."""
    if node.target is operator.getitem or (node.target is _DROPOUT and _drops_nothing(node)):
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    values = dict(zip((a.name for a in arguments), node.args, strict=False)) | dict(node.kwargs)
    shared = [values.get(a.name) for a in arguments if a.alias_info is not None]
    return [value for value in shared if isinstance(value, fx.Node)]


def _copy(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What ``destination.copy_(source)`` leaves in ``destination``, as a new tensor."""
    if source.dtype != destination.dtype:
        source = source.to(destination.dtype)
    return source if source.shape == destination.shape else source.expand(destination.shape)


def _writes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def refuse_autocast(graph: fx.Graph, model_class: str) -> None:
    """Refuse a graph with parts in half precision, which no pass enters.

    Args:
        graph: An exported graph in which regions without autocast are inlined.
        model_class: Name of the model's class.

    Raises:
        TraceError: Names the module that switches autocast on, and the dtype.
    """
    for node in graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.wrap_with_autocast
    ):
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        where = stack[-1][0] if stack and stack[-1][0] else "forward"
        raise TraceError(
            f"{model_class}: {where} computes a part under autocast ({node.args[1]}), and a traced "
            "graph computes in float32; leave autocast out of the model, and let the caller switch "
            "it on"
        )


@contextlib.contextmanager
def refuse_writes(model: nn.Module) -> Iterator[None]:
    """Refuse, before it happens, that an operator writes into a tensor of the model.

    Raises:
        TraceError: Names the parameter, buffer or attribute; or an operator that runs graphs of its
            own, and the line that calls it.
    """
    try:
        with _WriteGuard(model):
            yield
    except _InnerGraphError as error:
        refusal = refuse(model, error, error.suggestion)
        raise CaptureError(type(model).__name__, "cannot be captured", refusal) from error


class _WriteGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.supports_higher_order_operators = True
        self._model_class = type(model).__name__
        self._names = {
            _storage(tensor): name
            for name, tensor, _ in own_tensors(model)
            if tensor.numel() and not isinstance(tensor, LazyTensor)  # which refuse it themselves
        }

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):
            raise _InnerGraphError(str(func), args)
        for tensor in _written(func, args, kwargs or {}):
            name = self._names.get(_storage(tensor))
            if name is not None:
                raise TraceError(
                    f"{self._model_class}: forward writes into {name} ({func}), so a call depends "
                    "on the calls before it; compute a new tensor, or make it an input"
                )
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator overwrites."""
    if not isinstance(func, torch._ops.OpOverload):
        return []
    values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
    if "running_mean" in values and "training" in values:  # the schema does not always say so
        statistics = (values["running_mean"], values["running_var"]) if values["training"] else ()
        return [tensor for tensor in statistics if isinstance(tensor, Tensor)]
    written = [
        values.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return list(tensors_of(written))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def refuse_counters(model: nn.Module) -> Iterator[None]:
    """Refuse a model whose own numbers and flags are others after a call that is not its first.

    What the first call fills (caches, sizes) is there already; what changes now counts calls.

    Raises:
        TraceError: Names the attribute.
    """
    before, after = _plain_state(model), dict[str, Any]()
    # a hook: torch.export itself puts attributes back before it returns
    handle = model.register_forward_hook(lambda *_: after.update(_plain_state(model)))
    try:
        yield
    finally:
        handle.remove()
    for place, value in before.items():
        # `repr`: NaN is not equal to itself
        if type(after.get(place)) is type(value) and repr(after[place]) != repr(value):
            raise TraceError(
                f"{type(model).__name__}: each call changes {place} (from {value!r} to "
                f"{after[place]!r}), so a call depends on the calls before it; make it an input"
            )


def _plain_state(model: nn.Module) -> dict[str, Any]:
    """Numbers, flags and strings that modules hold, by dotted name."""
    return {
        f"{path}.{key}" if path else key: value
        for path, module in model.named_modules()
        for key, value in module.__dict__.items()
        if type(value) in (bool, int, float, str)
    }
