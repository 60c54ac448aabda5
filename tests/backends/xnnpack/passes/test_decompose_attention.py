"""Attention in plain ops computes what the fused op computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

from mpqdm_fx.backends.xnnpack.passes.decompose_attention import DecomposeAttention
from mpqdm_fx.capture.trace import trace

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Fused(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q, k, v, mask=None):
        return attention(q, k, v, attn_mask=mask, **self.settings)


def make_inputs(leading, length, source, dim, value_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*leading, *shape, generator=generator)

    return {"q": draw(length, dim), "k": draw(source, dim), "v": draw(source, value_dim)}


def fused_nodes(graph):
    return graph.graph.find_nodes(op="call_function", target=SDPA)


def decompose(inputs, **settings):
    graph = trace(Fused(**settings).eval(), inputs)
    assert len(fused_nodes(graph)) == 1
    return graph, DecomposeAttention()(graph)


def assert_close(graph, result, inputs):
    expected, actual = graph(**inputs), result.graph_module(**inputs)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


@given(
    leading=st.sampled_from([(2,), (3, 2), (2, 3, 2)]),
    length=st.integers(1, 6),
    source=st.integers(1, 6),
    dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_plain_ops_give_the_fused_result(leading, length, source, dim, value_dim, scale, seed):
    inputs = make_inputs(leading, length, source, dim, value_dim, seed)
    graph, result = decompose(inputs, scale=scale)
    assert not fused_nodes(result.graph_module)
    assert_close(graph, result, inputs)


def test_only_plain_delegated_ops_are_used():
    _, result = decompose(make_inputs((2, 3), 4, 5, 8, 8))
    names = {str(n.target) for n in result.graph_module.graph.nodes if n.op == "call_function"}
    assert names <= {
        "aten.reshape.default",
        "aten.transpose.int",
        "aten.mul.Tensor",
        "aten.bmm.default",
        "aten.softmax.int",
        "aten.sym_size.int",
    }


@pytest.mark.parametrize("shape", [(4, 5), (2, 1, 4, 5), (2, 3, 4, 5), (2, 1, 1, 5)])
def test_float_mask_is_added(shape):
    inputs = {**make_inputs((2, 3), 4, 5, 8, 8), "mask": torch.randn(shape)}
    graph, result = decompose(inputs)
    assert_close(graph, result, inputs)


def test_boolean_mask_removes_positions():
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[0, :, :, 3:] = False
    mask[1, :, 2, 0] = False
    inputs = {**make_inputs((2, 3), 4, 5, 8, 8), "mask": mask}
    graph, result = decompose(inputs)
    assert_close(graph, result, inputs)
    changed = {**inputs, "v": inputs["v"].clone()}
    changed["v"][0, :, 3:] = 1e6
    assert torch.equal(result.graph_module(**changed)[0], result.graph_module(**inputs)[0]), (
        "what is masked out has no influence at all"
    )


@settings(max_examples=20)
@given(
    length=st.integers(1, 9),
    most=st.integers(1, 60),
    mask=st.sampled_from([None, (1, 5), (0, 5), (2, 1, 0, 5), (2, 3, 0, 5), (2, 1, 1, 5)]),
    seed=st.integers(0, 2**16),
)
def test_runs_of_queries_give_the_same_rows(length, most, mask, seed):
    inputs = make_inputs((2, 3), length, 5, 4, 3, seed)
    if mask is not None:
        inputs["mask"] = torch.randn([size or length for size in mask])
    graph = trace(Fused().eval(), inputs, dynamic_batch=False)
    result = DecomposeAttention(most_scores=most)(graph)
    assert_close(graph, result, inputs)
    nodes = result.graph_module.graph.nodes
    scores = [n.meta["val"].numel() for n in nodes if n.target is torch.ops.aten.softmax.int]
    assert sum(scores) == 2 * 3 * length * 5
    assert max(scores) <= max(most, 2 * 3 * 5)  # a run has one query at least


def test_other_batch_sizes_run_too():
    graph, result = decompose(make_inputs((2, 3), 4, 5, 8, 8))
    assert_close(graph, result, make_inputs((5, 3), 4, 5, 8, 8, seed=1))


@pytest.mark.parametrize("settings", [{"is_causal": True}, {"enable_gqa": True}])
def test_what_the_rules_do_not_cover_is_left_alone(settings):
    inputs = make_inputs((2, 4), 5, 5, 8, 8)
    if "enable_gqa" in settings:
        inputs["k"], inputs["v"] = inputs["k"][:, :2], inputs["v"][:, :2]
    _, result = decompose(inputs, **settings)
    assert not result.modified


def test_graph_without_attention_is_left_alone():
    graph = trace(nn.Sequential(nn.Linear(2, 2)).eval(), {"input": torch.randn(1, 2)})
    assert not DecomposeAttention()(graph).modified
