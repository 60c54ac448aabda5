"""What rounding an input costs at the output, and which option every input gets for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpqdm_fx import MPQConfig
from mpqdm_fx.bits.activation_choice import choose_activations, options_of
from mpqdm_fx.bits.activation_costs import ActivationCosts
from mpqdm_fx.bits.channel_sizes import ChannelSizes
from mpqdm_fx.bits.probes import output_energies
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.numerics.activations.dynamic import fake_quantize_dynamic
from mpqdm_fx.records.report import ActivationChoice
from mpqdm_fx.run.cost import bind_sizes
from mpqdm_fx.run.speed import InputOption

DYNAMIC = InputOption(kind="dynamic")
FLOAT = InputOption(kind="float")


class SumOfLinears(nn.Module):
    """One number per sample, from two layers that read the same numbers behind activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(4, 6)
        self.act_a, self.act_b = nn.ReLU(), nn.ReLU()
        self.a, self.b = nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.a(self.act_a(h)) + self.b(self.act_b(h))


class Outliers(nn.Module):
    """Convolutions, of which one reads channels of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.even = nn.Conv2d(16, 16, 3, padding=1)
        self.uneven = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)
        self.register_buffer("gain", torch.logspace(-2, 2, 16)[:, None, None])
        with torch.no_grad():
            self.uneven.weight /= self.gain[None, :, 0, 0][..., None, None].view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.silu(self.first(x))
        h = functional.silu(self.even(h))
        return self.last(functional.silu(self.uneven(h * self.gain)))


def _calls(*shape: int, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(shape, generator=generator)} for _ in range(count)]


def _choices(
    model: nn.Module,
    calls: list[dict[str, Tensor]],
    weight_cost: Callable[[float], float] = lambda exponent: 0.0,
    **overrides: object,
) -> dict[str, ActivationChoice]:
    graph = trace(model.eval(), calls[0])
    settings = MPQConfig(**{"activation_mode": "dynamic", **overrides})  # type: ignore[arg-type]
    costs = ActivationCosts(graph, calls, settings, options_of(settings))
    energies = output_energies(graph, calls, watch=costs)
    sizes = bind_sizes(graph, calls[0])
    chosen = choose_activations(
        graph,
        costs.units,
        costs.costs(),
        {unit: {e: weight_cost(e) for e in (0.0, 0.5, 1.0)} for unit in costs.units},
        energies.output,
        settings,
        sizes,
    )
    return {name: choice for choice in chosen for name in choice.layers}


def test_the_cost_of_an_input_is_the_squared_change_of_the_output() -> None:
    model, calls = SumOfLinears().eval(), _calls(5, 4)
    graph = trace(model, calls[0])
    settings = MPQConfig(activation_mode="dynamic")
    costs = ActivationCosts(graph, calls, settings, (DYNAMIC, FLOAT))
    output_energies(graph, calls, watch=costs)
    changes = []
    with torch.no_grad():
        for call in calls:
            h = functional.relu(model.before(call["x"]))
            error = fake_quantize_dynamic(h, 8, 1) - h
            # one number per sample: random signs do not matter, and readers add up before squares
            changes.append(error @ (model.a.weight + model.b.weight).T)
    expected = float(torch.cat(changes).square().mean())
    by_unit = costs.costs()
    assert set(costs.units) == {"before", "a"}
    assert costs.units["a"] == ("a", "b")
    assert by_unit["a"][DYNAMIC] == pytest.approx(expected, rel=1e-4)
    assert by_unit["a"][FLOAT] == 0


def test_scaled_channels_cost_less_where_they_are_of_different_sizes() -> None:
    chosen = _choices(Outliers(), _calls(2, 3, 16, 16), slowdown=1.5)
    uneven, even = chosen["uneven"], chosen["even"]
    assert uneven.kind == "float" or uneven.exponent > 0
    assert uneven.quantized_cost > 10 * even.quantized_cost
    assert uneven.cost < uneven.quantized_cost / 10


@pytest.mark.parametrize("mode", ["static", "dynamic", "measured"])
@pytest.mark.parametrize("slowdown", [1.02, 1.1, 2.0])
def test_the_budget_of_time_and_bytes_is_kept(mode: str, slowdown: float) -> None:
    model = Outliers()
    chosen = _choices(model, _calls(2, 3, 16, 16), activation_mode=mode, slowdown=slowdown)
    assert sum(choice.slowdown for choice in chosen.values()) <= slowdown - 1 + 1e-9
    weights = {name: layer.weight.numel() for name, layer in model.named_children()}
    extra = sum(3 * weights[name] for name, choice in chosen.items() if choice.kind == "float")
    assert extra <= (slowdown - 1) * sum(weights.values())


def test_more_time_never_costs_more() -> None:
    calls = _calls(2, 3, 16, 16)
    costs = [
        sum(choice.cost for choice in _choices(Outliers(), calls, slowdown=slowdown).values())
        for slowdown in (1.01, 1.1, 1.5, 4.0)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


def test_an_override_of_the_width_and_other_widths_leave_no_choice() -> None:
    calls = _calls(2, 3, 16, 16)
    rule = {"pattern": "uneven", "activation_bits": 8}
    wide = _choices(Outliers(), calls, slowdown=4.0, overrides=[rule])
    assert (wide["uneven"].kind, wide["uneven"].exponent) == ("dynamic", 0.0)
    assert wide["even"].kind == "float"
    alike = {"activation_bits": 4, "activation_allocation": "uniform"}
    narrow = _choices(Outliers(), calls, slowdown=4.0, **alike)
    assert {name: choice.kind for name, choice in narrow.items()} == {
        "first": "float", "even": "dynamic", "uneven": "dynamic", "last": "dynamic",
    }  # fmt: skip
    assert {choice.bits for choice in narrow.values()} == {4}
    rule = {"pattern": "uneven", "activation_bits": 6}
    assert _choices(Outliers(), calls, overrides=[rule], **alike)["uneven"].bits == 6


def test_without_a_budget_nothing_is_measured() -> None:
    assert options_of(MPQConfig(activation_mode="dynamic", slowdown=1)) == ()
    assert options_of(MPQConfig(activation_mode="float")) == ()
    assert options_of(MPQConfig(activation_mode="timestep")) == ()
    assert options_of(MPQConfig(activation_mode="measured", slowdown=1)) != ()


def test_factors_are_powers_of_two_and_silent_channels_stay_within_bounds() -> None:
    largest = {"unit": torch.tensor([0.0, 1e-30, 1.0, 300.0])}
    sizes = ChannelSizes(largest=largest, mean_square={})
    for exponent in (0.5, 1.0):
        factor = sizes.factor("unit", exponent)
        assert torch.equal(factor.log2(), factor.log2().round())
        assert float(factor.max() / factor.min()) <= 2 ** (8 * exponent + 1)
    silent = ChannelSizes(largest={"unit": torch.zeros(3)}, mean_square={})
    assert torch.equal(silent.factor("unit", 1.0), torch.ones(3))


def test_channels_are_measured_over_all_calls() -> None:
    model, calls = Outliers().eval(), _calls(2, 3, 16, 16)
    graph = trace(model, calls[0])
    sizes = ChannelSizes.of(graph, calls, {"first": ("first",)})
    x = torch.cat([call["x"] for call in calls]).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(sizes.largest["first"], x.abs().amax(dim=0))
    torch.testing.assert_close(sizes.mean_square["first"], x.double().square().mean(dim=0))


def test_what_scaling_costs_the_weights_counts() -> None:
    calls = _calls(2, 3, 16, 16)
    free = _choices(Outliers(), calls)
    dear = _choices(Outliers(), calls, weight_cost=lambda exponent: 1e3 * exponent)
    assert any(choice.exponent for choice in free.values())
    assert not any(choice.exponent for choice in dear.values())
