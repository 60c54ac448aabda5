"""Inactive dropout goes, active dropout stays."""

import pytest
import torch
from one_block_graphs import one_block, run
from torch import nn

from mpqdm_fx.passes import DropDropout
from mpqdm_fx.testing import count

aten = torch.ops.aten


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_inactive_dropout_goes(variant):
    case = one_block("dropout", variant=variant)
    before = count(case.graph_module, nn.Dropout) + count(case.graph_module, aten.dropout.default)
    assert before == 1
    result = run(DropDropout(), case)
    assert result.modified
    after = count(result.graph_module, nn.Dropout)
    assert after + count(result.graph_module, aten.dropout.default) == 0


def test_active_dropout_stays():
    case = one_block("dropout")
    case.graph_module.get_submodule("drop8").train()
    result = DropDropout()(case.graph_module)
    assert not result.modified
    assert count(result.graph_module, nn.Dropout) == 1


def test_dropout_module_with_zero_probability_goes_even_in_train_mode():
    case = one_block("dropout")
    dropout = case.graph_module.get_submodule("drop8")
    dropout.train()
    dropout.p = 0.0
    assert run(DropDropout(), case).modified
