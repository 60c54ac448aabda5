"""Layer norms and RMS norms in plain ops compute what the fused ops compute."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import assert_close, draw, outputs, randomized, targets, traced, traced_in
from small import Twice
from torch import nn
from torch.nn.functional import layer_norm, rms_norm

from mpqdm_fx.backends.xnnpack.passes.decompose_layer_norm import DecomposeLayerNorm

aten = torch.ops.aten

FUSED = {
    nn.LayerNorm,
    nn.RMSNorm,
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
}


def decomposed(graph):
    result = DecomposeLayerNorm()(graph)
    assert result.modified
    assert not targets(result.graph_module) & FUSED
    return result.graph_module


@given(
    leading=st.sampled_from([(3,), (2, 5), (1, 1), (2, 3, 4), (2, 3, 2, 2)]),
    channels=st.integers(1, 9),
    parameters=st.sampled_from(["both", "weight", "none"]),
    kind=st.sampled_from([nn.LayerNorm, nn.RMSNorm]),
    seed=st.integers(0, 99),
)
def test_every_rank_gives_the_same_numbers(leading, channels, parameters, kind, seed):
    settings = {"elementwise_affine": parameters != "none"}
    if kind is nn.LayerNorm:
        settings["bias"] = parameters == "both"
    norm = randomized(kind(channels, **settings), seed)
    x = (draw(*leading, channels, seed=seed) * 2 + 3).float()
    graph = traced(nn.Sequential(norm), x, dynamic_batch=False)
    assert_close(outputs(decomposed(graph), x), outputs(graph, x), rtol=2e-5)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_means_are_what_xnnpack_takes(kind):
    for leading in [(3,), (2, 5), (2, 3, 4), (2, 3, 2, 2)]:
        x = draw(*leading, 6).float()
        plain = decomposed(traced(nn.Sequential(kind(6)), x))
        means = [n for n in plain.graph.nodes if n.target is aten.mean.dim]
        assert len(means) == (2 if kind is nn.LayerNorm else 1)
        for mean in means:
            assert mean.args[0].meta["val"].dim() == 4
            assert mean.args[1:] == ([-2, -1], True)


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (-1e4, 10.0), (0.0, 1e6)])
def test_large_mean_costs_no_accuracy(mean, std):
    x = draw(2, 7, 48, mean=mean, std=std).float()
    graph = traced(nn.Sequential(nn.LayerNorm(48, eps=0.0)), x)
    exact = layer_norm(x.double(), (48,), eps=0.0)
    error = (outputs(decomposed(graph), x) - exact).abs().max()
    assert error <= 4 * abs(mean) / std * 2**-24 + 4e-6


@given(batch=st.integers(1, 5), rank=st.sampled_from([2, 3, 4]))
def test_batch_stays_dynamic(batch, rank):
    middle = (4, 3)[: rank - 2]
    norm = randomized(nn.LayerNorm(6))
    graph = traced(nn.Sequential(norm), draw(2, *middle, 6).float())
    x = draw(batch, *middle, 6, seed=1).float()
    assert_close(outputs(decomposed(graph), x), outputs(graph, x))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: layer_norm(x, (6,), m.w, m.b, 0.1),
        lambda m, x: layer_norm(x, (6,)),
        lambda m, x: aten.native_layer_norm(x, (6,), m.w, m.b, 0.1)[0],
    ],
)
def test_functional_layer_norm_is_covered(function):
    x = draw(2, 5, 6).float()
    graph = traced(function, x, w=draw(6, seed=1).float(), b=draw(6, seed=2).float())
    assert targets(graph) & FUSED
    assert_close(outputs(decomposed(graph), x), outputs(graph, x))


@pytest.mark.parametrize("eps", [None, 0.1])
def test_functional_rms_norm_is_covered(eps):
    x = draw(2, 5, 6).float() * 1e-3
    graph = traced(lambda m, x: rms_norm(x, (6,), m.w, eps), x, w=draw(6, seed=1).float())
    assert targets(graph) & FUSED
    assert_close(outputs(decomposed(graph), x), outputs(graph, x))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: layer_norm(x, (5, 6)),
        lambda m, x: layer_norm(x, (6,), x[0, 0]),
        lambda m, x: (
            aten.native_layer_norm(x, (6,), None, None, 0.1)[0] * x.mean()
            + aten.native_layer_norm(x, (6,), None, None, 0.1)[1]
        ),
    ],
)
def test_what_the_rules_do_not_cover_is_left_alone(function):
    x = draw(2, 5, 6).float()
    graph = traced(function, x, dynamic_batch=False)
    before = sum(t in FUSED for t in (n.target for n in graph.graph.nodes))
    plain = DecomposeLayerNorm()(graph).graph_module
    after = sum(t in FUSED for t in (n.target for n in plain.graph.nodes))
    assert after == 1 <= before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_are_left_alone(dtype):
    graph = traced_in(dtype, nn.Sequential(nn.LayerNorm(6)), draw(2, 5, 6))
    assert not DecomposeLayerNorm()(graph).modified


def test_norm_that_is_called_twice_has_constants_for_each_call():
    norm = randomized(nn.LayerNorm(6))
    x = draw(2, 5, 6).float()
    graph = traced(Twice(norm), x)
    assert len(graph.graph.find_nodes(op="call_module", target="layer")) == 2
    plain = decomposed(graph)
    assert_close(outputs(plain, x), outputs(graph, x))
    fetched = [n.target for n in plain.graph.nodes if n.op == "get_attr"]
    assert len(fetched) == len(set(fetched)) == 4
