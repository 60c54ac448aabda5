"""The operators of native/FORMAT.md in torch's registry; importing this file registers them.

``torch.ops.mpqdm.<name>`` runs the reference. ``<name>.out`` writes into given tensors: it is what
an ExecuTorch program calls, by that name, in the kernels of the native library.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpqdm_fx.backends.lowbit import reference, reference_static

__all__ = ["NAMESPACE", "OPERATORS"]

NAMESPACE = "mpqdm"
_ALIASES = "abc"  # names of the memory that the results of an out form are written to


class _Operator(NamedTuple):
    """Arguments and results in the schema, and both bodies."""

    arguments: str
    results: tuple[str, ...]
    compute: Callable[..., Any]
    fake: Callable[..., Any]


def _fake_codes(x: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_dtype("x", x, torch.float32)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((parts,)),
        x.new_empty((parts,), dtype=torch.int32),
    )


def _fake_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, groups: int, _: float, __: bool
) -> Tensor:
    reference.check_group_norm(x, weight, bias, factor, groups)
    return x.new_empty(x.shape)


def _fake_group_norm_quantize(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_codes(_fake_group_norm(x, *settings), x.shape[0])


def _fake_static_codes(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    reference.check_dtype("x", x, torch.float32)
    reference_static.check_range(scale, zero_point)
    return x.new_empty(x.shape, dtype=torch.int8)


def _fake_numbers(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    reference.check_dtype("codes", codes, torch.int8)
    reference_static.check_range(scale, zero_point)
    return codes.new_empty(codes.shape, dtype=torch.float32)


def _fake_group_norm_quantize_static(x: Tensor, *settings: Any) -> Tensor:
    *norm, scale, zero_point = settings
    return _fake_static_codes(_fake_group_norm(x, *norm), scale, zero_point)


def _fake_conv2d(codes: Tensor, scale: Tensor, _: Tensor, __: Tensor, *sizes: int) -> Tensor:
    return scale.new_empty(reference.conv2d_shape(codes, *sizes))


def _fake_linear(codes: Tensor, scale: Tensor, _: Tensor, __: Tensor, out_features: int) -> Tensor:
    return scale.new_empty(reference.linear_shape(codes, out_features))


_CODES = ("codes", "scale", "zero_point")
_INPUT = "Tensor codes, Tensor scale, Tensor zero_point, Tensor weight"
_NORM = "Tensor x, Tensor weight, Tensor bias, Tensor factor, int groups, float eps, bool silu"
_RANGE = "Tensor scale, Tensor zero_point"
_OPERATORS = {
    "quantize_mixed": _Operator(
        "Tensor x, int parts", _CODES, reference.quantize_mixed, _fake_codes
    ),
    "group_norm_mixed": _Operator(_NORM, ("out",), reference.group_norm_mixed, _fake_group_norm),
    "group_norm_quantize_mixed": _Operator(
        _NORM, _CODES, reference.group_norm_quantize_mixed, _fake_group_norm_quantize
    ),
    "quantize_static_mixed": _Operator(
        f"Tensor x, {_RANGE}",
        ("out",),
        reference_static.quantize_static_mixed,
        _fake_static_codes,
    ),
    "dequantize_mixed": _Operator(
        f"Tensor codes, {_RANGE}", ("out",), reference_static.dequantize_mixed, _fake_numbers
    ),
    "group_norm_quantize_static_mixed": _Operator(
        f"{_NORM}, {_RANGE}",
        ("out",),
        reference_static.group_norm_quantize_static_mixed,
        _fake_group_norm_quantize_static,
    ),
    "conv2d_mixed": _Operator(
        f"{_INPUT}, int out_channels, int kernel, int stride, int padding, int upsampling=1",
        ("out",),
        reference.conv2d_mixed,
        _fake_conv2d,
    ),
    "linear_mixed": _Operator(
        f"{_INPUT}, int out_features", ("out",), reference.linear_mixed, _fake_linear
    ),
}

#: Names of the operators, without the namespace.
OPERATORS = tuple(_OPERATORS)


def _schema(arguments: Sequence[str], results: Sequence[str]) -> str:
    returned = results[0] if len(results) == 1 else f"({', '.join(results)})"
    return f"({', '.join(arguments)}) -> {returned}"


def _out_form(compute: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """The same operator, writing into tensors that are given by name."""

    def write(*args: Any, **kwargs: Any) -> Any:
        targets = tuple(kwargs.pop(name) for name in names)
        results = compute(*args, **kwargs)
        several = isinstance(results, tuple)
        for target, result in zip(targets, results if several else (results,), strict=True):
            if target.shape != result.shape:
                target.resize_(result.shape)
            target.copy_(result)
        return targets if several else targets[0]

    return write


def _register(name: str, operator: _Operator) -> None:
    arguments, names, compute, fake = operator
    several = len(names) > 1
    results = [f"Tensor {result}" for result in names] if several else ["Tensor"]
    written = [f"Tensor({alias}!)" for alias, _ in zip(_ALIASES, names, strict=False)]
    outs = [f"{kind} {result}" for kind, result in zip(written, names, strict=True)]
    forms = {
        name: (_schema([arguments], results), compute, fake),
        f"{name}.out": (
            _schema([arguments, "*", *outs], written),
            _out_form(compute, names),
            _out_form(fake, names),
        ),
    }
    for form, (schema, body, fake_body) in forms.items():
        qualified = f"{NAMESPACE}::{form}"
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "cpu", body)
        torch.library.register_fake(qualified, fake_body)


for _name, _operator in _OPERATORS.items():
    # A second import, by `importlib.reload` or of a second copy, has the operators already.
    if not hasattr(getattr(torch.ops, NAMESPACE), _name):
        _register(_name, _operator)
