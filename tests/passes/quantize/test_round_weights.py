import pytest
import torch
from small import TinyNet
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import CalibrationError, DialectError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.quantize.round_weights import RoundWeights
from mpqdm_fx.records.plan import BitPlan, LayerPlan


def _plan(graph_module, bits=lambda channel: 1 + channel % 8, levels="uniform") -> BitPlan:
    return BitPlan(
        layers=tuple(
            LayerPlan(
                name=name,
                kind=type(layer.module).__name__,
                shape=tuple(layer.weight.shape),
                bits=tuple(bits(channel) for channel in range(layer.weight.shape[0])),
                levels=levels,
            )
            for name, layer in weight_layers(graph_module).items()
        )
    )


@pytest.fixture(scope="module")
def graph():
    return trace(TinyNet(), {"x": torch.randn(2, 3, 6, 10)})


@pytest.mark.parametrize("levels", ["uniform", "codebook"])
def test_every_planned_weight_equals_codes_times_scale_on_legal_levels(graph, levels):
    plan = _plan(graph, levels=levels)
    rounded = RoundWeights(plan=plan)(graph).graph_module
    for planned in plan.layers:
        module = rounded.get_submodule(planned.name)
        codes, scale = module.weight_codes, module.weight_scale
        shape = (-1,) + (1,) * (codes.dim() - 1)
        assert torch.equal(module.weight, codes.float() * scale.reshape(shape))
        for row, bits in zip(codes.int().flatten(1), planned.bits, strict=True):
            assert row.unique().numel() <= 2**bits
            if levels == "uniform" and bits < 8:
                assert (row % 2 != 0).all()
                assert row.abs().max() < 2**bits


def test_what_stock_convert_computes_gives_the_codes_back(graph):
    plan = _plan(graph)
    rounded = RoundWeights(plan=plan)(graph).graph_module
    for planned in plan.layers:
        module = rounded.get_submodule(planned.name)
        scale = module.weight_scale.double()
        zero = torch.zeros(len(scale), dtype=torch.int64)
        stock = torch.quantize_per_channel(module.weight.detach(), scale, zero, 0, torch.qint8)
        assert torch.equal(stock.int_repr(), module.weight_codes)


def test_the_traced_graph_and_the_model_keep_their_weights(graph):
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    result = RoundWeights(plan=_plan(graph))(graph)
    assert result.modified
    after = graph.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_rounded_graph_is_left_alone(graph):
    plan = _plan(graph)
    rounded = RoundWeights(plan=plan)(graph).graph_module
    assert not RoundWeights(plan=plan)(rounded).modified


def test_a_coarser_plan_rounds_a_rounded_graph_again(graph):
    rounded = RoundWeights(plan=_plan(graph, lambda _: 6))(graph).graph_module
    result = RoundWeights(plan=_plan(graph, lambda _: 2))(rounded)
    assert result.modified
    assert result.graph_module.get_submodule("body").weight_codes.abs().max() <= 3


def test_a_layer_called_twice_is_rounded_once_for_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x).relu())

    graph = trace(Twice(), {"x": torch.randn(2, 4, 5, 7)})
    rounded = RoundWeights(plan=_plan(graph, lambda _: 2))(graph).graph_module
    calls = [
        node for node in rounded.graph.nodes if node.op == "call_module" and "conv" in node.target
    ]
    modules = {id(rounded.get_submodule(node.target)) for node in calls}
    assert len(calls) == 2
    assert len(modules) == 1


def test_a_plan_for_another_graph_is_refused_by_layer_name(graph):
    layer = LayerPlan(name="up.conv", kind="Conv2d", shape=(1, 1, 1, 1), bits=(4,))
    with pytest.raises(DialectError, match=r"up\.conv"):
        RoundWeights(plan=BitPlan(layers=(layer,)))(graph)
    layer = LayerPlan(name="body", kind="Conv2d", shape=(1, 1, 1, 1), bits=(4,))
    with pytest.raises(DialectError, match=r"body.*\(16, 12, 3, 3\)"):
        RoundWeights(plan=BitPlan(layers=(layer,)))(graph)


def test_non_finite_weights_are_refused_by_layer_name():
    model = TinyNet()
    with torch.no_grad():
        model.body.weight[0, 0, 0, 0] = float("nan")
    graph = trace(model, {"x": torch.randn(2, 3, 6, 10)})
    with pytest.raises(CalibrationError, match=r"body.*NaN"):
        RoundWeights(plan=_plan(graph))(graph)
