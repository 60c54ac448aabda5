"""Permutations end up where they copy least; numbers stay, bit for bit."""

import pytest
import torch
from norm_cases import Call, draw
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from mpqdm_fx.backends.lowbit.counting import layout_copies
from mpqdm_fx.backends.lowbit.passes import MoveLayouts
from mpqdm_fx.backends.xnnpack.passes import DecomposeUpsample
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.editing import replace_module

X = draw(2, 6, 4, 8).float()  # NHWC: what an own operator writes
FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def own(x):
    """Something that is bound to channels last."""
    return x.amax(-1, keepdim=True) * 2 + x  # in whatever order, the same number


class Pair(Call):
    """A function of two values."""

    def forward(self, x, second):
        return (self.function(self, x, second),)


def moved(function, *inputs, copies, **tensors):
    """The rewritten graph, after checks of its numbers and its number of copies."""
    net = (Call if len(inputs) == 1 else Pair)(function, **tensors)
    graph = DecomposeUpsample()(trace(net, inputs, dynamic_batch=False)).graph_module
    result = MoveLayouts()(graph).graph_module
    with torch.no_grad():
        pairs = zip(tree_leaves(result(*inputs)), tree_leaves(graph(*inputs)), strict=True)
    assert all(torch.equal(actual, expected) for actual, expected in pairs)
    assert layout_copies(result)[0] == copies
    return result


BETWEEN = {
    "nothing": lambda m, y: y,
    "a function": lambda m, y: functional.silu(y),
    "a scalar": lambda m, y: y * 0.5 + 1,
    "a number a channel": lambda m, y: y + m.channel[:, :, None, None],
    "a vector a channel": lambda m, y: y * m.channel[0, :, None, None],
    "a map": lambda m, y: y * m.map,
    "two branches": lambda m, y: torch.relu(y) + y * 2,
    "a concatenation of channels": lambda m, y: torch.cat([y, torch.relu(y)], 1),
    "a concatenation of rows": lambda m, y: torch.cat([y, y], 2),
    "padding": lambda m, y: functional.pad(y, (0, 1, 2, 3)),
    "padding of channels": lambda m, y: functional.pad(y, (0, 1, 2, 3, 1, 0), value=2.0),
    "a crop": lambda m, y: y[:, :, 1:, :2],
    "a cut of channels": lambda m, y: y[:, 1:5],
    "tokens": lambda m, y: y.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (6, 4)),
    "another view": lambda m, y: y.reshape(2, 8, 3, 8),
    "upsampling": lambda m, y: functional.interpolate(y, scale_factor=2.0),
    "a copy": lambda m, y: y.contiguous().clone(),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_between_own_operators_nothing_is_copied(between):
    tensors = {"channel": draw(2, 8, seed=3).float(), "map": draw(6, 4, seed=4).float()}

    def function(m, x):
        return own(between(m, own(x).permute(FIRST)).permute(LAST))

    moved(function, X, copies=0, **tensors)


def test_a_skip_is_copied_once():
    def function(m, x, first):
        y = own(x).permute(FIRST) + first
        return own((torch.relu(y) + first).permute(LAST))

    moved(function, X, draw(2, 8, 6, 4).float(), copies=1)


def test_what_reads_channels_first_gets_them_from_one_copy():
    def function(m, x):
        y = torch.relu(own(x).permute(FIRST))
        z = y.mean(1, keepdim=True) * 2
        return own(y.permute(LAST)), y, z

    moved(function, X, copies=1)


def test_tokens_come_from_an_image_without_a_copy():
    def function(m, x):
        y = own(x).permute(FIRST).flatten(2).transpose(1, 2)  # [B, H W, C]
        return y.softmax(-1)

    result = moved(function, X, copies=0)
    assert [n.meta["val"].shape for n in result.graph.nodes if "softmax" in n.name] == [(2, 24, 8)]


def test_the_smaller_side_of_an_operator_is_copied():
    def function(m, x):
        y = torch.cat([own(x).permute(FIRST)] * 2, 1)
        return y.softmax(2)

    result = moved(function, X, copies=1)
    (copy,) = [n for n in result.graph.nodes if n.target is torch.ops.aten.permute.default]
    assert copy.meta["val"].numel() == X.numel()


def test_values_with_one_pixel_are_not_copied_but_viewed():
    def function(m, x):
        y = own(x.mean((1, 2), keepdim=True)).permute(FIRST)
        return y.softmax(1)

    graph = trace(Call(function), (X,), dynamic_batch=False)
    assert layout_copies(graph) == (0, 0)


def test_a_graph_without_anything_to_gain_is_left_alone():
    def function(m, x):
        return torch.relu(x.permute(FIRST).softmax(2)).mean(3, keepdim=True)

    graph = trace(Call(function), (X,), dynamic_batch=False)
    assert not MoveLayouts()(graph).modified
    unknown = trace(Call(lambda m, x: torch.relu(x.permute(FIRST)).permute(LAST)), (X,))
    assert not MoveLayouts()(unknown).modified  # any batch: sizes are not known


def test_a_graph_that_writes_in_place_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return (self.act(x.permute(FIRST)).permute(LAST),)

    graph = trace(Net(), (X,), dynamic_batch=False)
    assert MoveLayouts()(graph).modified
    replace_module(graph, "act", nn.ReLU(inplace=True))
    assert not MoveLayouts()(graph).modified
