"""The generic laws of graph passes. `passes/test_laws.py` holds every pass to each of them.

A law is a function of (pass, random graph) that asserts. Passes are found by importing all modules
of `mpqdm_fx.passes`; the settings they are tried with come from `GraphPass.examples`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch.fx.passes.infra.pass_manager import PassManager

import mpqdm_fx.passes
from mpqdm_fx.graph.base import GraphPass
from mpqdm_fx.graph.editing import copy_graph_module, eliminate_dead_code
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.quantize_activations import QuantizeActivations
from mpqdm_fx.plan import ActivationRange, LayerActivation
from mpqdm_fx.testing import (
    KINDS,
    Block,
    GraphSpec,
    RandomGraph,
    assert_input_untouched,
    assert_modified_is_honest,
    assert_same_function,
    build_graph,
    digest,
    graphs,
)


def discover_passes() -> list[type[GraphPass]]:
    """Return every concrete pass class that a module of `mpqdm_fx.passes` defines."""
    infos = pkgutil.walk_packages(mpqdm_fx.passes.__path__, "mpqdm_fx.passes.")
    modules = [importlib.import_module(info.name) for info in infos]
    found = [cls for m in modules for cls in vars(m).values() if _is_pass_of(m.__name__, cls)]
    return sorted(found, key=lambda cls: cls.__name__)


def _is_pass_of(module_name: str, value: object) -> bool:
    if not (isinstance(value, type) and issubclass(value, GraphPass)):
        return False
    return value.__module__ == module_name and not inspect.isabstract(value)


def zoo() -> Iterator[RandomGraph]:
    """Yield two graphs per kind and variant of block: every pass meets what it is for."""
    for kind in KINDS:
        for variant in range(4):
            block = Block(kind=kind, variant=variant, channels=8)
            before = (Block(kind="conv", channels=8, stride=2), Block(kind="conv", groups=2))
            case = build_graph(GraphSpec(blocks=(*before, block), seed=variant))
            yield case
            yield with_quantized_activations(case)


def with_quantized_activations(case: RandomGraph) -> RandomGraph:
    """Return the graph as it is after `QuantizeActivations`, every layer with another range."""
    ranges = {}
    for index, name in enumerate(weight_layers(case.graph_module)):
        scale = ActivationRange(scale=2.0 ** -(4 + index % 3), zero_point=index % 5)
        ranges[name] = LayerActivation(input=scale, output=scale)
    result = QuantizeActivations(ranges=ranges)(case.graph_module)
    return replace(case, graph_module=result.graph_module)


def cases(max_blocks: int) -> st.SearchStrategy[RandomGraph]:
    """Draw graphs as tracing leaves them, or with quantized activations."""
    plain = graphs(max_blocks=max_blocks)
    return st.one_of(plain, plain.map(with_quantized_activations))


def same_function(graph_pass: GraphPass, case: RandomGraph) -> None:
    """The result computes what the input computes, within the pass's own tolerance."""
    if not graph_pass.preserves_function:
        return
    result = graph_pass(case.graph_module).graph_module
    assert_same_function(case.graph_module, result, case.inputs, rtol=graph_pass.tolerance)


def runs(graph_pass: GraphPass, case: RandomGraph) -> None:
    """The result is executable and gives outputs of the same shapes and dtypes."""
    result = graph_pass(case.graph_module).graph_module
    with torch.no_grad():
        pairs = zip(case.graph_module(**case.inputs), result(**case.inputs), strict=True)
        for want, got in pairs:
            assert (want.shape, want.dtype) == (got.shape, got.dtype)
            assert got.isfinite().all()


def honest_modified(graph_pass: GraphPass, case: RandomGraph) -> None:
    """`modified` is true exactly if the content changed."""
    assert_modified_is_honest(graph_pass, case.graph_module)


def idempotent(graph_pass: GraphPass, case: RandomGraph) -> None:
    """A second run finds nothing to do.

    The settings may name a layer, which the sweep after a rewrite removes if nothing reads it.
    """
    if _has_dead_code(case):
        return
    once = graph_pass(case.graph_module).graph_module
    assert not graph_pass(once).modified


def _has_dead_code(case: RandomGraph) -> bool:
    return eliminate_dead_code(copy_graph_module(case.graph_module))


def input_untouched(graph_pass: GraphPass, case: RandomGraph) -> None:
    """Code, tensors and meta of the input are what they were, to the bit."""
    assert_input_untouched(graph_pass, case.graph_module)


def deterministic(graph_pass: GraphPass, case: RandomGraph) -> None:
    """Two runs give the same bits, whatever the global random state is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = graph_pass(case.graph_module).graph_module
        torch.manual_seed(2)
        state = torch.get_rng_state()
        second = graph_pass(case.graph_module).graph_module
        assert torch.equal(torch.get_rng_state(), state), "the pass drew from the global generator"
    assert digest(first) == digest(second)


def metadata_kept(graph_pass: GraphPass, case: RandomGraph) -> None:
    """Surviving nodes keep their meta; new ones have a module path and a value; meta stays."""
    before = case.graph_module
    after = graph_pass(before).graph_module
    assert {key: after.meta.get(key) for key in before.meta} == before.meta
    old = {node.name: node for node in before.graph.nodes}
    for node in after.graph.nodes:
        twin = old.get(node.name)
        if twin is not None and (twin.op, twin.target) == (node.op, node.target):
            lost = twin.meta.keys() - node.meta.keys()
            assert not lost, f"{node.name} lost its meta {lost}"
            assert node.meta.get("nn_module_stack") == twin.meta.get("nn_module_stack")
        elif node.op != "get_attr":
            assert "val" in node.meta, f"{node.name} has no value"
            if any("nn_module_stack" in source.meta for source in node.all_input_nodes):
                assert "nn_module_stack" in node.meta, f"{node.name} has no provenance"
    with torch.no_grad():
        values = [n.meta["val"] for n in next(iter(after.graph.find_nodes(op="output"))).args[0]]
        for value, got in zip(values, after(**case.inputs), strict=True):
            assert (tuple(value.shape), value.dtype) == (tuple(got.shape), got.dtype)


def survives_export(graph_pass: GraphPass, case: RandomGraph) -> None:
    """`torch.export` takes the result, and the exported program is bit-equal to it."""
    result = graph_pass(case.graph_module).graph_module
    with torch.no_grad():
        exported = torch.export.export(result, (), dict(case.inputs), strict=False).module()
    assert_same_function(result, exported, case.inputs)


def accepted_by_pass_manager(graph_pass: GraphPass, case: RandomGraph) -> None:
    """torch.fx's PassManager runs it, to the same result."""
    alone = graph_pass(case.graph_module)
    managed = PassManager([graph_pass])(case.graph_module)
    assert managed.modified == alone.modified
    assert digest(managed.graph_module) == digest(alone.graph_module)


#: The laws checked on many random graphs; `survives_export` is slower and checked on few.
LAWS = (
    same_function,
    runs,
    honest_modified,
    idempotent,
    input_untouched,
    deterministic,
    metadata_kept,
    accepted_by_pass_manager,
)
