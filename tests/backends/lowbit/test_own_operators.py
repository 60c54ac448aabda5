"""UNets with own operators: the numbers of the quantized graph, and no copy inside a block."""

import re

import pytest
import torch
from rounded_nets import round_to_grid
from small import (
    condition_calls,
    plain_unet,
    sdxl_calls,
    tiny_condition_unet,
    tiny_sdxl_unet,
    tiny_unet,
    unet_calls,
)
from torch import nn

from mpqdm_fx.backends.lowbit.counting import layout_copies
from mpqdm_fx.backends.lowbit.image_layouts import ImageLayouts
from mpqdm_fx.backends.lowbit.method import LowbitMethod
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.digits.bundled import load_digits_unet
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.records.activations import DynamicActivation
from mpqdm_fx.testing import count

aten, mpqdm = torch.ops.aten, torch.ops.mpqdm


def digits():
    generator = torch.Generator().manual_seed(0)
    return load_digits_unet(), {
        "sample": torch.randn(1, 1, 16, 16, generator=generator),
        "timestep": torch.tensor([10]),
        "class_labels": torch.tensor([3]),
    }


def plain():
    call = unet_calls(1, batch=2)[0]
    return plain_unet(), {name: call[name] for name in ("sample", "timestep")}


MODELS = {
    "plain": plain,
    "classes": lambda: (tiny_unet(), unet_calls(1, batch=2)[0]),
    "condition": lambda: (tiny_condition_unet(), condition_calls(1)[0]),
    "sdxl": lambda: (tiny_sdxl_unet(), sdxl_calls(1)[0]),
    "digits": digits,
}
# Images that are not channels last by nature: what comes in and goes out, and what the first
# convolution writes where it has one channel and stays with XNNPACK. A single channel moves freely.
# "plain" joins a value to itself, which for XNNPACK is a product with ones and two more.
COPIES = {"plain": 3, "classes": 1, "condition": 2, "sdxl": 2, "digits": 1}


def prepared(model, kernels, bits=4):
    net, inputs = MODELS[model]()
    graph = Pipeline(passes=NORMALIZE)(trace(net, inputs)).graph_module
    graph = round_to_grid(graph, bits)
    activations = dict.fromkeys(weight_layers(graph), DynamicActivation())
    with torch.no_grad():
        return LowbitMethod(graph, inputs, activations, kernels=kernels)


SLOW = [pytest.param(m, marks=pytest.mark.matrix) for m in ("classes", "condition", "sdxl")]


@pytest.mark.parametrize("model", ["plain", "digits", *SLOW])
def test_memory_puts_a_whole_unet_into_own_operators(model):
    method = prepared(model, "memory")
    graph = method.prepared
    assert (
        set(weight_layers(graph))
        == set(method.choice.left)
        <= {"conv_in", "add_embedding.linear_1"}
    )
    assert count(graph, nn.GroupNorm) == 0
    with torch.no_grad():
        actual, expected = graph(*method.inputs), method.quantized(*method.inputs)
    assert sqnr_db(expected[0], actual[0]) > method.expected.bound_db
    copies, size = layout_copies(graph)
    assert copies == COPIES[model]
    assert size <= COPIES[model] * max(n.meta["val"].nbytes for n in ImageLayouts.of(graph).copies)


def test_no_permutation_is_left_in_a_block_of_the_digits():
    graph = prepared("digits", "memory").prepared
    for node in graph.graph.nodes:
        modules = [str(name) for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
        if any(".resnets." in name for name in modules):
            assert node.target not in (aten.permute.default, aten.transpose.int), node
    norms = count(graph, mpqdm.group_norm_quantize_mixed.default)
    assert norms == count(graph, mpqdm.conv2d_mixed.default) - 4  # two go down and two go up
    assert count(graph, mpqdm.group_norm_mixed.default) == 4  # in front of attention


@pytest.mark.matrix
def test_auto_leaves_layers_to_xnnpack_without_copies_around_them():
    method = prepared("digits", "auto")
    assert any("conv_shortcut" in name for name in method.choice.left)  # 1.09 times as long
    assert any("time_emb_proj" in name for name in method.choice.left)  # one row
    assert layout_copies(method.prepared)[0] == 1
    with torch.no_grad():
        actual = method.prepared(*method.inputs)[0]
    method.expected.check(torch.__file__, [actual], None)


def test_wide_weights_stay_with_xnnpack_in_auto():
    left = prepared("plain", "auto", bits=8).choice.left
    blocks = [name for name in left if name.endswith((".conv1", ".conv2"))]
    assert len(blocks) == 6
    times = [float(re.search(r"would take ([\d.]+) ", left[name])[1]) for name in blocks]
    assert min(times) > 0.95


def test_without_own_layers_the_road_is_xnnpack_s():
    method = prepared("plain", "xnnpack")
    assert method.choice.own == ()
    assert not any(str(n.target).startswith("mpqdm") for n in method.lowered.graph.nodes)
