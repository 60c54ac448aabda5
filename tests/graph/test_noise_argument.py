"""Which argument tells the noise level, and what it says of each sample."""

import pytest
import torch
from small import TinyDenoiser, TinyEDM, denoiser_calls, edm_calls
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.noise_argument import find_noise_argument, noise_arguments, noise_levels_of
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.split.timestep_table import tabulate_timesteps

SETTINGS = MPQConfig()


class Told(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)


def told_graph(name, value, batch=3):
    """Trace a denoiser whose second argument has any name."""
    forward = eval(f"lambda self, sample, {name}: self.conv(sample) * {name}.reshape(-1, 1, 1, 1)")
    kind = type("Told", (Told,), {"forward": forward})
    return trace(kind(), {"sample": torch.randn(batch, 2, 4, 4), name: value})


@pytest.mark.parametrize("name", ["timestep", "t", "sigma", "sigmas", "noise_level", "log_snr"])
@pytest.mark.parametrize(
    "value", [torch.tensor([80.0, 5.0, 0.3]), torch.tensor([[[[1.0]]], [[[2.0]]], [[[3.0]]]])]
)
def test_every_name_of_the_field_is_found(name, value):
    assert find_noise_argument(told_graph(name, value)).target == name


def test_a_timestep_comes_before_other_names():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, sample, sigma, timestep):
            return self.conv(sample) + (sigma + timestep)[:, None, None, None]

    call = {"sample": torch.randn(3, 2, 4, 4), "sigma": torch.rand(3), "timestep": torch.arange(3)}
    graph_module = trace(Both(), call)
    assert find_noise_argument(graph_module).target == "timestep"
    assert find_noise_argument(graph_module, "sigma").target == "sigma"
    assert list(noise_arguments(graph_module)) == ["sigma", "timestep"]


def test_an_argument_of_any_name_is_taken_if_it_is_named():
    graph_module = told_graph("how_bad", torch.tensor([0.1, 0.5, 0.9]))
    assert find_noise_argument(graph_module) is None
    assert find_noise_argument(graph_module, "how_bad").target == "how_bad"


@pytest.mark.parametrize("name", ["sgima", "noisy", "return_dict"])
def test_a_wrong_name_is_refused_with_the_names_that_there_are(name):
    graph_module = trace(TinyEDM(), edm_calls(1)[0])
    with pytest.raises(ConfigError, match=rf"'{name}'.*sigma, difficulty$"):
        find_noise_argument(graph_module, name)


def test_a_constant_of_the_graph_is_refused_with_its_remedy():
    class Constant(TinyEDM):
        def forward(self, noisy, level: float, difficulty):
            return super().forward(noisy, torch.full((len(noisy),), level), difficulty)

    call = edm_calls(1)[0]
    graph_module = trace(
        Constant(), {"noisy": call["noisy"], "level": 2.0, "difficulty": call["difficulty"]}
    )
    with pytest.raises(ConfigError, match=r"constant 2\.0 .*give a tensor of shape \[batch\]"):
        find_noise_argument(graph_module, "level")


def test_a_vector_that_is_not_one_number_per_sample_is_no_noise_level():
    class Schedule(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, sample, sigmas):
            return self.conv(sample) * sigmas.sum()

    call = {"sample": torch.randn(3, 2, 4, 4), "sigmas": torch.rand(7)}
    assert find_noise_argument(trace(Schedule(), call)) is None


def test_a_single_number_is_that_of_all_samples():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, sample, sigma):
            return self.conv(sample) * sigma

    for value in (5.0, torch.tensor(5.0)):
        graph_module = trace(Single(), {"sample": torch.randn(3, 2, 4, 4), "sigma": value})
        signature = graph_module.meta["signature"]
        assert signature.spec("sigma").shape == ()
        call = signature.normalize((), {"sample": torch.randn(3, 2, 4, 4), "sigma": 7})
        assert call["sigma"].dtype == torch.float32
        (levels,) = noise_levels_of(graph_module, [call], SETTINGS)
        assert levels.tolist() == [7.0] * 3


@pytest.mark.parametrize(
    ("model", "calls", "name"),
    [(TinyDenoiser, denoiser_calls, "timestep"), (TinyEDM, edm_calls, "sigma")],
)
def test_levels_are_told_for_each_sample_of_each_call(model, calls, name):
    graph_module = trace(model(), calls(1)[0])
    per_call = noise_levels_of(graph_module, calls(), SETTINGS)
    assert [levels.tolist() for levels in per_call] == [call[name].tolist() for call in calls()]
    assert {levels.dtype for levels in per_call} == {torch.float64}


def test_a_model_that_is_told_nothing_has_no_levels():
    graph_module = trace(nn.Conv2d(2, 2, 1), {"input": torch.randn(3, 2, 4, 4)})
    assert noise_levels_of(graph_module, [{"input": torch.randn(1, 2, 4, 4)}] * 2, SETTINGS) == [
        None,
        None,
    ]


def test_levels_that_do_not_fit_the_batch_are_refused_by_call_and_name():
    graph_module = trace(TinyEDM(), edm_calls(1)[0])
    calls = edm_calls(2)
    calls[1]["sigma"] = torch.ones(5)
    with pytest.raises(CalibrationError, match=r"call 1: input 'sigma' has 5 .* 2 samples"):
        noise_levels_of(graph_module, calls, SETTINGS)


def test_the_branch_of_sigma_becomes_a_table_over_a_schedule():
    sigmas = (80.0, 5.0, 0.3)
    call = edm_calls(1, batch=3)[0]
    graph_module = trace(TinyEDM(), call)
    tables = tabulate_timesteps(graph_module, sigmas)
    live = graph_module(**{**call, "sigma": torch.tensor(sigmas)})
    table = tables(**{**call, "sigma": torch.arange(3)})
    torch.testing.assert_close(table, live, rtol=1e-5, atol=1e-5)
    assert not any("sin" in str(node.target) for node in tables.graph.nodes)
