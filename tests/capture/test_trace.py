"""What trace makes of small modules: leaves, parameters, regions and containers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone uses
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import nn
from trace_helpers import Block, assert_equal_to_eager, attributes, calls, operators, randn

from mpqdm_fx.capture.trace import trace


def test_leaf_modules_are_called_by_their_own_names_in_order() -> None:
    model = Block().eval()
    gm = trace(model, (randn(2, 3, 8, 8),))
    assert calls(gm) == ["conv", "norm", "act", "act", "drop", "out.0"]
    # a dropout is a copy: the model's own may be put into training mode later
    own = {name for name in calls(gm) if gm.get_submodule(name) is model.get_submodule(name)}
    assert own == {"conv", "norm", "act", "out.0"}
    assert attributes(gm) == ["gain"]
    assert gm.gain is model.gain
    assert operators(gm) == ["aten.silu.default", "aten.mul.Tensor"]


def test_batch_of_one_still_gives_a_dynamic_batch() -> None:
    model = Block().eval()
    gm = trace(model, (randn(1, 3, 8, 8),))
    assert gm.meta["signature"].batch_range == (1, None)
    for batch in (1, 2, 5, 70):
        assert_equal_to_eager(model, gm, randn(batch, 3, 8, 8))


def test_nodes_keep_values_and_module_stacks() -> None:
    gm = trace(Block().eval(), (randn(2, 3, 8, 8),))
    conv = next(n for n in gm.graph.nodes if n.target == "out.0")
    assert tuple(conv.meta["val"].shape[1:]) == (3, 8, 8)
    assert [path for path, _ in conv.meta["nn_module_stack"].values()] == ["", "out", "out.0"]


def test_state_dict_keeps_the_names_and_the_parameters() -> None:
    model = Block().eval()
    gm = trace(model, (randn(2, 3, 8, 8),))
    ours, theirs = dict(gm.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)


def test_a_module_called_twice_has_two_nodes_and_one_object() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) + self.first(x)

    model = Twice().eval()
    gm = trace(model, (randn(2, 4),))
    assert len(calls(gm)) == 3
    assert {id(gm.get_submodule(name)) for name in calls(gm)} == {id(model.first)}
    assert_equal_to_eager(model, gm, randn(3, 4))


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids)) + F.linear(self.embed(ids), self.embed.weight)

    model = Tied().eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    gm = trace(model, (ids,))
    assert calls(gm) == ["embed", "head", "embed", "head"]
    assert gm.embed.weight is gm.head.weight is model.embed.weight
    assert_equal_to_eager(model, gm, ids)


def test_layer_applied_to_a_parameter_is_raised() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(randn(3, 4))
            self.project = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.project(self.tokens).T

    model = Tokens().eval()
    gm = trace(model, (randn(2, 4),))
    assert calls(gm) == ["project"]
    assert attributes(gm) == ["tokens"]
    assert_equal_to_eager(model, gm, randn(5, 4))


@pytest.mark.parametrize("padding_mode", ["circular", "reflect", "replicate"])
def test_convolution_that_pads_by_itself_is_one_call(padding_mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding_mode)).eval()
    gm = trace(model, (randn(2, 3, 8, 8),))
    assert calls(gm) == ["0"]
    assert operators(gm) == []
    assert_equal_to_eager(model, gm, randn(3, 3, 8, 8))


class ScaledLinear(nn.Linear):
    """A linear with an adapter and keyword arguments that change what it computes."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.adapter = nn.Linear(features, features, bias=False)

    def forward(self, x: torch.Tensor, scale: float = 1.0, adapt: bool = True) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + scale * self.adapter(x) if adapt else y


@pytest.mark.parametrize("adapt", [True, False])
def test_subclass_with_its_own_forward_is_never_called_with_other_arguments(adapt: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = ScaledLinear(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x, scale=0.5, adapt=adapt)

    model = Model().eval()
    gm = trace(model, (randn(2, 4),))
    assert_equal_to_eager(model, gm, randn(3, 4))
    # the part that is provably a stock linear is called as one that shares the parameters
    assert calls(gm) == (["linear", "linear.adapter"] if adapt else ["linear"])
    assert operators(gm) == (["aten.mul.Tensor", "aten.add.Tensor"] if adapt else [])
    assert type(gm.linear) is nn.Linear
    assert gm.linear.weight is model.linear.weight
    assert type(model.linear) is ScaledLinear


@pytest.mark.parametrize("bias", [True, False])
def test_convolution_subclass_is_called_with_the_settings_that_it_uses(bias: bool) -> None:
    class Conv(nn.Conv2d):
        def forward(self, x: torch.Tensor, dilate: bool = False) -> torch.Tensor:
            dilation = 2 if dilate else 1
            return F.conv2d(x, self.weight, self.bias, self.stride, 1, dilation, self.groups)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = Conv(4, 4, 3, padding=1, groups=2, bias=bias)
            self.other = Conv(4, 4, 3, padding=0, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.plain(self.plain(x), dilate=True))

    model = Model().eval()
    gm = trace(model, (randn(2, 4, 8, 8),))
    assert calls(gm) == ["plain", "other"]
    assert (gm.plain.groups, gm.plain.dilation) == (2, (1, 1))
    assert (gm.other.padding, model.other.padding) == ((1, 1), (0, 0))
    # the second call of one layer has other settings: one name holds one layer
    assert operators(gm) == ["aten.conv2d.default"]
    assert_equal_to_eager(model, gm, randn(3, 4, 8, 8))


@pytest.mark.parametrize("norm", [RMSNorm(4, eps=1e-6), FP32LayerNorm(4)])
def test_norms_of_diffusers_stay_aten(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm).eval()
    gm = trace(model, (randn(2, 4),))
    assert calls(gm) == ["0"]
    assert_equal_to_eager(model, gm, randn(3, 4))


def test_hooked_leaf_is_not_called_with_its_hook_lost() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    gm = trace(model, (randn(2, 4),))
    assert calls(gm) == ["0", "1"]
    assert operators(gm) == ["aten.mul.Tensor"]
    with torch.no_grad():
        assert torch.equal(gm(randn(2, 4)), model(randn(2, 4)))


def test_parametrized_weight_is_folded_into_its_layer() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))).eval()
    gm = trace(model, (randn(2, 4),))
    assert calls(gm) == ["0"]
    with torch.no_grad():
        assert torch.equal(gm(randn(3, 4)), model(randn(3, 4)))


def test_in_place_activation_keeps_its_effect() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.act = nn.SiLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            self.act(y)
            return y + self.act(self.linear(x))

    model = Model().eval()
    gm = trace(model, (randn(2, 4),))
    assert_equal_to_eager(model, gm, randn(3, 4))


def test_lifted_constants_and_buffers_are_attributes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", randn(3, 4), persistent=False)
            self.plain = randn(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.table.T + torch.tensor([1.0, 2.0, 3.0]) * self.plain.sum()

    model = Model().eval()
    gm = trace(model, (randn(2, 4),))
    assert "table" in attributes(gm)
    assert gm.table is model.table
    assert len(attributes(gm)) == 3
    assert_equal_to_eager(model, gm, randn(3, 4))


def test_gradient_and_autocast_regions_are_inlined() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                y = self.linear(x)
            with torch.enable_grad():
                z = self.linear(y)
            with torch.no_grad():
                return z * 2

    model = Model().eval()
    gm = trace(model, (randn(2, 4),))
    assert calls(gm) == ["linear", "linear"]
    assert operators(gm) == ["aten.mul.Tensor"]
    assert_equal_to_eager(model, gm, randn(3, 4))


def test_outputs_keep_their_structure() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"twice": x * 2, "rest": [x + 1, (x, None)]}

    model = Model()
    gm = trace(model, (randn(2, 4),))
    out = gm(randn(3, 4))
    assert torch.equal(out["twice"], randn(3, 4) * 2)
    assert out["rest"][1][1] is None
    assert torch.equal(out["rest"][1][0], randn(3, 4))


def test_nested_inputs_are_opened_by_getitem() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, extra: dict[str, Any] | None = None) -> torch.Tensor:
            assert extra is not None
            return x * extra["scale"] + extra["pair"][1] * extra["factor"]

    model = Model()
    extra = {"scale": randn(2, 1), "pair": (None, randn(2, 4)), "factor": 3.0}
    gm = trace(model, {"extra": extra, "x": randn(2, 4)})
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "extra"]
    assert gm.meta["signature"].batch_range == (1, None)
    given = {"scale": randn(5, 1), "pair": (None, randn(5, 4)), "factor": 3.0}
    normalized = gm.meta["signature"].normalize((randn(5, 4),), {"extra": given})
    assert torch.equal(gm(**normalized), model(randn(5, 4), given))
