"""In-place code becomes code that returns new tensors; what a model keeps in itself is refused."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone uses
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
from diffusers.utils.torch_utils import apply_freeu
from torch import nn
from trace_helpers import calls, randn

from mpqdm_fx import MPQConfig, lower, quantize
from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.editing import writes_in_place
from mpqdm_fx.numerics.metrics import sqnr_db


class Layers(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.inner = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.act = nn.SiLU(inplace=True)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def first(self, x):
        return self.inner(self.stem(x))


class InPlaceActivation(Layers):
    def forward(self, x):
        y = self.norm(self.first(x))
        self.act(y)
        return self.last(self.drop(y))


class AugmentedAssignment(Layers):
    def forward(self, x):
        y = self.first(x)
        early = y.flatten(2)  # sees what is added later
        y += 1.0
        y[:, :2].mul_(0.5)
        with torch.no_grad():
            y.clamp_(-1.0, 1.0)
        return self.last(y * early.mean())


class SliceAssignment(Layers):
    def forward(self, x):
        mask = torch.ones_like(x)
        mask[..., 1:3] = 0.25
        mask[:, 0] = x[:, 1] * 2
        return self.last(self.first(x * mask))


class OverwrittenInput(Layers):
    def forward(self, x):
        x.mul_(2)
        return self.last(self.act(self.first(x)))


class OverwrittenContainer(Layers):
    def forward(self, x, residuals):
        y = self.first(x)
        while residuals:
            y = y + residuals.pop()
        return self.last(y)


class FreeU(Layers):
    def forward(self, x):
        hidden, skip = apply_freeu(
            0, self.first(x), self.norm(self.first(x)), s1=0.9, s2=0.2, b1=1.2, b2=1.4
        )
        return self.last(hidden + skip)


class SlicedAttention(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.attention = Attention(8, heads=2, dim_head=4, processor=SlicedAttnProcessor(1))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.attention(self.first(x)))


IN_PLACE = [
    (InPlaceActivation, (3, 8, 8)),
    (AugmentedAssignment, (3, 8, 8)),
    (SliceAssignment, (3, 8, 8)),
    (OverwrittenInput, (3, 8, 8)),
    (FreeU, (3, 8, 8)),
    (SlicedAttention, (5, 8)),
]


@pytest.mark.parametrize(("kind", "shape"), IN_PLACE, ids=lambda v: getattr(v, "__name__", ""))
def test_in_place_code_is_traced_to_the_same_bits_and_writes_into_nothing(kind, shape):
    model = kind().eval()
    example = randn(2, *shape)
    graph_module = trace(model, {"x": example})
    assert torch.equal(example, randn(2, *shape))
    assert not any(writes_in_place(graph_module, node) for node in graph_module.graph.nodes)
    x = randn(2, *shape).flip(0)
    with torch.no_grad():
        assert same_bits(graph_module(x.clone()), model(x.clone()))


@pytest.mark.parametrize(("kind", "shape"), IN_PLACE, ids=lambda v: getattr(v, "__name__", ""))
def test_in_place_code_goes_the_whole_road(kind, shape):
    model = kind().eval()
    data = [{"x": randn(2, *shape)}, {"x": randn(4, *shape)[2:]}]
    settings = MPQConfig(weight_bits=8, refinements=0, activation_mode="static")
    quantized = quantize(model, settings, data)
    call = data[0]["x"]
    with torch.no_grad():
        actual, expected = quantized(call.clone()), model(call.clone())
        assert sqnr_db(expected, actual) > 20
        assert sqnr_db(actual, lower(quantized, "torch_ao")(call)) > 30


def test_layers_around_in_place_code_stay_layers_and_do_not_write():
    model = InPlaceActivation().eval()
    graph_module = trace(model, (randn(2, 3, 8, 8),))
    assert calls(graph_module)[:4] == ["stem", "inner", "norm", "act"]
    assert graph_module.inner is model.inner
    assert not graph_module.act.inplace
    assert model.act.inplace


def test_the_batch_stays_free():
    graph_module = trace(AugmentedAssignment().eval(), (randn(2, 3, 8, 8),))
    assert graph_module.meta["signature"].batch_range == (1, None)
    assert graph_module(randn(5, 3, 8, 8)).shape == (5, 3, 8, 8)


def test_a_container_that_the_model_empties_is_left_full():
    model = OverwrittenContainer().eval()
    residuals = [randn(2, 8, 8, 8), randn(2, 8, 8, 8) + 1]
    graph_module = trace(model, {"x": randn(2, 3, 8, 8), "residuals": residuals})
    assert len(residuals) == 2
    with torch.no_grad():
        expected = model(randn(2, 3, 8, 8), list(residuals))
        assert torch.equal(graph_module(randn(2, 3, 8, 8), residuals), expected)


def test_a_program_without_in_place_code_keeps_its_operators():
    class Model(nn.Module):
        def forward(self, x):
            return F.gelu(x.float().reshape(-1, 2, 2))

    targets = {str(node.target) for node in trace(Model(), (randn(2, 4),)).graph.nodes}
    assert {"aten.to.dtype", "aten.reshape.default"} <= targets


# -- state -----------------------------------------------------------------------------------------


class State(nn.Module):
    """Changes itself in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way, self.count = way, 0
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.table = nn.Embedding(3, 4, max_norm=0.1)
        self.register_buffer("total", torch.zeros(()))
        self.last = torch.zeros(4)

    def forward(self, x):
        y = self.linear(x)
        if self.way == "buffer":
            self.total += 1
        if self.way == "data":
            self.linear.weight.data.mul_(0.5)
        if self.way == "attribute":
            self.last.copy_(y[0])
        if self.way == "counter":
            self.count += 1
        if self.way == "statistics":
            y = F.batch_norm(y, self.norm.running_mean, self.norm.running_var, training=True)
        if self.way == "table":
            y = y + self.table(torch.zeros(len(x), dtype=torch.int64))
        return y


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("buffer", r"writes into total \(aten.add_"),
        ("data", r"writes into linear.weight \(aten.mul_"),
        ("attribute", r"writes into last \(aten.copy_"),
        ("counter", "each call changes count"),
        ("statistics", r"writes into norm.running_mean \(aten.native_batch_norm"),
        ("table", r"writes into table.weight \(aten.embedding_renorm_"),
    ],
)
def test_a_model_that_changes_itself_is_refused_by_name_and_stays_as_it_was(way, message):
    model = State(way).eval()
    model.table.weight.data.fill_(3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TraceError, match=message):
        trace(model, (randn(2, 4),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.last, torch.zeros(4))
    assert model.count == 0


def test_a_setting_that_is_nan_is_no_counter():
    model = State("none").eval()
    model.threshold = float("nan")
    trace(model, (randn(2, 4),))


def test_statistics_that_are_only_read_are_no_state():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))  # in training mode
    trace(model, (randn(2, 4),))
    assert int(model[1].num_batches_tracked) == 0


def test_caches_that_the_first_call_fills_are_no_state():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.width = None, 0

        def forward(self, x):
            if self.table is None or self.width < x.shape[1]:
                self.width = x.shape[1]
                self.table = torch.arange(float(self.width))
                self.table += 1
            return x * self.table

    model = Cached()
    graph_module = trace(model, (randn(2, 4),))
    assert torch.equal(graph_module(randn(3, 4)), randn(3, 4) * torch.arange(1.0, 5.0))
    assert (model.table, model.width) == (None, 0)


class _Dropped(nn.Module):
    """What is dropped is the tensor itself in evaluation: a write into either is in both."""

    def __init__(self, drop, written) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop, self.written = nn.Linear(4, 4), drop, written

    def forward(self, x):
        before = self.layer(x)
        after = self.drop(before)
        if self.written == "after":
            after += 1
        elif self.written == "view":
            after.view(-1)[:4].mul_(2)
        else:
            before[:, :2].add_(1)
        return (after, before * after) if self.written == "returned" else before * after


def _dropped(x):
    return nn.functional.dropout(x, 0.5, training=False)


@pytest.mark.parametrize("written", ["after", "view", "before", "returned"])
@pytest.mark.parametrize(
    "drop",
    [_dropped, nn.Dropout(0.5), nn.Dropout(0.0), nn.Dropout(0.5, inplace=True)],
    ids=["function", "module", "of nothing", "in place"],
)
def test_a_write_into_what_is_dropped_is_in_both(drop, written):
    model = _Dropped(drop, written).eval()
    example = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    graph = trace(model, example)
    other = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(1))}
    assert same_bits(graph(**other), model(**other))


def test_dropouts_that_nothing_is_written_into_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout(0.5)).eval()
    graph = trace(model, (torch.randn(3, 4),))
    assert [str(n.target) for n in graph.graph.find_nodes(op="call_module", target="2")] == ["2"]


class _Chosen(nn.Module):
    def __init__(self, choose) -> None:
        super().__init__()
        self.inner = _Choice(choose)

    def forward(self, x):
        return self.inner(x)


class _Choice(nn.Module):
    def __init__(self, choose) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.choose = nn.Linear(4, 4), choose

    def forward(self, x):
        return torch.cond(self.choose(x), lambda z: self.layer(z), lambda z: 2 * z, (x,))


def test_a_choice_by_a_value_is_refused_with_place_operator_shapes_and_remedy():
    with pytest.raises(TraceError) as told:
        trace(_Chosen(lambda x: x.sum() > 0).eval(), {"x": torch.ones(3, 4)})
    text = str(told.value)
    for part in ("_Chosen cannot be captured", "cond of tensors [], [3, 4]", "in inner at"):
        assert part in text
    assert text.endswith("use torch.where, or choose in Python by a constant")


def test_a_choice_by_a_constant_is_made():
    model = _Chosen(lambda x: x.shape[1] > 3).eval()
    graph = trace(model, {"x": torch.ones(3, 4)})
    assert same_bits(graph(x=torch.ones(2, 4)), model(torch.ones(2, 4)))
