"""The doctor judges the form that `quantize` would lower, of a float model too."""

import json

import pytest
from reporters import Told
from test_cli import run

import mpqdm_fx
from mpqdm_fx.io.progress import reporting
from mpqdm_fx.jobs.doctor import diagnose_model
from mpqdm_fx.records.config import MPQConfig

pytest.importorskip("executorch")
pytestmark = pytest.mark.xnnpack

FILE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        h = torch.cumsum(self.first(x), dim=2)
        return self.last(h + torch.relu(self.middle(h)))


def net():
    return Net().eval()


def calls():
    torch.manual_seed(1)
    return [{"x": torch.randn(2, 3, 6, 8)} for _ in range(2)]
"""
QUICK = {"allocation": "uniform", "rounding": "nearest", "propagation": 0.0, "judge": False}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "doctor_functions.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_mode": "static"},
        {"activation_mode": "dynamic", "levels": "int4"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_the_form_of_the_settings_is_foretold(file, tmp_path, settings):
    config = MPQConfig(**settings, **QUICK, row_weights="plain", slowdown=1)
    diagnosis = diagnose_model(f"{file}:net", config, inputs=f"{file}:calls")
    import doctor_functions

    quantized = mpqdm_fx.quantize(doctor_functions.net(), config, doctor_functions.calls())
    program = mpqdm_fx.lower(quantized, "xnnpack", output=tmp_path / "net.pte")
    assert diagnosis.delegates == program.subgraphs
    assert diagnosis.delegated == program.delegated
    assert len(diagnosis.outside) == program.undelegated


def test_the_options_reach_the_doctor(file):
    options = [f"{file}:net", "--inputs", f"{file}:calls", "--json"]
    counts = set()
    for more in (["--float"], ["--override", "middle=float"]):
        status, text = run("doctor", *options, *more, "--max-delegates", 1)
        assert status == 1, text
        counts.add(json.loads(text[text.index("{") : text.rindex("}") + 1])["delegated"])
    assert len(counts) == 2
    status, text = run("doctor", *options, "--activations", 4)
    assert (status, "choose --activations 8" in text) == (2, True)


def test_the_stages_are_those_that_are_foretold(file):
    reporter = Told()
    calls = f"{file}:calls"
    with reporting(reporter):
        diagnose_model(f"{file}:net", MPQConfig(activation_mode="static"), inputs=calls)
    assert reporter.outer_names == list(reporter.expectations[0])
    assert reporter.outer_names[-2:] == ["exporting", "asking XNNPACK"]
