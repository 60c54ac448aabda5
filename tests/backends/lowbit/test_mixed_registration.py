"""The low-bit operators as torch and ExecuTorch see them: schemas, shapes, out forms, export."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from mpqdm_fx.backends.lowbit import ops as operators
from mpqdm_fx.backends.lowbit.blob import pack_blob
from mpqdm_fx.backends.xnnpack.edge import to_edge
from mpqdm_fx.errors import ConfigError

ops = torch.ops.mpqdm
GENERATOR = torch.Generator().manual_seed(0)


def blob(rows, *shape):
    codes = torch.randint(-3, 4, (rows, *shape), generator=GENERATOR).to(torch.int8)
    return pack_blob(codes, torch.rand(rows, generator=GENERATOR) + 0.1, torch.ones(rows))


X = torch.randn(2, 5, 4, 8, generator=GENERATOR)
CODES = ops.quantize_mixed(X, 2)
NORM = (X, torch.ones(8), torch.zeros(8), 2 * torch.ones(8), 2, 1e-5, True)
RANGE = (torch.tensor([0.05]), torch.tensor([-3], dtype=torch.int32))
CALLS = {
    "quantize_mixed": (X, 10),
    "group_norm_mixed": NORM,
    "group_norm_quantize_mixed": NORM,
    "quantize_static_mixed": (X, *RANGE),
    "dequantize_mixed": (CODES[0], *RANGE),
    "group_norm_quantize_static_mixed": (*NORM, *RANGE),
    "conv2d_mixed": (*CODES, blob(12, 8, 3, 3), 12, 3, 2, 1),
    "linear_mixed": (*CODES, blob(12, 8), 12),
}


def listed(results):
    return list(results) if isinstance(results, tuple | list) else [results]


def test_every_operator_has_a_call():
    assert set(CALLS) == set(operators.OPERATORS)


@pytest.mark.parametrize("name", CALLS)
def test_torch_finds_nothing_wrong(name):
    torch.library.opcheck(getattr(ops, name).default, CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_shapes_and_dtypes_are_known_without_computing(name):
    expected = listed(getattr(ops, name)(*CALLS[name]))
    arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in CALLS[name]]
    faked = listed(getattr(ops, name)(*arguments))
    described = [(t.shape, t.dtype, t.stride()) for t in expected]
    assert [(t.shape, t.dtype, t.stride()) for t in faked] == described
    with torch._subclasses.FakeTensorMode() as mode:
        inside = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in CALLS[name]]
        faked = listed(getattr(ops, name)(*inside))
    assert [(t.shape, t.dtype, t.stride()) for t in faked] == described


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("right_size", [True, False])
def test_the_out_form_writes_the_same(name, right_size):
    expected = listed(getattr(ops, name)(*CALLS[name]))
    form = getattr(ops, name).out
    names = [argument.name for argument in form._schema.arguments if argument.is_out]
    outs = [torch.empty_like(t) if right_size else t.new_empty(0) for t in expected]
    results = listed(form(*CALLS[name], **dict(zip(names, outs, strict=True))))
    for result, out, value in zip(results, outs, expected, strict=True):
        assert result is out
        assert torch.equal(out, value)


def test_wrong_calls_are_refused_while_tracing():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 4, 4, 8)
        for call in (
            lambda: ops.quantize_mixed(x.half(), 1),
            lambda: ops.group_norm_mixed(x, x[0, 0, 0], x[0, 0, 0], x[0, 0, 0], 3, 1e-5, False),
            lambda: ops.linear_mixed(x, x[0], x[0], x[0], 4),
            lambda: ops.quantize_static_mixed(x, x[0], x[0]),
            lambda: ops.dequantize_mixed(x, x[0], x[0]),
            lambda: ops.conv2d_mixed(x.to(torch.int8), x[0], x[0], x[0], 4, 5, 1, 0),
        ):
            with pytest.raises(ConfigError):
                call()


def test_a_second_import_leaves_the_operators_alone(monkeypatch):
    before = ops.linear_mixed(*CALLS["linear_mixed"])
    importlib.reload(operators)
    monkeypatch.delitem(sys.modules, operators.__name__)
    assert importlib.import_module(operators.__name__) is not operators
    assert torch.equal(ops.linear_mixed(*CALLS["linear_mixed"]), before)


def test_the_operators_need_no_executorch():
    program = (
        "import sys, mpqdm_fx.backends.lowbit.ops; "
        "assert not [name for name in sys.modules if name.startswith('executorch')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class Block(nn.Module):
    """A convolution of XNNPACK, then own operators, each once, then a linear layer of XNNPACK."""

    def __init__(self):
        super().__init__()
        self.entry, self.end = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(12, 5)
        self.norm, self.last = nn.GroupNorm(2, 8), nn.GroupNorm(3, 12)
        self.register_buffer("convolution", blob(16, 8, 3, 3))
        self.register_buffer("linear", blob(12, 16))
        self.register_buffer("square", blob(12, 12))
        self.register_buffer("scale", RANGE[0])
        self.register_buffer("zero_point", RANGE[1])

    def forward(self, x):
        y = self.entry(x).permute(0, 2, 3, 1).contiguous()
        norm = (self.norm.weight, self.norm.bias, self.norm.weight, 2, 1e-5)
        codes = ops.group_norm_quantize_mixed(y, *norm, True)
        y = ops.conv2d_mixed(*codes, self.convolution, 16, 3, 1, 1)
        codes = ops.quantize_mixed(y, y.shape[0] * y.shape[1] * y.shape[2])
        y = ops.linear_mixed(*codes, self.linear, 12)
        norm = (self.last.weight, self.last.bias, self.last.weight, 3, 1e-5)
        known = (self.scale, self.zero_point)
        codes = ops.group_norm_quantize_static_mixed(y, *norm, True, *known)
        y = ops.linear_mixed(codes, *known, self.square, 12)
        y = ops.dequantize_mixed(ops.quantize_static_mixed(y, *known), *known)
        y = ops.group_norm_mixed(y, *norm, False)
        return self.end(torch.relu(y))


@pytest.mark.xnnpack
def test_programs_keep_the_operators_between_xnnpacks_parts():
    module, x = Block().eval(), torch.randn(2, 4, 8, 8, generator=GENERATOR)
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x), module(x))
    edge = to_edge(exported)
    (plan,) = edge.to_executorch().executorch_program.execution_plan
    called = {(operator.name, operator.overload) for operator in plan.operators}
    assert called == {(f"mpqdm::{name}", "out") for name in CALLS}
    assert len(plan.delegates) >= 2


def test_a_batch_may_be_dynamic():
    class Convolution(nn.Module):
        def forward(self, x, weight):
            codes = ops.group_norm_quantize_mixed(x, *NORM[1:])
            return ops.conv2d_mixed(*codes, weight, 12, 3, 2, 1)

    weight, module = CALLS["conv2d_mixed"][3], Convolution()
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    exported = torch.export.export(module, (X, weight), dynamic_shapes=(batch, None))
    more = torch.cat([X, X + 1])
    assert torch.equal(exported.module()(more, weight), module(more, weight))
