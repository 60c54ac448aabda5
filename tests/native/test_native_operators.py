"""The operators in ExecuTorch's runtime: those of programs, and calls with anything wrong."""

import subprocess

import pytest
import torch
from native_builds import build, require_compiler
from torch import nn

import mpqdm_fx.backends.lowbit.ops  # noqa: F401  (registers the operators with torch)
from mpqdm_fx.backends.lowbit.blob import pack_blob
from mpqdm_fx.backends.xnnpack.edge import to_edge
from mpqdm_fx.numerics.metrics import sqnr_db

ops = torch.ops.mpqdm
pytestmark = pytest.mark.xnnpack
GENERATOR = torch.Generator().manual_seed(0)


def blob(rows, *shape):
    codes = torch.randint(-128, 128, (rows, *shape), generator=GENERATOR).to(torch.int8)
    codes[: rows // 2] = codes[: rows // 2].clamp(-3, 3)
    return pack_blob(codes, torch.rand(rows, generator=GENERATOR) + 0.1, torch.ones(rows))


class Layer(nn.Module):
    """Quantizes its input, a part a sample, and runs a layer on it."""

    def __init__(self, weight, *settings):
        super().__init__()
        self.register_buffer("weight", weight)
        self.settings = settings

    def forward(self, x):
        layer = ops.conv2d_mixed if len(self.settings) > 1 else ops.linear_mixed
        return layer(*ops.quantize_mixed(x, x.shape[0]), self.weight, *self.settings)


class Norm(nn.Module):
    """Group norm by itself, or with codes behind it."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator
        self.register_buffer("weight", torch.randn(12, generator=GENERATOR))

    def forward(self, x):
        return self.operator(x, self.weight, self.weight, self.weight, 3, 1e-5, True)


class Known(nn.Module):
    """Rounds its input to a known range, as codes for a layer or as numbers."""

    def __init__(self, weight=None, *settings):
        super().__init__()
        self.layer = None if weight is None else Layer(weight, *settings)
        self.register_buffer("scale", torch.tensor([0.02]))
        self.register_buffer("zero_point", torch.tensor([-90], dtype=torch.int32))

    def forward(self, x):
        known = self.scale, self.zero_point
        codes = ops.quantize_static_mixed(x, *known)
        if self.layer is None:
            return ops.dequantize_mixed(codes, *known)
        layer = ops.conv2d_mixed if len(self.layer.settings) > 1 else ops.linear_mixed
        return layer(codes, *known, self.layer.weight, *self.layer.settings)


class KnownNorm(Norm):
    """Group norm with codes on a known range behind it."""

    def __init__(self):
        super().__init__(ops.group_norm_quantize_static_mixed)
        self.known = Known()

    def forward(self, x):
        known = self.known.scale, self.known.zero_point
        return self.operator(x, self.weight, self.weight, self.weight, 3, 1e-5, True, *known)


class Block(nn.Module):
    """Group norm with codes, and a convolution of them."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = Norm(ops.group_norm_quantize_mixed), Layer(blob(21, 12, 3, 3))

    def forward(self, x):
        return ops.conv2d_mixed(*self.norm(x), self.layer.weight, 21, 3, 1, 1)


MODULES = {
    "convolution": (lambda: Layer(blob(21, 12, 3, 3), 21, 3, 2, 1), (2, 7, 6, 12)),
    "pointwise": (lambda: Layer(blob(8, 12, 1, 1), 8, 1, 1, 0), (3, 5, 4, 12)),
    "linear": (lambda: Layer(blob(9, 12), 9), (2, 7, 12)),
    "known range, convolution": (lambda: Known(blob(21, 12, 3, 3), 21, 3, 1, 1), (2, 7, 6, 12)),
    "known range, linear": (lambda: Known(blob(9, 12), 9), (2, 7, 12)),
    "known range, numbers": (lambda: Known(), (2, 7, 12)),
    "known range, group norm": (lambda: KnownNorm(), (2, 7, 6, 12)),
    "group norm": (lambda: Norm(ops.group_norm_mixed), (2, 7, 6, 12)),
    "group norm and codes": (lambda: Norm(ops.group_norm_quantize_mixed), (2, 7, 6, 12)),
}


def executed(runtime, exported, x):
    program = to_edge(exported).to_executorch().buffer
    return runtime.load_program(program).load_method("forward").execute((x,))


def assert_same(module, results, x):
    expected = module(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    if not isinstance(module, Norm):
        for result, value in zip(results, expected, strict=True):
            assert torch.equal(result, value)
        return
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype
        if result.dtype == torch.int8:  # a result on the edge between two codes may go to either
            assert (result.int() - value.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(result, value, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("name", MODULES)
def test_programs_compute_what_torch_computes(runtime, name):
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape, generator=GENERATOR)
    results = executed(runtime, torch.export.export(module, (x,)), x)
    assert_same(module, results, x)


def test_outputs_of_a_dynamic_batch_get_its_size(runtime):
    module, x = Block(), torch.randn(2, 7, 6, 12, generator=GENERATOR)
    sizes = ({0: torch.export.Dim("batch", min=1, max=5)},)
    exported = torch.export.export(module, (x,), dynamic_shapes=sizes)
    for batch in (1, 5):
        y = torch.randn(batch, 7, 6, 12, generator=GENERATOR)
        (result,) = executed(runtime, exported, y)
        expected = module(y)
        assert result.shape == expected.shape
        # codes on an edge may differ by one, each by a scale times a weight
        assert sqnr_db(expected, result) > 40


def test_a_damaged_program_fails_and_says_why(runtime, capfd):
    module, x = MODULES["linear"][0](), torch.randn(2, 7, 12, generator=GENERATOR)
    program = bytearray(to_edge(torch.export.export(module, (x,))).to_executorch().buffer)
    program[program.rindex(b"MPQL") + 140] ^= 1
    with pytest.raises(RuntimeError):
        runtime.load_program(bytes(program)).load_method("forward").execute((x,))
    assert "linear_mixed.out: weight: " in capfd.readouterr().err


def test_wrong_calls_are_errors_and_never_stop_the_process():
    require_compiler()
    program = build("linux", "mpqdm_operators_test") / "tests" / "mpqdm_operators_test"
    done = subprocess.run([str(program), "1", "3000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout == "failed: 0\n"


@pytest.mark.matrix
def test_many_more_wrong_calls():
    require_compiler()
    program = build("linux", "mpqdm_operators_test") / "tests" / "mpqdm_operators_test"
    done = subprocess.run([str(program), "9", "200000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
