"""A walk computes what the graph computes, once per node and call, can be changed on the way."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reporters import Told
from small import TinyNet, condition_calls, net_calls, tiny_condition_unet, tiny_unet, unet_calls
from torch import fx, nn

from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import CalibrationError, DialectError
from mpqdm_fx.graph.editing import copy_graph_module, replace_module, shallow_clone
from mpqdm_fx.graph.lanes import install_in_lane, is_lane, twin_of
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.qdq import is_dequantize
from mpqdm_fx.io.progress import reporting
from mpqdm_fx.passes import CarryErrorLane, QuantizeActivations
from mpqdm_fx.run.walk import Walk
from mpqdm_fx.testing import graphs


def carry(graph_module):
    return CarryErrorLane()(graph_module).graph_module


@functools.cache
def traced(kind):
    make, calls = {
        "net": (TinyNet, net_calls),
        "unet": (tiny_unet, unet_calls),
        "condition": (tiny_condition_unet, condition_calls),
    }[kind]
    recorded = calls()
    # the last call is shorter, as the last batch of a recording is
    recorded.append({name: value[:1] for name, value in recorded[0].items()})
    graph = trace(make().eval(), recorded[0])
    return graph, carry(QuantizeActivations.examples(graph)[0](graph).graph_module), recorded


def by_hand(graph_module, calls):
    with torch.no_grad():
        return [graph_module(**inputs) for inputs in calls]


def rounded(module: nn.Module) -> nn.Module:
    """A layer with coarse weights."""
    clone = shallow_clone(module)
    weight = module.weight.detach()
    step = weight.abs().max() / 3
    clone.weight = nn.Parameter((weight / step).round() * step, requires_grad=False)
    return clone


def computing(graph_module):
    return [n for n in graph_module.graph.nodes if n.op.startswith("call_")]


@pytest.mark.parametrize("kind", ["net", "unet", "condition"])
def test_outputs_are_those_of_the_graph_bit_by_bit(kind):
    for graph_module in traced(kind)[:2]:
        calls = traced(kind)[2]
        walk = Walk(graph_module, calls)
        assert list(walk) == list(graph_module.graph.nodes)
        assert same_bits(walk.outputs, by_hand(graph_module, calls))


@given(case=graphs(max_blocks=4), lanes=st.booleans())
def test_outputs_of_random_graphs_are_those_of_the_graph(case, lanes):
    graph_module = carry(case.graph_module) if lanes else case.graph_module
    calls = [dict(case.inputs), {**case.inputs, "sample": -case.inputs["sample"]}]
    walk = Walk(graph_module, calls)
    for _ in walk:
        pass
    assert same_bits(walk.outputs, by_hand(graph_module, calls))
    assert walk.executions == len(calls) * len(computing(graph_module))
    assert walk.alive == ()


class Counting(nn.Module):
    """Wraps a layer and counts its calls."""

    def __init__(self, inner: nn.Module, log: list) -> None:
        super().__init__()
        self.inner, self.log = inner, log

    def forward(self, *args):
        self.log.append(self.inner)
        return self.inner(*args)


def test_every_node_is_executed_once_per_call():
    graph, _, calls = traced("net")
    graph, log = copy_graph_module(graph), []
    layers = list(weight_layers(graph).values())
    for layer in layers:
        replace_module(graph, layer.name, Counting(layer.module, log))
    walk = Walk(graph, calls)
    for _ in walk:
        pass
    assert log == [layer.module for layer in layers for _ in calls]
    assert walk.executions == len(calls) * len(computing(graph))


def test_a_node_is_yielded_before_it_is_executed():
    _, lanes, calls = traced("net")
    walk, seen = Walk(lanes, calls), 0
    for node in walk:
        assert walk.executions == seen * len(calls)
        assert node not in walk.alive
        seen += node.op.startswith("call_")


def test_values_are_those_of_the_interpreter_at_every_node():
    _, lanes, calls = traced("net")
    expected = [_record(lanes, inputs) for inputs in calls]
    walk = Walk(lanes, calls)
    for node in walk:
        for source in node.all_input_nodes:
            assert same_bits(list(walk.values(source)), [values[source] for values in expected])


def _record(graph_module, inputs):
    values = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            values[node] = super().run_node(node)
            return values[node]

    with torch.no_grad():
        Recorder(graph_module).run(*inputs.values())
    return values


@pytest.mark.parametrize("kind", ["net", "unet", "condition"])
def test_a_value_lives_until_its_last_reader_and_no_longer(kind):
    _, lanes, calls = traced(kind)
    walk, done = Walk(lanes, calls), set()
    layer_twins = {
        twin: call
        for layer in weight_layers(lanes, embeddings=True).values()
        for call in layer.nodes
        if (twin := twin_of(lanes, call)) is not None
    }
    for node in walk:
        needed = {n for n in done if any(user not in done for user in n.users)}
        # at a layer's twin, the input of both lanes can be read
        needed |= set(layer_twins[node].all_input_nodes if node in layer_twins else ())
        assert set(walk.alive) == needed
        done.add(node)
    assert walk.alive == ()


def test_both_inputs_of_a_layer_can_be_read_at_its_call_and_at_its_twin():
    _, lanes, calls = traced("unet")
    walk, twins = Walk(lanes, calls), 0
    for node in walk:
        if node.op == "call_module" and node.target.startswith("error_lane."):
            exact, noisy = node.prev.args[0], node.args[0]
            assert len(list(walk.values(exact))) == len(list(walk.values(noisy))) == len(calls)
            twins += 1
    assert twins == len(weight_layers(traced("unet")[0], embeddings=True))


def test_values_of_a_node_that_is_not_alive_are_refused_by_name():
    graph, _, calls = traced("net")
    nodes = list(graph.graph.nodes)
    walk = Walk(graph, calls)
    for node in walk:
        if node.op == "output":
            with pytest.raises(CalibrationError, match=r"conv_in .*was freed"):
                walk.values(nodes[1])
        else:
            with pytest.raises(CalibrationError, match=f"{node.name} does not exist yet"):
                walk.values(node)


def test_a_module_replaced_at_its_yield_is_the_one_that_is_called():
    source, _, calls = traced("unet")
    lanes, plain = carry(source), copy_graph_module(source)
    layers = weight_layers(source, embeddings=True)
    for name, layer in layers.items():
        replace_module(plain, name, rounded(layer.module))
    walk = Walk(lanes, calls)
    for node in walk:
        if node.op == "call_module" and node.target.startswith("error_lane."):
            name = node.target.removeprefix("error_lane.")
            install_in_lane(lanes, name, rounded(layers[name].module))
    expected = zip(by_hand(source, calls), by_hand(plain, calls), strict=True)
    assert same_bits(walk.outputs, list(expected))


def test_arguments_edited_before_execution_are_the_ones_that_are_used():
    graph, _, calls = traced("net")
    graph = copy_graph_module(graph)
    walk = Walk(graph, calls)
    for node in walk:
        if node.target == "norm":
            node.next.args = node.args  # nobody reads the norm then
    graph.recompile()
    assert same_bits(walk.outputs, by_hand(graph, calls))
    assert walk.alive == ()


def test_a_walk_goes_on_where_a_loop_was_left():
    _, lanes, calls = traced("net")
    walk, seen = Walk(lanes, calls), []
    for node in walk:
        seen.append(node)
        if node.target == "body":
            break
    assert len(list(walk.values(node.args[0]))) == len(calls)
    executions = walk.executions
    seen.append(next(walk))
    assert walk.executions == executions + len(calls)
    seen.extend(walk)
    assert seen == list(lanes.graph.nodes)
    assert same_bits(walk.outputs, by_hand(lanes, calls))


def test_a_walk_that_is_over_stays_over():
    graph, _, calls = traced("net")
    walk = Walk(graph, calls)
    assert len(list(walk)) == len(graph.graph.nodes)
    assert list(walk) == []
    assert len(walk.outputs) == len(calls)


def test_an_error_names_the_node_and_ends_the_walk():
    graph, _, calls = traced("net")
    graph = copy_graph_module(graph)
    walk = Walk(graph, calls)
    for node in walk:
        if node.target == "body":
            replace_module(graph, "body", nn.Conv2d(5, 7, 1))
            break
    with pytest.raises(RuntimeError) as caught:
        next(walk)
    assert any("body" in note for note in caught.value.__notes__)
    with pytest.raises(CalibrationError, match="failed at node body"):
        next(walk)


def test_delta_is_zero_where_lanes_are_shared_and_before_anything_is_rounded():
    source, _, calls = traced("net")
    lanes = carry(source)
    walk = Walk(lanes, calls)
    for node in walk:
        assert all(
            walk.delta(n) == 0.0 for n in node.all_input_nodes if _measurable(walk, lanes, n)
        )


def _measurable(walk, lanes, node):
    twin = twin_of(lanes, node)
    return not is_lane(node) and (twin is None or twin in walk.alive)


def test_delta_is_the_relative_error_over_all_calls():
    source, _, calls = traced("net")
    lanes = carry(source)
    install_in_lane(lanes, "conv_in", rounded(source.conv_in))
    install_in_lane(lanes, "mix", rounded(source.mix))
    expected = [_record(lanes, inputs) for inputs in calls]
    walk, measured = Walk(lanes, calls), []
    for node in walk:
        if node.op == "call_module" and node.target.startswith("error_lane."):
            x, x_hat = node.prev.args[0], node.args[0]
            want = sum(float((e[x].double() - e[x_hat]).square().sum()) for e in expected)
            want /= sum(float(e[x].double().square().sum()) for e in expected)
            assert walk.delta(x) == pytest.approx(want, rel=1e-9)
            assert x is x_hat or walk.delta(x_hat) == walk.delta(x)
            measured.append(walk.delta(x))
    assert measured[0] == 0.0
    assert all(value > 0 for value in measured[1:])


def test_delta_of_a_quantizer_is_its_own_error_where_the_value_is_shared():
    _, lanes, calls = traced("net")
    walk, checked = Walk(lanes, calls), 0
    for node in walk:
        source = node.args[0] if node.target == "error_lane.conv_in" else None
        if source is not None and is_dequantize(source):
            assert twin_of(lanes, node.prev.args[0]) is None
            assert walk.delta(node.prev.args[0]) == 0.0
            assert 0 < walk.delta(source) < 0.1
            checked += 1
    assert checked == 1


def test_a_walk_without_calls_is_refused():
    with pytest.raises(CalibrationError, match="no calls"):
        Walk(traced("net")[0], [])


def test_a_call_without_an_argument_is_refused_by_number_and_name():
    graph, _, calls = traced("unet")
    broken = [calls[0], {k: v for k, v in calls[1].items() if k != "timestep"}]
    with pytest.raises(CalibrationError, match="call 1 lacks the argument 'timestep'"):
        Walk(graph, broken)


def test_a_node_that_writes_into_its_input_is_refused_by_name():
    graph = copy_graph_module(traced("net")[0])
    replace_module(graph, "act", nn.SiLU(inplace=True))
    with pytest.raises(DialectError, match=r"act .*writes into its input"):
        Walk(graph, traced("net")[2])


def test_nested_inputs_and_outputs_and_sizes_pass_through():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x, extra):
            left, right = self.linear(x).chunk(2, dim=-1)
            return left * extra["scale"], {"right": right.reshape(x.shape[0], -1)}

    torch.manual_seed(0)
    calls = [
        {"x": torch.randn(n, 3, 4), "extra": {"scale": torch.randn(n, 1, 1)}} for n in (3, 3, 2)
    ]
    graph = trace(Nested().eval(), calls[0])
    walk = Walk(graph, calls)
    for _ in walk:
        pass
    assert same_bits(walk.outputs, by_hand(graph, calls))


def test_parameters_and_gradients_are_left_alone():
    graph, _, calls = traced("net")
    for node in Walk(graph, calls):
        assert torch.is_grad_enabled(), f"at {node}: the caller's code runs in the caller's mode"
    assert all(p.grad is None for p in graph.parameters())


def test_progress_is_the_cost_of_what_is_executed():
    graph, _, calls = traced("net")
    mix = next(node for node in graph.graph.nodes if node.target == "mix")
    reports = Told()
    with reporting(reports):
        walk = Walk(graph, calls, progress="sweep", before={mix: 12_345})
    for node in walk:
        if node.target == "body":
            assert not reports.closed_names
            before = len(reports.amounts)
        if node.target == "mix":
            # 16 channels of 3x3x12 at 60 pixels, for two samples; the last call has one
            sample_cost = 16 * 108 * 60
            assert sample_cost * 2 in reports.amounts[before:]
            assert sample_cost in reports.amounts[before:]
            assert reports.amounts.count(12_345) == 0
    assert reports.amounts.count(12_345) == 1  # the caller's work on that node
    (stage,) = reports.stages
    assert sum(reports.amounts) == stage.done == stage.total
    assert reports.closed_names == ["sweep"]


def test_a_walk_without_a_name_tells_nothing():
    graph, _, calls = traced("net")
    reports = Told()
    with reporting(reports):
        for _ in Walk(graph, calls):
            pass
    assert not reports.stages


def test_a_device_is_where_values_and_constants_are():
    # no other device here: "meta" computes shapes only, and takes no tensor of the CPU
    graph, lanes, calls = traced("condition")
    walk = Walk(lanes, calls, device="meta")
    for node in walk:
        for source in node.all_input_nodes:
            leaves = torch.utils._pytree.tree_leaves(list(walk.values(source)))
            assert {t.device.type for t in leaves if isinstance(t, torch.Tensor)} <= {"meta"}
    with torch.no_grad():
        assert walk.outputs[0][1][0].shape == graph(**calls[0])[0].shape
    assert all(p.device.type == "cpu" for p in lanes.parameters())
