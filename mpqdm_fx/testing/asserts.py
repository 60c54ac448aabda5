"""Assertions on passes: same function, honest `modified`, untouched input."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from mpqdm_fx.passes.base import GraphPass

__all__ = [
    "assert_input_untouched",
    "assert_modified_is_honest",
    "assert_same_function",
    "count",
    "digest",
]

# node meta that later stages read; the rest (stack traces, fake values) is told apart by its keys
_CONTENT_KEYS = ("nn_module_stack", "quantization_annotation", "custom")


def count(graph_module: fx.GraphModule, target: type[nn.Module] | Callable[..., Any]) -> int:
    """Count the calls of a module class (subclasses included) or of a function.

    Args:
        graph_module: the graph.
        target: a module class such as `nn.Conv2d`, or a function such as
            `torch.ops.aten.cat.default`.
    """
    nodes = graph_module.graph.nodes
    if isinstance(target, type) and issubclass(target, nn.Module):
        modules = (graph_module.get_submodule(str(n.target)) for n in nodes if _is_call(n))
        return sum(isinstance(module, target) for module in modules)
    return sum(n.op == "call_function" and n.target == target for n in nodes)


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_module"


def assert_same_function(
    a: nn.Module,
    b: nn.Module,
    inputs: Mapping[str, Any],
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
) -> None:
    """Assert that two modules give the same outputs on the same inputs.

    Args:
        a: the reference.
        b: the module under test.
        inputs: keyword arguments of both.
        atol: largest allowed absolute difference of any element.
        rtol: allowed difference as a share of the largest magnitude in the reference output.
            With both 0 the outputs must be equal bit for bit, NaN and signed zero included.

    Raises:
        AssertionError: outputs differ in structure, shape, dtype or value; says where and how far.
    """
    with torch.no_grad():
        expected, expected_spec = pytree.tree_flatten(a(**inputs))
        actual, actual_spec = pytree.tree_flatten(b(**inputs))
    assert expected_spec == actual_spec, f"outputs {expected_spec} became {actual_spec}"
    for index, (reference, value) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(reference, Tensor):
            assert reference == value, f"output {index}: {reference!r} became {value!r}"
            continue
        kinds = [(t.shape, t.dtype) for t in (reference, value)]
        assert kinds[0] == kinds[1], f"output {index}: {kinds[0]} became {kinds[1]}"
        if _bits(reference) == _bits(value):
            continue
        assert atol or rtol, f"output {index} is not bit-equal: {_distance(reference, value)}"
        assert reference.isfinite().all(), f"output {index} of the reference is not finite"
        bound = atol + rtol * float(reference.abs().max())
        worst = float((reference - value).abs().max())
        assert worst <= bound, f"output {index} is off by {worst:.3e}, allowed {bound:.3e}"


def _distance(reference: Tensor, value: Tensor) -> str:
    wide = [t.to(torch.float64) for t in (reference, value)]
    return f"off by up to {float((wide[0] - wide[1]).abs().max()):.3e}"


def _bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def digest(graph_module: fx.GraphModule) -> str:
    """Hash all content of a graph: code, nodes, modules' settings, every bit of every tensor.

    Unlike `passes.base.fingerprint` it looks at values and not at identities, so two graphs built
    alike have the same digest.
    """
    h = hashlib.sha256(graph_module.code.encode())
    for node in graph_module.graph.nodes:
        content = [repr(node.meta.get(key)) for key in _CONTENT_KEYS]
        place = (node.name, node.op, str(node.target), repr(node.args), repr(node.kwargs))
        h.update(repr((place, sorted(node.meta), content)).encode())
    for name, module in graph_module.named_modules(remove_duplicate=False):
        if not isinstance(module, fx.GraphModule) and (
            not module._modules and type(module) is not nn.Module
        ):
            settings = (name, type(module).__qualname__, module.extra_repr(), module.training)
            h.update(repr(settings).encode())
    tensors = [
        *graph_module.named_parameters(remove_duplicate=False),
        *graph_module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        h.update(repr((name, type(tensor).__name__, tensor.shape, tensor.dtype)).encode())
        h.update(_bits(tensor))
    h.update(repr(sorted(graph_module.meta.items(), key=lambda item: item[0])).encode())
    return h.hexdigest()


def assert_modified_is_honest(graph_pass: GraphPass, graph_module: fx.GraphModule) -> PassResult:
    """Run a pass and assert that `modified` is true exactly if the graph's content changed.

    Args:
        graph_pass: the pass.
        graph_module: its input.

    Returns:
        The pass's result.
    """
    before = digest(graph_module)
    result = graph_pass(graph_module)
    changed = digest(result.graph_module) != before
    assert result.modified == changed, (
        f"{graph_pass} says modified={result.modified}, but the graph "
        f"{'changed' if changed else 'did not change'}"
    )
    return result


def assert_input_untouched(graph_pass: GraphPass, graph_module: fx.GraphModule) -> PassResult:
    """Run a pass and assert that the graph that went in is what it was, to the bit.

    Args:
        graph_pass: the pass.
        graph_module: its input.

    Returns:
        The pass's result, whose GraphModule is another object.
    """
    before = digest(graph_module)
    metas = [dict(node.meta) for node in graph_module.graph.nodes]
    result = graph_pass(graph_module)
    assert result.graph_module is not graph_module, f"{graph_pass} returned its input"
    assert digest(graph_module) == before, f"{graph_pass} changed its input graph"
    for node, meta in zip(graph_module.graph.nodes, metas, strict=True):
        same = node.meta.keys() == meta.keys() and all(node.meta[k] is meta[k] for k in meta)
        assert same, f"{graph_pass} changed the meta of {node.name!r} in its input"
    return result
