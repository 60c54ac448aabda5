"""Two processes give what one gives."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.sweep.shards import Shards

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from small import tiny_unet, unet_calls
from sweeps import quantized, traced
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.io.processes import is_first, joined

with joined():
    calls = unet_calls(3)
    # calls of different sizes: each process counts the rows of all
    calls[0] = {{name: value[:1] for name, value in calls[0].items()}}
    graph, calls = traced(tiny_unet(), calls)
    result = quantized(graph, calls, allocation="measured", activation_mode={mode!r})
    if is_first():
        layers = weight_layers(result.rounded, embeddings=True)
        torch.save(
            {{name: (la.module.weight_codes, la.module.weight) for name, la in layers.items()}},
            sys.argv[1],
        )
"""


@pytest.mark.parametrize("mode", ["static", pytest.param("timestep", marks=pytest.mark.matrix)])
def test_two_processes_quantize_to_the_same_weights_as_one(tmp_path, mode):
    here = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(paths=[str(here), str(here.parent / "support")], mode=mode))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for command, name in (([sys.executable], "one.pt"), ([*torchrun, "--standalone"], "two.pt")):
        done = subprocess.run(
            [*command, str(script), str(tmp_path / name)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    single, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert set(single) == set(two)
    for name, (codes, weight) in single.items():
        assert torch.equal(codes, two[name][0]), name
        assert torch.equal(weight, two[name][1]), name


def test_more_processes_than_calls_are_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert list(Shards.of(5).indices) == [1]
    with pytest.raises(CalibrationError, match="start at most 3 processes"):
        Shards.of(3)
