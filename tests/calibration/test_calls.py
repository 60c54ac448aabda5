"""Calibration data that cannot be used is refused where it came in: call, input, reason."""

import numpy as np
import pytest
import torch
from small import TinyNet, net_calls, tiny_unet, unet_calls
from torch import Tensor, nn

from mpqdm_fx import MPQConfig, Trajectories, prepare, quantize
from mpqdm_fx.bits.sensitivity import measure_sensitivity
from mpqdm_fx.calibration.calls import check_call, check_calls, table_sizes
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.digits.network import build_scheduler
from mpqdm_fx.distill import DistillConfig, distill
from mpqdm_fx.errors import CalibrationError, ConfigError, TraceError
from mpqdm_fx.report.metrics import epsilon_sqnr

SETTINGS = MPQConfig(allocation="uniform", rounding="nearest", propagation=0)

#: What stands in a tensor's place, and what is said of it.
STRAY = [
    (torch.tensor([[1.0, float("nan")]]), "NaN or infinity"),
    (torch.tensor([[1.0, float("-inf")]]), "NaN or infinity"),
    (torch.empty(0, 3), r"shape \(0, 3\).*is empty"),
    (torch.ones(2, 3, dtype=torch.complex64), "complex64"),
    (torch.ones(2, 3).to_sparse(), "sparse"),
    (torch.ones(2, 3, device="meta"), 'the device "meta"'),
    (np.ones((2, 3)), "ndarray of NumPy"),
    (np.float32(1), "float32 of NumPy"),
    (float("nan"), "is nan"),
    (2**63, "more than 64 bits"),
]


@pytest.mark.parametrize(("stray", "message"), STRAY, ids=range(len(STRAY)))
@pytest.mark.parametrize("inside", [lambda x: x, lambda x: {"ids": (torch.ones(1), x)}])
def test_an_input_that_cannot_be_used_is_refused_by_name_however_deep_it_lies(
    stray, message, inside
):
    call = {"sample": torch.ones(2, 3), "added": inside(stray), "flag": True, "mask": None}
    with pytest.raises(CalibrationError, match=rf"^place: input 'added.*'.*{message}"):
        check_call(call, "place")


@pytest.mark.parametrize("call", [[torch.ones(1)], torch.ones(1), {1: torch.ones(1)}, None, "x"])
def test_a_call_is_a_dict_by_name(call):
    with pytest.raises(CalibrationError, match="a dict by name"):
        check_call(call, "place")


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"x": torch.ones(1, dtype=torch.bfloat16), "y": torch.tensor(3), "z": [torch.ones(2)]},
        {"size": (64, 64), "return_dict": True, "nothing": None, "word": "epsilon", "t": 0.5},
        {"largest": 2**63 - 1, "least": -(2**63), "mask": torch.tensor([True])},
    ],
)
def test_what_models_of_diffusers_take_passes(call):
    check_call(call, "place")


def test_calls_with_other_inputs_than_the_first_are_refused_with_the_odd_ones():
    calls = [{"x": torch.ones(1), "y": None}, {"x": torch.ones(1), "z": torch.ones(1)}]
    with pytest.raises(CalibrationError, match=r"call 1: .*give z in all calls or in none"):
        check_calls(calls)


class Unused(nn.Module):
    """Takes an input that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet()

    def forward(self, x: Tensor, hint: Tensor) -> Tensor:
        return self.net(x)


def _traced_calls(monkeypatch, model, calls):
    """`quantize`, which must not trace the model."""

    def never(*args, **kwargs):
        raise AssertionError("the model was traced first")

    monkeypatch.setattr("mpqdm_fx.api.normalized", never)
    quantize(model, SETTINGS, calls)


@pytest.mark.parametrize("index", [0, 2])
def test_nan_in_an_input_that_the_model_does_not_read_is_refused_before_any_work(
    monkeypatch, index
):
    calls = [{**call, "hint": torch.ones(2)} for call in net_calls()]
    calls[index]["hint"] = torch.tensor([1.0, float("nan")])
    with pytest.raises(CalibrationError, match=rf"calibration call {index}: input 'hint'.*NaN"):
        _traced_calls(monkeypatch, Unused(), calls)
    with pytest.raises(CalibrationError, match=r"^example inputs: input 'hint'.*NaN"):
        prepare(Unused(), SETTINGS, (torch.ones(1, 3, 6, 10), torch.tensor([float("nan")])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.empty(0, 1, 8, 8)}, "'sample'.*is empty"),
        ({"sample": [[0.0]]}, "'sample' is a list where the model takes a tensor"),
        ({"class_labels": np.array([1, 2, 3])}, "'class_labels' is a ndarray"),
        ({"timestep": 2**70}, "'timestep' is an integer of more than 64 bits"),
        ({"timestep": float("inf")}, "'timestep' is inf"),
    ],
    ids=range(5),
)
def test_a_first_call_that_cannot_be_used_is_refused_before_any_work(monkeypatch, change, message):
    calls = [{**unet_calls(1)[0], **change}]
    with pytest.raises(CalibrationError, match=message):
        _traced_calls(monkeypatch, tiny_unet(), calls)
    with pytest.raises(CalibrationError, match=message):  # not all there: call by call
        _traced_calls(monkeypatch, tiny_unet(), iter(calls))


@pytest.mark.parametrize("calls", [torch.ones(2), unet_calls(1)[0], None, 3])
def test_calibration_that_is_no_iterable_of_calls_is_refused(calls):
    with pytest.raises(CalibrationError, match="an iterable of calls"):
        quantize(tiny_unet(), SETTINGS, calls)


@pytest.fixture(scope="module")
def prepared():
    return prepare(tiny_unet(), SETTINGS, unet_calls(1)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"class_labels": torch.tensor([1, 10, 2])}, CalibrationError, "10, and .* rows 0 to 9"),
        ({"class_labels": torch.tensor([1, -1, 2])}, CalibrationError, "-1, and .* rows 0 to 9"),
        ({"class_labels": torch.tensor([1, 2])}, TraceError, "class_labels has shape"),
        ({"sample": torch.ones(3, 1, 8, 8).double()}, TraceError, "sample is torch.float64"),
        ({"sample": torch.ones(3, 1, 8, 9)}, TraceError, "sample has shape"),
        ({"class_labels": None}, TraceError, "missing argument.*class_labels"),
        ({"hint": torch.ones(1)}, TraceError, "no argument 'hint'"),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("verb", ["record", "__call__"])
def test_a_later_call_that_does_not_fit_is_refused_with_its_index_and_leaves_no_trace(
    prepared, change, error, message, verb
):
    before = len(prepared.records)
    with pytest.raises(error, match=rf"^calibration call {before}: .*{message}"):
        getattr(prepared, verb)(**{**unet_calls(1)[0], **change})
    assert len(prepared.records) == before


def test_tables_are_found_behind_casts_and_reshapes_and_nothing_else_is():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.other = nn.Embedding(7, 4), nn.Embedding(5, 4)

        def forward(self, ids: Tensor, times: Tensor) -> Tensor:
            return self.table(ids.view(-1, 2).long()).sum() + self.other((times % 5).long())

    inputs = {"ids": torch.ones(2, 2).int(), "times": torch.ones(2).int()}
    assert table_sizes(trace(Words().eval(), inputs)) == {"ids": 7}


def test_sensitivities_and_comparisons_judge_their_calls_first():
    graph = trace(TinyNet(), net_calls(1)[0])
    calls = [*net_calls(2), {"x": torch.full((2, 3, 6, 10), float("nan"))}]
    with pytest.raises(CalibrationError, match=r"calibration call 2: input 'x'.*NaN"):
        measure_sensitivity(graph, calls)
    with pytest.raises(CalibrationError, match=r"batch 2: input 'x'.*NaN"):
        epsilon_sqnr(None, None, calls)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], "condition"),
        (torch.tensor([1.0, float("nan")]), "'class_labels'.*NaN"),
        (np.array([1, 2]), "'class_labels' is a ndarray"),
        (torch.tensor([1, 2, 3]), "number of trajectories, 2"),
    ],
    ids=range(4),
)
def test_conditions_are_judged_before_the_first_run(labels, message):
    settings = {"num_trajectories": 2, "num_inference_steps": 1, "batch_size": 2, "seed": 0}
    for given in ({"class_labels": labels}, lambda count, generator: {"class_labels": labels}):
        with pytest.raises(CalibrationError, match=message):
            Trajectories(tiny_unet(), build_scheduler(), **settings, conditions=given)


def test_distill_judges_conditions_before_it_traces(monkeypatch):
    monkeypatch.setattr("mpqdm_fx.distill.distillation.in_form_of", None)
    labels = {"class_labels": torch.tensor([1.0, float("nan")])}
    with pytest.raises(CalibrationError, match=r"'class_labels'.*NaN"):
        distill(
            None, tiny_unet(), DistillConfig(updates=1, trajectories=2),
            scheduler=build_scheduler(), conditions=labels,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("effective_bits", 1.01), ("weight_bytes", 100)])
def test_a_budget_below_the_smallest_is_refused_before_anything_is_recorded(name, value):
    call = net_calls(1)[0]
    with pytest.raises(ConfigError, match=rf"the smallest that can is {name}=") as caught:
        prepare(TinyNet(), MPQConfig(**{name: value}), call)
    smallest = type(value)(str(caught.value).rpartition(f"{name}=")[2].split()[0])
    assert prepare(TinyNet(), MPQConfig(**{name: smallest}), call)
    with pytest.raises(ConfigError, match="smallest"):
        prepare(TinyNet(), MPQConfig(**{name: type(value)(smallest * 0.99)}), call)


def test_what_the_model_itself_refuses_in_a_run_is_said_with_its_inputs():
    settings = {"num_trajectories": 2, "num_inference_steps": 1, "batch_size": 2, "seed": 0}
    for labels, reason in ((torch.tensor([1, 99]), "IndexError"), (torch.ones(2, 3), "Error")):
        runs = Trajectories(
            tiny_unet(), build_scheduler(), **settings, conditions={"class_labels": labels}
        )
        with pytest.raises(CalibrationError, match=rf"'sample': \(2, 1, 8, 8\).*{reason}"):
            next(iter(runs))
