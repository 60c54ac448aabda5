"""Group norms in plain ops compute what the fused op computes, whatever the mean."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import assert_close, draw, outputs, randomized, targets, traced, traced_in
from small import Twice
from torch import nn

from mpqdm_fx.backends.xnnpack.passes.decompose_group_norm import DecomposeGroupNorm
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.editing import copy_graph_module

aten = torch.ops.aten


def decomposed(graph):
    result = DecomposeGroupNorm()(graph)
    assert result.modified
    left = targets(result.graph_module)
    assert not left & {nn.GroupNorm, aten.group_norm.default, aten.native_group_norm.default}
    return result.graph_module


@given(
    groups=st.integers(1, 4),
    width=st.integers(1, 4),
    space=st.sampled_from([(), (7,), (3, 5), (1, 1), (2, 3, 5)]),
    batch=st.integers(2, 3),  # torch refuses one value per channel
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_rank_and_group_size_gives_the_same_numbers(
    groups, width, space, batch, affine, seed
):
    channels = groups * width
    norm = randomized(nn.GroupNorm(groups, channels, affine=affine), seed)
    # spread and offset differ by channel, so that channels of a group are far apart
    factor = torch.arange(1, channels + 1).reshape(1, -1, *[1] * len(space))
    x = (draw(batch, channels, *space, seed=seed) * factor + 3 * factor).float()
    graph = traced(nn.Sequential(norm), x, dynamic_batch=False)
    # In double: of a single number per group the fused op in float32 gives back its rounding error,
    # multiplied by 1 / sqrt(eps).
    exact = copy.deepcopy(norm).double()(x.double()).detach().float()
    assert_close(outputs(decomposed(graph), x), exact)


def test_no_value_has_more_than_four_axes_and_means_are_what_xnnpack_takes():
    norm = randomized(nn.GroupNorm(2, 6))
    for space in [(7,), (5, 4), (2, 3, 5)]:
        x = draw(2, 6, *space).float()
        plain = decomposed(traced(nn.Sequential(norm), x))
        new = [n for n in plain.graph.nodes if n.op == "call_function"]
        assert max(n.meta["val"].dim() for n in new) <= max(4, x.dim())
        means = [n for n in new if n.target is aten.mean.dim]
        assert len(means) == 4
        for mean in means:
            assert mean.args[0].meta["val"].dim() == 4
            assert mean.args[1:] == ([-2, -1], True)


def test_image_is_never_viewed():
    x = draw(2, 6, 5, 4).float()
    plain = decomposed(traced(nn.Sequential(nn.GroupNorm(2, 6)), x, dynamic_batch=False))
    views = [n for n in plain.graph.nodes if n.target is aten.reshape.default]
    assert views
    assert all(n.meta["val"].numel() <= 2 * 6 for n in views)


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (-1e4, 10.0), (1e-3, 1e-6), (0.0, 1e6)])
@pytest.mark.parametrize("shape", [(2, 6, 9, 13), (2, 6, 40)])
def test_large_mean_costs_no_accuracy(mean, std, shape):
    x = draw(*shape, mean=mean, std=std).float()
    graph = traced(nn.Sequential(nn.GroupNorm(3, 6, eps=0.0)), x)
    exact = torch.nn.functional.group_norm(x.double(), 3, eps=0.0)
    error = (outputs(decomposed(graph), x) - exact).abs().max()
    stock = (outputs(graph, x) - exact).abs().max()
    # mean / std times the unit roundoff is what the input itself is uncertain by
    assert error <= 4 * abs(mean) / std * 2**-24 + 4e-6
    assert error <= 4 * stock + 4e-6


def test_constant_input_gives_the_bias():
    norm = randomized(nn.GroupNorm(2, 4))
    x = torch.full((2, 4, 3, 5), 7.0)
    actual = outputs(decomposed(traced(nn.Sequential(norm), x)), x)
    assert torch.allclose(actual, norm.bias.detach()[:, None, None].expand_as(x), atol=1e-6)


@given(batch=st.integers(1, 5), rank=st.sampled_from([2, 3, 4, 5]))
def test_batch_stays_dynamic(batch, rank):
    space = (4, 3, 5)[: rank - 2]
    norm = randomized(nn.GroupNorm(2, 6))
    graph = traced(nn.Sequential(norm), draw(2, 6, *space).float())
    x = draw(batch, 6, *space, seed=1).float()
    assert_close(outputs(decomposed(graph), x), outputs(graph, x))


def test_image_may_have_all_but_its_channels_dynamic():
    norm = randomized(nn.GroupNorm(2, 6))
    graph = traced(nn.Sequential(norm), draw(2, 6, 5, 4).float())
    size = torch.export.Dim.DYNAMIC
    shapes = ({0: size, 2: size, 3: size},)
    x = draw(2, 6, 5, 4).float()
    program = torch.export.export(decomposed(graph), (x,), dynamic_shapes=shapes).module()
    larger = draw(3, 6, 7, 9).float()
    assert_close(outputs(program, larger), norm(larger).detach())


class Aten(nn.Module):
    def __init__(self, affine=True) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(6, seed=3).float()) if affine else None
        self.bias = nn.Parameter(draw(6, seed=4).float()) if affine else None

    def forward(self, x):
        return torch.nn.functional.group_norm(x, 2, self.weight, self.bias, eps=0.1)


@pytest.mark.parametrize("affine", [True, False])
def test_functional_call_is_covered(affine):
    x = draw(2, 6, 5, 7).float()
    model = nn.Sequential(Aten(affine))
    graph = trace(model.eval(), (x,))
    assert aten.group_norm.default in targets(graph)
    plain = decomposed(graph)
    assert_close(outputs(plain, x), outputs(graph, x))
    buffers = set(dict(plain.named_buffers()))
    assert len(buffers) == (2 if affine else 1)
    assert all(name.startswith("0.") for name in buffers)


def native(reads):
    def call(module, x):
        return reads(aten.native_group_norm(x, module.w, None, 2, 6, 35, 2, 1e-5))

    return call


def test_native_form_is_covered_unless_its_statistics_are_read():
    x, w = draw(2, 6, 5, 7).float(), draw(6).float()
    first = traced(native(lambda r: r[0]), x, dynamic_batch=False, w=w)
    assert_close(outputs(decomposed(first), x), outputs(first, x))
    second = traced(native(lambda r: r[0] * r[1].mean()), x, dynamic_batch=False, w=w)
    assert not DecomposeGroupNorm()(second).modified


def test_weight_that_is_computed_is_left_alone():
    x = draw(2, 6, 5, 7).float()
    graph = traced(lambda m, x: torch.group_norm(x, 2, x[0, :, 0, 0]), x)
    assert not DecomposeGroupNorm()(graph).modified


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_are_left_alone(dtype):
    graph = traced_in(dtype, nn.Sequential(nn.GroupNorm(2, 6)), draw(2, 6, 5, 7))
    assert not DecomposeGroupNorm()(graph).modified


def test_double_precision_is_kept():
    x = draw(2, 6, 5, 7)
    graph = traced_in(torch.float64, nn.Sequential(randomized(nn.GroupNorm(2, 6))), x)
    assert_close(outputs(decomposed(graph), x), outputs(graph, x), rtol=1e-13)


def test_norm_that_is_called_twice_has_constants_for_each_call():
    norm = randomized(nn.GroupNorm(2, 6))
    x = draw(2, 6, 5, 7).float()
    graph = traced(Twice(norm), x)
    assert len(graph.graph.find_nodes(op="call_module", target="layer")) == 2
    plain = decomposed(graph)
    assert_close(outputs(plain, x), outputs(graph, x))
    fetched = [n.target for n in plain.graph.nodes if n.op == "get_attr"]
    assert len(fetched) == len(set(fetched)) == 4


def test_parameters_keep_the_norm_s_name_and_survive_copies_and_exports():
    norm = randomized(nn.GroupNorm(2, 6))
    x = draw(2, 6, 5, 7).float()
    plain = decomposed(_named(norm, x))
    assert {"block.norm_weight", "block.norm_bias"} == set(dict(plain.named_buffers()))
    assert torch.equal(plain.get_buffer("block.norm_weight").flatten(), norm.weight)
    assert not plain.get_buffer("block.norm_weight").requires_grad
    copied = copy_graph_module(plain)
    again = torch.export.export(copied, (x,)).module()
    assert torch.equal(outputs(again, x), outputs(plain, x))


class _Block(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.norm = norm

    def forward(self, x):
        return self.block.norm(x)


def _named(norm, x):
    return trace(_Block(norm).eval(), (x,))
