"""The whole ladder on UNets, as the command line writes and reads it."""

import json

import pytest
from diffusers import DDIMScheduler
from small import tiny_condition_unet, tiny_unet

from mpqdm_fx.jobs.quantize import quantize_to_folder
from mpqdm_fx.parity.verify import verify
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sources.sources import load_source

pytestmark = [pytest.mark.xnnpack, pytest.mark.matrix]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("make", [tiny_unet, tiny_condition_unet])
def test_a_unet_passes_at_every_rung_and_again(make, mode, tmp_path):
    make().save_pretrained(tmp_path / "model")
    DDIMScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    config = MPQConfig(weight_bits=8, allocation="uniform", refinements=0, activation_mode=mode)
    folder = tmp_path / "out"
    quantize_to_folder(
        load_source(str(tmp_path / "model")),
        config,
        backend="xnnpack",
        output=folder,
        trajectories=2,
        steps=3,
        samples=0,
    )
    ladder = verify(folder)
    assert ladder.passed, ladder.first_divergence
    assert [rung.name for rung in ladder.rungs][-1] == "pte"
    assert ladder.rung("pte").against == ("decomposed" if mode == "dynamic" else "edge")
    layers = [
        layer["name"]
        for layer in json.loads((folder / "mpqdm.json").read_text())["report"]["layers"]
    ]
    for name in ("quantized", "decomposed", "converted", "edge", "pte"):
        rung = ladder.rung(name)
        assert not rung.unmatched
        assert {node.site.module for node in rung.layers} >= {n for n in layers if "conv1" in n}
        assert rung.float_db > 15
