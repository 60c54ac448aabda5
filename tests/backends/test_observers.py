"""Weight observers hand over the grid's integers and refuse what is not on the grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounded_nets import Residual, rounded
from torch import nn

from mpqdm_fx.backends.observers import (
    GridWeightObserver,
    UnresolvedRangeObserver,
    WeightGrid,
    weight_grids,
)
from mpqdm_fx.backends.pt2e_observers import PT2EGridWeightObserver
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ConfigError

OBSERVERS = (GridWeightObserver, PT2EGridWeightObserver)


def random_grid(seed: int, channels: int, exponent: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (channels, 3, 2), generator=generator, dtype=torch.int8)
    scale = torch.rand(channels, generator=generator) * 2.0**exponent + 2.0 ** (exponent - 4)
    scale = scale.to(torch.bfloat16).float()
    return codes, WeightGrid(layer="some.layer", scale=scale)


@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(-100, 60))
def test_codes_of_a_weight_on_the_grid_come_back_bit_for_bit(seed, channels, exponent):
    codes, grid = random_grid(seed, channels, exponent)
    weight = codes.float() * grid.scale[:, None, None]
    assert torch.equal(grid.codes(weight), codes)


@given(st.integers(0, 2**16), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_codes_survive_a_weight_stored_in_another_dtype(seed, dtype):
    codes, grid = random_grid(seed, 4)
    weight = (codes.float() * grid.scale[:, None, None]).to(dtype)
    assert torch.equal(grid.codes(weight), codes)


@given(st.integers(0, 2**16), st.integers(0, 4), st.floats(0.02, 0.5))
def test_one_weight_off_the_grid_is_refused_with_layer_and_channel(seed, channel, share):
    codes, grid = random_grid(seed, 5)
    weight = codes.float() * grid.scale[:, None, None]
    weight[channel, 1, 0] += share * grid.scale[channel]
    for observer in OBSERVERS:
        with pytest.raises(ConfigError, match=rf"some\.layer.*channel {channel};.*QuantizedModel"):
            observer(grid=grid)(weight)


def test_code_beyond_int8_is_refused():
    _, grid = random_grid(0, 2)
    weight = torch.full((2, 1), 128.0) * grid.scale[:, None]
    with pytest.raises(ConfigError, match="not on the int8 grid"):
        grid.codes(weight)


def test_weight_with_other_channels_is_refused():
    _, grid = random_grid(0, 2)
    with pytest.raises(ConfigError, match="3 output channels"):
        grid.codes(torch.zeros(3, 1))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_observer_reports_the_grid_scales_and_zero_points_of_zero(observer):
    _, grid = random_grid(3, 6)
    scale, zero_point = observer(grid=grid).calculate_qparams()
    assert torch.equal(scale, grid.scale)
    assert torch.equal(zero_point, torch.zeros(6, dtype=torch.int64))


def test_observers_name_the_dtypes_of_their_flows():
    _, grid = random_grid(3, 6)
    made = [observer(grid=grid) for observer in OBSERVERS]
    assert [o.dtype for o in made] == [torch.qint8, torch.int8]
    assert {(o.quant_min, o.quant_max, o.ch_axis) for o in made} == {(-127, 127, 0)}


def test_unresolved_range_tells_what_to_call():
    observer = UnresolvedRangeObserver(layer="some.layer")
    x = torch.randn(2)
    assert observer(x) is x
    with pytest.raises(ConfigError, match=r"some\.layer.*set_ranges"):
        observer.calculate_qparams()


def test_grids_of_a_rounded_graph_are_its_layers_in_order():
    graph, _, _ = rounded(Residual())
    grids = weight_grids(graph)
    assert list(grids) == ["conv_in", "conv1", "down", "shortcut", "conv_out"]
    for name, grid in grids.items():
        assert torch.equal(grid.scale, graph.get_submodule(name).weight_scale)


def test_graph_that_was_not_rounded_is_refused():
    graph = trace(nn.Sequential(nn.Linear(3, 4)).eval(), {"input": torch.randn(2, 3)})
    with pytest.raises(ConfigError, match=r"QuantizedModel\.rounded"):
        weight_grids(graph)


def test_weight_changed_after_rounding_is_refused():
    graph, _, _ = rounded(Residual())
    graph.get_submodule("down").weight.data[3] *= 1.01
    with pytest.raises(ConfigError, match=r"down: .*channel 3"):
        weight_grids(graph)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_that_cannot_be_is_refused(value):
    graph, _, _ = rounded(Residual())
    graph.get_submodule("conv1").weight_scale[2] = value
    with pytest.raises(ConfigError, match="conv1: weight_scale"):
        weight_grids(graph)
