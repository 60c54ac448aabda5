"""Which layers own kernels run: what fits, and by the table what is faster there."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounded_nets import round_to_grid
from torch import nn

from mpqdm_fx.backends.lowbit import costs
from mpqdm_fx.backends.lowbit.costs import CPUS, Point, relative_time
from mpqdm_fx.backends.lowbit.layers import choose_layers
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.editing import copy_graph_module, replace_module
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.rebuild import infer_static_values
from mpqdm_fx.records.activations import (
    ActivationRange,
    DynamicActivation,
    StaticActivation,
    TimestepActivation,
)

DYNAMIC = DynamicActivation()
GRID = ActivationRange(scale=0.1, zero_point=0)


class Net(nn.Module):
    """One layer of every fate."""

    def __init__(self):
        super().__init__()
        self.fits = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.odd = nn.Conv2d(8, 6, 3, padding=1)
        self.narrow = nn.Conv2d(6, 8, 3, padding=1)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.fixed = nn.Conv2d(8, 8, 3, padding=1)
        self.timed = nn.Conv2d(8, 8, 3, padding=1)
        self.coarse = nn.Conv2d(8, 8, 3, padding=1)
        self.few = nn.Linear(8, 8)

    def forward(self, x):
        h = self.narrow(self.odd(self.wide(self.fits(x))))
        h = self.coarse(self.timed(self.fixed(self.line(h.flatten(2)).view_as(h))))
        return self.few(h.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    inputs = {"x": torch.randn(2, 8, 8, 8)}
    graph = trace(Net().eval(), inputs)
    bits = {name: 4 for name, _ in Net().named_children()} | {"wide": 8}
    graph = round_to_grid(graph, bits)
    infer_static_values(graph, list(inputs.values()))
    activations = dict.fromkeys(bits, DYNAMIC)
    activations["fixed"] = StaticActivation(input=GRID, output=GRID)
    activations["timed"] = TimestepActivation(groups=(activations["fixed"],) * 2)
    activations["coarse"] = DynamicActivation(bits=4)
    return graph, activations


MISFITS = {
    "narrow": "6 input channels, no multiple of 4",
    "line": "Conv2d and Linear, not Conv1d",
    "timed": 'not by noise level; quantize with activation_mode="static" or "dynamic"',
    "coarse": "8 bits, not 4",
}


def test_memory_takes_all_that_fits(net):
    choice = choose_layers(*net, kernels="memory")
    assert choice.own == ("fits", "wide", "odd", "fixed", "few")
    assert choice.left.keys() == MISFITS.keys()
    for name, reason in MISFITS.items():
        assert reason in choice.left[name]


def test_auto_takes_what_is_faster(net):
    choice = choose_layers(*net, kernels="auto", cpu="avx2")
    assert choice.own == ("fits", "odd", "fixed")  # a fixed range costs what another does
    assert choice.left["wide"] == (
        "own kernels would take 0.99 of the time on avx2: too small a gain"  # 8 bits
    )
    assert "2 rows" in choice.left["few"]
    assert choose_layers(*net).own == choice.own


@pytest.mark.parametrize("cpu", ["vnni", "dotprod"])
def test_auto_leaves_convolutions_where_all_widths_cost_the_same(net, cpu):
    choice = choose_layers(*net, cpu=cpu)
    assert "fits" not in choice.own
    assert "times as long" in choice.left["fits"]


def test_xnnpack_takes_nothing(net):
    choice = choose_layers(*net, kernels="xnnpack")
    assert choice.own == ()
    assert choice.left.keys() == net[1].keys()


@pytest.mark.parametrize("kernels", ["auto", "memory", "xnnpack"])
def test_every_layer_that_stays_is_named_with_its_reason(net, kernels):
    graph = copy_graph_module(net[0])
    replace_module(graph, "few", nn.Linear(8, 8))
    choice = choose_layers(graph, {"fits": DYNAMIC}, kernels=kernels)
    assert {*choice.own, *choice.left} == set(weight_layers(graph))
    assert not set(choice.own) & set(choice.left)
    assert choice.left["wide"] == "its input stays in float, and own kernels read inputs of 8 bits"
    assert choice.left["few"] == "its weights are not rounded"


@pytest.mark.parametrize("settings", [{"kernels": "fast"}, {"cpu": "sse"}])
def test_an_unknown_setting_is_refused(net, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"{name}='{value}': choose one of '"):
        choose_layers(*net, **settings)


def test_the_table_has_every_class_of_cpu_and_both_kinds_of_layer():
    data = json.loads((Path(costs.__file__).parent / "costs.json").read_text())
    assert set(data["cpus"]) == set(CPUS)
    for cpu in data["cpus"].values():
        assert {point["kernel"] for point in cpu["points"]} == {1, 3}


@given(bits=st.integers(1, 8), widths=st.sets(st.integers(1, 8), min_size=1))
def test_time_between_two_measured_widths_is_between_their_times(bits, widths):
    point = Point(kernel=3, channels=8, rows=8, time={w: float(w * w) for w in widths})
    below = [w for w in widths if w <= bits] or [min(widths)]
    above = [w for w in widths if w >= bits] or [max(widths)]
    assert max(below) ** 2 <= point.time_at(bits) <= min(above) ** 2


def test_time_of_a_measured_shape_and_of_mixed_widths():
    where = {"kernel": 3, "channels": 320, "rows": 4096}
    assert relative_time("avx2", **where, widths=[4]) == 0.64
    assert relative_time("avx2", **where, widths=[2, 4]) == pytest.approx(0.635)
    # the nearest shape answers
    assert relative_time("avx2", kernel=3, channels=300, rows=3000, widths=[4]) == 0.64
    assert relative_time("avx2", kernel=1, channels=1280, rows=1, widths=[3]) == 0.85
