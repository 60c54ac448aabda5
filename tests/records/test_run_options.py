"""How a run goes is one record; the keywords that were there before it still say the same."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
from small import TinyNet, net_calls

import mpqdm_fx
from mpqdm_fx.api import prepare_on
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.former_keywords import former_keywords
from mpqdm_fx.records.run_options import RunOptions

VERBS = (
    mpqdm_fx.prepare,
    mpqdm_fx.convert,
    mpqdm_fx.open_sweep,
    mpqdm_fx.quantize,
    mpqdm_fx.export_pipeline,
    prepare_on,
)
CHEAP = MPQConfig(
    weight_bits=4, allocation="uniform", rounding="nearest", refinements=0, propagation=0.0,
    slowdown=1, row_weights="plain", judge=False,
)  # fmt: skip


@pytest.fixture
def prepared():
    prepared = mpqdm_fx.prepare(TinyNet(), CHEAP, net_calls()[0])
    for call in net_calls():
        prepared.record(**call)
    return prepared


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("record_memory", 0),
        ("record_memory", None),
        ("activation_memory", 1.5),
        ("resume", 1),
        ("half", None),
        ("directory", b"out"),
        ("record_directory", 3),
        ("device", 0),
        ("sensitivity", ("a",)),
    ],
)
def test_a_field_out_of_range_is_refused_by_its_name(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}="):
        RunOptions(**{field: value})


def test_devices_and_paths_may_be_texts_or_objects():
    texts = RunOptions(device="cpu", directory="a", sensitivity="b")
    assert (texts.device, texts.directory, texts.sensitivity) == ("cpu", "a", "b")
    objects = RunOptions(device=torch.device("cpu"), directory=Path("a"), sensitivity=Path("b"))
    assert objects.device == torch.device("cpu")


def test_a_job_that_chooses_the_folder_takes_no_other():
    assert RunOptions(resume=True).inside(Path("a")) == RunOptions(resume=True, directory=Path("a"))
    with pytest.raises(ConfigError, match=r"directory='b': .* in a; leave `directory` out"):
        RunOptions(directory="b").inside(Path("a"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_shows_the_record_and_none_of_the_keywords(verb):
    parameters = inspect.signature(verb).parameters
    assert parameters["run"].default == RunOptions()
    fields = set(inspect.signature(RunOptions).parameters)
    assert not (fields | {"max_memory", "max_activations"}) & set(parameters)


@former_keywords(max_memory="activation_memory", device="device")
def verb(model, *, run=RunOptions()):
    return model, run


def test_keywords_from_before_say_the_same_with_a_warning_at_the_callers_line():
    with pytest.warns(DeprecationWarning, match="goes with the next version") as warned:
        called = verb(1, max_memory=5, device="cpu")
    assert called == (1, RunOptions(activation_memory=5, device="cpu"))
    assert str(warned[0].message) == (
        "verb(max_memory=..., device=...) goes with the next version; give "
        "run=RunOptions(activation_memory=..., device=...)"
    )
    assert warned[0].filename == __file__


def test_the_record_alone_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verb(1, run=RunOptions(half=True)) == (1, RunOptions(half=True))


def test_both_forms_at_once_are_refused_and_unknown_keywords_are_pythons_error():
    with pytest.raises(ConfigError, match=r"verb\(device=...\) is given `run` as well; give run="):
        verb(1, device="cpu", run=RunOptions())
    with pytest.raises(TypeError, match="max_activations"):
        verb(1, max_activations=5)
    with (
        pytest.warns(DeprecationWarning, match="activation_memory"),
        pytest.raises(ConfigError, match="activation_memory=0"),
    ):
        verb(1, max_memory=0)


def test_what_was_a_limit_of_prepare_and_one_of_convert_are_two_fields(prepared, tmp_path):
    with pytest.warns(DeprecationWarning, match=r"record_memory=..., record_directory=..."):
        spilled = mpqdm_fx.prepare(
            TinyNet(), CHEAP, net_calls()[0], max_memory=1, directory=tmp_path / "calls"
        )
    spilled.record(**net_calls()[0])
    assert all(path.is_relative_to(tmp_path / "calls") for path in spilled.records.shards)
    assert spilled.records.shards
    with pytest.warns(DeprecationWarning, match="activation_memory"):
        solved = mpqdm_fx.convert(prepared, directory=tmp_path / "run", max_memory=2**30)
    assert list((tmp_path / "run").glob("layer-*"))
    run = RunOptions(directory=tmp_path / "run", resume=True)
    assert mpqdm_fx.convert(prepared, run=run).plan == solved.plan


def test_quantize_and_open_sweep_take_the_keywords_that_they_had(prepared, tmp_path):
    with pytest.warns(DeprecationWarning, match=r"quantize\(max_memory=..., .*record_memory="):
        mpqdm_fx.quantize(
            TinyNet(), CHEAP, net_calls(), max_memory=1, max_activations=2**30, resume=False,
            directory=tmp_path / "run", device="cpu", sensitivity=tmp_path / "table",
        )  # fmt: skip
    assert list((tmp_path / "run").glob("layer-*"))
    with pytest.warns(DeprecationWarning, match="half"):
        sweep = mpqdm_fx.open_sweep(prepared, half=True)
    assert mpqdm_fx.convert(prepared, sweep=sweep).plan
    with pytest.warns(DeprecationWarning, match="record_memory"):
        assert prepare_on(TinyNet(), CHEAP, net_calls(), max_memory=1).records.shards
