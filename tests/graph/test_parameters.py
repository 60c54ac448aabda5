"""The law of the count: what becomes of a model's parameters adds up to all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ALL, REFUSED, by_name
from safetensors.torch import load_file
from torch import nn
from zoo_base import Case

from mpqdm_fx.bits.allocate import fixed_plan, layer_limits
from mpqdm_fx.calibration.count import bit_plan
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.parameters import first_names, model_parameters
from mpqdm_fx.model.packed import write_packed
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.passes.quantize.round_weights import RoundWeights
from mpqdm_fx.passes.quantize.scale_inputs import ScaleInputs
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import BitPlan
from mpqdm_fx.sweep.measured_bits import budget_bits

QUICK = ("UNet2DModel", "UNet1DModel/diffuser", "DiTTransformer2DModel", "T5FilmDecoder")


def assert_counted(model: nn.Module, inputs: Any, path: Path) -> BitPlan:
    """Check the law on a model whose layers all get four bits, against the file that is written."""
    graph = normalized(model, inputs, MPQConfig())
    layers = weight_layers(graph, embeddings=True)
    planned = [fixed_plan(layer, 4, "all alike") for layer in layers.values()]
    rounded = RoundWeights(plan=BitPlan(layers=tuple(planned)))(graph).graph_module
    plan = bit_plan(graph, rounded, planned, {})
    # by name: every name of every parameter has a fate, and no other has
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert list(dict.fromkeys(entry.name for entry in plan.parameters)) == names
    # the law
    total = sum(parameter.numel() for parameter in model.parameters())
    fates = ("quantized", "float", "shared", "folded", "unused")
    assert sum(plan.count(fate) for fate in fates) == plan.num_parameters == total
    # what is quantized, counted from the graph's own layers
    distinct = {layer.weight.data_ptr(): layer.weight.numel() for layer in layers.values()}
    assert plan.count("quantized") == sum(distinct.values())
    # what is stored, counted from the file
    write_packed(path, rounded, plan)
    stored = load_file(path).values()
    assert sum(t.numel() * t.element_size() for t in stored) == plan.weight_bytes + plan.float_bytes
    return plan


@pytest.mark.parametrize("name", QUICK)
def test_fates_add_up_to_the_parameters_and_bytes_to_the_file_on(name: str, tmp_path: Path) -> None:
    case = by_name(name)
    plan = assert_counted(case.model(), case.inputs(2, 7), tmp_path / "w.safetensors")
    assert plan.count("quantized") > 0.5 * plan.num_parameters


@pytest.mark.matrix
@pytest.mark.parametrize("case", [c for c in ALL if c.name not in QUICK], ids=lambda c: c.name)
def test_the_law_of_the_count_holds_on_every_class(case: Case, tmp_path: Path) -> None:
    if case.name in REFUSED:
        with pytest.raises(TraceError, match=REFUSED[case.name]):
            normalized(case.model(), case.inputs(2, 7), MPQConfig())
    else:
        assert_counted(case.model(), case.inputs(2, 7), tmp_path / "w.safetensors")


class Names(nn.Module):
    """One layer under two names, one parameter in two layers, one storage in two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.a.weight
        self.same = nn.Linear(4, 4, bias=False)
        self.same.weight = nn.Parameter(self.a.weight.data)
        self.turned = nn.Parameter(self.a.weight.data.T)
        self.dead = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.same(self.tied(torch.sin(self.b(torch.sin(self.a(x)))))) @ self.turned


def test_every_name_of_a_tensor_is_known() -> None:
    names = first_names(Names(), ["tied.weight"])
    assert {name for name, first in names.items() if first == "tied.weight"} == {
        "a.weight",
        "b.weight",
        "tied.weight",
        "same.weight",
    }
    assert names["b.bias"] == "a.bias"
    assert names["turned"] == "turned"


def test_empty_tensors_and_those_without_data_are_told_apart() -> None:
    module = nn.Module()
    for name in ("a", "b"):
        module.register_buffer(name, torch.empty(0))
        module.register_buffer(f"{name}_meta", torch.empty(3, device="meta"))
    assert all(name == first for name, first in first_names(module).items())


def test_parameters_are_found_by_storage_and_counted_once() -> None:
    model = Names()
    entries = {
        entry.name: entry for entry in model_parameters(model, trace(model, (torch.ones(2, 4),)))
    }
    assert entries["a.weight"].tensor == "a.weight"
    shares = {name: entry.shares for name, entry in entries.items() if entry.shares}
    assert shares == {"b.weight": "a.weight", "b.bias": "a.bias"} | dict.fromkeys(
        ("tied.weight", "same.weight"), "a.weight"
    )
    assert (entries["tied.weight"].numel, entries["same.weight"].numel) == (0, 16)
    assert entries["dead.weight"].tensor is None
    assert sum(entry.numel for entry in entries.values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_tied_layers_add_up_and_their_copy_is_named(tmp_path: Path) -> None:
    plan = assert_counted(Names(), (torch.ones(2, 4),), tmp_path / "w.safetensors")
    assert plan.count("shared") == 16  # `same`; the other names are of the very same parameter
    assert plan.count("unused") == 10
    assert set(plan.copies) == {"tied.weight", "same.weight"}
    assert plan.num_weights == 16 + 16  # `a` under all its names, and `turned`


def test_weights_that_were_tied_count_once_though_one_input_is_scaled() -> None:
    graph = normalized(Names(), (torch.ones(2, 4),), MPQConfig())
    factors = {"tied": torch.tensor([0.5, 1.0, 2.0, 4.0])}
    scaled = ScaleInputs(factors=factors)(graph).graph_module
    planned = [fixed_plan(la, 4, None) for la in weight_layers(graph, embeddings=True).values()]
    before, after = (bit_plan(part, part, planned, {}) for part in (graph, scaled))
    assert after.copies == before.copies
    assert after.num_weights == before.num_weights == 32
    budget = MPQConfig(effective_bits=20)
    limits = layer_limits(graph, budget)
    assert budget_bits(scaled, budget, limits) == budget_bits(graph, budget, limits)


class Reader(nn.Module):
    """A table that is looked up and multiplied with, as in tied language models."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.table(ids), self.table.weight)


def test_a_table_that_is_multiplied_with_too_is_quantized_once(tmp_path: Path) -> None:
    plan = assert_counted(Reader(), (torch.ones(2, 3, dtype=torch.int64),), tmp_path / "w")
    assert (plan.num_weights, plan.float_weights, plan.copies) == (20, (), ())


class Gains(nn.Module):
    """A norm of its own, whose gain has axes of one; a product with a matrix of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(1, 1, 4))
        self.row = nn.Parameter(torch.ones(1, 4))
        self.table = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.inner(x) * self.gain + self.table, self.row)


def test_gains_are_no_weights_and_matrices_of_one_row_are(tmp_path: Path) -> None:
    plan = assert_counted(Gains(), (torch.ones(2, 3, 4),), tmp_path / "w")
    assert {tensor.name for tensor in plan.float_weights} == {"row", "table"}
