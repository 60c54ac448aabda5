"""`lower(..., "lowbit")`: typed, checked, and the numbers that the doctor foretells."""

import inspect
import json
import typing

import pytest
from kernel_package import kernels_missing
from small import plain_unet, unet_calls

import mpqdm_fx.backends.lower as doors
from mpqdm_fx import MPQConfig, lower, quantize
from mpqdm_fx.backends.lowbit.doctor import diagnose_lowbit
from mpqdm_fx.backends.lowbit.program import LowbitProgram
from mpqdm_fx.backends.lowbit.road import LowbitGraphs
from mpqdm_fx.backends.names import PROGRAMS
from mpqdm_fx.errors import ConfigError, LoweringError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.jobs.result_folder import ProgramForm

DYNAMIC = MPQConfig(
    weight_bits=3, activation_mode="dynamic", allocation="uniform", rounding="nearest",
    refinements=0, propagation=0, judge=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def quantized():
    calls = [{key: call[key] for key in ("sample", "timestep")} for call in unet_calls(2)]
    return quantize(plain_unet(), DYNAMIC, calls)


def test_every_verb_has_an_overload_that_takes_its_options():
    typed = {
        typing.get_args(typing.get_type_hints(entry, doors.__dict__)["backend"])[0]: entry
        for entry in typing.get_overloads(lower)
    }
    assert set(typed) == set(doors._VERBS)
    for backend in PROGRAMS:
        options = inspect.signature(typed[backend]).parameters.keys() - {"backend"}
        assert options == inspect.signature(doors._VERBS[backend]).parameters.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give `output`"),
        ({"output": "x.pte", "engine": "fbgemm"}, "'lowbit' takes no engine; .* kernels, cpu"),
        ({"output": "x.pte", "kernels": "fast"}, "kernels='fast'"),
        ({"output": "x.pte", "cpu": "z80"}, "cpu='z80'"),
        ({"output": "x.pte", "kernels": "memory", "cpu": "vnni"}, 'only kernels="auto" asks'),
    ],
)
def test_options_that_do_not_fit_are_refused(quantized, options, message):
    with pytest.raises(ConfigError, match=message):
        lower(quantized, "lowbit", **options)


@pytest.mark.parametrize("option", [{"kernels": "memory"}, {"cpu": "dotprod"}])
def test_options_of_own_kernels_are_refused_without_such_kernels(option):
    (name,) = option
    for backend in ("xnnpack", "packed"):
        with pytest.raises(ConfigError, match=f"{name}=.*{backend} has no own kernels"):
            ProgramForm(backend=backend, **option).check(DYNAMIC)


def test_ranges_by_noise_level_are_no_settings_for_own_kernels():
    ProgramForm(backend="lowbit").check(MPQConfig(activation_mode="static"), runs=False)
    timestep = MPQConfig(activation_mode="timestep")
    with pytest.raises(ConfigError, match=r'does not run .*; choose activation_mode="measured"'):
        ProgramForm(backend="lowbit").check(timestep, runs=False)


@pytest.mark.xnnpack
def test_a_job_that_runs_its_program_is_refused_without_the_library():
    with kernels_missing():
        with pytest.raises(LoweringError, match=r"calls mpqdm::conv2d_mixed.*pip install"):
            ProgramForm(backend="lowbit").check(DYNAMIC)
        ProgramForm(backend="lowbit").check(DYNAMIC, runs=False)
        ProgramForm(backend="lowbit", kernels="xnnpack").check(DYNAMIC)


@pytest.mark.matrix
@pytest.mark.xnnpack
@pytest.mark.parametrize("kernels", ["memory", "xnnpack"])
def test_the_doctor_foretells_what_is_written(quantized, tmp_path, kernels):
    with kernels_missing():
        program = lower(
            quantized, "lowbit", output=tmp_path / "net.pte", kernels=kernels, keep_graphs=True
        )
    assert isinstance(program, LowbitProgram)
    assert isinstance(program.graphs, LowbitGraphs)
    assert bool(program.own_layers) is (kernels == "memory")
    example = example_inputs(quantized.signature, batch_size=1)
    diagnosis = diagnose_lowbit(quantized.rounded, example, quantized.ranges, kernels=kernels)
    for name in (
        "own_layers", "left_layers", "own_operators", "crossings", "layout_copies",
        "layout_copy_bytes", "delegated",
    ):  # fmt: skip
        assert getattr(diagnosis, name) == getattr(program, name), name
    assert diagnosis.delegates == program.subgraphs
    assert len(diagnosis.outside) == program.undelegated
    told = str(diagnosis)
    assert f"{len(program.own_layers)} layers in own kernels" in told
    assert all(f"  {name}: {why}" in told for name, why in program.left_layers.items())
    assert json.loads(json.dumps(diagnosis.to_dict()))["crossings"] == program.crossings
