"""Every wrong call of the table is one line with the remedy, exit status 2, and leaves nothing."""

import json
import re
import shlex

import pytest
from diffusers import DDIMScheduler
from small import tiny_unet
from typing_in import typed
from wrong_calls import CALLS, PAGE, page

from mpqdm_fx.jobs.quantize import quantize_to_folder
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sources.sources import load_source

OWN = """
from small import tiny_unet, unet_calls

SIZE = 3

def model():
    return tiny_unet()

def calls():
    return unet_calls(2)

def other_names():
    yield {"image": unet_calls(1)[0]["sample"]}

def broken():
    return 1 / 0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    tiny_unet().save_pretrained(root / "pipeline" / "unet")
    DDIMScheduler().save_pretrained(root / "pipeline" / "scheduler")
    index = json.dumps({"_class_name": "DDIMPipeline"})
    (root / "pipeline" / "model_index.json").write_text(index)
    (root / "own.py").write_text(OWN)
    (root / "grid.png").write_bytes(b"a picture")
    settings = MPQConfig(
        weight_bits=2, allocation="uniform", rounding="nearest", propagation=0.0, slowdown=1,
        row_weights="plain", judge=False,
    )  # fmt: skip
    quantize_to_folder(
        load_source(str(root / "pipeline"), "unet"), settings, backend="packed",
        output=root / "out", trajectories=2, steps=2, samples=0, subfolder="unet",
    )  # fmt: skip
    return root


def listed(folder):
    files = {path: path.stat() for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.fault)
def test_a_wrong_call_is_one_line_and_leaves_nothing(call, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = listed(place)
    status, out, err = typed(monkeypatch, capsys, *shlex.split(call.typed))
    assert (status, out) == (2, "")
    *begun, line = err.replace(f"{place}/", "").splitlines()
    assert line == f"error: {call.printed}"
    # what the command was about to do, and how far it came: models are loaded before some refusals
    assert all(re.search(r", after \d", text) for text in begun[1:])
    assert "Traceback" not in err
    assert listed(place) == before


def test_there_are_at_least_25_wrong_calls_each_of_its_own_kind():
    assert len(CALLS) >= 25
    for name in ("fault", "typed", "printed"):
        assert len({getattr(call, name) for call in CALLS}) == len(CALLS)


def test_the_page_is_written_from_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/cli/wrong_calls.py"
