"""AssignQConfigs: a rounded graph says of every layer what was decided."""

import dataclasses

import pytest
from hypothesis import given
from small import tiny_unet, unet_calls

from mpqdm_fx import MPQConfig, load, quantize, save
from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.quantize.assign_qconfigs import QCONFIG, AssignQConfigs, assigned_qconfigs
from mpqdm_fx.records.plan import BitPlan
from mpqdm_fx.testing import graphs


@given(case=graphs(max_blocks=3))
def test_what_is_written_is_what_is_read_and_every_call_says_it(case):
    for assign in AssignQConfigs.examples(case.graph_module):
        graph = assign(case.graph_module).graph_module
        qconfigs = assigned_qconfigs(graph)
        layers = weight_layers(graph, embeddings=True)
        assert list(qconfigs) == list(layers)
        # a layer whose result nobody reads is gone, as after every pass
        planned = [planned for planned in assign.plan.layers if planned.name in layers]
        assert [q.weight for q in qconfigs.values() if q.weight] == planned
        activations = {name: q.activation for name, q in qconfigs.items() if q.activation}
        assert activations == {n: a for n, a in assign.activations.items() if n in layers}
        for name, layer in layers.items():
            assert {id(node.meta[QCONFIG]) for node in layer.nodes} == {id(qconfigs[name])}


def test_a_layer_that_is_not_there_and_calls_that_differ_are_refused():
    quantized = quantize(tiny_unet(), MPQConfig(weight_bits=4, allocation="uniform"), unet_calls(2))
    graph = quantized.rounded
    stranger = dataclasses.replace(quantized.plan.layers[0], name="nowhere")
    with pytest.raises(DialectError, match=r"'nowhere'.*no weight layer"):
        AssignQConfigs(plan=BitPlan(layers=(stranger,)))(graph)
    assert assigned_qconfigs(graph).keys() == weight_layers(graph, embeddings=True).keys()


@pytest.mark.parametrize(
    "mode",
    [
        "dynamic",
        pytest.param("static", marks=pytest.mark.matrix),
        pytest.param("float", marks=pytest.mark.matrix),
    ],
)
def test_a_quantized_model_says_its_plan_and_its_activations_also_when_it_is_loaded(mode, tmp_path):
    config = MPQConfig(weight_bits=2, allocation="omq", activation_mode=mode, slowdown=1)
    quantized = quantize(tiny_unet(), config, unet_calls(2))
    save(quantized, tmp_path / "out")
    for model in (quantized, load(tmp_path / "out")):
        qconfigs = assigned_qconfigs(model.rounded)
        assert {q.weight for q in qconfigs.values() if q.weight} == set(quantized.plan.layers)
        activations = {name: q.activation for name, q in qconfigs.items() if q.activation}
        assert activations == dict(quantized.ranges)
