"""The benchmark of a stranger's model: its reference, its rows, and what is not made again."""

import importlib
import json
import sys
from argparse import Namespace

import pytest
import torch
from small import SIGMAS, TinyEDM, edm_calls
from torch import nn

from mpqdm_fx import MPQConfig, quantize
from mpqdm_fx.calibration.samplers import is_sampler
from mpqdm_fx.numerics.metrics import sqnr_db


@pytest.fixture(scope="module")
def stranger():
    """The program as a module."""
    pytest.importorskip("executorch")
    return importlib.import_module("stranger")


def test_the_reference_rounds_weights_to_so_many_levels_and_leaves_the_model_alone(stranger):
    model = TinyEDM()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = stranger.nearest(model, 3, "float", [])
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            own, weight = model.get_submodule(name).weight, module.weight
            for row, exact in zip(weight.flatten(1), own.flatten(1), strict=True):
                step = exact.abs().max() / 3
                assert len((row / step).round().unique()) <= 7
                torch.testing.assert_close((row / step).round() * step, row)
                assert bool(((row - exact).abs() <= step / 2 + 1e-6).all())


def test_the_references_activations_cost_something_and_not_much(stranger):
    model, calls = TinyEDM(), edm_calls()
    with torch.no_grad():
        floats = torch.cat([model(**call) for call in calls])
        found = {}
        for mode in ("float", "dynamic", "static"):
            rounded = stranger.nearest(model, 8, mode, calls)
            found[mode] = sqnr_db(floats, torch.cat([rounded(**call) for call in calls]))
    assert found["float"] > found["dynamic"] > found["static"] > 15


def test_errors_are_told_together_and_at_each_sigma(stranger):
    model, calls = TinyEDM(), edm_calls(10)
    with torch.no_grad():
        floats = [model(**call) for call in calls]
    row = stranger.measured(lambda **call: 0.9 * model(**call), calls, floats)
    assert row["sqnr_db"] == pytest.approx(20, abs=1e-3)
    assert row["sqnr_db_at"] == pytest.approx({f"{sigma:g}": 20 for sigma in SIGMAS}, abs=1e-3)


def test_rows_that_are_there_are_not_made_again(stranger, tmp_path, monkeypatch, capsys):
    made = []

    class Bench:
        def __init__(self, arguments):
            pass

        def result(self, *row):
            made.append(row)
            if len(made) == 3:
                raise KeyboardInterrupt
            return {"seconds": 1.0, "sqnr_db": 20.0, "sqnr_db_at": {f"{s:g}": 20.0 for s in SIGMAS}}

    output = tmp_path / "rows.json"
    monkeypatch.setattr(stranger, "Bench", Bench)
    options = [
        "--widths",
        "8",
        "4",
        "--methods",
        "nearest",
        "--seeds",
        "0",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", ["stranger.py", *options])
    with pytest.raises(KeyboardInterrupt):
        stranger.main()
    assert len(json.loads(output.read_text())) == 2
    stranger.main()
    assert [row[:2] for row in made] == [
        (8, "float"), (8, "dynamic"), (8, "static"), (8, "static"), (4, "dynamic"), (4, "static"),
    ]  # fmt: skip
    row = "| W4A8 static, nearest | 20.0 | 20.0 20.0 20.0 20.0 20.0 | 1 |  |  |  |"
    assert row in capsys.readouterr().out


def test_all_of_the_table_is_made_by_default(stranger):
    every = Namespace(
        seeds=[0, 1, 2], widths=stranger.WIDTHS, modes=stranger.MODES, methods=stranger.METHODS,
        set=[], calls=3,
    )  # fmt: skip
    names = [row[-1] for row in stranger.wanted(every)]
    assert len(names) == len(set(names)) == 3 * 3 * (4 * 2 + 1)


def test_the_loop_is_a_sampler(stranger):
    assert is_sampler(stranger.Renoising())


@pytest.mark.matrix
@pytest.mark.xnnpack
def test_a_programs_row_has_its_error_bytes_and_time(stranger, tmp_path):
    bench = object.__new__(stranger.Bench)
    bench.network, bench.held_out = TinyEDM(), edm_calls(5, seed=9)
    with torch.no_grad():
        bench.floats = [bench.network(**call) for call in bench.held_out]
    settings = MPQConfig(weight_bits=8, activation_mode="dynamic", refinements=0)
    quantized = quantize(bench.network, settings, edm_calls())
    told, run = bench._program(quantized, tmp_path / "programs" / "row.pte")
    assert told["sqnr_db"] > 30
    assert set(told["sqnr_db_at"]) == {f"{sigma:g}" for sigma in SIGMAS}
    assert told["bytes"] == (tmp_path / "programs" / "row.pte").stat().st_size
    assert told["milliseconds"].keys() == {"program", "float"}
    assert told["time_ratio"] > 0
    assert bool(run(**bench.held_out[0])[0].isfinite().all())
