"""Two lanes in one graph: bit-equal until a layer is replaced, and then only the second moves."""

import copy
import functools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls
from torch import nn

from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import copy_graph_module, shallow_clone
from mpqdm_fx.graph.lanes import (
    error_lane_name,
    float_of,
    has_lanes,
    install_in_lane,
    is_lane,
    is_quantizer,
    twin_of,
)
from mpqdm_fx.graph.layers import called_module, replace_module, weight_layers
from mpqdm_fx.graph.quantizers import (
    ActivationQuantizer,
    CodebookQuantizer,
    DynamicQuantizer,
    NoiseLevelQuantizer,
)
from mpqdm_fx.passes import CarryErrorLane, QuantizeActivations
from mpqdm_fx.records.activations import ActivationRange, StaticActivation
from mpqdm_fx.testing import digest, graphs


@functools.cache
def traced_unet(make, calls):
    return trace(make(), calls()[0])


def with_pairs(graph_module):
    ranges = {
        name: StaticActivation(
            input=ActivationRange(scale=2.0 ** -(3 + i % 3), zero_point=i % 4, bits=8),
            output=ActivationRange(scale=2.0 ** -(4 + i % 2), zero_point=0, bits=8),
        )
        for i, name in enumerate(weight_layers(graph_module))
    }
    return QuantizeActivations(ranges=ranges)(graph_module).graph_module


def carry(graph_module):
    return CarryErrorLane()(graph_module).graph_module


def run(graph_module, inputs):
    with torch.no_grad():
        return graph_module(**inputs)


def changed(module: nn.Module) -> nn.Module:
    """The same layer with another weight in its first output channel."""
    clone = shallow_clone(module)
    weight = module.weight.detach().clone()
    weight[0] += 1.0
    clone.weight = nn.Parameter(weight, requires_grad=False)
    return clone


def nodes_of(graph_module):
    return {node.name: node for node in graph_module.graph.nodes}


class Toy(nn.Module):
    """What the lanes share: the embedding of `t` is behind layers, `x * 2` and its norm are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.to_q, self.to_k, self.out = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        h = self.norm(x * 2.0)
        y = self.to_q(h) + self.to_k(h)
        noise = torch.ones_like(y)
        return self.out(self.out(y + noise)) + h


@pytest.fixture
def toy():
    return trace(Toy().eval(), {"x": torch.randn(2, 3, 6)})


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize(
    ("make", "calls"), [(tiny_unet, unet_calls), (tiny_condition_unet, condition_calls)]
)
def test_lanes_of_a_unet_are_bit_equal_to_the_graphs_they_came_from(make, calls, quantized):
    graph = traced_unet(make, calls)
    source = with_pairs(graph) if quantized else graph
    lanes = carry(source)
    for inputs in calls():
        exact, noisy = run(lanes, inputs)
        assert same_bits(exact, run(graph, inputs))
        assert same_bits(noisy, run(source, inputs))
    assert same_bits(exact, noisy) is not quantized


def test_lanes_are_bit_equal_for_every_mode_of_activations():
    graph, inputs = traced_unet(tiny_unet, unet_calls), unet_calls(calls=1)[0]
    modules = set()
    for graph_pass in QuantizeActivations.examples(graph):
        source = graph_pass(graph).graph_module
        lanes = carry(source)
        exact, noisy = run(lanes, inputs)
        assert same_bits(exact, run(graph, inputs))
        assert same_bits(noisy, run(source, inputs))
        called = (called_module(lanes, n, ActivationQuantizer) for n in lanes.graph.nodes)
        modules |= {type(module) for module in called if module is not None}
    assert modules == {CodebookQuantizer, DynamicQuantizer, NoiseLevelQuantizer}


@given(case=graphs(max_blocks=4), quantized=st.booleans())
def test_lanes_are_bit_equal_to_the_graphs_they_came_from(case, quantized):
    source = with_pairs(case.graph_module) if quantized else case.graph_module
    exact, noisy = run(carry(source), case.inputs)
    assert same_bits(exact, run(case.graph_module, case.inputs))
    assert same_bits(noisy, run(source, case.inputs))


@given(case=graphs(max_blocks=4), quantized=st.booleans(), data=st.data())
def test_a_replaced_layer_moves_only_the_second_output_and_as_in_the_plain_graph(
    case, quantized, data
):
    source = with_pairs(case.graph_module) if quantized else case.graph_module
    lanes, plain = carry(source), copy_graph_module(source)
    # a layer that nobody reads is dead code, which passes remove
    alive = weight_layers(lanes, embeddings=True).keys()
    layers = {n: la for n, la in weight_layers(source, embeddings=True).items() if n in alive}
    assume(layers)
    name = data.draw(st.sampled_from(sorted(layers)))
    install_in_lane(lanes, name, changed(layers[name].module))
    replace_module(plain, name, changed(layers[name].module))
    exact, noisy = run(lanes, case.inputs)
    assert same_bits(exact, run(case.graph_module, case.inputs))
    assert same_bits(noisy, run(plain, case.inputs))


@given(case=graphs(max_blocks=4), quantized=st.booleans())
def test_a_node_has_a_twin_exactly_if_it_is_a_layer_or_reads_the_quantized_lane(case, quantized):
    source = with_pairs(case.graph_module) if quantized else case.graph_module
    lanes = carry(source)
    calls = {n.name for la in weight_layers(source, embeddings=True).values() for n in la.nodes}
    for node in lanes.graph.nodes:
        if is_lane(node) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue  # sizes, and the output
        twin = twin_of(lanes, node)
        # what the node read in the source: its float value, or a quantizer in front of it
        before = nodes_of(source)[node.name].all_input_nodes
        behind = [is_quantizer(source, n) or _twin(lanes, n.name) is not None for n in before]
        assert (twin is not None) is (node.name in calls or any(behind))


def _twin(lanes, name):
    return twin_of(lanes, nodes_of(lanes)[name])


@given(case=graphs(max_blocks=4), quantized=st.booleans())
def test_float_lane_holds_no_quantizer_and_never_reads_the_quantized_lane(case, quantized):
    lanes = carry(with_pairs(case.graph_module) if quantized else case.graph_module)
    for node in lanes.graph.nodes:
        if not is_lane(node) and node.op != "output":
            assert not is_quantizer(lanes, node)
            assert not any(map(is_lane, node.all_input_nodes))


@given(case=graphs(max_blocks=4), quantized=st.booleans())
def test_a_twin_stands_directly_behind_its_float_node_and_names_it(case, quantized):
    lanes = carry(with_pairs(case.graph_module) if quantized else case.graph_module)
    for copied in (lanes, copy_graph_module(lanes), copy.deepcopy(lanes)):
        assert has_lanes(copied)
        for node in copied.graph.nodes:
            if is_lane(node) and not is_quantizer(copied, node):
                assert node.prev is float_of(copied, node)
                assert twin_of(copied, node.prev) is node


def test_layers_without_error_read_the_very_same_node_in_both_lanes(toy):
    lanes = carry(toy)
    nodes = nodes_of(lanes)
    for name in ("to_q", "to_k"):
        twin = twin_of(lanes, nodes[name])
        assert twin.args == nodes[name].args
        assert twin.target == error_lane_name(name) == f"error_lane.{name}"
    assert twin_of(lanes, nodes["norm"]) is None
    out = nodes["out"]
    assert twin_of(lanes, out).args[0] is twin_of(lanes, out.args[0]) is not None


def test_a_value_that_depends_on_a_shape_alone_is_shared(toy):
    lanes = carry(toy)
    (ones,) = (n for n in lanes.graph.nodes if "ones_like" in str(n.target))
    assert twin_of(lanes, ones) is None
    assert {is_lane(user) for user in ones.users} == {False, True}


def test_a_layer_that_is_called_twice_has_one_layer_in_the_lane(toy):
    lanes = carry(toy)
    calls = weight_layers(toy)["out"].nodes
    assert len(calls) == 2
    targets = {twin_of(lanes, nodes_of(lanes)[n.name]).target for n in calls}
    assert targets == {error_lane_name("out")}


def test_layers_tied_under_two_names_stay_tied_in_the_lane(toy):
    tied = copy_graph_module(toy)
    replace_module(tied, "to_k", tied.to_q)
    lanes = carry(tied)
    nodes = nodes_of(lanes)
    assert {twin_of(lanes, nodes[n]).target for n in ("to_q", "to_k")} == {error_lane_name("to_q")}


def test_the_lane_has_layers_of_its_own_that_share_the_tensors(toy):
    lanes = carry(toy)
    for name in weight_layers(toy):
        ours, theirs = lanes.get_submodule(error_lane_name(name)), toy.get_submodule(name)
        assert ours is not theirs
        assert lanes.get_submodule(name) is theirs
        assert ours.weight is theirs.weight
        assert ours.bias is theirs.bias


def test_a_quantizer_is_the_identity_in_the_float_lane(toy):
    source = with_pairs(toy)
    lanes = carry(source)
    quantizers = [n for n in lanes.graph.nodes if is_quantizer(lanes, n)]
    assert len(quantizers) == sum(is_quantizer(source, n) for n in source.graph.nodes) > 0
    for node in quantizers:
        assert is_lane(node)
        value = float_of(lanes, node)
        assert not is_lane(value)
        # the pair rounds the twin of that value, or the value itself where it is shared
        root = node
        while is_quantizer(lanes, root):
            root = root.args[0]
        assert root is (twin_of(lanes, value) or value)


class Halve(ActivationQuantizer):
    """Stands for a quantizer with a second argument."""

    def forward(self, x, shift):
        return (x / 2).round() * 2 + 0 * shift.sum()


def test_modules_that_quantize_vanish_from_the_float_lane_with_all_their_arguments(toy):
    source = copy_graph_module(toy)
    source.add_module("rounder", Halve())
    out = next(n for n in source.graph.nodes if n.target == "out")
    q = next(n for n in source.graph.nodes if n.target == "to_q")
    with source.graph.inserting_before(out):
        rounded = source.graph.call_module("rounder", (out.args[0], q))
    rounded.meta["val"] = out.args[0].meta["val"]
    out.replace_input_with(out.args[0], rounded)
    source.recompile()
    inputs = {"x": torch.randn(2, 3, 6)}
    lanes = carry(source)
    exact, noisy = run(lanes, inputs)
    assert same_bits(exact, run(toy, inputs))
    assert same_bits(noisy, run(source, inputs))
    twin = nodes_of(lanes)["rounder"]
    assert twin.args[1] is twin_of(lanes, nodes_of(lanes)["to_q"])


def test_integers_between_quantize_and_dequantize_are_floats_in_the_float_lane(toy):
    source = with_pairs(toy)
    restored = next(n for n in source.graph.nodes if n.name.startswith("dequantize"))
    with source.graph.inserting_before(restored):
        codes = source.graph.call_function(torch.ops.aten.neg.default, (restored.args[0],))
    codes.meta["val"] = restored.args[0].meta["val"]
    restored.replace_input_with(restored.args[0], codes)
    source.recompile()
    lanes = carry(source)
    node = nodes_of(lanes)[codes.name]
    assert node.meta["val"].dtype == torch.float32
    assert twin_of(lanes, node).meta["val"].dtype == torch.int8
    inputs = {"x": torch.randn(2, 3, 6)}
    assert same_bits(run(lanes, inputs)[1], run(source, inputs))


def test_a_second_pass_does_nothing(toy):
    lanes = carry(toy)
    result = CarryErrorLane()(lanes)
    assert not result.modified
    assert digest(result.graph_module) == digest(lanes)


def test_a_node_that_writes_into_its_input_is_refused_by_name(toy):
    source = copy_graph_module(toy)
    add = next(n for n in source.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    add.target = torch.ops.aten.add_.Tensor
    with pytest.raises(DialectError, match=rf"{add.name}.*add_.*writes into its input"):
        CarryErrorLane()(source)


def test_a_model_that_uses_the_name_of_the_lane_is_refused(toy):
    source = copy_graph_module(toy)
    source.add_module("error_lane", nn.Linear(2, 2))
    with pytest.raises(DialectError, match="error_lane"):
        CarryErrorLane()(source)
