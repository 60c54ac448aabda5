"""The normalizing pipeline on traced UNets of diffusers: what it finds, what it leaves alone."""

import pytest
import torch
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.testing import assert_input_untouched, assert_same_function, count, digest

aten = torch.ops.aten


def _inputs(conditional: bool, batch: int, seed: int) -> dict:
    calls = condition_calls if conditional else unet_calls
    return calls(calls=1, batch=batch, seed=seed)[0]


@pytest.fixture(scope="module", params=[False, True], ids=["UNet2D", "UNet2DCondition"])
def traced(request):
    model = tiny_condition_unet() if request.param else tiny_unet()
    graph_module = trace(model, _inputs(request.param, 2, 10))
    result = assert_input_untouched(Pipeline(passes=NORMALIZE), graph_module)
    return request.param, model, graph_module, result


def test_same_function_at_several_timesteps_and_batch_sizes(traced):
    conditional, _, before, result = traced
    for batch, seed in ((1, 0), (2, 1), (3, 2)):
        inputs = _inputs(conditional, batch, seed)
        assert_same_function(before, result.graph_module, inputs, rtol=1e-5)


def test_nothing_inactive_is_left(traced):
    *_, result = traced
    assert result.modified
    for target in (nn.Dropout, aten.dropout.default, aten._assert_tensor_metadata.default):
        assert count(result.graph_module, target) == 0
    assert not Pipeline(passes=NORMALIZE)(result.graph_module).modified


def test_every_shortcut_over_a_skip_is_split_and_nothing_else(traced):
    _, model, before, result = traced
    shortcuts = {
        name
        for name, _ in model.named_modules()
        if name.startswith("up_blocks") and name.endswith("conv_shortcut")
    }
    assert len(shortcuts) == 4
    parts = {name for name in weight_layers(result.graph_module) if "_part" in name}
    assert parts == {f"{name}_part{i}" for name in shortcuts for i in (0, 1)}
    # the norms of the same resnets read the concatenations whole
    assert count(result.graph_module, aten.cat.default) == count(before, aten.cat.default)


def test_every_geglu_is_split(traced):
    conditional, _, before, result = traced
    names = {name for name in weight_layers(before) if name.endswith("ff.net.0.proj")}
    assert len(names) == (4 if conditional else 0)
    gated = {n for n in weight_layers(result.graph_module) if n.endswith(("_value", "_gate"))}
    assert gated == {f"{name}_{role}" for name in names for role in ("value", "gate")}
    assert count(result.graph_module, aten.chunk.default) == 0


def test_all_other_layers_are_the_models_own_modules(traced):
    _, model, _, result = traced
    made = ("_part0", "_part1", "_value", "_gate")
    for name, layer in weight_layers(result.graph_module).items():
        if not name.endswith(made):
            assert layer.module is model.get_submodule(name)


def test_the_model_is_untouched(traced):
    conditional, model, before, _ = traced
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Pipeline(passes=NORMALIZE)(before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    inputs = _inputs(conditional, 2, 7)
    assert_same_function(before, _Tuple(model), inputs)


class _Tuple(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs, return_dict=False)


def test_result_exports_again_bit_equal(traced):
    conditional, _, _, result = traced
    inputs = _inputs(conditional, 2, 10)
    with torch.no_grad():
        exported = torch.export.export(result.graph_module, (), inputs, strict=False).module()
    assert_same_function(result.graph_module, exported, inputs)


def test_every_node_has_a_value_of_the_true_shape(traced):
    conditional, _, _, result = traced
    inputs = _inputs(conditional, 3, 10)
    checker = _Shapes(result.graph_module)
    with torch.no_grad():
        checker.run(*inputs.values())
    assert checker.compared > 100


class _Shapes(torch.fx.Interpreter):
    compared = 0

    def run_node(self, node):
        value = super().run_node(node)
        if isinstance(value, torch.Tensor) and node.op.startswith("call"):
            # the batch axis is symbolic; all others are numbers
            known = [n if isinstance(n, int) else None for n in node.meta["val"].shape]
            assert len(known) == value.dim()
            assert all(k in (None, n) for k, n in zip(known, value.shape, strict=True))
            assert node.meta["val"].dtype == value.dtype
            self.compared += 1
        return value


def test_running_twice_gives_the_same_bits(traced):
    *_, before, result = traced
    assert digest(Pipeline(passes=NORMALIZE)(before).graph_module) == digest(result.graph_module)
