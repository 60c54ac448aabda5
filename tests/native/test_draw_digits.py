"""The app in C++ draws the very bytes that diffusers draws with the same program."""

import importlib.util
import os
import subprocess

import pytest
import torch
from native_builds import NATIVE, build, require_compiler
from rounded_nets import round_to_grid
from small import tiny_unet

from mpqdm_fx.backends.lowbit.lower import lower_lowbit
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.digits.bundled import load_digits_scheduler, load_digits_unet
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.records.activations import DynamicActivation

pytestmark = pytest.mark.xnnpack
EXAMPLE = NATIVE / "examples" / "draw_digits"
LABELS, STEPS = [3, 7], 4


def app():
    require_compiler()
    return build("linux", "draw_digits") / "examples" / "draw_digits" / "draw_digits"


def inputs_text(noise):
    spec = importlib.util.spec_from_file_location("write_inputs", EXAMPLE / "write_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.inputs_text(LABELS, STEPS, noise)


def put_program(folder, unet, size):
    """Write a program of own kernels, and what the app reads beside it; return the noise."""
    noise = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    example = {
        "sample": noise,
        "timestep": torch.tensor([10, 10]),
        "class_labels": torch.tensor(LABELS),
    }
    graph = Pipeline(passes=NORMALIZE)(trace(unet, example)).graph_module
    graph = round_to_grid(graph, 8)
    ranges = dict.fromkeys(weight_layers(graph), DynamicActivation())
    lower_lowbit(graph, ranges, example, folder / "unet.pte", kernels="memory")
    (folder / "inputs.txt").write_text(inputs_text(noise))
    return noise


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """A folder with the program of a small network; and its noise."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, put_program(folder, tiny_unet(), 8)


def draw(folder, inputs="inputs.txt", **environment):
    command = [app(), folder / "unet.pte", folder / inputs, folder / "digits.f32"]
    return subprocess.run(
        [*map(str, command)], env={**os.environ, **environment}, capture_output=True, text=True
    )


def drawn_in_python(runtime, folder, noise):
    method = runtime.load_program(folder / "unet.pte").load_method("forward")
    scheduler = load_digits_scheduler()
    scheduler.set_timesteps(STEPS)
    sample = noise
    for time in scheduler.timesteps:
        (output,) = method.execute((sample, time.repeat(2), torch.tensor(LABELS)))
        sample = scheduler.step(output.clone(), time, sample).prev_sample
    return sample.numpy()


def assert_drawn(folder, expected, **environment):
    """The app draws these bytes; returns what it printed."""
    (folder / "digits.f32").unlink(missing_ok=True)
    done = draw(folder, **environment)
    assert done.returncode == 0, done.stderr
    assert (folder / "digits.f32").read_bytes() == expected.tobytes()
    return done.stdout.splitlines()


def test_the_app_draws_the_bytes_of_diffusers_on_all_kernels(runtime, native, drawing):
    folder, noise = drawing
    expected = drawn_in_python(runtime, folder, noise)
    assert expected.std() > 0.1
    for name in native.kernel_sets:
        lines = assert_drawn(folder, expected, MPQDM_KERNELS=name)
        assert [len(line) for line in lines] == [16] * 16


@pytest.mark.matrix
def test_the_bundled_models_digits_are_those_of_diffusers(runtime, tmp_path):
    noise = put_program(tmp_path, load_digits_unet(), 16)
    lines = assert_drawn(tmp_path, drawn_in_python(runtime, tmp_path, noise))
    assert any("@" in line for line in lines)


WRONG = {
    "steps": (lambda text: text.partition("step")[0], "has no steps"),
    "labels": (lambda text: text.replace("labels 3 7", "labels 3"), "have 1 labels"),
    "a number": (lambda text: text.rsplit(" ", 1)[0], "a step lacks a number"),
    "word": (lambda text: "seed 3\n" + text, "a line that begins with seed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_named(drawing, name):
    folder, _ = drawing
    change, message = WRONG[name]
    (folder / "wrong.txt").write_text(change((folder / "inputs.txt").read_text()))
    done = draw(folder, "wrong.txt")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_damaged_program_is_named(drawing, tmp_path):
    folder, _ = drawing
    program = bytearray((folder / "unet.pte").read_bytes())
    program[program.rindex(b"MPQL") + 300] ^= 1
    (tmp_path / "unet.pte").write_bytes(program)
    (tmp_path / "inputs.txt").write_text((folder / "inputs.txt").read_text())
    done = draw(tmp_path)
    assert done.returncode == 2
    assert "the program failed" in done.stderr
