"""Walks under a memory limit: the same bits from disk, the foreseen bytes, nothing left behind."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls
from torch import nn

from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.passes import CarryErrorLane
from mpqdm_fx.run.cost import walk_memory
from mpqdm_fx.run.walk import Walk
from mpqdm_fx.testing import graphs


@functools.cache
def traced(kind="unet"):
    make, calls = {
        "unet": (tiny_unet, unet_calls),
        "condition": (tiny_condition_unet, condition_calls),
    }[kind]
    recorded = calls()
    recorded.append({name: value[:1] for name, value in recorded[0].items()})
    graph = trace(make(), recorded[0])
    return CarryErrorLane()(graph).graph_module, recorded


def finished(graph_module, calls, **settings):
    walk = Walk(graph_module, calls, **settings)
    for _ in walk:
        pass
    return walk


@functools.cache
def unlimited(kind="unet"):
    return finished(*traced(kind))


@pytest.mark.parametrize("half", [False, True], ids=["full", "half"])
@pytest.mark.parametrize("kind", ["unet", "condition"])
def test_peak_bytes_of_a_walk_are_those_foreseen_from_the_shapes(kind, half):
    graph_module, calls = traced(kind)
    walk = finished(graph_module, calls, half=half)
    assert walk.peak_bytes == walk_memory(graph_module, calls, half=half)[0]
    assert walk.spilled == 0


@given(case=graphs(max_blocks=4), half=st.booleans())
def test_peak_bytes_on_random_graphs_are_those_foreseen(case, half):
    graph_module = CarryErrorLane()(case.graph_module).graph_module
    calls = [dict(case.inputs)] * 3
    peak, smallest = walk_memory(graph_module, calls, half=half)
    assert finished(graph_module, calls, half=half).peak_bytes == peak
    assert smallest <= peak


@pytest.mark.parametrize("kind", ["unet", "condition"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_spilled_values_come_back_with_the_same_bits(kind, share, tmp_path):
    graph_module, calls = traced(kind)
    peak, smallest = walk_memory(graph_module, calls)
    limit = int(smallest + share * (peak - smallest))
    walk = finished(graph_module, calls, max_memory=limit, directory=tmp_path)
    assert same_bits(walk.outputs, unlimited(kind).outputs)
    assert walk.spilled > 0
    assert walk.peak_bytes <= limit
    assert list(tmp_path.iterdir()) == []


@given(case=graphs(max_blocks=4), calls=st.integers(1, 3), share=st.floats(0, 1))
def test_random_graphs_give_the_same_bits_under_every_limit_that_is_accepted(case, calls, share):
    graph_module = CarryErrorLane()(case.graph_module).graph_module
    inputs = [{**case.inputs, "sample": case.inputs["sample"] + i} for i in range(calls)]
    peak, smallest = walk_memory(graph_module, inputs)
    limit = int(smallest + share * (peak - smallest))
    walk = finished(graph_module, inputs, max_memory=limit)
    assert same_bits(walk.outputs, finished(graph_module, inputs).outputs)
    assert walk.peak_bytes <= limit


def test_a_limit_at_the_peak_writes_nothing_to_disk(tmp_path):
    graph_module, calls = traced()
    walk = Walk(graph_module, calls, max_memory=unlimited().peak_bytes, directory=tmp_path)
    assert all(not any(tmp_path.iterdir()) for _ in walk)
    assert walk.spilled == 0


def test_a_limit_below_one_node_at_one_call_is_refused_with_the_smallest_that_can_hold():
    graph_module, calls = traced()
    smallest = walk_memory(graph_module, calls)[1]
    with pytest.raises(CalibrationError, match=f"smallest limit that can is {smallest} bytes"):
        Walk(graph_module, calls, max_memory=smallest - 1)
    # and no node has inputs and outputs that large, but for the one it is named after
    with torch.no_grad():
        assert smallest == max(_need(graph_module, inputs) for inputs in calls)


def _need(graph_module, inputs):
    values, largest = {}, 0
    arguments = iter(inputs.values())
    for node in graph_module.graph.nodes:
        read = sum(_bytes(values[n]) for n in node.all_input_nodes if n.op != "get_attr")
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(arguments)
        elif node.op == "call_module":
            values[node] = graph_module.get_submodule(node.target)(*args, **kwargs)
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        elif node.op == "get_attr":
            values[node] = graph_module.get_parameter(node.target)
            continue
        largest = max(largest, read + _bytes(values.get(node)))
    return largest


def _bytes(value):
    leaves = torch.utils._pytree.tree_leaves(value)
    return sum(t.nbytes for t in leaves if isinstance(t, torch.Tensor))


def test_values_on_disk_can_be_read_in_call_order():
    graph_module, calls = traced()
    smallest = walk_memory(graph_module, calls)[1]
    limited = Walk(graph_module, calls, max_memory=smallest)
    free = Walk(graph_module, calls)
    for node, same in zip(limited, free, strict=True):
        assert node is same
        for source in node.all_input_nodes:
            assert same_bits(list(limited.values(source)), list(free.values(source)))
            held = limited.peak_bytes
            assert held <= smallest


class Layouts(nn.Module):
    """Values whose memory is transposed, cut out, or one element for many."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 8)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        h = self.linear(x).transpose(1, 2)
        left, right = h.transpose(1, 2).chunk(2, dim=-1)
        mean = x.mean(dim=-1, keepdim=True).expand(x.shape[0], x.shape[1], 4)
        late = self.last(left) * 2.0
        return late, self.last(right) + late, (mean * right).sum(-1), h, x > 0


def test_layout_in_memory_survives_the_disk():
    calls = [{"x": torch.randn(3, 5, 6)} for _ in range(3)]
    graph_module = trace(Layouts().eval(), calls[0])
    smallest = walk_memory(graph_module, calls)[1]
    limited, free = Walk(graph_module, calls, max_memory=smallest), Walk(graph_module, calls)
    layouts = set()
    for node, _ in zip(limited, free, strict=True):
        for source in node.all_input_nodes:
            for a, b in zip(limited.values(source), free.values(source), strict=True):
                if isinstance(a, torch.Tensor):
                    assert (a.stride(), a.dtype) == (b.stride(), b.dtype)
                    # kernels that take blocks of 64 bytes start them at the same element
                    assert a.data_ptr() % 64 == b.data_ptr() % 64
                    layouts.add((a.is_contiguous(), 0 in a.stride()))
    assert limited.spilled > 0
    assert layouts == {(True, False), (False, False), (False, True)}
    assert same_bits(limited.outputs, free.outputs)


def test_half_precision_holds_half_the_bytes_and_little_error():
    graph_module, calls = traced()
    walk = finished(graph_module, calls, half=True)
    assert walk.peak_bytes == pytest.approx(unlimited().peak_bytes / 2, rel=0.01)
    for got, want in zip(walk.outputs, unlimited().outputs, strict=True):
        for lane, exact in zip(got, want, strict=True):
            error = (lane[0] - exact[0]).norm() / exact[0].norm()
            assert lane[0].dtype == torch.float32
            assert 0 < error < 5e-3


def test_half_precision_keeps_lanes_equal_before_anything_is_rounded():
    graph_module, calls = traced()
    for exact, noisy in finished(graph_module, calls, half=True).outputs:
        assert same_bits(exact, noisy)


class Large(nn.Module):
    def forward(self, x):
        return (x * 1e6) / 1e6, (x * 1e6).isinf()


def test_values_that_overflow_float16_stay_float32():
    calls = [{"x": torch.tensor([[1.0, -3.0, torch.inf]])}, {"x": torch.tensor([[0.5, 0.25, 2.0]])}]
    graph_module = trace(Large().eval(), calls[0])
    walk = finished(graph_module, calls, half=True)
    for (value, infinite), inputs in zip(walk.outputs, calls, strict=True):
        assert torch.equal(infinite, inputs["x"].isinf())
        torch.testing.assert_close(value, inputs["x"], rtol=1e-3, atol=0)


def test_a_walk_that_is_given_up_leaves_no_files(tmp_path):
    graph_module, calls = traced()
    smallest = walk_memory(graph_module, calls)[1]
    walk = Walk(graph_module, calls, max_memory=smallest, directory=tmp_path)
    for node in walk:
        if walk.spilled and node.op == "call_module":
            break
    assert any(tmp_path.rglob("*.safetensors"))
    walk.close()
    assert list(tmp_path.iterdir()) == []
    assert walk.alive == ()


def test_files_are_removed_with_their_values(tmp_path):
    graph_module, calls = traced()
    peak, smallest = walk_memory(graph_module, calls)
    walk = Walk(graph_module, calls, max_memory=(peak + smallest) // 2, directory=tmp_path)
    for _ in walk:
        assert len(list(tmp_path.rglob("*.safetensors"))) <= len(walk.alive) * len(calls)
