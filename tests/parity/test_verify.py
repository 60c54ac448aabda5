"""`verify` on folders: what is right passes, what is not is named, what is no folder is refused."""

import json
import math
import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from parity_folders import double_a_scale, edit_thresholds, folder_of_net
from records import edit_json
from safetensors.torch import load_file, save_file
from small import TinyNet, plain_unet, unet_calls

from mpqdm_fx import MPQConfig, quantize
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.folders import MANIFEST, seal_folder
from mpqdm_fx.io.sealed import Entry, read_json
from mpqdm_fx.model.storage import load, write_model
from mpqdm_fx.parity import verify as verify_module
from mpqdm_fx.parity.rung_inputs import INPUTS, random_calls, read_calls, write_calls
from mpqdm_fx.parity.thresholds import THRESHOLDS, Thresholds
from mpqdm_fx.parity.verify import store_parity, verify
from mpqdm_fx.sources.sources import make_source

CHEAP = {"allocation": "uniform", "levels": "uniform", "refinements": 0, "propagation": 0.0}
RUNGS = ["float", "quantized", "decomposed", "converted", "edge", "pte"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder without a program, with thresholds, and the ladder that they were stored from."""
    folder = folder_of_net(tmp_path_factory.mktemp("parity") / "net", program=False)
    return folder, verify(folder, model=TinyNet(), store=True)


@pytest.fixture
def copied(stored, tmp_path):
    return shutil.copytree(stored[0], tmp_path / "net")


def test_an_unchanged_folder_passes_with_the_same_numbers(stored):
    folder, first = stored
    again = verify(folder, model=TinyNet())
    assert again.passed
    assert again.to_dict() == first.to_dict()
    assert [rung.name for rung in again.rungs] == RUNGS[:2]
    assert len(again.rung("quantized").layers) == 4
    assert any("there is no unet.pte" in note for note in again.notes)
    assert again.stored_versions["torch"]


def test_a_large_model_is_left_to_the_command(tmp_path, monkeypatch, caplog):
    unet = plain_unet()
    calls = [{key: call[key] for key in ("sample", "timestep")} for call in unet_calls()]
    quantized = quantize(unet, MPQConfig(activation_mode="dynamic", **CHEAP), calls)
    source = make_source("unet", unet, DDIMScheduler())
    write_model(quantized, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert store_parity(quantized, source, tmp_path).passed
    assert {path.name for path in tmp_path.iterdir()} == before | {INPUTS, THRESHOLDS}
    (tmp_path / INPUTS).unlink()
    (tmp_path / THRESHOLDS).unlink()
    monkeypatch.setattr(verify_module, "_LARGEST", 1000)
    assert store_parity(quantized, source, tmp_path) is None
    assert "verify --store" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == before


def test_without_thresholds_it_fails_with_the_remedy_and_writes_nothing(copied):
    (copied / THRESHOLDS).unlink()
    seal_folder(copied)
    before = sorted(path.name for path in copied.iterdir())
    with pytest.raises(ArtifactError, match=r"no thresholds \(parity\.json\).*--store"):
        verify(copied, model=TinyNet())
    assert sorted(path.name for path in copied.iterdir()) == before


@pytest.mark.parametrize("layer", ["conv_in", "body", "mix", "conv_out"])
def test_a_changed_scale_in_the_packed_file_is_found_and_its_layer_named(copied, layer):
    double_a_scale(copied, layer)
    ladder = verify(copied, model=TinyNet())
    assert ladder.passed is False
    assert ladder.first_divergence.rung == "quantized"
    assert ladder.first_divergence.node.site.module == layer


def test_a_raised_threshold_of_a_layer_fails_with_rung_layer_and_decibels(copied):
    def change(data):
        data["rungs"]["quantized"]["nodes"]["mix@0 linear 0"] = [59.5, "inf"]

    edit_thresholds(copied, change)
    first = verify(copied, model=TinyNet()).first_divergence
    assert (first.rung, first.node.site.module, first.wanted_db) == ("quantized", "mix", 58.5)
    for part in ("rung `quantized`", "mix: linear [1, 6, 10, 12]", "against `float`", "58.5 dB"):
        assert part in str(first)


def test_a_raised_threshold_of_an_output_fails_with_the_rung_named(copied):
    edit_thresholds(
        copied, lambda data: data["rungs"]["quantized"].update(previous_db=[59.0, "inf"])
    )
    first = verify(copied, model=TinyNet()).first_divergence
    assert (first.rung, first.node, first.wanted_db) == ("quantized", None, 58.0)
    assert "its output" in str(first)


LAYERS = ["conv_in@0 convolution 0", "body@0 convolution 0", "mix@0 linear 0"]


def _rename(rung, key):
    rung["nodes"]["x" + key] = rung["nodes"].pop(key)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda rungs: rungs["quantized"]["nodes"].clear(), "4 weight layers have no threshold"),
        (lambda rungs: rungs["quantized"]["nodes"].pop(LAYERS[0]), "1 weight layers have no thr"),
        (lambda rungs: _rename(rungs["quantized"], LAYERS[2]), "have no threshold.* of mix"),
        (
            lambda rungs: rungs["quantized"]["nodes"].update({"gone@0 linear 0": [3.0, 3.0]}),
            "1 weight layers have thresholds and are no longer in the graph.* of gone",
        ),
        (lambda rungs: rungs.update(pte=rungs["quantized"]), "`pte` has thresholds, but was not"),
        (
            lambda rungs: rungs.update(other=rungs.pop("quantized")),
            "`other` has thresholds, but was not measured",
        ),
        (lambda rungs: rungs["quantized"].update(against="edge"), "of a comparison with `edge`"),
    ],
)
def test_missing_renamed_or_emptied_thresholds_fail_by_name(copied, change, fault):
    edit_thresholds(copied, lambda data: change(data["rungs"]))
    ladder = verify(copied, model=TinyNet())
    assert ladder.passed is False
    assert any(re.search(fault, message) for message in ladder.faults), ladder.faults
    assert ladder.failure in ladder.faults
    assert ladder.to_dict()["faults"] == list(ladder.faults)


def test_a_value_that_is_nan_falls_short_by_name_and_is_not_stored(copied, monkeypatch):
    def broken(*args):
        quantized = load(*args)
        with torch.no_grad():
            quantized.graph_module.get_submodule("mix").bias[0] = math.nan
        return quantized

    monkeypatch.setattr("mpqdm_fx.parity.verify.load", broken)
    ladder = verify(copied, model=TinyNet())
    assert ladder.passed is False
    assert ladder.first_divergence.node.site.module == "mix"
    assert math.isnan(ladder.first_divergence.sqnr_db)
    json.dumps(ladder.to_dict(), allow_nan=False)
    before = {path: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(ArtifactError, match="holds NaN"):
        verify(copied, model=TinyNet(), store=True)
    assert before == {path: path.read_bytes() for path in copied.iterdir()}


def test_what_is_wanted_follows_from_what_was_measured(stored):
    """No threshold lies lower than the measurement beside it allows."""
    data = json.loads((stored[0] / THRESHOLDS).read_text())
    rung = stored[1].rung("quantized")
    assert rung.wanted_db == pytest.approx(rung.previous_db - 1, abs=0.011)
    for node in rung.nodes:
        ratio, steady = map(float, data["rungs"]["quantized"]["nodes"][node.site.key])
        assert ratio == pytest.approx(node.sqnr_db, abs=0.011)
        assert node.wanted_db == pytest.approx(min(60, ratio - 1, steady - 6), abs=0.011)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("in.x"), "wanted are in.x and outputs"),
        (lambda t: t.update({"in.y": t["in.x"].clone()}), "wanted are in.x and outputs"),
        (lambda t: t.update({"in.x": t["in.x"][..., :9]}), r"in\.x is .*wanted is"),
        (lambda t: t.update({"in.x": t["in.x"].double()}), r"in\.x is torch.float64"),
        (lambda t: t.update({"in.x": t["in.x"][:2]}), r"in\.x is|out\.0 is"),
        (lambda t: t.update({"in.x": t["in.x"] * math.nan}), r"in\.x holds NaN"),
        (lambda t: t.update({"out.0": t["out.0"] * math.nan}), r"out\.0 holds NaN$"),
        (lambda t: t.pop("out.0"), "and outputs"),
    ],
)
def test_inputs_that_do_not_fit_the_graph_are_refused(stored, tmp_path, change, message):
    signature = load(stored[0], TinyNet()).signature
    tensors = load_file(stored[0] / INPUTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / INPUTS)
    with pytest.raises(ArtifactError, match=message):
        read_calls(tmp_path / INPUTS, signature)


def test_stored_outputs_of_another_shape_are_refused(stored, copied, monkeypatch):
    monkeypatch.setattr("mpqdm_fx.parity.verify.load", lambda *_: load(copied, TinyNet()))
    tensors = load_file(copied / INPUTS)
    tensors["out.0"] = tensors["out.0"][..., :4].contiguous()
    save_file(tensors, copied / INPUTS)
    entry = {INPUTS: Entry.of(copied / INPUTS).to_dict()}
    edit_thresholds(copied, lambda data: data["files"].update(entry))
    with pytest.raises(ArtifactError, match="not of one model"):
        verify(copied)


def test_storing_anew_takes_what_is_there_as_right(copied):
    double_a_scale(copied, "mix")
    assert verify(copied, model=TinyNet(), store=True).passed
    assert verify(copied, model=TinyNet()).passed


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_measured(
    copied, monkeypatch
):
    (copied / "notes.txt").write_text("mine")
    monkeypatch.setattr(verify_module, "_measure", None)
    with pytest.raises(ArtifactError, match=r"not of its result: notes\.txt"):
        verify(copied, model=TinyNet(), store=True)


def test_without_the_float_model_its_stored_outputs_stand_for_it(stored, copied, monkeypatch):
    monkeypatch.setattr("mpqdm_fx.parity.verify.load", lambda *_: load(copied, TinyNet()))
    ladder = verify(copied)
    assert ladder.passed
    assert ladder.rung("quantized").nodes == ()
    assert ladder.rung("quantized").float_db == pytest.approx(stored[1].rung("quantized").float_db)
    assert any("float model is not there" in note for note in ladder.notes)


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def _newer(folder):
    edit_thresholds(folder, lambda data: data.update(version=99))


def _foreign(folder):
    edit_thresholds(folder, lambda data: data.update(format="other"))


def _no_site(folder):
    edit_thresholds(
        folder, lambda data: data["rungs"]["quantized"].update(nodes={"mix": [3.0, 3.0]})
    )


def _edited(change, *, resealed=True):
    def damage(folder):
        if resealed:
            edit_thresholds(folder, change)
        else:
            edit_json(folder / THRESHOLDS, change)
            seal_folder(folder)

    return damage


def _lower(data):
    data["rungs"]["quantized"]["float_db"] = [3.0, "inf"]


def _program(folder):
    (folder / "unet.pte").write_bytes(b"no program")
    seal_folder(folder)


def _other_inputs(folder):
    tensors = load_file(folder / INPUTS)
    save_file({name: value + 1 for name, value in tensors.items()}, folder / INPUTS)
    seal_folder(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not a folder"),
        (_remove(MANIFEST), "was not written by mpqdm-fx quantize"),
        (_remove(INPUTS), "parity.safetensors does not exist"),
        (_truncate(INPUTS), "parity.safetensors is truncated"),
        (_other_inputs, "parity.safetensors is not the file that the thresholds"),
        (_edited(_lower, resealed=False), "does not have the digest"),
        (_edited(lambda data: data["files"].clear()), "files"),
        (_edited(lambda data: data["rungs"].clear()), "rungs"),
        (_edited(lambda data: data["files"].update(x=data["files"].pop(INPUTS))), INPUTS),
        (_edited(lambda data: data["margins_db"].update(measured=40.0)), "other margins"),
        (_edited(lambda data: data["rungs"]["quantized"].update(float_db=["nan", 1.0])), "NaN"),
        (_edited(lambda data: data["rungs"]["quantized"].update(float_db=3.0)), "float_db"),
        (_edited(lambda data: data.update(version=1)), "reads from"),
        (_truncate(THRESHOLDS), "is truncated"),
        (_newer, "format version 99"),
        (_foreign, "no file of thresholds"),
        (_no_site, "is damaged"),
        (_program, "unet.pte is not the file that the thresholds"),
    ],
)
def test_bad_input_is_one_clear_error(copied, damage, message):
    damage(copied)
    with pytest.raises(ArtifactError, match=message):
        verify(copied, model=TinyNet())


def test_storing_needs_the_float_model(copied, monkeypatch):
    monkeypatch.setattr("mpqdm_fx.parity.verify.load", lambda *_: load(copied, TinyNet()))
    with pytest.raises(ArtifactError, match="give `model`"):
        verify(copied, store=True)


def test_thresholds_are_what_is_read_back(stored, tmp_path):
    path = stored[0] / THRESHOLDS
    thresholds = Thresholds.from_dict(read_json(path), path)
    again = tmp_path / "again.json"
    thresholds.write(again)
    assert Thresholds.from_dict(read_json(again), again) == thresholds
    assert again.read_text() == path.read_text()


def test_inputs_are_what_is_read_back_and_run_through_the_timesteps(tmp_path, stored):
    signature = load(stored[0], TinyNet()).signature
    calls = random_calls(signature)
    outputs = [(torch.randn(1, 3),) for _ in calls]
    write_calls(tmp_path / "calls.safetensors", calls, outputs)
    loaded, results = read_calls(tmp_path / "calls.safetensors", signature)
    assert len(loaded) == len(calls) == 4
    for expected, actual in zip(calls, loaded, strict=True):
        assert torch.equal(expected["x"], actual["x"])
    assert all(torch.equal(a, b) for (a,), (b,) in zip(outputs, results, strict=True))
