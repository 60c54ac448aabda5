"""Tests of the test strategies: they cover what they claim; their graphs are what tracing makes."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import zoo
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.testing import (
    FAMILIES,
    KINDS,
    Block,
    GraphSpec,
    assert_same_function,
    bit_plans,
    bit_vectors,
    build_graph,
    count,
    digest,
    graphs,
    make_weight,
    weights,
)

aten = torch.ops.aten


def _operations(graph_module) -> Counter:
    """Count what a graph calls: module classes and functions."""
    return Counter(
        type(graph_module.get_submodule(n.target)).__name__ if n.op == "call_module" else n.target
        for n in graph_module.graph.nodes
        if n.op.startswith("call")
    )


# --- graphs


@given(case=graphs())
def test_drawn_graphs_run_to_finite_outputs_of_moderate_size(case):
    case.graph_module.graph.lint()
    with torch.no_grad():
        outputs = case.graph_module(**case.inputs)
    for output in outputs:
        assert output.isfinite().all()
        assert output.abs().max() < 1e3
        assert output.shape[0] == case.spec.batch


@given(case=graphs())
def test_every_node_has_the_value_and_the_path_that_tracing_gives(case):
    for node in case.graph_module.graph.nodes:
        if node.op.startswith("call"):
            assert "val" in node.meta
            path, kind = list(node.meta["nn_module_stack"].values())[-1]
            if node.op == "call_module":
                assert path == node.target
                assert kind == type(case.graph_module.get_submodule(path)).__name__
    assert not any(p.requires_grad for p in case.graph_module.parameters())
    signature = case.graph_module.meta["signature"]
    assert signature.arguments == tuple(case.inputs)
    assert signature.normalize((), case.inputs).keys() == case.inputs.keys()


@settings(max_examples=5)
@example(case=build_graph(GraphSpec(blocks=tuple(Block(kind=kind) for kind in KINDS))))
@given(case=graphs(max_blocks=4))
def test_traced_twin_is_the_same_graph(case):
    # the graph as a plain module, sent down the real road
    twin = trace(case.graph_module, dict(case.inputs), dynamic_batch=False)
    assert_same_function(case.graph_module, twin, case.inputs)
    built, traced = (_operations(g) - _dead_operations(g) for g in (case.graph_module, twin))
    # what the export adds or folds on its own account
    loose = {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten.sym_size.int,
        torch.ops.aten.to.dtype,
        *(op for op in built if getattr(op, "__name__", "") == "ge"),
    }
    assert {op: n for op, n in built.items() if op not in loose} == {
        op: n for op, n in traced.items() if op not in loose
    }


def _dead_operations(graph_module) -> Counter:
    convolutions = [n for n in graph_module.graph.nodes if n.op == "call_module" and not n.users]
    return Counter({"Conv2d": len(convolutions)})


@pytest.fixture(scope="module")
def unets():
    return [
        trace(tiny_unet(), unet_calls(calls=1)[0]),
        trace(tiny_condition_unet(), condition_calls(calls=1)[0]),
    ]


def test_what_traced_unets_compute_occurs_in_random_graphs(unets):
    random = set().union(*(_operations(case.graph_module) for case in zoo()))
    wanted = set().union(*map(_operations, unets))
    # plumbing of shapes and of the sinusoidal table, which no pass looks at
    plumbing = {
        aten.arange.start_step,
        aten.arange.default,
        aten.arange.start,
        aten.exp.default,
        aten.ones.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.slice.Tensor,
        aten.expand.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.sym_size.int,
        aten.view.default,
        aten.flatten.using_ints,
    }
    missing = {op for op in wanted - random - plumbing if not _is_arithmetic(op)}
    assert not missing


def _is_arithmetic(op) -> bool:
    return getattr(op, "__module__", "") in ("_operator", "math", "torch.sym_float")


def test_every_kind_and_the_awkward_cases_are_drawn():
    seen: set[str] = set()

    @settings(max_examples=300, derandomize=True, database=None)
    @given(case=graphs())
    def look(case):
        seen.update(block.kind for block in case.spec.blocks)
        seen.add(f"tail {case.spec.tail}")
        layers = weight_layers(case.graph_module)
        if any(len(layer.nodes) > 1 for layer in layers.values()):
            seen.add("called twice")
        output = case.graph_module.graph.find_nodes(op="output")[0].args[0][0]
        if any(output in layer.nodes for layer in layers.values()):
            seen.add("weight layer as output")
        if not layers:
            seen.add("no weight layer")
        for layer in layers.values():
            if not any(n.users for n in layer.nodes):
                seen.add("dead layer")
            if getattr(layer.module, "groups", 1) > 1:
                seen.add("grouped")
            if layer.module.bias is None:
                seen.add("no bias")
            if getattr(layer.module, "stride", (1,)) == (2, 2):
                seen.add("strided")
            seen.add(getattr(layer.module, "padding_mode", "zeros"))

    look()
    assert seen >= {
        *KINDS,
        "tail block",
        "tail conv",
        "tail several",
        "called twice",
        "weight layer as output",
        "no weight layer",
        "dead layer",
        "grouped",
        "no bias",
        "strided",
        "circular",
    }


@given(case=graphs(max_blocks=3))
def test_building_a_spec_again_gives_the_same_bits(case):
    again = build_graph(case.spec)
    assert digest(again.graph_module) == digest(case.graph_module)
    assert all(torch.equal(again.inputs[name], case.inputs[name]) for name in case.inputs)


def test_building_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    build_graph(GraphSpec(blocks=tuple(Block(kind=kind) for kind in KINDS)))
    make_weight("student_t", 3, 4, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_activation_object_serves_the_whole_graph():
    blocks = (Block(kind="residual"), Block(kind="residual"))
    assert count(build_graph(GraphSpec(blocks=blocks)).graph_module, nn.SiLU) == 2
    names = dict(build_graph(GraphSpec(blocks=blocks)).graph_module.named_modules())
    assert sum(isinstance(m, nn.SiLU) for m in names.values()) == 1


def test_drawing_from_chosen_kinds_draws_only_those():
    @settings(max_examples=20, derandomize=True, database=None)
    @given(case=graphs(kinds=["geglu", "linear"], min_blocks=2, max_blocks=2))
    def look(case):
        assert len(case.spec.blocks) == 2
        assert {block.kind for block in case.spec.blocks} <= {"geglu", "linear"}

    look()


# --- weights


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_finite_float32_and_reproducible(family):
    for seed in range(20):
        weight = make_weight(family, 5, 7, seed)
        assert weight.shape == (5, 7)
        assert weight.dtype == torch.float32
        assert weight.isfinite().all()
        assert torch.equal(weight, make_weight(family, 5, 7, seed))
    assert not torch.equal(make_weight(family, 5, 7, 0), make_weight(family, 5, 7, 1))


def _kurtosis(x: torch.Tensor) -> float:
    z = (x - x.mean()) / x.std(correction=0)
    return float(z.pow(4).mean())


def test_families_are_what_they_are_called():
    many = {family: make_weight(family, 50, 400, 3) for family in FAMILIES}
    assert math.isclose(float(many["normal"].std()), 0.1, rel_tol=0.05)
    assert _kurtosis(many["normal"]) < 4 < _kurtosis(many["student_t"])
    rows = many["outlier_row"].abs().amax(1).sort().values
    assert rows[-1] > 10 * rows[-2]
    single = make_weight("outlier_element", 6, 8, 0).abs().flatten().sort().values
    assert single[-1] > 2 * single[-2]
    assert len(many["constant"].unique()) == 1
    zero = (many["zero_rows"] == 0).all(1)
    assert 0 < zero.sum() < 50
    assert 1e-22 < many["tiny"].abs().max() < 1e-18
    assert 1e9 < many["huge"].abs().max() < 1e12


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match="outlier_row"):
        make_weight("cauchy", 1, 1, 0)


def test_every_family_and_the_smallest_matrix_are_drawn():
    seen: set = set()

    @settings(max_examples=300, derandomize=True, database=None)
    @given(weight=weights())
    def look(weight):
        rows, columns = weight.shape
        assert 1 <= rows <= 12
        assert 1 <= columns <= 48
        seen.add("one row" if rows == 1 else "rows")
        seen.add("one column" if columns == 1 else "columns")
        top = float(weight.abs().max())
        seen.add("huge" if top > 1e8 else "tiny" if top < 1e-15 else "plain")
        if rows * columns > 3 and len(weight.unique()) == 1:
            seen.add("constant")
        if bool((weight == 0).all(1).any()):
            seen.add("zero row")

    look()
    assert seen == {
        *("one row", "rows", "one column", "columns"),
        *("huge", "tiny", "plain", "constant", "zero row"),
    }


# --- bits and plans


@given(data=st.data(), rows=st.integers(1, 20))
def test_bit_vectors_have_one_legal_width_per_row(data, rows):
    bits = data.draw(bit_vectors(rows, ladder=(2, 3, 8)))
    assert bits.shape == (rows,)
    assert bits.dtype == torch.int64
    assert set(bits.tolist()) <= {2, 3, 8}


@given(data=st.data(), case=graphs(max_blocks=3))
def test_plans_fit_their_graph_and_survive_json(data, case):
    plan = data.draw(bit_plans(case.graph_module))
    layers = weight_layers(case.graph_module, embeddings=True)
    for planned in plan.layers:
        assert planned.shape == tuple(layers[planned.name].weight.shape)
        assert len(planned.bits) == planned.shape[0]
    assert type(plan).from_json(plan.to_json()) == plan


def test_plans_leave_layers_out_and_mix_widths():
    case = build_graph(GraphSpec(blocks=(Block(kind="attention"), Block(kind="geglu"))))
    seen: set = set()

    @settings(max_examples=50, derandomize=True, database=None)
    @given(plan=bit_plans(case.graph_module))
    def look(plan):
        seen.add("partial" if len(plan.layers) < 6 else "all")
        for planned in plan.layers:
            seen.add("mixed" if len(set(planned.bits)) > 1 else "one width")
            seen.update(planned.bits)
            seen.add(planned.levels)

    look()
    assert seen >= {"partial", "all", "mixed", "one width", "uniform", "codebook", *range(1, 9)}
