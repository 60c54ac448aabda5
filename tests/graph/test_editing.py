"""Editing a copy never reaches the graph, the containers or the model it came from."""

import pytest
import torch
from torch import fx, nn

from mpqdm_fx.graph.editing import (
    add_module,
    copy_graph_module,
    eliminate_dead_code,
    free_name,
    infer_val,
    inherit_meta,
    insert_call,
    prune,
    replace_module,
    shallow_clone,
)
from mpqdm_fx.testing import Block, GraphSpec, build_graph, digest

aten = torch.ops.aten


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1)))
        self.tied = nn.ModuleDict({"again": self.body[1][0]})

    def forward(self, x):
        return self.tied["again"](self.body(x))


@pytest.fixture
def model():
    return _Net().eval()


@pytest.fixture
def case():
    blocks = (Block(kind="skip_concat", variant=1), Block(kind="geglu"), Block(kind="dead"))
    return build_graph(GraphSpec(blocks=blocks))


def test_replacing_in_a_plain_copy_leaves_model_and_graph_alone(model):
    # a bare GraphModule over the model's own containers, which is what copy.copy also gives
    graph_module = fx.GraphModule(model, fx.Tracer().trace(model))
    for name in ("body", "tied"):
        graph_module._modules[name] = getattr(model, name)
    old = model.body[1][0]
    new = nn.Conv2d(4, 4, 1)
    replace_module(graph_module, "body.1.0", new)
    assert graph_module.get_submodule("body.1.0") is new
    assert model.body[1][0] is old
    assert model.tied["again"] is old


def test_replacing_a_tied_module_replaces_it_at_all_its_names(model):
    graph_module = copy_graph_module(fx.symbolic_trace(model))
    graph_module.add_module("alias", graph_module.get_submodule("body.1.0"))
    new = nn.Conv2d(4, 4, 1)
    replace_module(graph_module, "body.1.0", new)
    assert graph_module.get_submodule("alias") is new


def test_replacing_what_is_not_there_is_an_error(model):
    with pytest.raises(AttributeError):
        replace_module(fx.symbolic_trace(model), "body.7", nn.Identity())


def test_adding_makes_containers_and_refuses_a_taken_name(case):
    graph_module = copy_graph_module(case.graph_module)
    before = digest(case.graph_module)
    add_module(graph_module, "new.path.conv", nn.Conv2d(1, 1, 1))
    add_module(graph_module, "blocks.0.extra", nn.Conv2d(1, 1, 1))
    assert isinstance(graph_module.get_submodule("new.path.conv"), nn.Conv2d)
    with pytest.raises(AttributeError, match="taken"):
        add_module(graph_module, "blocks.0.conv", nn.Conv2d(1, 1, 1))
    assert digest(case.graph_module) == before
    assert "extra" not in dict(case.graph_module.get_submodule("blocks.0").named_children())


def test_free_names_avoid_modules_parameters_and_each_other(case):
    graph_module = copy_graph_module(case.graph_module)
    assert free_name(graph_module, "blocks.0.other") == "blocks.0.other"
    assert free_name(graph_module, "blocks.0.conv") == "blocks.0.conv_1"
    add_module(graph_module, "blocks.0.conv_1", nn.Identity())
    assert free_name(graph_module, "blocks.0.conv") == "blocks.0.conv_2"
    assert free_name(graph_module, "blocks.0.conv.weight") == "blocks.0.conv.weight_1"
    assert free_name(graph_module, "nowhere.at.all") == "nowhere.at.all"


def test_shallow_clone_shares_tensors_and_nothing_else():
    conv = nn.Conv2d(3, 4, 1)
    clone = shallow_clone(conv)
    assert clone.weight is conv.weight
    clone.weight = nn.Parameter(torch.zeros(4, 3, 1, 1))
    clone.register_buffer("extra", torch.ones(1))
    clone.stride = (2, 2)
    clone.register_forward_hook(lambda *_: None)
    assert conv.weight.abs().sum() > 0
    assert not conv._buffers
    assert conv.stride == (1, 1)
    assert not conv._forward_hooks


def test_pruning_keeps_what_nodes_refer_to_and_the_shared_modules_whole(case):
    graph_module = copy_graph_module(case.graph_module)
    before = digest(case.graph_module)
    assert eliminate_dead_code(graph_module)
    prune(graph_module)
    names = set(graph_module.state_dict())
    assert "blocks.2.conv.weight" not in names
    assert names < set(case.graph_module.state_dict())
    assert digest(case.graph_module) == before
    graph_module.recompile()
    graph_module(**case.inputs)


def test_pruning_keeps_a_parameter_that_is_read_as_a_tensor():
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("conv.weight")
    graph.output(graph.call_function(torch.add, (x, weight)))
    root = nn.Module()
    root.conv = nn.Conv2d(3, 4, 1)
    graph_module = copy_graph_module(fx.GraphModule(root, graph))
    prune(graph_module)
    assert set(graph_module.state_dict()) == {"conv.weight"}
    assert set(root.state_dict()) == {"conv.weight", "conv.bias"}


def test_pruning_spares_a_shared_layer_of_which_one_tensor_is_still_read():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("conv", (x,))
    graph.output((y, graph.get_attr("conv.weight")))
    root = nn.Module()
    root.conv = nn.Conv2d(3, 4, 1)
    graph_module = copy_graph_module(fx.GraphModule(root, graph))
    call = next(n for n in graph_module.graph.nodes if n.op == "call_module")
    call.replace_all_uses_with(call.args[0])
    graph_module.graph.erase_node(call)
    prune(graph_module)
    assert set(graph_module.state_dict()) == {"conv.weight"}
    assert root.conv.bias is not None


def test_containers_of_a_copy_are_its_own(case):
    graph_module = copy_graph_module(case.graph_module)
    before = digest(case.graph_module)
    container = graph_module.get_submodule("blocks.0")
    assert container is not case.graph_module.get_submodule("blocks.0")
    container.conv = nn.Identity()
    container.register_buffer("extra", torch.ones(1))
    del graph_module.get_submodule("blocks").__dict__["_modules"]["1"]
    assert digest(case.graph_module) == before


def test_dead_code_elimination_keeps_writes_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = x * 2
            self.relu(y)
            y.add_(1)
            torch.relu(y)
            return y

    graph_module = fx.symbolic_trace(InPlace())
    x = torch.randn(8)
    expected = graph_module(x)
    assert eliminate_dead_code(graph_module)  # torch.relu goes
    graph_module.recompile()
    assert [n.op for n in graph_module.graph.nodes].count("call_method") == 1
    assert [n.op for n in graph_module.graph.nodes].count("call_module") == 1
    assert torch.equal(graph_module(x), expected)


def test_inserted_call_takes_the_anchors_path_and_its_own_value(case):
    graph_module = copy_graph_module(case.graph_module)
    anchor = next(n for n in graph_module.graph.nodes if n.target == "blocks.0.conv")
    anchor.meta["stack_trace"] = "File model.py, line 1"
    add_module(graph_module, "blocks.0.wide", nn.Conv2d(anchor.args[0].meta["val"].shape[1], 9, 1))
    module_call = insert_call(graph_module, "blocks.0.wide", (anchor.args[0],), anchor=anchor)
    function_call = insert_call(graph_module, aten.relu.default, (module_call,), anchor=anchor)
    assert module_call.meta["val"].shape[1] == function_call.meta["val"].shape[1] == 9
    for node in (module_call, function_call):
        assert node.meta["stack_trace"] == anchor.meta["stack_trace"]
        assert node.meta["val"] is not anchor.meta["val"]
    paths = [list(n.meta["nn_module_stack"].values())[-1][0] for n in (module_call, function_call)]
    assert paths == ["blocks.0.wide", "blocks.0.conv"]
    assert list(anchor.meta["nn_module_stack"].values())[-1][0] == "blocks.0.conv"
    graph_module.graph.lint()


def test_annotations_are_not_inherited(case):
    graph_module = copy_graph_module(case.graph_module)
    anchor, node = list(graph_module.graph.nodes)[2:4]
    anchor.meta["quantization_annotation"] = object()
    inherit_meta(node, anchor)
    assert "quantization_annotation" not in node.meta


def test_no_value_is_inferred_from_a_graph_without_values():
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1)))
    node = next(n for n in graph_module.graph.nodes if n.op == "call_module")
    infer_val(graph_module, node)
    assert "val" not in node.meta
