"""A graph takes the very inputs that it was traced with, and refuses other constants by name."""

import copy
from typing import Any

import pytest
import torch
from records import read_back
from small import condition_calls, tiny_condition_unet
from torch import Tensor, nn
from trace_helpers import randn

from mpqdm_fx.api import prepare, quantize
from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.calling import example_call, signature_to_dict
from mpqdm_fx.graph.nested import same_constant
from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.passes.normalize.drop_dropout import DropDropout
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.run_options import RunOptions


class Controlled(nn.Module):
    """Takes numbers and flags beside tensors, and empties the list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.body, self.drop = nn.Conv2d(4, 4, 1), nn.Dropout()

    def forward(
        self, x: Tensor, scale: float = 1.0, extra: Any = None, *, flip: bool = False
    ) -> Tensor:
        h = self.first(x) * scale + extra["residuals"].pop(0)
        h = h * extra["factor"] + extra["pair"][1]
        h = self.body(self.drop(h.flip(-1) if flip else h).sin())
        return self.last(h)


def call(seed: int = 0, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    extra = {
        "residuals": [torch.randn(2, 4, 6, 5, generator=generator)],
        "factor": 3.0,
        "pair": (None, torch.randn(2, 4, 1, 1, generator=generator)),
    }
    x = torch.randn(2, 3, 6, 5, generator=generator)
    return {"x": x, "scale": 0.5, "extra": extra, **changes}


@pytest.fixture(scope="module")
def graph():
    return trace(Controlled().eval(), call())


def expected(**changes: Any) -> Tensor:
    with torch.no_grad():
        return Controlled().eval()(**call(**changes))


def test_graph_takes_its_inputs_by_name_and_in_the_order_of_the_model(graph):
    given = call()
    with torch.no_grad():
        assert same_bits(graph(**given), expected())
        assert same_bits(graph(given["x"], 0.5, given["extra"]), expected())
        assert same_bits(graph(**given, flip=False), expected())
        assert same_bits(graph(given["x"], extra=given["extra"]), expected())
    assert len(given["extra"]["residuals"]) == 1


def test_copies_and_graphs_behind_passes_take_them_too(graph):
    passed = DropDropout()(graph)
    assert passed.modified
    for variant in (copy.deepcopy(graph), passed.graph_module):
        with torch.no_grad():
            assert same_bits(variant(**call()), expected())
        with pytest.raises(TraceError, match=r"constant 0\.5 and cannot be float 0\.25"):
            variant(**call(scale=0.25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.25}, r"'scale' was traced as the constant 0.5 and cannot be float 0.25 now"),
        ({"flip": True}, r"'flip' was traced as the constant False and cannot be bool True now"),
        ({"scail": 0.5}, r"no argument 'scail'; did you mean scale\?"),
        ({"extra": {**call()["extra"], "factor": 2.0}}, r"'extra.factor' .* constant 3.0"),
        ({"x": 1.0}, r"x has shape"),
    ],
)
def test_graph_refuses_other_constants_by_name(graph, changes, message):
    with pytest.raises(TraceError, match=message):
        graph(**call(**changes))


def test_model_doors_refuse_a_call_that_leaves_out_what_the_model_would_take_otherwise(graph):
    signature = graph.meta["signature"]
    assert signature.defaults == (("scale", 1.0),)
    without = {name: value for name, value in call().items() if name != "scale"}
    with pytest.raises(TraceError, match=r"takes 1\.0 where a call leaves it out; give"):
        signature.normalize((), without)


def test_an_argument_that_the_example_left_out_may_be_given_its_default(graph):
    assert ("flip", False) in graph.meta["signature"].baked
    values = {**call(), "scale": 1.0}
    gm = trace(Controlled().eval(), {name: values[name] for name in ("x", "extra")})
    signature = gm.meta["signature"]
    assert signature.defaults == ()
    signature.normalize((), values)
    signature.normalize((), {**values, "scale": 1})
    for scale in (0, 0.0, None, False):
        with pytest.raises(TraceError, match=r"'scale' was traced as the constant 1\.0"):
            signature.normalize((), {**values, "scale": scale})


@pytest.mark.parametrize(
    ("value", "baked", "same"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (None, False, True),
        ({}, None, True),
        (0, None, False),
        ((8, 8), [8, 8], True),
        ([8, 9], (8, 8), False),
        ({"a": (1, None)}, {"a": [1, False]}, True),
        ({"a": 1}, {"b": 1}, False),
        ("a", "b", False),
        (torch.zeros(1), None, False),
    ],
)
def test_constants_are_the_same_if_a_model_may_take_them_so(value, baked, same):
    assert same_constant(value, baked) is same


def test_prepared_model_records_and_quantized_model_takes_the_inputs(tmp_path):
    model, settings = Controlled().eval(), MPQConfig(weight_bits=8, activation_mode="static")
    calls = [call(seed) for seed in range(4)]
    run = RunOptions(record_memory=1000, record_directory=tmp_path / "calls")
    prepared = prepare(model, settings, calls[0], run=run)
    torch.testing.assert_close(prepared(**calls[1]), expected(seed=1))
    prepared.record(**calls[2])
    assert prepared.records.shards
    recorded = list(prepared.records)
    assert recorded[1]["extra"]["pair"][0] is None
    assert recorded[1]["extra"]["factor"] == 3.0
    assert torch.equal(recorded[1]["extra"]["pair"][1], calls[2]["extra"]["pair"][1])
    quantized = quantize(model, settings, calls)
    assert (quantized(**calls[3]) - expected(seed=3)).abs().max() < 0.1
    assert all(len(given["extra"]["residuals"]) == 1 for given in calls)
    for changes in ({"scale": 0.25}, {"flip": True}):
        with pytest.raises(TraceError, match=f"'{next(iter(changes))}' was traced as the constant"):
            quantized(**call(**changes))
    # a model that is loaded is traced anew: with the constants, not with forward's defaults
    save(quantized, tmp_path / "packed")
    loaded = load(tmp_path / "packed", model=Controlled())
    assert same_bits(loaded(**calls[3]), quantized(**calls[3]))
    assert loaded.signature.defaults == quantized.signature.defaults


def test_signature_with_defaults_survives_json_and_gives_a_call_of_the_model(graph):
    signature = graph.meta["signature"]
    again = read_back(Signature, signature_to_dict(signature))
    assert again == signature
    example = example_call(again)
    assert example["scale"] == 0.5
    assert example["extra"]["factor"] == 3.0
    with torch.no_grad():
        assert same_bits(graph(**example), Controlled().eval()(**example_call(again)))
    plain = trace(nn.Sequential(nn.Linear(4, 4)).eval(), (randn(2, 4),)).meta["signature"]
    assert "defaults" not in signature_to_dict(plain)


def test_lists_that_a_unet_empties_stay_the_callers():
    model, given = tiny_condition_unet(), condition_calls(1)[0]
    residuals = [randn(2, 16, 8, 8), randn(2, 24, 4, 4)]
    given["down_intrablock_additional_residuals"] = residuals
    gm = trace(model, given)
    assert len(residuals) == 2
    assert "down_intrablock_additional_residuals.1" in {s.name for s in gm.meta["signature"].inputs}
    with torch.no_grad():
        once, twice = gm(**given), gm(**given)
        fresh = {**given, "down_intrablock_additional_residuals": list(residuals)}
        assert same_bits(once, model(**fresh, return_dict=False))
    assert same_bits(once, twice)
