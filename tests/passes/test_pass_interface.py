"""GraphPass and Pipeline: copies, contracts on the right graph, honest `modified`."""

import copy
import dataclasses
import logging
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_manager import PassManager

from mpqdm_fx.errors import ConfigError, DialectError
from mpqdm_fx.graph.layers import replace_module
from mpqdm_fx.passes.base import GraphPass, Pipeline, fingerprint
from mpqdm_fx.testing import Block, GraphSpec, assert_same_function, build_graph, count, digest

BLOCKS = (Block(kind="residual"), Block(kind="skip_concat", variant=1), Block(kind="dead"))


@pytest.fixture
def case():
    return build_graph(GraphSpec(blocks=BLOCKS, tail="conv"))


@dataclass(frozen=True, kw_only=True)
class DropSilu(GraphPass):
    """Replace every SiLU by its input."""

    def rewrite(self, graph_module):
        nodes = [n for n in graph_module.graph.nodes if n.target == "act"]
        for node in nodes:
            node.replace_all_uses_with(node.args[0])
        return bool(nodes)


@dataclass(frozen=True, kw_only=True)
class DoubleWeight(GraphPass):
    """Install a convolution with another weight."""

    name: str = "tail.conv"

    def rewrite(self, graph_module):
        layer = copy.deepcopy(graph_module.get_submodule(self.name))
        layer.weight.mul_(2)
        replace_module(graph_module, self.name, layer)
        return True


@dataclass(frozen=True, kw_only=True)
class Nothing(GraphPass):
    def rewrite(self, graph_module):
        return False


def test_result_is_another_graph_with_the_same_leaf_modules_and_parameters(case):
    result = Nothing()(case.graph_module)
    assert not result.modified
    assert result.graph_module is not case.graph_module
    assert result.graph_module.graph is not case.graph_module.graph
    assert digest(result.graph_module) == digest(case.graph_module)
    assert type(result.graph_module).__name__ == "RandomUNet"
    for name, parameter in case.graph_module.named_parameters():
        assert result.graph_module.get_parameter(name) is parameter
    assert_same_function(case.graph_module, result.graph_module, case.inputs)


def test_dead_code_is_swept_only_if_the_pass_did_something(case):
    convolutions = count(case.graph_module, nn.Conv2d)
    assert count(Nothing()(case.graph_module).graph_module, nn.Conv2d) == convolutions
    swept = DropSilu()(case.graph_module).graph_module
    assert count(swept, nn.Conv2d) == convolutions - 1
    assert "blocks.2.conv.weight" not in swept.state_dict()
    assert "act" not in dict(swept.named_modules())
    assert "blocks.2.conv.weight" in case.graph_module.state_dict()


def test_replaced_module_is_seen_in_the_result_and_not_in_the_input(case):
    before = case.graph_module.get_submodule("tail.conv").weight.clone()
    result = DoubleWeight()(case.graph_module)
    assert result.modified
    assert torch.equal(case.graph_module.get_submodule("tail.conv").weight, before)
    assert torch.equal(result.graph_module.get_submodule("tail.conv").weight, 2 * before)


def test_non_persistent_buffers_stay_non_persistent():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

        def forward(self, x):
            return x + self.table

    graph_module = fx.symbolic_trace(Table())
    graph_module._non_persistent_buffers_set.add("table")
    result = Nothing()(graph_module).graph_module
    assert not result.state_dict()
    assert [name for name, _ in result.named_buffers()] == ["table"]


# --- contracts


@dataclass(frozen=True, kw_only=True)
class Contract(DropSilu):
    """Want SiLUs in, promise none out; record what was checked."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def requires(self, graph_module):
        self.seen.append(("requires", count(graph_module, nn.SiLU)))
        if not count(graph_module, nn.SiLU):
            raise DialectError("needs a SiLU")

    def ensures(self, graph_module):
        self.seen.append(("ensures", count(graph_module, nn.SiLU)))
        if count(graph_module, nn.SiLU):
            raise DialectError("a SiLU is left")


def test_requires_sees_the_input_and_ensures_the_output(case):
    silus = count(case.graph_module, nn.SiLU)
    assert silus
    graph_pass = Contract()
    result = graph_pass(case.graph_module)
    assert graph_pass.seen == [("requires", silus), ("ensures", 0)]
    with pytest.raises(DialectError, match="needs a SiLU"):
        graph_pass(result.graph_module)


def test_broken_promise_is_an_error(case):
    class Breaks(Contract):
        def rewrite(self, graph_module):
            return False

    with pytest.raises(DialectError, match="a SiLU is left"):
        Breaks()(case.graph_module)


def test_contracts_are_checked_inside_a_pipeline_too(case):
    pipeline = Pipeline(passes=(DropSilu(), Contract()))
    with pytest.raises(DialectError, match="needs a SiLU") as error:
        pipeline(case.graph_module)
    assert any("Contract(" in note for note in error.value.__notes__)


# --- honesty


def test_claiming_a_change_that_did_not_happen_is_an_error(case):
    class Boasts(GraphPass):
        def rewrite(self, graph_module):
            return True

    with pytest.raises(DialectError, match=r"returned True.*left as it was"):
        Boasts()(case.graph_module)


@pytest.mark.parametrize("act", ["node", "module", "meta", "node meta", "parameter"])
def test_hiding_a_change_is_an_error(case, act):
    class Hides(GraphPass):
        def rewrite(self, graph_module):
            if act == "node":
                next(n for n in graph_module.graph.nodes if n.op == "output").args = (
                    (graph_module.graph.find_nodes(op="placeholder")[0],),
                )
            elif act == "module":
                DoubleWeight().rewrite(graph_module)
            elif act == "meta":
                graph_module.meta["note"] = 1
            elif act == "node meta":
                next(iter(graph_module.graph.nodes)).meta["custom"] = {}
            else:
                graph_module.register_parameter("extra", nn.Parameter(torch.ones(1)))
            return False

    with pytest.raises(DialectError, match=r"returned False.*changed"):
        Hides()(case.graph_module)


def test_writing_into_a_shared_parameter_is_an_error(case):
    class Writes(GraphPass):
        def rewrite(self, graph_module):
            graph_module.get_submodule("tail.conv").weight.mul_(2)
            return True

    with pytest.raises(DialectError, match="wrote into its input"):
        Writes()(case.graph_module)


def test_writing_into_a_shared_module_is_an_error(case):
    class Writes(GraphPass):
        def rewrite(self, graph_module):
            conv = graph_module.get_submodule("tail.conv")
            conv.weight = nn.Parameter(conv.weight * 2)
            return True

    with pytest.raises(DialectError, match="wrote into its input"):
        Writes()(case.graph_module)


def test_switching_a_shared_module_to_train_mode_is_an_error(case):
    class Writes(GraphPass):
        def rewrite(self, graph_module):
            graph_module.get_submodule("tail.norm").train()
            return True

    with pytest.raises(DialectError, match="wrote into its input"):
        Writes()(case.graph_module)


def test_fingerprints_of_one_graph_are_equal_and_of_two_are_not(case):
    assert fingerprint(case.graph_module) == fingerprint(case.graph_module)
    reseeded = build_graph(dataclasses.replace(case.spec, seed=1)).graph_module
    assert fingerprint(case.graph_module) != fingerprint(reseeded)


# --- torch.fx's own machinery


def test_pass_is_a_torch_pass_and_its_manager_runs_it(case):
    assert isinstance(DropSilu(), PassBase)
    manager = PassManager([DropSilu(), Pipeline(passes=(Nothing(),))], steps=3)
    result = manager(case.graph_module)
    assert result.modified
    assert count(result.graph_module, nn.SiLU) == 0


# --- Pipeline


def test_pipeline_runs_in_order_and_copies_once(case):
    order = []

    class Notes(GraphPass):
        def rewrite(self, graph_module):
            order.append(id(graph_module))
            return False

    result = Pipeline(passes=(Notes(), Pipeline(passes=(Notes(),)), Notes()))(case.graph_module)
    assert not result.modified
    assert order == [id(result.graph_module)] * 3


def test_pipeline_is_modified_if_any_of_its_passes_did_something(case):
    assert Pipeline(passes=(Nothing(), DropSilu(), Nothing()))(case.graph_module).modified
    assert not Pipeline(passes=(Nothing(), Nothing()))(case.graph_module).modified
    assert not Pipeline(passes=())(case.graph_module).modified


@dataclass(frozen=True, kw_only=True)
class DropOneSilu(GraphPass):
    def rewrite(self, graph_module):
        node = next((n for n in graph_module.graph.nodes if n.target == "act"), None)
        if node is None:
            return False
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
        return True


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_pipeline_repeats_until_nothing_changes_or_its_steps_are_used_up(case, steps):
    silus = count(case.graph_module, nn.SiLU)
    assert silus > 2
    result = Pipeline(passes=(DropOneSilu(),), max_steps=steps)(case.graph_module)
    assert count(result.graph_module, nn.SiLU) == max(0, silus - steps)


@pytest.mark.parametrize("entry", [DropSilu, lambda graph_module: graph_module, None])
def test_pipeline_refuses_what_is_no_pass(entry):
    with pytest.raises(ConfigError, match="GraphPass"):
        Pipeline(passes=(entry,))


def test_pipeline_refuses_zero_steps():
    with pytest.raises(ConfigError, match="max_steps"):
        Pipeline(passes=(), max_steps=0)


def test_passes_are_frozen_and_comparable():
    assert DoubleWeight(name="a") == DoubleWeight(name="a") != DoubleWeight(name="b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        DoubleWeight().name = "other"


def test_a_pass_logs_and_does_not_print(case, caplog, capsys):
    with caplog.at_level(logging.DEBUG, logger="mpqdm_fx"):
        DropSilu()(case.graph_module)
    assert any("DropSilu" in record.message for record in caplog.records)
    assert capsys.readouterr() == ("", "")
