"""A module is a leaf only if calling it is its stock class's forward; else its parts are proven."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone uses
from torch import nn
from torch.nn.utils import parametrize
from trace_helpers import calls, operators, randn

from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.layers import sample_rows, weight_layers, weight_rows
from mpqdm_fx.graph.leaves import is_stock

CONV, MUL, PAD = "aten.conv2d.default", "aten.mul.Tensor", "aten.pad.default"


def conv(kind: Callable[..., nn.Module] = nn.Conv2d, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(4, 4, 3, **{"padding": 1, **settings})


def tiled() -> nn.Module:
    """Seamless along one axis, as web interfaces patch it into diffusion models."""
    module = conv()
    left, right, top, bottom = module._reversed_padding_repeated_twice
    module.padding_x, module.padding_y = (left, right, 0, 0), (0, 0, top, bottom)

    def forward(self: Any, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        x = F.pad(F.pad(x, self.padding_x, mode="circular"), self.padding_y, mode="constant")
        return F.conv2d(x, weight, bias, self.stride, (0, 0), self.dilation, self.groups)

    module._conv_forward = types.MethodType(forward, module)
    return module


def patched_forward() -> nn.Module:
    module = conv()
    stock = module.forward
    module.forward = lambda x: stock(x) * 2
    return module


def hooked(register: str, hook: Callable[..., Any]) -> nn.Module:
    module = conv()
    getattr(module, register)(hook)
    return module


def compiled() -> nn.Module:
    module = conv()
    module._compiled_call_impl = lambda x: nn.Module._call_impl(module, x)
    return module


class OwnHelper(nn.Conv2d):
    def _conv_forward(self, x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class OwnCall(nn.Conv2d):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) * 2


class OwnStride(nn.Conv2d):
    @property
    def stride(self) -> tuple[int, int]:
        return (2, 2)

    @stride.setter
    def stride(self, value: Any) -> None:
        pass


def parametrized() -> nn.Module:
    module = conv()
    parametrize.register_parametrization(module, "weight", nn.Identity())
    return module


ALTERED: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "helper on the instance": (tiled, ["0"], [PAD, PAD]),
    "forward on the instance": (patched_forward, ["0"], [MUL]),
    "helper of a subclass": (lambda: conv(OwnHelper), [], [MUL, CONV]),
    "call of a subclass": (lambda: conv(OwnCall), ["0"], [MUL]),
    "property of a subclass": (lambda: conv(OwnStride), ["0"], []),
    "forward hook": (
        lambda: hooked("register_forward_hook", lambda m, args, output: output * 2),
        ["0"],
        [MUL],
    ),
    "forward pre-hook": (
        lambda: hooked("register_forward_pre_hook", lambda m, args: (args[0] * 2,)),
        ["0"],
        [MUL],
    ),
    "backward hook": (
        lambda: hooked("register_full_backward_hook", lambda m, grad_in, grad_out: None),
        ["0"],
        [],
    ),
    # what is compiled is left out, and parametrizations are folded, before the graph is captured
    "compiled call": (compiled, ["0"], []),
    "parametrization": (parametrized, ["0"], []),
}


@pytest.mark.parametrize(("build", "names", "rest"), ALTERED.values(), ids=ALTERED)
def test_altered_layer_is_no_leaf_and_what_is_provably_stock_in_it_is_called(build, names, rest):
    module = build()
    assert not is_stock(module)
    model, x = nn.Sequential(module).eval(), randn(2, 4, 7, 9)
    gm = trace(model, (x,))
    assert calls(gm) == names
    assert [o for o in operators(gm) if not o.startswith(("aten.view_as", "aten.alias"))] == rest
    with torch.no_grad():
        assert same_bits(gm(x), model(x))
    for layer in weight_layers(gm).values():
        assert type(layer.module) is nn.Conv2d
        assert is_stock(layer.module)
        assert torch.equal(layer.module.weight, module.weight)
        assert layer.module.weight is module.weight or parametrize.is_parametrized(module)


@pytest.mark.parametrize("build", [tiled, lambda: conv(OwnStride), patched_forward])
def test_rows_of_a_layer_in_the_graph_give_what_it_returns(build):
    gm = trace(nn.Sequential(build()).eval(), (randn(2, 4, 7, 9),))
    (layer,) = weight_layers(gm).values()
    seen: list[torch.Tensor] = []
    handle = layer.module.register_forward_hook(
        lambda m, args, output: seen.extend([*args, output])
    )
    with torch.no_grad():
        gm(randn(2, 4, 7, 9))
    handle.remove()
    rows = F.linear(
        sample_rows(layer.module, seen[0]), weight_rows(layer.module), layer.module.bias
    )
    torch.testing.assert_close(rows, seen[1].detach().movedim(1, -1).flatten(0, 2))


class Renamed(nn.Conv2d):
    """A subclass that changes no call: another constructor, another print."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "x"

    def extra_repr(self) -> str:
        return "mine"

    def describe(self) -> str:
        return self.note


@pytest.mark.parametrize("kind", [nn.Conv2d, Renamed])
def test_layer_whose_call_is_the_stock_forward_is_the_very_module(kind):
    module = conv(kind)
    assert is_stock(module)
    gm = trace(nn.Sequential(module).eval(), (randn(2, 4, 7, 9),))
    assert gm.get_submodule("0") is module


def test_sizes_of_a_replaced_weight_are_those_of_the_weight():
    module = conv(padding=(0, 2))
    module.weight = nn.Parameter(randn(4, 4, 1, 5))
    gm = trace(nn.Sequential(module).eval(), (randn(2, 4, 7, 9),))
    installed = gm.get_submodule("0")
    assert installed.kernel_size == (1, 5)
    assert module.kernel_size == (3, 3)
    rows = F.linear(sample_rows(installed, randn(2, 4, 7, 9)), weight_rows(installed), module.bias)
    expected = module(randn(2, 4, 7, 9)).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(rows, expected)


def test_padding_of_other_modes_is_what_the_forward_reads():
    module = conv(padding_mode="circular")
    module.padding = (2, 2)  # the forward reads what the constructor wrote down beside it
    x = randn(2, 4, 7, 9)
    rows = F.linear(sample_rows(module, x), weight_rows(module), module.bias)
    torch.testing.assert_close(rows, module(x).movedim(1, -1).flatten(0, 2))


class Settings(nn.Module):
    """Changes its layer between two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv.dilation, self.conv.padding = (2, 2), (2, 2)
        y = self.conv(x)
        self.conv.dilation, self.conv.padding = (1, 1), (1, 1)
        return self.conv(y)


def test_one_name_holds_one_layer_when_settings_change_between_calls():
    model, x = Settings().eval(), randn(2, 4, 7, 9)
    gm = trace(model, (x,))
    assert calls(gm) == ["conv"]
    assert operators(gm) == [CONV]
    with torch.no_grad():
        assert same_bits(gm(x), model(x))


class Functional(nn.Module):
    """Reads the weights of layers that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = conv(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, self.conv.weight, self.conv.bias, padding=2, stride=2)
        return F.linear(y.movedim(1, -1), self.linear.weight)


def test_layers_whose_weights_are_read_elsewhere_are_called():
    model, x = Functional().eval(), randn(2, 4, 7, 9)
    gm = trace(model, (x,))
    assert calls(gm) == ["conv", "linear"]
    assert gm.get_submodule("conv").stride == (2, 2)
    assert gm.get_submodule("linear").bias is None
    with torch.no_grad():
        assert same_bits(gm(x), model(x))


class Enlarged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x, output_size=[14, 18])


def test_transposed_convolution_that_is_asked_for_a_size_stays_aten():
    model, x = Enlarged().eval(), randn(2, 4, 7, 9)
    gm = trace(model, (x,))
    assert calls(gm) == []
    with torch.no_grad():
        assert gm(x).shape[2:] == (14, 18)
        assert same_bits(gm(x), model(x))


class Doubling(nn.Parameter):
    """A parameter that changes what is done with it."""

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            return result * 2 if function is F.linear else result


class PlainKind(nn.Parameter):
    """A parameter of a class of its own that does nothing of its own."""


def test_tensors_with_operations_of_their_own_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[0].weight = PlainKind(model[0].weight.data)
    assert calls(trace(model, (randn(2, 4),))) == ["0", "1"]
    model[1].weight = Doubling(model[1].weight.data)
    with pytest.raises(TraceError, match=r"1\.weight is a .*Doubling, not a plain tensor"):
        trace(model, (randn(2, 4),))


def test_lazy_modules_are_refused_before_they_have_shapes():
    model = nn.Sequential(nn.LazyConv2d(4, 3)).eval()
    with pytest.raises(TraceError, match=r"0\.weight is not initialised yet; call the model once"):
        trace(model, (randn(2, 4, 7, 9),))
    model(randn(2, 4, 7, 9))
    assert calls(trace(model, (randn(2, 4, 7, 9),))) == ["0"]


def test_global_hooks_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(TraceError, match="global module hooks are registered"):
            trace(nn.Sequential(nn.Linear(4, 4)).eval(), (randn(2, 4),))
    finally:
        handle.remove()
