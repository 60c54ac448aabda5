"""What scaling inputs does to the rounding of weights, in errors of the output."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.bits.channel_sizes import ChannelSizes
from mpqdm_fx.bits.weight_costs import expected_widths, weight_costs
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.levels.grids import dequantize
from mpqdm_fx.numerics.solve.scales import quantize_uniform

LAYERS = {
    "linear": (nn.Linear(12, 8), (12,)),
    "convolution": (nn.Conv2d(12, 8, 3, padding=1), (12, 6, 6)),
    "grouped": (nn.Conv2d(12, 8, 3, padding=1, groups=4), (12, 6, 6)),
}


def costs_of(layer, shape, sizes, bits, exponents=(0.0, 0.5, 1.0), energies=None):
    graph = trace(nn.Sequential(layer).eval(), {"input": torch.randn(2, *shape)})
    layers = weight_layers(graph)
    (name,) = layers
    return weight_costs(
        layers,
        {name: (name,)},
        ChannelSizes(largest={name: sizes}, mean_square={name: sizes.double().square()}),
        {name: torch.ones(8, dtype=torch.float64) if energies is None else energies},
        exponents,
        fixed={name: bits},
        mean_bits=4.0,
        feedback=False,
        seed=0,
    )[name]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_cost_is_the_error_of_the_rounded_layer_on_independent_inputs(kind, bits):
    layer, shape = LAYERS[kind]
    sizes = torch.logspace(-1, 1, 12)
    energies = torch.linspace(0.1, 2, 8, dtype=torch.float64)
    costs = costs_of(layer, shape, sizes, bits, energies=energies)
    groups = getattr(layer, "groups", 1)
    for exponent, cost in costs.items():
        largest = ChannelSizes(largest={"": sizes}, mean_square={})
        factor = largest.factor("", exponent) if exponent else torch.ones(12)
        total = 0.0
        for row in range(8):  # by hand: each output channel reads its group's inputs
            inputs = slice(row // (8 // groups) * (12 // groups), None)
            width = layer.weight.shape[1]
            f, x = factor[inputs][:width], sizes[inputs][:width]
            kernel = layer.weight[0, 0].numel()
            weight = (layer.weight[row].detach().reshape(width, -1) * f[:, None]).reshape(1, -1)
            energy = (x / f).square().repeat_interleave(kernel)
            codes, scale = quantize_uniform(weight, torch.tensor([bits]), energy[None])
            error = (energy * (weight - dequantize(codes, scale)).square()).sum()
            total += float(energies[row] * error)
        assert cost == pytest.approx(total, rel=1e-4)


def test_scaling_costs_weights_of_two_bits_what_it_does_not_cost_those_of_eight():
    torch.manual_seed(0)
    layer, sizes = nn.Linear(12, 8), torch.logspace(-2, 1, 12)
    two, eight = (costs_of(layer, (12,), sizes, bits) for bits in (2, 8))
    assert two[1.0] - two[0.0] > 100 * abs(eight[1.0] - eight[0.0])


@given(
    st.lists(st.tuples(st.floats(1e-9, 1e3), st.integers(1, 5000)), min_size=1, max_size=8),
    st.floats(1, 8),
)
def test_expected_widths_meet_the_average_but_for_rounding(layers, mean):
    costs = torch.tensor([cost for cost, _ in layers]).double()
    numbers = torch.tensor([count for _, count in layers]).double()
    widths = expected_widths(costs, numbers, mean)
    assert all(1 <= width <= 8 for width in widths)
    average = sum(w * int(n) for w, n in zip(widths, numbers, strict=True)) / float(numbers.sum())
    assert abs(average - mean) <= 0.51
    dearer = sorted(range(len(layers)), key=lambda i: float(costs[i] / numbers[i]))
    assert [widths[i] for i in dearer] == sorted(widths)


def test_of_no_layer_nothing_is_expected():
    assert expected_widths(torch.empty(0).double(), torch.empty(0).double(), 3.0) == []
