"""A student computes what the quantized model computes, and so does what it is frozen to."""

import dataclasses
import functools

import pytest
import torch
from small import condition_calls, tiny_condition_unet, tiny_unet, unet_calls

import mpqdm_fx
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.student import freeze, make_student
from mpqdm_fx.distill.trainable import cell_base
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.numerics.halves import fits_half
from mpqdm_fx.numerics.levels.grids import snap

CONFIG = DistillConfig(updates=1, rank=2)
CASES = {
    "static": {},
    "timestep": {  # fitted levels
        "activation_mode": "timestep",
        "timestep_groups": 3,
        "activation_bits": 4,
        "activation_allocation": "uniform",
    },
    "dynamic": {"activation_mode": "dynamic"},
    "uniform": {"levels": "uniform", "weight_bits": 3, "allocation": "omq"},
    # pairs that meet, one of eight bits and one of four
    "narrow": {
        "activation_bits": 4,
        "activation_levels": "uniform",
        "activation_allocation": "uniform",
    },
    "levels": {"activation_bits": 4, "activation_allocation": "uniform"},
    "codebook": {"levels": "codebook", "weight_bits": 3, "allocation": "omq"},
    "int4": {"levels": "int4", "weight_bits": 4, "activation_mode": "dynamic"},
    "entropy": {"levels": "uniform", "weight_storage": "entropy", "allocation": "measured"},
}


@functools.cache  # tests of one case do not follow each other where several processes share them
def small_pair(name):
    return pair_of(name, tiny_unet(), unet_calls())


def pair_of(name, model, calls):
    settings = mpqdm_fx.MPQConfig(
        **{
            "weight_bits": 2,
            "allocation": "uniform",
            "refinements": 0,
            "propagation": 0.0,
            "bias_correction": False,
            "slowdown": 1,
            "row_weights": "plain",
            "judge": False,
            **CASES[name],
        }
    )
    quantized = mpqdm_fx.quantize(model, settings, calls)
    teacher = normalized(model, example_inputs(quantized.signature), settings)
    return quantized, teacher


_RARE = ("narrow", "levels", "int4", "static")
"""What the other cases hold in parts: of the long matrix."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.matrix) if name in _RARE else name for name in CASES
    ],
)
def case(request):
    return *small_pair(request.param), unet_calls(seed=9)[0]


def outputs(quantized, inputs):
    with torch.no_grad():
        return quantized(**inputs).sample


def student_outputs(student, quantized, inputs):
    with torch.no_grad():
        return student.graph_module(**quantized.signature.normalize((), dict(inputs)))[0]


def test_student_starts_as_the_quantized_model_bit_for_bit(case):
    quantized, teacher, inputs = case
    student = make_student(quantized, teacher, CONFIG)
    assert set(student.layers) == {layer.name for layer in quantized.plan.layers}
    assert torch.equal(student_outputs(student, quantized, inputs), outputs(quantized, inputs))


def test_a_rounded_base_moves_with_the_step_and_gives_it_its_gradient(case):
    quantized, teacher, inputs = case
    config = dataclasses.replace(CONFIG, base="codes")
    student = make_student(quantized, teacher, config)
    assert torch.equal(student_outputs(student, quantized, inputs), outputs(quantized, inputs))
    for layer in student.layers.values():
        rows = layer.weight_rows()
        weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        (rows * weights).sum().backward()
        # codes stay what they are, so a row is its codes times its step
        expected = (rows.detach() * weights).sum(1)
        assert torch.allclose(layer.log_scale.grad, expected, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            before = layer.frozen().codes
            layer.log_scale -= 0.05
            assert torch.equal(layer.frozen().codes, before)
            layer.log_scale += 0.05


def test_untrained_student_freezes_to_the_model_it_came_from(case):
    quantized, teacher, inputs = case
    frozen = freeze(make_student(quantized, teacher, CONFIG), quantized)
    for layer in quantized.plan.layers:
        assert torch.equal(frozen.codes(layer.name), quantized.codes(layer.name)), layer.name
    assert torch.equal(outputs(frozen, inputs), outputs(quantized, inputs))


def test_what_was_moved_at_random_is_frozen_bit_for_bit_and_still_legal(case, tmp_path):
    quantized, teacher, inputs = case
    before = outputs(quantized, inputs)
    student = make_student(quantized, teacher, CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in student.trained():
            size = 2.0 if name.endswith(("levels", "shift")) else 0.1
            value += size * torch.randn(value.shape, generator=generator)
    frozen = freeze(student, quantized)
    output = outputs(frozen, inputs)
    assert torch.equal(output, student_outputs(student, quantized, inputs))
    assert not torch.equal(output, before)
    assert torch.equal(outputs(quantized, inputs), before), "the start was changed"
    layers = frozen.plan.layers
    same = [torch.equal(frozen.codes(layer.name), quantized.codes(layer.name)) for layer in layers]
    # codes of an entropy coder stay, since others would take another number of bytes
    assert all(same) if layers[0].coded is not None else not all(same)
    # packing refuses codes that are not of the plan's levels
    packed = [
        mpqdm_fx.save(model, tmp_path / "frozen", overwrite=True) for model in (quantized, frozen)
    ]
    assert torch.equal(outputs(mpqdm_fx.load(packed[1]), inputs), output)
    assert mpqdm_fx.load(packed[1]).plan.effective_bits == quantized.plan.effective_bits


def test_stochastic_rounding_ends_with_its_block_and_repeats_with_its_seed(case):
    quantized, teacher, inputs = case
    student = make_student(quantized, teacher, CONFIG)
    before = student_outputs(student, quantized, inputs)
    results = []
    for seed in (3, 3, 4):
        with student.rounded_by(seed):
            results.append(student_outputs(student, quantized, inputs))
            rows = {name: layer.weight_rows() for name, layer in student.layers.items()}
        for name, layer in student.layers.items():
            codes = rows[name].detach() / layer.scale[:, None].detach()
            assert torch.equal(codes, codes.round()), name
    assert torch.equal(results[0], results[1])
    held = quantized.plan.layers[0].coded is not None
    assert torch.equal(results[1], results[2]) is held
    assert torch.equal(student_outputs(student, quantized, inputs), before)
    with student.rounded_by(None):
        assert torch.equal(student_outputs(student, quantized, inputs), before)


def test_a_row_of_few_codes_keeps_its_own_levels():
    codes = torch.tensor([[3, 3, 5]], dtype=torch.int8)  # 8 bits, and no even code
    weight = torch.tensor([[1.4, 3.6, 5.0]])
    base = cell_base(codes, torch.ones(1), weight, torch.tensor([8]), {})
    assert torch.equal(snap(base, torch.ones(1), 8), codes)


def test_biases_stored_in_half_precision_stay_there():
    model = tiny_unet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "bias", None), torch.Tensor):
                module.bias.copy_(module.bias.half().float())
    quantized, teacher = pair_of("static", model, unet_calls())
    student = make_student(quantized, teacher, CONFIG)
    with torch.no_grad():
        for layer in student.layers.values():
            if layer.bias is not None:
                layer.bias *= 1.00123
    for name, layer in student.layers.items():
        if layer.bias is not None:
            bias = layer.frozen().bias
            assert fits_half(bias), name
            assert not torch.equal(bias, quantized.rounded.get_submodule(name).bias)
            assert torch.allclose(bias, layer.bias, rtol=1e-3, atol=1e-7)


@pytest.mark.matrix
def test_text_conditioned_model_goes_the_same_road():
    calls = condition_calls()
    quantized, teacher = pair_of("static", tiny_condition_unet(), calls)
    student = make_student(quantized, teacher, CONFIG)
    assert torch.equal(student_outputs(student, quantized, calls[0]), outputs(quantized, calls[0]))


@pytest.mark.parametrize("base", [pytest.param("float", marks=pytest.mark.matrix), "codes"])
def test_other_bases_start_from_their_own_rounding(base):
    quantized, teacher = pair_of("uniform", tiny_unet(), unet_calls())
    student = make_student(quantized, teacher, DistillConfig(updates=1, base=base))
    frozen = freeze(student, quantized)
    names = [layer.name for layer in quantized.plan.layers]
    same = [torch.equal(frozen.codes(n), quantized.codes(n)) for n in names]
    # GPTQ's codes are not the nearest ones of the float weight
    assert all(same) if base == "codes" else not all(same)


def test_another_teacher_is_refused():
    quantized, _ = pair_of("static", tiny_unet(), unet_calls())
    graph = normalized(tiny_condition_unet(), condition_calls()[0], quantized.settings)
    with pytest.raises(ConfigError, match="the float model has no such layer"):
        make_student(quantized, graph, CONFIG)
