"""Going backwards part by part shows the gradients that one pass over the whole graph shows."""

import pytest
import torch
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls
from torch import nn

from mpqdm_fx import MPQConfig
from mpqdm_fx.bits import parted_probe
from mpqdm_fx.bits.activation_choice import options_of
from mpqdm_fx.bits.activation_costs import ActivationCosts
from mpqdm_fx.bits.parted_probe import backward_bytes, backward_parts
from mpqdm_fx.bits.probes import output_energies
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.run.cost import bind_sizes, value_bytes


class Chunks(nn.Module):
    """A tuple between layers, one value that many read, and an output in the middle."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.left, self.right, self.wide = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 6)

    def forward(self, x):
        h = self.first(x)
        left, right = h.chunk(2, dim=-1)
        middle = torch.tanh(self.left(left)) * left
        return middle, self.right(torch.relu(right) + middle) + self.wide(h)


MODELS = {
    "unet": (tiny_unet, lambda: unet_calls(2)),
    "condition": (tiny_condition_unet, lambda: condition_calls(2)),
    "chunks": (Chunks, lambda: [{"x": torch.randn(4, 6)}]),
}


@pytest.fixture(params=MODELS)
def traced(request):
    model, calls = (make() for make in MODELS[request.param])
    return trace(model.eval(), calls[0]), calls


def _measured(graph, calls, mode):
    settings = MPQConfig(activation_mode=mode)
    watch = ActivationCosts(graph, calls, settings, options_of(settings))
    energies = output_energies(graph, calls, watch=watch, seed=3)
    return energies, watch.costs()


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("share", [4, 10**9])
def test_energies_and_costs_are_those_of_the_whole(traced, mode, share, monkeypatch):
    graph, calls = traced
    sizes = bind_sizes(graph, calls[0])
    limit = sum(value_bytes(node, sizes) for node in graph.graph.nodes) // share
    whole, costs = _measured(graph, calls, mode)
    passes = []
    monkeypatch.setattr(torch.autograd, "grad", _counted(torch.autograd.grad, passes))
    monkeypatch.setattr(parted_probe, "PROBED_BYTES", limit)
    parted, parted_costs = _measured(graph, calls, mode)
    assert len(passes) > len(calls) * 2 * 2  # not one for each call and direction
    assert parted.samples == whole.samples
    assert parted.output == pytest.approx(whole.output, rel=1e-5)
    for name, energy in whole.channels.items():
        assert torch.allclose(parted.channels[name], energy, rtol=1e-4, atol=1e-9)
        assert torch.allclose(parted.groups[name], whole.groups[name], rtol=1e-4, atol=1e-9)
    for unit, options in costs.items():
        assert parted_costs[unit] == pytest.approx(options, rel=1e-3, abs=1e-9)


def _counted(function, calls):
    def run(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return run


def test_parts_are_all_nodes_in_order_and_only_tensors_cross(traced):
    graph, calls = traced
    sizes = bind_sizes(graph, calls[0])
    nodes = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
    for limit in (1, 5_000, 10**9):
        parts = backward_parts(graph, sizes, limit)
        assert [node for part in parts for node in part.nodes] == nodes
        for part in parts[:-1]:
            assert not any(isinstance(node.meta["val"], tuple | list) for node in part.gives)
        if limit == 10**9:
            assert len(parts) == 1
        held = [sum(value_bytes(node, sizes) for node in part.nodes) for part in parts]
        assert all(
            size <= limit or len(part.nodes) < 20 for size, part in zip(held, parts, strict=True)
        )


def test_less_is_held_where_the_graph_is_parted(monkeypatch):
    calls = unet_calls(1)
    graph = trace(tiny_unet(), calls[0])
    whole = backward_bytes(graph, calls[0])
    monkeypatch.setattr(parted_probe, "PROBED_BYTES", whole // 60)  # of three samples
    assert backward_bytes(graph, calls[0]) < whole / 4


def test_a_layer_that_no_gradient_reaches_is_refused_in_parts_too(monkeypatch):
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b((self.a(x) > 0).float())

    calls = [{"x": torch.randn(3, 4)}]
    graph = trace(Rounded().eval(), calls[0])
    for limit in (10**9, 1):
        monkeypatch.setattr(parted_probe, "PROBED_BYTES", limit)
        with pytest.raises(CalibrationError, match="a: it reaches the output, but no gradient"):
            output_energies(graph, calls)


def test_an_output_without_layers_is_refused_in_parts_too(monkeypatch):
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return (self.a(x) > 0).float() * x + x.sin().cos()

    calls = [{"x": torch.randn(3, 4)}]
    graph = trace(Nothing().eval(), calls[0])
    for limit in (10**9, 1):
        monkeypatch.setattr(parted_probe, "PROBED_BYTES", limit)
        with pytest.raises(CalibrationError, match=r"does not depend|no gradient"):
            output_energies(graph, calls)
