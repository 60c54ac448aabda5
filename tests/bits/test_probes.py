"""Squared Jacobians by random directions: exact where one direction is enough."""

import pytest
import torch
from small import SIGMAS, TinyNet, net_calls
from torch import nn

from mpqdm_fx.bits import probed_parts
from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.probes import output_energies
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.config import MPQConfig


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


def _assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-10)


def test_energies_are_the_squared_gradients_of_a_scalar_output(scalar_graph):
    calls = scalar_calls()
    energies = output_energies(scalar_graph, calls, probes=1)
    assert energies.samples == 5
    _assert_same(energies.channels, _expected(calls))


def test_more_directions_of_a_scalar_output_change_nothing(scalar_graph):
    calls = scalar_calls()
    energies = output_energies(scalar_graph, calls, probes=3, seed=4)
    _assert_same(energies.channels, _expected(calls))


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
    monkeypatch.setattr(probed_parts, "PROBED_BYTES", 1)
    parts = output_energies(scalar_graph, calls, probes=1)
    assert parts.samples == 5
    _assert_same(parts.channels, whole)


def test_few_samples_are_taken_from_all_calls(scalar_graph):
    calls = scalar_calls(batches=(2,) * 8)
    energies = output_energies(scalar_graph, calls, probes=1, samples=8)
    assert energies.samples == 8
    _assert_same(energies.channels, _expected([calls[index] for index in (1, 3, 5, 7)]))


def test_a_weight_counts_as_many_samples(scalar_graph):
    call = scalar_calls(batches=(3,))[0]
    weights = [torch.tensor([2.0, 0.0, 1.0])]
    energies = output_energies(scalar_graph, [call], probes=1, weights=weights)
    repeated = {name: tensor[[0, 0, 2]] for name, tensor in call.items()}
    _assert_same(energies.channels, _expected([repeated]))


def test_the_graph_is_left_as_it_was(scalar_graph):
    before = {name: p.requires_grad for name, p in scalar_graph.named_parameters()}
    modules = {name: id(module) for name, module in scalar_graph.named_modules()}
    output_energies(scalar_graph, scalar_calls(), probes=1)
    assert {name: p.requires_grad for name, p in scalar_graph.named_parameters()} == before
    assert {name: id(module) for name, module in scalar_graph.named_modules()} == modules
    assert all(p.grad is None for p in scalar_graph.parameters())


class Cut(nn.Module):
    """A layer that the output is computed from, behind a step without gradient."""

    def __init__(self, cut):
        super().__init__()
        self.used, self.cut, self.by = nn.Linear(3, 2), nn.Linear(3, 2), cut

    def forward(self, x):
        return self.used(x) + self.by(self.cut(x))


def test_a_layer_that_reaches_the_output_in_steps_alone_is_refused_by_name_or_skipped():
    calls = [{"x": torch.randn(4, 3)}]
    graph = trace(Cut(lambda y: (y > 0).float()), calls[0])
    with pytest.raises(CalibrationError, match=r"cut: .* no gradient .*\"cut\", \"skip\": True"):
        output_energies(graph, calls)
    energies = output_energies(graph, calls, skipped=("cut",)).channels
    torch.testing.assert_close(energies["used"], torch.ones(2).double())


def test_a_layer_that_nothing_reads_has_no_energy():
    calls = [{"x": torch.randn(4, 3)}]
    graph_module = trace(Cut(torch.Tensor.detach), calls[0])
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
    with pytest.raises(CalibrationError, match=r"^conv: it writes NaN or infinity"):
        output_energies(scalar_graph, calls)


class Steep(nn.Module):
    """Outputs are finite, and their gradients are not in float32."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.last(self.first(x * 1e-30) * 1e25 * 1e25)


def test_a_gradient_that_is_not_finite_is_refused_with_the_layer():
    calls = [{"x": torch.randn(4, 3)}]
    graph_module = trace(Steep(), calls[0])
    assert bool(torch.isfinite(graph_module(**calls[0])).all())
    with pytest.raises(CalibrationError, match=r"^first: the output has no finite gradient"):
        output_energies(graph_module, calls)


# Noise levels


def _groups(boundary=1.5):
    """Two groups of noise levels, told apart by `labels` (0..3)."""
    return NoiseGroups(levels=NoiseLevels(boundaries=(boundary,), argument="labels"))


def _part(calls, group):
    """The samples of one group."""
    rows = [(call["labels"] >= 1.5) == bool(group) for call in calls]
    return [
        {name: tensor[mask] for name, tensor in call.items()}
        for call, mask in zip(calls, rows, strict=True)
        if bool(mask.any())
    ]


def test_energies_of_a_noise_level_are_those_of_its_samples_alone(scalar_graph, monkeypatch):
    calls = scalar_calls(batches=(5, 4, 3))
    energies = output_energies(scalar_graph, calls, probes=1, groups=_groups())
    _assert_same(energies.channels, _expected(calls))
    expected = [_expected(_part(calls, group)) for group in (0, 1)]
    sums = {name: torch.stack([part[name].sum() for part in expected]) for name in expected[0]}
    _assert_same(energies.groups, sums)
    monkeypatch.setattr(probed_parts, "PROBED_BYTES", 1)  # sample by sample
    alone = output_energies(scalar_graph, calls, probes=1, groups=_groups())
    _assert_same(alone.groups, sums)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_over_noise_levels_is_the_sum_over_channels(scalar_graph, weighted):
    calls = scalar_calls(batches=(5, 4, 3))
    weights = [torch.rand(len(call["x"])) for call in calls] if weighted else None
    settings = {"probes": 2, "weights": weights, "groups": _groups()}
    energies = output_energies(scalar_graph, calls, **settings)
    labels = torch.cat([call["labels"] for call in calls])
    importance = torch.ones(12) if weights is None else torch.cat(weights)
    share = torch.stack([importance[labels < 1.5].sum(), importance[labels >= 1.5].sum()])
    share = (share / share.sum()).double()
    assert bool((share > 0).all())
    for name, energy in energies.groups.items():
        torch.testing.assert_close(energy @ share, energies.channels[name].sum(), rtol=1e-5, atol=0)


def test_a_noise_level_without_samples_counts_as_the_mean(scalar_graph):
    calls = scalar_calls(batches=(5,))
    energies = output_energies(scalar_graph, calls, probes=1, groups=_groups(boundary=100))
    for name, energy in energies.groups.items():
        torch.testing.assert_close(energy, energies.channels[name].sum().expand(2))


class Scaled(nn.Module):
    """Its layer's energy is sigma squared, for each number of the output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 1)

    def forward(self, x, sigma):
        return self.conv(x) * sigma[:, None, None, None]


@pytest.mark.parametrize("samples", [20, 32, 100, 160])
def test_few_samples_are_taken_from_all_noise_levels(samples):
    # calls along runs of five steps: every fifth call has the same noise level
    x = torch.randn(4, 2, 3, 3)
    calls = [{"x": x, "sigma": torch.full((4,), SIGMAS[i % 5])} for i in range(40)]
    graph_module = trace(Scaled(), calls[0])
    groups = NoiseGroups.of(graph_module, calls, MPQConfig())
    energies = output_energies(graph_module, calls, samples=samples, groups=groups)
    assert energies.samples == samples
    expected = 9 * torch.tensor(SIGMAS[::-1]).double().square()
    torch.testing.assert_close(energies.groups["conv"], expected)


# What others see of a backward pass


class Readers(nn.Module):
    """Values that weight layers read, and others too; one output number a sample."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.left, self.right, self.twice = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        known = self.readers(h, h)
        return (known + x[..., :4]).square().mean(1).sum(-1, keepdim=True)

    def readers(self, seen, others):
        """`seen` is the value as `left` and `right` read it."""
        mixed = self.left(seen) * self.right(seen) + self.norm(others)[..., :4]
        return mixed + self.twice(torch.sin(self.twice(mixed)))


class Seen:
    """A watch that keeps what it is shown, by call."""

    def __init__(self, kinds=()):
        self.kinds, self.read, self.written = dict(kinds), {}, {}
        self.started = self.finished = 0

    def start(self, inputs):
        assert inputs
        self.started += 1

    def kind(self, call):
        return self.kinds.get(call.name, 8)

    def finish(self, _samples):
        self.finished += 1

    def inputs(self, call, x, gradient, samples):
        assert samples == len(x)
        self.read[call.name] = (x, gradient)

    def outputs(self, call, y, gradient, samples):
        assert samples == len(y)
        self.written[call.name] = (y, gradient)


def test_a_watch_sees_the_gradient_of_what_weight_layers_alone_read():
    model, x = Readers(), torch.randn(3, 5, 6)
    watch = Seen()
    energies = output_energies(trace(model, {"x": x}), [{"x": x}], probes=1, watch=watch)
    assert watch.started == 1
    assert watch.finished == 1  # random direction
    assert set(watch.read) == {"first", "left", "twice", "twice_1"}  # left stands for right too
    assert set(watch.written) == {"first", "left", "right", "twice", "twice_1"}
    h = model.first(x).detach()
    seen = h.clone().requires_grad_()
    result = (model.readers(seen, h) + x[..., :4]).square().mean(1).sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad(result.sum(), seen)
    value, gradient = watch.read["left"]
    torch.testing.assert_close(value, h)
    # <v, f> has the sign of each sample's only output
    torch.testing.assert_close(gradient.abs(), expected.abs(), rtol=1e-4, atol=1e-6)
    outer = x.clone().requires_grad_()
    result = (model.readers(*[model.first(outer)] * 2) + x[..., :4]).square().mean(1).sum()
    (expected,) = torch.autograd.grad(result, outer)  # not through what is added later
    torch.testing.assert_close(watch.read["first"][1].abs(), expected.abs(), rtol=1e-4, atol=1e-6)
    for name in ("first", "left", "right"):
        squared = watch.written[name][1].double().square().flatten(0, -2).sum(0) / 3
        torch.testing.assert_close(energies.channels[name], squared)


def test_readers_of_two_kinds_are_seen_apart_and_add_up_to_one():
    model, x = Readers(), torch.randn(3, 5, 6)
    together, apart = Seen(), Seen({"right": 4})
    for watch in (together, apart):
        output_energies(trace(model, {"x": x}), [{"x": x}], probes=1, watch=watch)
    assert set(apart.read) == {*together.read, "right"}
    parts = apart.read["left"][1] + apart.read["right"][1]
    torch.testing.assert_close(parts, together.read["left"][1], rtol=1e-4, atol=1e-6)


def test_watching_changes_no_energy(scalar_graph):
    calls = scalar_calls()
    plain, watched = (output_energies(scalar_graph, calls, watch=w) for w in (None, Seen()))
    for name, energy in plain.channels.items():
        assert torch.equal(watched.channels[name], energy)
