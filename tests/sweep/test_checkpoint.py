"""A solved layer is that of this run and this layer, bit for bit, or it is refused by name."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records import change_tensor, edit_record, flip
from torch import nn

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.graph.layers import WeightLayer
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.sweep.checkpoint import Checkpoint
from mpqdm_fx.sweep.solve import LayerSolution

RUN = {"settings": {"weight_bits": 3, "seed": 0}, "model": "abc", "versions": {"torch": "2"}}


def layer(name="body", seed=0):
    torch.manual_seed(seed)
    return WeightLayer(name=name, module=nn.Linear(9, 4), nodes=())


def solution(of, levels="uniform", **numbers):
    bits = (1, 2, 4, 8)
    rows = of.weight.detach()
    fitted = RowLevels.fit(rows, torch.tensor(bits), levels)
    return LayerSolution(
        plan=LayerPlan(name=of.name, kind="Linear", shape=(4, 9), bits=bits, levels=levels),
        codes=fitted.snap(rows).to(torch.int8),
        scale=fitted.scale,
        bias=of.module.bias.detach() + 1,
        **numbers,
    )


def same(actual, expected):
    numbers = ("plan", "alpha", "beta", "damping", "base_error", "error", "rows", "seconds")
    return all(getattr(actual, key) == getattr(expected, key) for key in numbers) and all(
        torch.equal(getattr(actual, key), getattr(expected, key))
        for key in ("codes", "scale", "bias")
    )


@pytest.mark.parametrize("levels", ["uniform", "codebook", "int4"])
def test_what_was_solved_is_read_back(tmp_path, levels):
    checkpoint, body = Checkpoint(tmp_path, RUN), layer()
    assert checkpoint.load(body) is None
    solved = solution(body, levels, alpha=0.3, error=math.inf, base_error=0.25, rows=7, seconds=1.5)
    checkpoint.save(solved)
    assert same(Checkpoint(tmp_path, RUN, resume=True).load(body), solved)


@given(data=st.data())
def test_no_flipped_bit_passes(data, tmp_path_factory):
    checkpoint, body = Checkpoint(tmp_path_factory.mktemp("run"), RUN), layer()
    checkpoint.save(solution(body))
    path = checkpoint._path("body")
    byte, bit = divmod(data.draw(st.integers(0, 8 * path.stat().st_size - 1)), 8)
    flip(path, byte, bit=bit)
    try:
        loaded = checkpoint.load(body)
    except ArtifactError as error:
        message = str(error)
    else:  # padding of the header: nothing that was written has changed
        assert same(loaded, solution(body))
        return
    assert path.name in message
    assert "delete this file and resume" in message or "update" in message


NAMES = ["a b", "a_b", "a.b", "A b", "ä", "Ä", "x" * 300, "x" * 299 + "y", "../up", "a/b", "a\0b"]


def test_no_two_layers_have_one_file_whatever_they_are_called(tmp_path):
    checkpoint = Checkpoint(tmp_path, RUN)
    for seed, name in enumerate(NAMES):
        checkpoint.save(solution(layer(name, seed)))
    files = [path.name for path in tmp_path.iterdir() if path.name != "sweep.json"]
    assert len({name.lower() for name in files}) == len(NAMES)
    assert max(len(name.encode()) for name in files) < 200
    for seed, name in enumerate(NAMES):
        assert same(checkpoint.load(layer(name, seed)), solution(layer(name, seed)))


def test_another_runs_and_another_layers_file_are_refused(tmp_path):
    checkpoint, body = Checkpoint(tmp_path / "this", RUN), layer()
    foreign = Checkpoint(tmp_path / "other", {**RUN, "settings": {"weight_bits": 2, "seed": 0}})
    foreign.save(solution(body))
    foreign._path("body").rename(checkpoint._path("body"))
    with pytest.raises(ArtifactError, match=r"layer-body-.*of another run.*delete this file"):
        checkpoint.load(body)
    checkpoint.save(solution(layer("head")))
    checkpoint._path("head").replace(checkpoint._path("body"))
    with pytest.raises(ArtifactError, match=r"does not fit body: it is of 'head'"):
        checkpoint.load(body)


def test_without_the_header_nothing_is_taken_for_granted(tmp_path):
    checkpoint = Checkpoint(tmp_path, RUN)
    checkpoint.save(solution(layer()))
    (tmp_path / "sweep.json").unlink()
    for resume in (True, False):
        with pytest.raises(ArtifactError, match=r"no sweep\.json.*delete it"):
            Checkpoint(tmp_path, {**RUN, "model": "other"}, resume=resume)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_folder_that_is_no_runs_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="in the way"):
        Checkpoint(tmp_path, RUN)


def test_what_a_kill_left_of_a_header_is_no_hindrance(tmp_path):
    (tmp_path / ".sweep.json.0123abcd.part").mkdir()
    Checkpoint(tmp_path, RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_the_first_difference_is_told_in_a_line_however_long_it_is(tmp_path):
    Checkpoint(tmp_path, RUN)
    hostile = {**RUN, "settings": {"weight_bits": ["x" * 10**6] * 9, "y" * 10**6: 1}}
    (tmp_path / "sweep.json").write_text(json.dumps(hostile))
    with pytest.raises(ConfigError, match=r"settings\.seed was None, is 0") as caught:
        Checkpoint(tmp_path, RUN, resume=True)
    assert len(str(caught.value)) < 1000


def _head(**changes):
    return lambda head, _: head.update(changes)


def _plan(**changes):
    return lambda head, _: head["plan"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_head(alpha="0.5"), "alpha"),
        (_head(rows=-1), "rows"),
        (_head(seconds="inf"), "seconds"),
        (_head(more=1), "more"),
        (_plan(levels="best"), "levels"),
        (_plan(bits=[[9, 4]]), "bits"),
        (_plan(bits=[[2, 2**62]]), "bits: counts of channels are whole and at most"),
        (_plan(shape=[4, 8]), "a Linear of shape"),
        (_plan(kind="Conv2d"), "a Conv2d of shape"),
        (change_tensor("codes", lambda x: x.float()), "codes is torch.float32"),
        (change_tensor("codes", lambda x: x[:, :8].contiguous()), "codes is torch.int8"),
        (change_tensor("codes", lambda x: x * 0), "not balanced"),
        (change_tensor("scale", lambda x: -x), "bfloat16"),
        (change_tensor("scale", lambda x: x * 1.001), "bfloat16"),
        (change_tensor("scale", lambda x: x * math.nan), "NaN"),
        (change_tensor("bias", lambda x: x[:3].clone()), "bias is"),
        (change_tensor("bias", lambda x: x.double()), "bias is torch.float64"),
        (change_tensor("bias", lambda x: x / 0), "infinity"),
        (lambda _, tensors: tensors.pop("codes"), "it holds bias, scale"),
        (lambda _, tensors: tensors.update(more=torch.ones(1)), "it holds bias, codes, more"),
    ],
)
def test_what_does_not_fit_the_layer_is_refused_by_name(tmp_path, change, message):
    checkpoint, body = Checkpoint(tmp_path, RUN), layer()
    checkpoint.save(solution(body))
    path = checkpoint._path("body")
    edit_record(path, "solved layer", 1, change)
    with pytest.raises(ArtifactError, match=rf"layer-body.*{message}.*delete this file and resume"):
        checkpoint.load(body)
