"""The app in C++ draws the very bytes that diffusers draws with the same program."""

import importlib.util
import os
import subprocess

import pytest
import torch
from native_builds import NATIVE, build, require_compiler
from rounded_nets import round_to_grid
from torch import nn

import mpqdm_fx.backends.lowbit.ops  # noqa: F401  (registers the operators)
from mpqdm_fx.backends.lowbit.blob import pack_blob
from mpqdm_fx.backends.lowbit.lower import lower_lowbit
from mpqdm_fx.backends.xnnpack.edge import to_edge
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.digits.bundled import load_digits_scheduler, load_digits_unet
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.records.activations import DynamicActivation

pytestmark = pytest.mark.xnnpack
EXAMPLE = NATIVE / "examples" / "draw_digits"
LABELS, STEPS = [3, 7], 4
FLOAT = 6  # float32 as the runtime reports it


def app():
    require_compiler()
    return build("linux", "draw_digits") / "examples" / "draw_digits" / "draw_digits"


def inputs_text(noise):
    spec = importlib.util.spec_from_file_location("write_inputs", EXAMPLE / "write_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.inputs_text(LABELS, STEPS, noise)


class Denoiser(nn.Module):
    """A network that is small, and so quickly lowered: layers of XNNPACK around own operators."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.entry, self.end = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(12, 1, 3, padding=1)
        self.times, self.classes = nn.Linear(1, 8), nn.Embedding(10, 8)
        codes = torch.randint(-7, 8, (12, 8, 3, 3)).to(torch.int8)
        self.register_buffer("weight", pack_blob(codes, torch.full((12,), 0.02), torch.zeros(12)))

    def forward(self, sample, timestep, class_labels):
        condition = self.times(timestep[:, None] / 1000) + self.classes(class_labels)
        y = (self.entry(sample) + condition[:, :, None, None]).permute(0, 2, 3, 1).contiguous()
        norm = (torch.ones(8), torch.zeros(8), torch.ones(8), 2, 1e-5, True)
        codes = torch.ops.mpqdm.group_norm_quantize_mixed(y, *norm)
        y = torch.ops.mpqdm.conv2d_mixed(*codes, self.weight, 12, 3, 1, 1)
        return self.end(y.permute(0, 3, 1, 2))


def example_inputs(size):
    """A call of two images."""
    return {
        "sample": torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([10, 10]),
        "class_labels": torch.tensor(LABELS),
    }


@pytest.fixture(scope="module", params=[torch.int64, torch.float32], ids=str)
def drawing(tmp_path_factory, request):
    """A folder with a program, and what the app reads beside it; and the noise."""
    folder, example = tmp_path_factory.mktemp("digits"), example_inputs(8)
    example["timestep"] = example["timestep"].to(request.param)
    exported = torch.export.export(Denoiser().eval(), tuple(example.values()))
    (folder / "unet.pte").write_bytes(to_edge(exported).to_executorch().buffer)
    (folder / "inputs.txt").write_text(inputs_text(example["sample"]))
    return folder, example["sample"]


def draw(folder, inputs="inputs.txt", **environment):
    command = [app(), folder / "unet.pte", folder / inputs, folder / "digits.f32"]
    return subprocess.run(
        [*map(str, command)], env={**os.environ, **environment}, capture_output=True, text=True
    )


def drawn_in_python(runtime, folder, noise):
    method = runtime.load_program(folder / "unet.pte").load_method("forward")
    takes_float = method.metadata.input_tensor_meta(1).dtype() == FLOAT
    scheduler = load_digits_scheduler()
    scheduler.set_timesteps(STEPS)
    sample = noise
    for time in scheduler.timesteps:
        times = time.repeat(2)
        times = times.float() if takes_float else times
        (output,) = method.execute((sample, times, torch.tensor(LABELS)))
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
    example = example_inputs(16)
    graph = Pipeline(passes=NORMALIZE)(trace(load_digits_unet(), example)).graph_module
    graph = round_to_grid(graph, 8)
    ranges = dict.fromkeys(weight_layers(graph), DynamicActivation())
    lower_lowbit(graph, ranges, example, tmp_path / "unet.pte", kernels="memory")
    (tmp_path / "inputs.txt").write_text(inputs_text(example["sample"]))
    lines = assert_drawn(tmp_path, drawn_in_python(runtime, tmp_path, example["sample"]))
    assert any("@" in line for line in lines)


WRONG = {
    "steps": (lambda text: text.partition("step")[0], "has no steps"),
    "labels": (lambda text: text.replace("labels 3 7", "labels 3"), "have 1 labels"),
    "a number": (lambda text: text.rsplit(" ", 1)[0], "a step lacks a number"),
    "a bound": (lambda text: text.replace("clip 1", "clip"), "clip lacks a number above 0"),
    "an alpha": (lambda text: text.replace("step 749 ", "step 749 -"), "drew NaN"),
    "word": (lambda text: "seed 3\n" + text, "a line that begins with seed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_named(drawing, name):
    folder, _ = drawing
    change, message = WRONG[name]
    (folder / "wrong.txt").write_text(change((folder / "inputs.txt").read_text()))
    done = draw(folder, "wrong.txt")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_a_damaged_program_is_named(drawing, tmp_path):
    folder, _ = drawing
    program = bytearray((folder / "unet.pte").read_bytes())
    program[program.rindex(b"MPQL") + 300] ^= 1
    (tmp_path / "unet.pte").write_bytes(program)
    (tmp_path / "inputs.txt").write_text((folder / "inputs.txt").read_text())
    done = draw(tmp_path)
    assert done.returncode == 2, done.stderr
    assert "the program failed" in done.stderr
