"""Values are found again by module path and operator."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import TinyNet, net_calls
from torch import Tensor, nn

from mpqdm_fx.backends.pt2e import export_graph
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.parity.sites import Site, matching_sites, sites


class Twice(nn.Module):
    """A layer and an activation called twice, with sums in between."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 5)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.act(self.mix(x))
        return h + self.act(self.mix(h)).reshape(h.shape)


def test_sites_name_module_call_operator_and_order():
    graph = trace(Twice(), {"x": torch.randn(2, 5)})
    assert list(sites(graph)) == [
        Site("mix", 0, "linear", 0),
        Site("act", 0, "silu", 0),
        Site("", 0, "add", 0),
        Site("mix", 1, "linear", 0),
        Site("act", 1, "silu", 0),
        Site("", 0, "add", 1),
    ]


@pytest.mark.parametrize("model", [Twice, TinyNet])
def test_every_layer_of_a_graph_is_found_in_its_export(model):
    inputs = {"x": torch.randn(2, 5)} if model is Twice else net_calls(1)[0]
    graph = trace(model(), inputs)
    exported = export_graph(graph, inputs).module(check_guards=False)
    pairs = matching_sites(graph, exported)
    assert {site for site in sites(graph) if site.op in ("linear", "convolution")} <= set(pairs)
    for site, (left, right) in pairs.items():
        assert (left.graph, right.graph) == (graph.graph, exported.graph)
        assert left.op == "call_module" or site.op in str(left.target)


def test_operators_whose_numbers_differ_are_not_compared():
    class More(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    inputs = {"x": torch.randn(2, 5)}
    matches = matching_sites(trace(Twice(), inputs), trace(More(), inputs))
    adds = [site for site in matches if site.op == "add"]
    # of three additions here and two there, only what comes last in both is known to be the same
    assert adds == [Site("", 0, "add", 2)]


@given(
    module=st.from_regex(r"([a-z_0-9]+(\.[a-z_0-9]+){0,3})?", fullmatch=True),
    call=st.integers(0, 99),
    op=st.from_regex(r"[a-z_0-9]+", fullmatch=True),
    nth=st.integers(0, 999),
)
def test_a_key_is_the_site(module, call, op, nth):
    site = Site(module, call, op, nth)
    assert Site.from_key(site.key) == site


@pytest.mark.parametrize(
    "key", ["", "conv 0", "conv linear 0", "conv@x linear 0", "conv@0 linear x"]
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match=r".+"):
        Site.from_key(key)


def test_an_end_that_has_its_like_elsewhere_is_not_compared_with_another_value():
    class Scaled(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0

    inputs = {"x": torch.randn(2, 5)}
    matches = matching_sites(trace(Twice(), inputs), trace(Scaled(), inputs))
    assert Site("", 0, "add", 1) in matches
    assert not any(site.op == "mul" for site in matches)
