"""Batch norms fold into the layer before them, where they may."""

import pytest
import torch
from one_block_graphs import one_block, run, weight_shapes
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.passes import FoldBatchNorm
from mpqdm_fx.testing import assert_same_function, count

aten = torch.ops.aten


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_batch_norm_folds_into_the_convolution_before_it(variant, bias, groups):
    case = one_block("batch_norm", variant=variant, bias=bias, groups=groups)
    assert count(case.graph_module, nn.BatchNorm2d) == 1
    result = run(FoldBatchNorm(), case)
    assert result.modified
    assert count(result.graph_module, nn.BatchNorm2d) == 0
    assert weight_shapes(result.graph_module) == weight_shapes(case.graph_module)
    old, new = (g.get_submodule("blocks.1.conv") for g in (case.graph_module, result.graph_module))
    assert new is not old
    assert new.bias is not None
    assert not torch.equal(new.weight, old.weight)


class _LinearNorm(nn.Module):
    def __init__(self, affine: bool = True):
        super().__init__()
        self.linear = nn.Linear(5, 6, bias=False)
        self.norm = nn.BatchNorm1d(6, affine=affine)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return (self.norm(self.linear(x)),)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_folds_into_the_linear_layer_before_it(affine):
    graph_module = trace(_LinearNorm(affine).eval(), {"x": torch.randn(4, 5)})
    result = FoldBatchNorm()(graph_module)
    assert result.modified
    assert count(result.graph_module, nn.BatchNorm1d) == 0
    inputs = {"x": torch.randn(3, 5)}
    assert_same_function(graph_module, result.graph_module, inputs, rtol=FoldBatchNorm.tolerance)


def test_batch_norm_over_tokens_does_not_fold_into_a_linear_layer():
    # on [N, C, L] it normalises axis 1, which here is the token axis
    graph_module = trace(_LinearNorm().eval(), {"x": torch.randn(4, 6, 5)[..., :5]})
    assert not FoldBatchNorm()(graph_module).modified


@pytest.mark.parametrize("rank", [1, 2])
def test_batch_norm_over_a_value_without_batch_axis_does_not_fold_into_a_convolution(rank):
    # it takes the channels for the batch and normalises the axis behind them
    conv = (nn.Conv1d, nn.Conv2d)[rank - 1](6, 6, 3, padding=1)
    norm = nn.BatchNorm1d(6)
    norm.running_mean.uniform_(-1, 1)
    graph_module = trace(nn.Sequential(conv, norm).eval(), (torch.randn([6] * (rank + 1)),))
    assert not FoldBatchNorm()(graph_module).modified


class _TwoReaders(nn.Module):
    def __init__(self, shared: bool):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.shared = shared

    def forward(self, x):
        y = self.conv(x)
        return (self.norm(y) + (self.conv(y) if self.shared else y),)


@pytest.mark.parametrize("shared", [True, False])
def test_convolution_that_others_use_is_not_folded(shared):
    graph_module = trace(_TwoReaders(shared).eval(), {"x": torch.randn(2, 3, 4, 4)})
    assert not FoldBatchNorm()(graph_module).modified


def test_batch_norm_without_running_statistics_stays():
    case = one_block("batch_norm")
    case.graph_module.set_submodule(
        "blocks.1.norm", nn.BatchNorm2d(8, track_running_stats=False).eval()
    )
    assert not FoldBatchNorm()(case.graph_module).modified
