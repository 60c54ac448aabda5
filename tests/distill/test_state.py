"""The state of a training run is that run's, whole, or refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from records import edit_record, flip

from mpqdm_fx.distill.checkpoint import (
    History,
    check_tensors,
    has_state,
    load_state,
    save_state,
)
from mpqdm_fx.errors import ArtifactError, ConfigError

HISTORY = {"updates": 3, "seconds": 1.5, "losses": [0.5], "resumed": 0}


def save(folder, identity):
    numbers = {"history": HISTORY, "weight": 0.0, "recent": [0.25, 0.125]}
    save_state(folder, identity, {"now": torch.arange(3.0)}, **numbers)


def test_what_was_saved_is_read_back(tmp_path):
    assert not has_state(tmp_path)
    assert load_state(tmp_path / "none", {}) is None
    save(tmp_path, {"seed": 0})
    state = load_state(tmp_path, {"seed": 0})
    assert state.numbers.history == History(**HISTORY)
    assert state.numbers.recent == (0.25, 0.125)
    assert torch.equal(state.tensors["now"], torch.arange(3.0))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_scheduler_whose_settings_hold_an_infinity_is_kept_and_compared(tmp_path):
    scheduler = json.loads(DPMSolverMultistepScheduler().to_json_string())
    assert scheduler["lambda_min_clipped"] == -math.inf
    save(tmp_path, {"scheduler": scheduler})
    assert load_state(tmp_path, {"scheduler": scheduler}).numbers.weight == 0.0
    changed = {**scheduler, "lambda_min_clipped": -5.1}
    with pytest.raises(ConfigError, match=r"lambda_min_clipped was '-inf', is -5\.1"):
        load_state(tmp_path, {"scheduler": changed})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="in the way"):
        load_state(tmp_path, {})


WANTED = {"now": torch.zeros(3), "generator": torch.zeros(8, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("generator"), "'generator' is missing"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "'more' has no place in this run"),
        (lambda tensors: tensors["now"].fill_(math.nan), "'now' holds NaN"),
        (
            lambda tensors: tensors.update(now=torch.zeros(2)),
            r"'now' is torch.float32 \[2\], this run",
        ),
        (lambda tensors: tensors.update(now=torch.zeros(3).half()), "'now' is torch.float16"),
    ],
)
def test_tensors_that_are_not_those_of_a_run_are_refused(change, message):
    tensors = {name: tensor.clone() for name, tensor in WANTED.items()}
    check_tensors(Path("state"), tensors, WANTED)
    change(tensors)
    with pytest.raises(ArtifactError, match=f"state is damaged: {message}.*; delete it"):
        check_tensors(Path("state"), tensors, WANTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda numbers: numbers["history"].update(updates=-1), r"history\.updates"),
        (lambda numbers: numbers["history"].update(seconds="1"), r"history\.seconds"),
        (lambda numbers: numbers.update(recent=[1.0] * 100), "recent"),
        (lambda numbers: numbers.update(weight=-1.0), "weight"),
        (lambda numbers: numbers.pop("weight"), "weight"),
        (lambda numbers: numbers.update(more=1), "more"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, change, message):
    save(tmp_path, {"seed": 0})
    (file,) = tmp_path.iterdir()
    edit_record(file, "distillation", 1, lambda head, _: change(head["numbers"]))
    with pytest.raises(ArtifactError, match=rf"numbers\.{message}.*delete it to start anew"):
        load_state(tmp_path, {"seed": 0})


def test_a_flipped_bit_is_found(tmp_path):
    save(tmp_path, {"seed": 0})
    (file,) = tmp_path.iterdir()
    flip(file, -2)
    with pytest.raises(ArtifactError, match=r"is corrupted.*delete it to start anew"):
        load_state(tmp_path, {"seed": 0})
