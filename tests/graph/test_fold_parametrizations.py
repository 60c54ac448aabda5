"""Folded weights have the bits that the parametrized ones have in evaluation mode."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from trace_helpers import assert_equal_to_eager, calls, randn

from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.graph.fold_parametrizations import fold_parametrizations, plain_names


class Negated(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


class Noisy(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + torch.randn_like(weight)


def negated_norm(layer: nn.Module) -> nn.Module:
    """Two parametrizations on one tensor, and one on another tensor."""
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "weight", Negated())
    parametrize.register_parametrization(layer, "bias", Negated())
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.3)
    return prune.random_unstructured(layer, "weight", 0.2)


def old_style(function: object, layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(layer)


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own and two": negated_norm,
    "old weight_norm": lambda layer: old_style(weight_norm, layer),
    "old spectral_norm": lambda layer: old_style(spectral_norm, layer),
    "pruned": pruned,
}


class Net(nn.Module):
    """The layer is called under two names, so it must stay one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), layer)
        self.again = layer
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.again(F.silu(self.body(x))))


def net(way: str) -> Net:
    torch.manual_seed(0)
    return Net(WAYS[way](nn.Conv2d(6, 6, 1)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_folded_layer_is_a_stock_layer_of_the_same_bits(way: str, training: bool) -> None:
    model = net(way).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    folded = fold_parametrizations(model)
    assert type(folded.again) is nn.Conv2d
    assert folded.again is folded.body[1]
    assert folded.out is model.out  # whatever is not above a folded layer is shared
    assert not folded.again._forward_pre_hooks
    assert set(dict(folded.again.named_parameters())) == {"weight", "bias"}
    # the caller's model, its training flags and the random state are as before
    assert torch.equal(torch.get_rng_state(), random)
    assert model.again is model.body[1]
    assert type(model.again) is not nn.Conv2d or model.again._forward_pre_hooks
    assert all(module.training is training for module in model.modules())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = randn(2, 3, 7, 5)
    with torch.no_grad():
        assert same_bits(folded.eval()(x), model.eval()(x))
    copy.deepcopy(folded)  # which torch refuses for the hooks of old


@pytest.mark.parametrize("way", WAYS)
def test_trace_calls_a_folded_layer_as_a_module(way: str) -> None:
    model = net(way)
    graph_module = trace(model, (randn(2, 3, 7, 5),))
    assert calls(graph_module) == ["body.0", "body.1", "again", "out"]
    with torch.no_grad():
        x = randn(2, 3, 7, 5)
        assert same_bits(graph_module(x), model.eval()(x))


def test_a_model_without_parametrizations_is_returned_itself() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    assert fold_parametrizations(model) is model
    assert plain_names(model) == {}


def test_a_weight_that_is_drawn_anew_at_every_call_is_not_folded() -> None:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Noisy())
    model = nn.Sequential(layer, parametrizations.weight_norm(nn.Linear(3, 3)))
    folded = fold_parametrizations(model)
    assert folded[0] is layer
    assert type(folded[1]) is nn.Linear


def test_a_parametrized_model_without_layers_around_it_folds() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 4))
    graph_module = trace(model, (randn(2, 3),))
    assert_equal_to_eager(model, graph_module, randn(2, 3))
    assert type(fold_parametrizations(model)) is nn.Linear


def test_every_original_names_the_weight_that_it_is_there_for() -> None:
    names = plain_names(net("own and two"))
    assert names["again.parametrizations.weight.original1"] == "again.weight"
    assert names["body.1.parametrizations.bias.original"] == "body.1.bias"
    assert plain_names(net("old weight_norm"))["again.weight_g"] == "again.weight"
