"""A weight that is computed when it is read has the shape, dtype and bits of the whole one."""

import copy

import pytest
import torch
from small import tiny_unet, unet_calls
from torch import nn

from mpqdm_fx import MPQConfig, load, quantize, save
from mpqdm_fx.graph.editing import infer_val
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.stand_ins import stand_ins
from mpqdm_fx.numerics.lazy_tensor import CodedTensor, LazyTensor, StoredTensor, plain, row_blocks
from mpqdm_fx.passes.quantize.round_weights import hold_codes, install_codes


def stored(shape=(6, 4), dtype=torch.bfloat16):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return StoredTensor(values), values.float()


def coded():
    codes = torch.randint(-127, 128, (6, 4), generator=torch.Generator().manual_seed(1))
    codes, scale = codes.to(torch.int8), torch.rand(6) + 0.1
    return CodedTensor(codes, scale), codes.float() * scale[:, None]


LAZY = [stored(), stored(dtype=torch.float16), stored(dtype=torch.float32), coded()]


@pytest.mark.parametrize(("lazy", "whole"), LAZY)
def test_readers_get_plain_tensors_of_the_same_bits(lazy, whole):
    assert (lazy.shape, lazy.dtype, lazy.device) == (whole.shape, torch.float32, whole.device)
    assert torch.equal(plain(lazy), whole)
    for result, expected in (
        (lazy + 1, whole + 1),
        (lazy.flatten(1).abs().amax(dim=1), whole.abs().amax(dim=1)),
        (torch.isfinite(lazy).all(), torch.tensor(True)),
        (lazy.T @ lazy, whole.T @ whole),
    ):
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)


@pytest.mark.parametrize(("lazy", "whole"), LAZY)
def test_layers_compute_as_with_the_whole_weight(lazy, whole):
    x, ids = torch.randn(3, 5, 4), torch.tensor([[0, 5, 2], [1, 1, 4]])
    linear, table = nn.Linear(4, 6), nn.Embedding(6, 4)
    expected = []
    for weight in (whole, lazy):
        linear.weight = table.weight = nn.Parameter(weight, requires_grad=False)
        with torch.no_grad():
            expected.append((linear(x), table(ids)))
    assert isinstance(linear.weight, LazyTensor)
    assert all(torch.equal(a, b) for a, b in zip(*expected, strict=True))


@pytest.mark.parametrize(("lazy", "whole"), LAZY)
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_gradients_are_those_of_the_whole_weight_which_is_made_again(
    lazy, whole, shape, monkeypatch
):
    made, own = [], type(lazy).plain
    monkeypatch.setattr(type(lazy), "plain", lambda self: made.append(self) or own(self))
    linear, gradients = nn.Linear(4, 6), []
    for weight in (whole, lazy):
        linear.weight = nn.Parameter(weight, requires_grad=False)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
        y = linear(x)
        forward = len(made)
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    # nothing was kept from the forward pass
    assert (forward, len(made)) == (1, 2)


@pytest.mark.parametrize(("lazy", "whole"), LAZY)
def test_slices_of_rows_and_copies_stay_lazy(lazy, whole):
    assert isinstance(lazy[2:5], LazyTensor)
    assert torch.equal(plain(lazy[2:5]), whole[2:5])
    assert isinstance(lazy.detach(), LazyTensor)
    parameter = copy.deepcopy(nn.Parameter(lazy, requires_grad=False))
    assert isinstance(parameter, nn.Parameter)
    assert torch.equal(plain(parameter), whole)
    assert torch.equal(torch.cat(list(row_blocks(lazy, 8))), whole)
    assert [len(block) for block in row_blocks(lazy, 8)] == [2, 2, 2]


def test_a_lazy_weight_cannot_be_written_into():
    with pytest.raises(RuntimeError, match="never written"):
        stored()[0].add_(1)


def test_a_rounded_copy_of_a_lazy_layer_is_lazy_too():
    linear = nn.Linear(4, 6)
    linear.weight = nn.Parameter(stored()[0], requires_grad=False)
    lazy, whole = coded()
    rounded = install_codes(linear, lazy.codes, lazy.scale)
    assert isinstance(rounded.weight, CodedTensor)
    assert rounded.weight_codes is rounded.weight.codes
    assert torch.equal(plain(rounded.weight), whole)
    assert isinstance(linear.weight, StoredTensor)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 5)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
        (nn.Conv3d(4, 6, 1), (2, 4, 3, 3, 3)),
        (nn.Linear(4, 6), (2, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@torch.no_grad()
def test_a_layer_that_holds_only_codes_computes_the_same_numbers(layer, shape):
    codes = torch.randint(-128, 128, layer.weight.shape, dtype=torch.int8)
    scale = torch.rand(len(codes)) + 0.1
    lazy, whole = (install_codes(layer, codes, scale, lazy=lazy) for lazy in (True, False))
    assert isinstance(lazy.weight, CodedTensor)
    assert not isinstance(whole.weight, LazyTensor)
    x = torch.randn(shape)
    assert torch.equal(lazy(x), whole(x))
    half = install_codes(layer.bfloat16(), codes, scale, lazy=True)
    assert half.weight.dtype == torch.bfloat16  # which codes times scale are not


def test_a_quantized_model_that_holds_codes_is_the_same_model(tmp_path):
    calls = unet_calls(2)
    model = quantize(tiny_unet(), MPQConfig(activation_mode="dynamic", allocation="uniform"), calls)
    expected, plan = model(**calls[0]).sample, model.plan
    hold_codes(model, model.rounded)
    kept = [m for m in model.modules() if isinstance(getattr(m, "weight", None), CodedTensor)]
    assert len(kept) == len(plan.layers)
    shared = {id(module.weight) for module in kept}
    layers = weight_layers(model.rounded, embeddings=True)
    assert {id(layers[planned.name].weight) for planned in plan.layers} == shared
    assert torch.equal(model(**calls[0]).sample, expected)
    save(model, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(**calls[0]).sample, expected)
    hold_codes(model)
    assert torch.equal(copy.deepcopy(model)(**calls[0]).sample, expected)


def test_stand_ins_have_shapes_and_go_again():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    lazy = nn.Parameter(stored()[0], requires_grad=False)
    model[0].weight = model[1].weight = lazy
    with stand_ins(model):
        assert model[0].weight is model[1].weight
        assert type(model[0].weight) is nn.Parameter
        assert model[0].weight.shape == lazy.shape
    assert model[0].weight is lazy
    assert model[1].weight is lazy


def test_values_of_a_lazy_layer_are_inferred_without_its_numbers(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    linear = nn.Linear(4, 6)
    linear.weight = nn.Parameter(stored()[0], requires_grad=False)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = FakeTensorMode().from_tensor(torch.zeros(3, 4))
    call = graph.call_module("linear", (x,))
    graph.output(call)
    module = torch.fx.GraphModule(nn.ModuleDict({"linear": linear}), graph)
    monkeypatch.setattr(StoredTensor, "plain", lambda self: pytest.fail("numbers were made"))
    infer_val(module, call)
    assert tuple(call.meta["val"].shape) == (3, 6)
