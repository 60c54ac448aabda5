"""A quantized model and the model that it was made of do not change each other."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from small import tiny_unet, unet_calls

from mpqdm_fx.api import convert, prepare, quantize
from mpqdm_fx.backends.lower import lower
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.distillation import distill
from mpqdm_fx.records.config import MPQConfig

SETTINGS = MPQConfig(
    weight_bits=4, allocation="uniform", rounding="nearest", propagation=0.0, judge=False,
    activation_mode="static", slowdown=1,
)  # fmt: skip


def answers(model):
    with torch.no_grad():
        return [model(**call).sample for call in unet_calls(2, seed=7)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.fixture(params=[True, False], ids=["trainable", "frozen"])
def model(request):
    return tiny_unet().requires_grad_(request.param)


def test_no_memory_is_shared(model):
    quantized = quantize(model, SETTINGS, unet_calls())
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors(model).values()}
    for graph in (quantized, quantized.rounded):
        shared = [
            name
            for name, tensor in tensors(graph).items()
            if tensor.untyped_storage().data_ptr() in own
        ]
        assert shared == []


def test_training_the_float_model_leaves_the_quantized_one(model):
    quantized = quantize(model, SETTINGS, unet_calls())
    before = answers(quantized)
    model.requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**unet_calls(1)[0]).sample.square().mean().backward()
    optimizer.step()
    assert same(answers(quantized), before)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_changing_the_quantized_model_leaves_the_float_one(model):
    expected = answers(model)
    quantized = quantize(model, SETTINGS, unet_calls())
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.mul_(2)
    assert same(answers(model), expected)


def test_a_prepared_model_can_be_converted_again(model):
    prepared = prepare(model, SETTINGS, unet_calls(1)[0])
    for call in unet_calls():
        prepared(**call)
    first = convert(prepared)
    expected = answers(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert same(answers(convert(prepared)), expected)


def test_nothing_that_is_done_changes_the_float_model(model, tmp_path):
    before, state = answers(model), copy.deepcopy(model.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    quantized = quantize(model, SETTINGS, unet_calls())
    start = answers(quantized)
    config = DistillConfig(updates=3, trajectories=4, steps=2, batch_size=4, rank=2)
    labels = {"class_labels": torch.arange(4)}
    result = distill(quantized, model, config, scheduler=DDIMScheduler(), conditions=labels)
    lower(result.quantized, "torch_ao")
    assert same(answers(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert same(answers(quantized), start)
