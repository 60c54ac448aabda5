"""Group norms in front of own layers become own operators; others stay."""

import pytest
import torch
from norm_cases import assert_close, draw, outputs, randomized, traced
from torch import nn
from torch.nn import functional

from mpqdm_fx.backends.lowbit.passes import UseMixedNorms
from mpqdm_fx.testing import count

mpqdm = torch.ops.mpqdm


class Norm(nn.Module):
    """A norm, what follows it, and the codes that an own layer would read."""

    def __init__(self, norm, then, axes=(0, 2, 3, 1)):
        super().__init__()
        self.norm, self.act, self.then, self.axes = randomized(norm), nn.SiLU(), then, axes

    def forward(self, x):
        y = self.then(self, self.norm(x)).permute(self.axes)
        codes, scale, zero_point = mpqdm.quantize_mixed(y, y.shape[0])
        return (codes.float() - zero_point.reshape(-1, *[1] * (y.dim() - 1))) * scale.reshape(
            -1, *[1] * (y.dim() - 1)
        )


FOLLOWERS = [
    pytest.param(lambda m, y: m.act(y), True, id="a module"),
    pytest.param(lambda m, y: functional.silu(y), True, id="a function"),
    pytest.param(lambda m, y: y, False, id="nothing"),
]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("then", "silu"), FOLLOWERS)
def test_norm_of_an_image(then, silu, affine):
    x = draw(2, 12, 5, 7, mean=3.0).float()
    graph = traced(Norm(nn.GroupNorm(4, 12, affine=affine), then), x, dynamic_batch=False)
    result = UseMixedNorms()(graph).graph_module
    (norm,) = result.graph.find_nodes(op="call_function", target=mpqdm.group_norm_mixed.default)
    assert norm.args[4:] == (4, 1e-5, silu)
    assert count(result, nn.GroupNorm) == count(result, nn.SiLU) == 0
    # a code next to a tie may fall to the other side
    assert_close(outputs(result, x), outputs(graph, x), rtol=1e-2)


def test_norm_of_tokens_is_that_of_an_image_of_one_row():
    x = draw(2, 12, 35).float()
    graph = traced(Norm(nn.GroupNorm(4, 12), lambda m, y: y, (0, 2, 1)), x, dynamic_batch=False)
    result = UseMixedNorms()(graph).graph_module
    (norm,) = result.graph.find_nodes(op="call_function", target=mpqdm.group_norm_mixed.default)
    assert norm.meta["val"].shape == (2, 1, 35, 12)
    assert_close(outputs(result, x), outputs(graph, x), rtol=1e-2)


def test_a_norm_that_others_read_too_stays():
    def then(m, y):
        return m.act(y) * y.mean()

    x = draw(2, 12, 5, 7).float()
    graph = traced(Norm(nn.GroupNorm(4, 12), then), x, dynamic_batch=False)
    assert not UseMixedNorms()(graph).modified


def test_a_norm_without_own_layers_stays():
    x = draw(2, 12, 5, 7).float()
    graph = traced(nn.Sequential(nn.GroupNorm(4, 12), nn.SiLU()), x, dynamic_batch=False)
    assert not UseMixedNorms()(graph).modified


BEHIND = {
    "another activation": lambda m, y: functional.gelu(y),
    "a scale and a shift": lambda m, y: m.act(y * torch.full((2, 12, 1, 1), 1.5) + 0.5),
    "two branches": lambda m, y: torch.cat([m.act(y), y], 1),
}


@pytest.mark.parametrize("then", BEHIND.values(), ids=BEHIND)
def test_what_computes_alike_in_both_layouts_may_stand_between(then):
    x = draw(2, 12, 5, 7).float()
    graph = traced(Norm(nn.GroupNorm(4, 12), then), x, dynamic_batch=False)
    result = UseMixedNorms()(graph).graph_module
    (norm,) = result.graph.find_nodes(op="call_function", target=mpqdm.group_norm_mixed.default)
    assert norm.args[6] is False
    assert_close(outputs(result, x), outputs(graph, x), rtol=1e-2)
