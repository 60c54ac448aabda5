"""Checks and guards go."""

import operator

import torch
from one_block_graphs import one_block, run
from torch import nn

from mpqdm_fx.passes import DropAssertions
from mpqdm_fx.testing import Block, GraphSpec, build_graph, count

aten = torch.ops.aten


def test_assertions_go_with_what_only_fed_them():
    case = build_graph(
        GraphSpec(blocks=tuple(Block(kind="assertion", variant=v) for v in (0, 1)), tail="conv")
    )
    assert count(case.graph_module, aten._assert_tensor_metadata.default) == 1
    assert count(case.graph_module, aten._assert_scalar.default) == 1
    result = run(DropAssertions(), case)
    assert result.modified
    for target in (
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten.sym_size.int,
        operator.ge,
    ):
        assert count(result.graph_module, target) == 0


def test_guards_of_an_exported_program_go():
    model = nn.Conv2d(3, 3, 1).eval()
    exported = torch.export.export(model, (torch.randn(2, 3, 4, 4),)).module()
    guards = [n for n in exported.graph.nodes if n.op == "call_module"]
    assert len(guards) == 1
    result = DropAssertions()(exported)
    assert result.modified
    assert not [n for n in result.graph_module.graph.nodes if n.op == "call_module"]
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(result.graph_module(x), model(x))


def test_graph_without_assertions_is_left_alone():
    assert not run(DropAssertions(), one_block("residual")).modified
