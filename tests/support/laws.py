"""The generic laws of graph passes. `passes/test_laws.py` holds every pass to each of them.

A law is a function of a `Trial` (a pass that ran on a random graph) that asserts. Passes are found
by importing all modules of `FOLDERS`; the settings they are tried with come from
`GraphPass.examples`.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx
from torch.fx.passes.infra.pass_manager import PassManager

import mpqdm_fx.backends.lowbit.passes
import mpqdm_fx.backends.xnnpack.passes
import mpqdm_fx.passes
from mpqdm_fx.backends.lowbit.passes import MoveLayouts, UseMixedLayers, UseMixedNorms
from mpqdm_fx.graph.dynamic_chain import insert_dynamic_chain
from mpqdm_fx.graph.editing import (
    copy_graph_module,
    eliminate_dead_code,
    insert_call,
    replace_module,
)
from mpqdm_fx.graph.lanes import has_lanes
from mpqdm_fx.graph.layers import EMBEDDINGS, weight_layers
from mpqdm_fx.passes.base import GraphPass, PassResult, Pipeline
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.passes.quantize.scale_inputs import ScaleInputs
from mpqdm_fx.records.activations import ActivationRange, StaticActivation
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

aten = torch.ops.aten

#: Packages that hold passes, and nothing else.
FOLDERS = (
    mpqdm_fx.passes,
    mpqdm_fx.backends.xnnpack.passes,
    mpqdm_fx.backends.lowbit.passes,
)


def discover_passes() -> list[type[GraphPass]]:
    """Return every concrete pass class that a module of `FOLDERS` defines."""
    infos = [i for f in FOLDERS for i in pkgutil.walk_packages(f.__path__, f"{f.__name__}.")]
    modules = [importlib.import_module(i.name) for i in infos if not i.name.endswith(".base")]
    classes = [cls for m in modules for cls in vars(m).values() if _is_pass_of(m.__name__, cls)]
    return sorted(classes, key=lambda cls: cls.__name__)


def _is_pass_of(module_name: str, value: object) -> bool:
    if not (isinstance(value, type) and issubclass(value, GraphPass)):
        return False
    return value.__module__ == module_name and not inspect.isabstract(value)


@functools.cache
def zoo(stride: int = 1) -> tuple[RandomGraph, ...]:
    """Return graphs with each kind and variant of block: every pass meets what it is for.

    Each comes four times: plain, with quantized activations, with chains that quantize at run
    time, and with layers in own operators. `stride` thins them out.
    """
    plain = list(_plain_zoo(stride))
    return (
        *plain,
        *map(with_quantized_activations, plain),
        *map(with_dynamic_chains, plain),
        *map(with_own_operators, plain),
    )


def with_rounded_tables(case: RandomGraph) -> RandomGraph:
    """The same graph with codes and scales in its embeddings."""
    graph = copy_graph_module(case.graph_module)
    for name, layer in weight_layers(graph, embeddings=True).items():
        if isinstance(layer.module, EMBEDDINGS):
            rows = layer.weight.detach()
            scale = (rows.abs().amax(1) / 127).clamp(min=1e-30).to(torch.bfloat16).float()
            codes = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
            replace_module(graph, name, install_codes(layer.module, codes, scale))
    return replace(case, graph_module=graph)


def with_fetched_weights(case: RandomGraph) -> RandomGraph:
    """The same graph in which each layer's result is multiplied by one of its weights as well."""
    graph = copy_graph_module(case.graph_module)
    for name, layer in weight_layers(graph).items():
        call = layer.nodes[0]
        with graph.graph.inserting_before(call):
            weight = graph.graph.get_attr(f"{name}.weight")
        mode = call.meta["val"].fake_mode
        weight.meta = {**call.meta, "val": mode.from_tensor(layer.weight, static_shapes=True)}
        row = insert_call(graph, aten.flatten.using_ints, (weight,), anchor=call)
        one = insert_call(graph, aten.select.int, (row, 0, 1), anchor=call)
        product = insert_call(graph, aten.mul.Tensor, (call, one), anchor=call.next)
        product.meta["nn_module_stack"] = call.meta["nn_module_stack"]
        for user in [user for user in call.users if user is not product]:
            user.replace_input_with(call, product)
    graph.graph.lint()
    graph.recompile()
    return replace(case, graph_module=graph)


@functools.cache
def weight_fetching_zoo() -> tuple[RandomGraph, ...]:
    """Return graphs that read the weights of their layers beside calling them."""
    first = Block(kind="conv", channels=8, kernel=1)
    return tuple(
        with_fetched_weights(build_graph(GraphSpec(blocks=(first, Block(kind=kind, channels=8)))))
        for kind in ("conv", "geglu", "skip_concat", "batch_norm", "patches", "sequences")
    )


def _plain_zoo(stride: int) -> Iterator[RandomGraph]:
    for index, kind in enumerate(KINDS):
        for variant in range(4):
            if (index + variant) % stride:
                continue
            block = Block(kind=kind, variant=variant, channels=8)
            before = (Block(kind="conv", channels=8, stride=2), Block(kind="conv", groups=2))
            yield build_graph(GraphSpec(blocks=(*before, block), seed=variant))
    pointwise = Block(kind="conv", channels=8, kernel=1)
    for seed in (0, 3):
        yield build_graph(GraphSpec(blocks=(Block(kind="conv", channels=8), pointwise), seed=seed))
    table = Block(kind="time_embedding", variant=1, channels=8)
    yield with_rounded_tables(
        build_graph(GraphSpec(blocks=(Block(kind="conv", channels=8), table)))
    )
    yield from weight_fetching_zoo()[:1]


def with_quantized_activations(case: RandomGraph) -> RandomGraph:
    """Return the graph as it is after `QuantizeActivations`, every layer with another range."""
    ranges = {}
    for index, name in enumerate(weight_layers(case.graph_module)):
        scale = ActivationRange(scale=2.0 ** -(4 + index % 3), zero_point=index % 5)
        ranges[name] = StaticActivation(input=scale, output=scale)
    result = QuantizeActivations(ranges=ranges)(case.graph_module)
    return replace(case, graph_module=result.graph_module)


def with_dynamic_chains(case: RandomGraph) -> RandomGraph:
    """Return the case with quantizer chains in its graph."""
    return replace(case, graph_module=chained(case.graph_module))


def with_own_operators(case: RandomGraph) -> RandomGraph:
    """Return the case with its layers in own operators and permutations around them.

    If its seed is odd, with norms in own operators too, and permutations where they copy least.
    Ranges are chosen at run time, and channels of every second input scaled; those of every second
    pair of seeds are fixed, and none is scaled.
    """
    examples = UseMixedLayers.examples(case.graph_module)
    passes: tuple[GraphPass, ...] = (examples[case.spec.seed // 2 % len(examples)],)
    if case.spec.seed % 4 < 2:
        factors = ScaleInputs.examples(case.graph_module)[0].factors
        passes = (ScaleInputs(factors=dict([*factors.items()][::2])), *passes)
    if case.spec.seed % 2:
        passes = (*passes, UseMixedNorms(), MoveLayouts())
    return replace(case, graph_module=Pipeline(passes=passes)(case.graph_module).graph_module)


def chained(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with quantizer chains as PT2E writes them: one per value, for all layers."""
    graph_module = copy_graph_module(graph_module)
    chains: dict[fx.Node, fx.Node] = {}
    for layer in weight_layers(graph_module).values():
        for call in layer.nodes:
            value = call.args[0]
            assert isinstance(value, fx.Node)
            if value not in chains:
                chains[value] = insert_dynamic_chain(graph_module, value).dequantize
            call.update_arg(0, chains[value])
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def cases(max_blocks: int) -> st.SearchStrategy[RandomGraph]:
    """Draw graphs as tracing leaves them, or with quantized activations or own operators."""
    plain = graphs(max_blocks=max_blocks)
    return st.one_of(
        plain,
        plain.map(with_quantized_activations),
        plain.map(with_dynamic_chains),
        plain.map(with_own_operators),
    )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A pass, a graph, and two runs of the one on the other under different random states."""

    graph_pass: GraphPass
    case: RandomGraph
    result: PassResult
    again: PassResult

    @property
    def before(self) -> fx.GraphModule:
        return self.case.graph_module

    @property
    def after(self) -> fx.GraphModule:
        return self.result.graph_module


def try_pass(graph_pass: GraphPass, case: RandomGraph) -> Trial:
    """Run the pass; asserts here that it is honest about `modified` and leaves its input alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        result = assert_input_untouched(graph_pass, case.graph_module)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        again = assert_modified_is_honest(graph_pass, case.graph_module)
        assert torch.equal(torch.get_rng_state(), state), "the pass drew from the global generator"
    return Trial(graph_pass=graph_pass, case=case, result=result, again=again)


def same_function(trial: Trial) -> None:
    """The result computes what the input computes, within the pass's own tolerance."""
    if trial.graph_pass.preserves_function:
        rtol = trial.graph_pass.tolerance
        assert_same_function(trial.before, trial.after, trial.case.inputs, rtol=rtol)


def runs(trial: Trial) -> None:
    """The result is executable and gives finite outputs of the same shapes and dtypes.

    A graph with two lanes returns such outputs twice.
    """
    inputs = trial.case.inputs
    with torch.no_grad():
        before, after = trial.before(**inputs), trial.after(**inputs)
    added = has_lanes(trial.after) and not has_lanes(trial.before)
    for lane in after if added else (after,):
        for expected, actual in zip(before, lane, strict=True):
            assert (expected.shape, expected.dtype) == (actual.shape, actual.dtype)
            assert actual.isfinite().all()


def deterministic(trial: Trial) -> None:
    """Two runs give the same bits, whatever the global random state is."""
    assert digest(trial.after) == digest(trial.again.graph_module)


def idempotent(trial: Trial) -> None:
    """A second run finds nothing to do.

    The settings may name a layer, which the sweep after a rewrite removes if nothing reads it.
    """
    if not eliminate_dead_code(copy_graph_module(trial.before)):
        assert not trial.graph_pass(trial.after).modified


def metadata_kept(trial: Trial) -> None:
    """Surviving nodes keep their meta; new ones have a module path and a value; meta stays."""
    assert {key: trial.after.meta.get(key) for key in trial.before.meta} == trial.before.meta
    old = {node.name: node for node in trial.before.graph.nodes}
    for node in trial.after.graph.nodes:
        twin = old.get(node.name)
        if twin is not None and (twin.op, twin.target) == (node.op, node.target):
            lost = twin.meta.keys() - node.meta.keys()
            assert not lost, f"{node.name} lost its meta {lost}"
            assert node.meta.get("nn_module_stack") == twin.meta.get("nn_module_stack")
        elif node.op != "get_attr":
            assert "val" in node.meta, f"{node.name} has no value"
            if any("nn_module_stack" in source.meta for source in node.all_input_nodes):
                assert "nn_module_stack" in node.meta, f"{node.name} has no provenance"


def values_are_true(trial: Trial) -> None:
    """Every `val` has the shape and dtype that the node really computes."""
    with torch.no_grad():
        _CheckValues(trial.after).run(*trial.case.inputs.values())


class _CheckValues(fx.Interpreter):
    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, torch.Tensor) and node.op != "get_attr":
            value = node.meta["val"]
            kinds = [(tuple(t.shape), t.dtype) for t in (value, result)]
            assert kinds[0] == kinds[1], f"{node.name} says {kinds[0]}, computes {kinds[1]}"
        return result


def accepted_by_pass_manager(trial: Trial) -> None:
    """torch.fx's PassManager runs it, to the same result."""
    managed = PassManager([trial.graph_pass])(trial.before)
    assert managed.modified == trial.result.modified
    assert digest(managed.graph_module) == digest(trial.after)


def survives_export(graph_pass: GraphPass, case: RandomGraph) -> None:
    """`torch.export` takes the result, and the exported program is bit-equal to it."""
    result = graph_pass(case.graph_module).graph_module
    with torch.no_grad():
        exported = torch.export.export(result, (), dict(case.inputs), strict=False).module()
    assert_same_function(result, exported, case.inputs)


#: The laws checked on many random graphs; `survives_export` is slower and checked on few.
LAWS = (
    same_function,
    runs,
    deterministic,
    idempotent,
    metadata_kept,
    values_are_true,
    accepted_by_pass_manager,
)
