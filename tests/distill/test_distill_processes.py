"""Two processes train what one trains."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from diffusers import DDIMScheduler
from small import tiny_unet, unet_calls
import mpqdm_fx
from mpqdm_fx.distill.distillation import distill
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.io.processes import is_first, joined

settings = mpqdm_fx.MPQConfig(
    weight_bits=2, allocation="uniform", refinements=0, propagation=0.0, levels="uniform"
)
quantized = mpqdm_fx.quantize(tiny_unet(), settings, unet_calls())
with joined():
    result = distill(
        quantized,
        tiny_unet(),
        DistillConfig(updates=6, trajectories=4, steps=4, batch_size=8, rank=2, relation="trd"),
        scheduler=DDIMScheduler(),
        conditions={{"class_labels": torch.arange(4)}},
        directory=sys.argv[1],
    )
    place = "first" if is_first() else "second"
    found = (result.before, result.after, result.history.updates)
    torch.save(found, f"{{sys.argv[1]}}.{{place}}.pt")
"""


@pytest.mark.matrix
def test_two_processes_train_what_one_trains(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(paths=[str(Path(__file__).parents[1] / "support")]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for command, name in (([sys.executable], "one"), ([*torchrun, "--standalone"], "two")):
        done = subprocess.run(
            [*command, str(script), str(tmp_path / name)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    names = ("one.first", "two.first", "two.second")
    single, two, second = (torch.load(tmp_path / f"{name}.pt") for name in names)
    # each saw other rows, and both took the same steps
    assert second == two
    assert two[0] == single[0]
    assert two[2] == single[2] == 6
    # sums in another order: Adam's first steps have the sign of gradients near zero
    assert two[1] == pytest.approx(single[1], rel=1e-2)
    assert single[1] < single[0]
