"""A traced graph is taken by torch.ao, by torch.export and by copy, and traces again to itself."""

import copy
from typing import Any

import pytest
import torch
from model_zoo import by_name
from torch import fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.backend_config import get_onednn_backend_config
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from mpqdm_fx.capture.explain import count_kinds
from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.numerics.metrics import sqnr_db

CASE = by_name("UNet2DModel")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return CASE.model()


@pytest.fixture(scope="module")
def graph_module(model: nn.Module) -> fx.GraphModule:
    return trace(model, CASE.inputs(2, 7))


@pytest.fixture(scope="module")
def inputs(graph_module: fx.GraphModule) -> dict[str, Any]:
    given: dict[str, Any] = graph_module.meta["signature"].normalize((), CASE.inputs(3, 250))
    return given


@pytest.fixture(scope="module")
def expected(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(**CASE.inputs(3, 250), return_dict=False)


def layer_names(graph_module: fx.GraphModule) -> set[str]:
    return {
        str(n.target)
        for n in graph_module.graph.nodes
        if n.op == "call_module"
        and isinstance(graph_module.get_submodule(str(n.target)), nn.Conv2d | nn.Linear)
    }


def test_deep_copy_is_equal_and_independent(
    graph_module: fx.GraphModule, inputs: dict[str, Any], expected: Any
) -> None:
    twin = copy.deepcopy(graph_module)
    with torch.no_grad():
        twin.conv_out.weight.zero_()
        assert not same_bits(twin(**inputs), expected)
        assert same_bits(graph_module(**inputs), expected)
    assert twin.meta["signature"] == graph_module.meta["signature"]


def test_exports_again_with_the_names_of_its_layers(
    model: nn.Module, graph_module: fx.GraphModule, inputs: dict[str, Any]
) -> None:
    batch = torch.export.Dim("batch", min=1, max=63)
    shapes = {name: {0: batch} for name in inputs}
    with torch.no_grad():
        exported = torch.export.export(graph_module, (), inputs, dynamic_shapes=shapes)
        again = exported.module()
        for size in (1, 5):
            given = CASE.inputs(size, 999)
            normalized = graph_module.meta["signature"].normalize((), given)
            assert same_bits(again(**normalized), model(**given, return_dict=False))
    layers = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    names = {
        next(reversed(n.meta["nn_module_stack"].values()))[0]
        for n in exported.graph.nodes
        if n.target in layers
    }
    assert names == layer_names(graph_module)


def test_traces_again_to_the_same_graph(
    graph_module: fx.GraphModule, inputs: dict[str, Any], expected: Any
) -> None:
    again = trace(graph_module, inputs)
    assert count_kinds(again) == count_kinds(graph_module)
    assert layer_names(again) == layer_names(graph_module)
    assert same_bits(again(**inputs), expected)


def test_stock_prepare_fx_and_convert_fx_quantize_every_layer(
    graph_module: fx.GraphModule, inputs: dict[str, Any], expected: Any
) -> None:
    backend = get_onednn_backend_config()
    mapping = get_default_qconfig_mapping("onednn")
    example = tuple(inputs.values())
    prepared = prepare_fx(graph_module, mapping, example, backend_config=backend)
    with torch.no_grad():
        prepared(**inputs)
        converted = convert_fx(prepared, backend_config=backend)
        quantized = {n for n, m in converted.named_modules() if "quantized" in type(m).__module__}
        assert layer_names(graph_module) <= quantized
        assert sqnr_db(expected[0], converted(**inputs)[0]) > 15
        assert same_bits(graph_module(**inputs), expected)  # untouched
