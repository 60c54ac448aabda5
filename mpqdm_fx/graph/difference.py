"""Where a graph and the model that it was traced from part, to the bit."""

import collections
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

__all__ = ["attention_kernels", "first_difference", "same_bits"]


def same_bits(result: Any, expected: Any) -> bool:
    """Tell whether two nested outputs hold equal tensors, NaN in the same places included."""
    ours, theirs = pytree.tree_leaves(result), pytree.tree_leaves(expected)
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a is not b and a != b:
                return False
        elif (
            a.dtype != b.dtype
            or a.shape != b.shape
            or not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        ):
            return False
    return True


def attention_kernels() -> Iterator[contextlib.AbstractContextManager[None]]:
    """Yield contexts that fix which of attention's kernels run.

    First without the fast path of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``: it
    is one fused operator that torch.export does not record. Then also with the plain products of
    ``scaled_dot_product_attention``, for a model that asks for them itself.
    """
    for backends in ((), (SDPBackend.MATH,)):
        yield _kernels(list(backends))


@contextlib.contextmanager
def _kernels(backends: list[SDPBackend]) -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(backends) if backends else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def first_difference(
    model: nn.Module,
    graph_module: fx.GraphModule,
    call: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> str:
    """Say where the values of a graph first differ from those of its model, and by how much.

    Both run without attention's fast path. Values are compared where the graph calls a module:
    what the module reads, and what it returns.

    Args:
        model: The model; each of its modules is hooked for one call.
        graph_module: Its graph.
        call: Keyword arguments of the model.
        arguments: The same for the graph, in the order of its placeholders.

    Returns:
        One sentence with the size of the difference, the node and its module.
    """
    with next(attention_kernels()):
        calls, expected = _record(model, call)
        comparison = _Comparison(graph_module, calls, model)
        result = comparison.run(*arguments.values())
    text = f"the graph's output differs from the model's{_size(result, expected)}"
    return f"{text}, first at {comparison.place}" if comparison.place else text


_Calls = dict[int, collections.deque[tuple[Any, Any]]]


def _record(model: nn.Module, call: Mapping[str, Any]) -> tuple[_Calls, Any]:
    """What every module read and returned, call by call, under the module's id; and the output."""
    calls: _Calls = collections.defaultdict(collections.deque)

    def note(module: nn.Module, args: Any, output: Any) -> None:
        copies = pytree.tree_map_only(Tensor, torch.clone, (args[:1], output))
        calls[id(module)].append(copies)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        return calls, model(**call)
    finally:
        for handle in handles:
            handle.remove()


class _Comparison(fx.Interpreter):
    """Runs a graph and notes the first node whose value is not the model's."""

    def __init__(self, graph_module: fx.GraphModule, calls: _Calls, model: nn.Module) -> None:
        super().__init__(graph_module)
        self.calls, self.place = calls, ""
        self.ids = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        calls = self.calls.get(self.ids.get(str(n.target), 0)) if n.op == "call_module" else None
        if calls and not self.place:
            read, returned = calls.popleft()
            source = n.args[0]
            assert isinstance(source, fx.Node)
            self._compare(source, (self.env[source],), read)
            self._compare(n, result, returned)
        return result

    def _compare(self, node: fx.Node, value: Any, expected: Any) -> None:
        if self.place or same_bits(value, expected):
            return
        stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
        module = stack[-1][0].split("@")[0] or "the model itself"
        self.place = f"node {node.name} ({node.target}) of {module}{_size(value, expected)}"


def _size(result: Any, expected: Any) -> str:
    """The largest difference of two nested outputs; empty if they do not compare."""
    ours, theirs = pytree.tree_leaves(result), pytree.tree_leaves(expected)
    if len(ours) != len(theirs):
        return f" ({len(ours)} values for {len(theirs)})"
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or same_bits(a, b):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f" ({list(a.shape)} {a.dtype} for {list(b.shape)} {b.dtype})"
        error, largest = (float(t.double().abs().max()) for t in (a.double() - b.double(), b))
        return f" by {error:.2g} (largest value {largest:.2g})"
    return ""
