"""Squared Jacobians by random directions: exact where one direction is enough."""

import pytest
import torch
from small import TinyNet, net_calls
from torch import nn

from mpqdm_fx.calibration import probes as probes_module
from mpqdm_fx.calibration.probes import output_energies
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.trace import trace


class ScalarNet(nn.Module):
    """One output number a sample, so one sign is all directions: the estimate is exact."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, stride=2)
        self.act = nn.SiLU()
        self.mix = nn.Linear(8, 6)
        self.last = nn.Linear(6, 1, bias=False)

    def forward(self, x, labels):
        h = self.conv(x) + self.table(labels)[:, :, None, None]
        h = self.act(self.grouped(self.act(h)))
        return self.last(self.mix(h.flatten(2).transpose(1, 2)).mean(1) ** 2)


def scalar_calls(batches=(3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(size, 2, 6, 5, generator=generator),
            "labels": torch.randint(4, (size,), generator=generator),
        }
        for size in batches
    ]


@pytest.fixture(scope="module")
def scalar_graph():
    return trace(ScalarNet(), scalar_calls()[0])


def _outputs_of(model, call):
    """Every layer's output, with its gradient of the sum over samples."""
    written = {}
    handles = []
    for name, layer in model.named_children():
        if any(True for _ in layer.parameters()):
            handles.append(
                layer.register_forward_hook(
                    lambda _m, _i, out, name=name: written.__setitem__(name, out)
                )
            )
    result = model(**call)
    gradients = torch.autograd.grad(result.sum(), list(written.values()))
    for handle in handles:
        handle.remove()
    return dict(zip(written, gradients, strict=True))


def _expected(calls):
    """Mean over samples of the squared gradients, summed over positions."""
    model, total, count = ScalarNet(), {}, 0
    for call in calls:
        count += len(call["x"])
        for name, gradient in _outputs_of(model, call).items():
            squared = gradient.double().square()
            if name == "table":
                value = torch.zeros(5, 8, dtype=torch.float64)
                value.index_add_(0, call["labels"], squared)
            else:
                axis = 1 if squared.dim() == 4 else -1
                value = squared.movedim(axis, -1).flatten(0, -2).sum(0)
            total[name] = total.get(name, 0) + value
    return {name: value / count for name, value in total.items()}


def _assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-10)


def test_energies_are_the_squared_gradients_of_a_scalar_output(scalar_graph):
    calls = scalar_calls()
    found = output_energies(scalar_graph, calls, probes=1)
    assert found.samples == 5
    _assert_same(found.channels, _expected(calls))


def test_more_directions_of_a_scalar_output_change_nothing(scalar_graph):
    calls = scalar_calls()
    found = output_energies(scalar_graph, calls, probes=3, seed=4)
    _assert_same(found.channels, _expected(calls))


def test_a_direction_covers_all_outputs_on_average():
    graph = trace(TinyNet(), net_calls()[0])
    calls = net_calls(calls=1, batch=2)
    energies = output_energies(graph, calls, probes=300).channels
    # The last layer's output is the model's output: each of its 60 positions has energy 1.
    torch.testing.assert_close(energies["conv_out"], torch.full((3,), 60.0).double())
    model, x = TinyNet(), calls[0]["x"]
    jacobian = torch.func.jacrev(lambda y: model.conv_out(y))(
        model.mix(model.body(model.act(model.norm(model.conv_in(x)))).movedim(1, -1)).movedim(-1, 1)
    )
    exact = jacobian.double().square().sum(dim=(0, 1, 2, 3, 4, 6, 7)) / 2
    torch.testing.assert_close(energies["mix"], exact, rtol=0.15, atol=0)


def test_splitting_calls_into_parts_changes_nothing(scalar_graph, monkeypatch):
    calls = scalar_calls(batches=(5,))
    whole = output_energies(scalar_graph, calls, probes=1).channels
    monkeypatch.setattr(probes_module, "_MEMORY", 1)
    parts = output_energies(scalar_graph, calls, probes=1)
    assert parts.samples == 5
    _assert_same(parts.channels, whole)


def test_few_samples_are_taken_from_all_calls(scalar_graph):
    calls = scalar_calls(batches=(2,) * 8)
    found = output_energies(scalar_graph, calls, probes=1, samples=8)
    assert found.samples == 8
    _assert_same(found.channels, _expected([calls[index] for index in (1, 3, 5, 7)]))


def test_a_weight_counts_as_many_samples(scalar_graph):
    call = scalar_calls(batches=(3,))[0]
    weights = [torch.tensor([2.0, 0.0, 1.0])]
    found = output_energies(scalar_graph, [call], probes=1, weights=weights)
    repeated = {name: tensor[[0, 0, 2]] for name, tensor in call.items()}
    _assert_same(found.channels, _expected([repeated]))


def test_the_graph_is_left_as_it_was(scalar_graph):
    before = {name: p.requires_grad for name, p in scalar_graph.named_parameters()}
    modules = {name: id(module) for name, module in scalar_graph.named_modules()}
    output_energies(scalar_graph, scalar_calls(), probes=1)
    assert {name: p.requires_grad for name, p in scalar_graph.named_parameters()} == before
    assert {name: id(module) for name, module in scalar_graph.named_modules()} == modules
    assert all(p.grad is None for p in scalar_graph.parameters())


class Cut(nn.Module):
    """A layer that the output is computed from, behind a step without gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.cut = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x) + self.cut(x).detach()


def test_a_layer_that_reaches_the_output_without_gradient_is_refused_by_name():
    calls = [{"x": torch.randn(4, 3)}]
    with pytest.raises(CalibrationError, match=r"cut: it reaches the output, but no gradient"):
        output_energies(trace(Cut(), calls[0]), calls)


def test_a_layer_that_nothing_reads_has_no_energy():
    calls = [{"x": torch.randn(4, 3)}]
    graph_module = trace(Cut(), calls[0])
    (output,) = graph_module.graph.find_nodes(op="output")
    (used,) = (node for node in graph_module.graph.nodes if node.target == "used")
    output.replace_input_with(output.all_input_nodes[0], used)
    graph_module.recompile()
    energies = output_energies(graph_module, calls).channels
    assert energies["cut"].tolist() == [0, 0]
    torch.testing.assert_close(energies["used"], torch.ones(2).double())


def test_bad_calls_are_refused(scalar_graph):
    calls = scalar_calls()
    with pytest.raises(CalibrationError, match="1 tensors of weights for 2 calls"):
        output_energies(scalar_graph, calls, weights=[torch.ones(3)])
    for bad in (torch.ones(3), torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -1.0])):
        with pytest.raises(CalibrationError, match="weights of call 1 have shape"):
            output_energies(scalar_graph, calls, weights=[torch.ones(3), bad])
    with pytest.raises(CalibrationError, match="are zero"):
        output_energies(scalar_graph, calls, weights=[torch.zeros(3), torch.zeros(2)])
    calls[0]["x"][0, 0, 0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="no finite gradient"):
        output_energies(scalar_graph, calls)
