import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from changed_unets import rounded_model
from manifests import edit_manifest
from records import flip
from small import TinyNet, net_calls, tiny_unet, unet_calls

from mpqdm_fx.api import quantize
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.folders import (
    MANIFEST,
    WEIGHTS,
    check_target,
    seal_folder,
    staged_directory,
)
from mpqdm_fx.io.versions import FORMAT_VERSION
from mpqdm_fx.model import manifest, storage
from mpqdm_fx.model.folder import rewritten_folder
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.records.config import MPQConfig


@pytest.fixture(scope="module")
def quantized():
    config = MPQConfig(
        weight_bits=3, levels="codebook", overrides=[{"pattern": "*to_q", "skip": True}]
    )
    return quantize(tiny_unet(), config, unet_calls())


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    return save(quantized, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copy_of_saved(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_loading_gives_the_same_integers_and_bit_equal_outputs(quantized, saved):
    loaded = load(saved)
    assert loaded.plan == quantized.plan
    assert loaded.ranges == quantized.ranges
    assert loaded.settings == quantized.settings
    for layer in quantized.plan.layers:
        assert torch.equal(loaded.codes(layer.name), quantized.codes(layer.name))
    call = unet_calls(1, seed=5)[0]
    assert torch.equal(loaded(**call).sample, quantized(**call).sample)


def test_what_was_chosen_for_inputs_and_judged_at_the_output_is_kept(quantized, saved):
    report = quantized.report
    assert {choice.kind for choice in report.activations} >= {"static"}
    assert sum(score.chosen for score in report.judged) == 1
    loaded = load(saved).report
    assert loaded.activations == report.activations
    assert loaded.judged == report.judged


def test_an_error_without_measure_is_kept(quantized, tmp_path):
    # of an output of zeros every error is infinite
    report = quantized.report
    endless = tuple(replace(score, error=math.inf) for score in report.judged)
    model = quantized.with_graph(quantized.rounded, report=replace(report, judged=endless))
    loaded = load(save(model, tmp_path / "model")).report
    assert loaded.judged == model.report.judged


def test_the_weights_file_has_the_bytes_that_the_plan_counts(quantized, saved):
    plan = quantized.plan
    header = int.from_bytes((saved / WEIGHTS).read_bytes()[:8], "little") + 8
    assert (saved / WEIGHTS).stat().st_size == header + plan.weight_bytes + plan.float_bytes
    assert header < 1024


def test_a_result_is_replaced_whole_where_that_is_said(quantized, tmp_path):
    folder = save(quantized, tmp_path / "model")
    (folder / "summary.json").write_text("{}")
    seal_folder(folder)
    with pytest.raises(ArtifactError, match="overwrite=True"):
        save(quantized, folder)
    assert (folder / "summary.json").exists()
    save(quantized, folder, overwrite=True)
    assert not (folder / "summary.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_result_that_holds_somebody_elses_files_is_not_replaced(quantized, tmp_path):
    folder = save(quantized, tmp_path / "model")
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.txt").write_text("years of work")
    (folder / ".unet.pte.0123456789abcdef").write_text("an expanded program")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "program_files.cpython-311.pyc").write_text("compiled")
    with pytest.raises(ArtifactError, match=r"its result: notes/thesis\.txt; it is not replaced"):
        save(quantized, folder, overwrite=True)
    shutil.rmtree(folder / "notes")
    save(quantized, folder, overwrite=True)


def test_a_folder_that_is_sealed_anew_takes_in_nobody_elses_files(quantized, tmp_path):
    folder = save(quantized, tmp_path / "model")
    before = (folder / MANIFEST).read_bytes()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"), rewritten_folder(folder):
        pass
    (folder / "thesis.txt").unlink()
    flip(folder / WEIGHTS, -100)
    with pytest.raises(ArtifactError, match="checksum"), rewritten_folder(folder):
        pass
    assert (folder / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_result_whose_manifest_is_damaged_is_not_replaced(quantized, tmp_path):
    folder = save(quantized, tmp_path / "model")
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        save(quantized, folder, overwrite=True)


@pytest.mark.matrix
def test_a_model_whose_inputs_are_scaled_loads_by_itself_and_into_a_skeleton(tmp_path):
    model = tiny_unet()
    with torch.no_grad():  # a few channels of what most layers read are far larger
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[::7] *= 60
    config = MPQConfig(allocation="uniform", rounding="nearest", judge=False)
    quantized = quantize(model, config, unet_calls())
    shared = [choice for choice in quantized.report.activations if len(choice.layers) > 1]
    assert any(choice.exponent for choice in shared)
    folder = save(quantized, tmp_path / "model")
    call = unet_calls(1, seed=3)[0]
    for loaded in (load(folder), load(folder, model=tiny_unet(seed=7))):
        assert torch.equal(loaded(**call).sample, quantized(**call).sample)
    again = save(load(folder, model=tiny_unet(seed=7)), tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_model_that_is_no_diffusers_class_loads_by_itself_and_into_a_skeleton(tmp_path):
    quantized = quantize(TinyNet(), MPQConfig(), net_calls())
    folder = save(quantized, tmp_path / "net")
    skeleton = TinyNet(seed=7)
    before = {name: value.clone() for name, value in skeleton.state_dict().items()}
    call = net_calls(1, seed=3)[0]
    assert torch.equal(load(folder)(**call), quantized(**call))
    assert torch.equal(load(folder, model=skeleton)(**call), quantized(**call))
    assert all(torch.equal(skeleton.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ArtifactError, match="does not fit"):
        load(folder, model=torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)))


class ComplexBuffer(TinyNet):
    """Takes a table of complex numbers, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.polar(torch.ones(3, 1, 1), torch.rand(3, 1, 1)))

    def forward(self, x):
        return super().forward(x * torch.view_as_real(self.table)[..., 0])


def test_a_complex_buffer_is_saved_and_loaded(tmp_path):
    model, call = ComplexBuffer(), net_calls(1)[0]
    folder = save(rounded_model(model, call), tmp_path / "net")
    assert torch.equal(
        load(folder).graph_module(**call), rounded_model(model, call).graph_module(**call)
    )


def test_a_buffer_of_a_kind_that_no_file_holds_is_refused_by_name(tmp_path):
    quantized = rounded_model(ComplexBuffer(), net_calls(1)[0])
    quantized.rounded.get_buffer("table").data = torch.zeros(3, 1, 1, dtype=torch.complex128)
    with pytest.raises(ArtifactError, match="table is complex128, which a packed file does not"):
        save(quantized, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_a_model_that_load_would_refuse_is_not_written(tmp_path, monkeypatch):
    quantized = rounded_model(TinyNet(), net_calls(1)[0])
    monkeypatch.setattr(manifest, "_LARGEST_RUN", 10)
    with pytest.raises(
        ArtifactError, match=r"cannot be saved so that it loads: .*x of .*too large"
    ):
        save(quantized, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_weights_that_do_not_read_back_are_not_written(tmp_path, monkeypatch):
    quantized = rounded_model(TinyNet(), net_calls(1)[0])
    write_packed = storage.write_packed

    def write_other_codes(path, rounded, plan):
        negated = copy.deepcopy(rounded)
        negated.get_buffer("body.weight_codes").neg_()
        return write_packed(path, negated, plan)

    monkeypatch.setattr(storage, "write_packed", write_other_codes)
    with pytest.raises(ArtifactError, match="returns other numbers than the one that was saved"):
        save(quantized, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_a_truncated_file_is_refused_by_name(copy_of_saved):
    data = (copy_of_saved / WEIGHTS).read_bytes()
    (copy_of_saved / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS} is truncated"):
        load(copy_of_saved)


def test_one_flipped_bit_is_refused(copy_of_saved):
    flip(copy_of_saved / WEIGHTS, -100)
    with pytest.raises(ArtifactError, match="checksum"):
        load(copy_of_saved)


def test_a_newer_version_is_refused_with_the_remedy(copy_of_saved):
    edit_manifest(copy_of_saved, lambda manifest: manifest.update(version=FORMAT_VERSION + 1))
    with pytest.raises(ArtifactError, match=rf"version {FORMAT_VERSION + 1}.*update mpqdm-fx"):
        load(copy_of_saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": "x"}', '{"version": 3}', '{"format": "other"}']
)
def test_a_damaged_manifest_is_refused(copy_of_saved, text):
    (copy_of_saved / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=MANIFEST):
        load(copy_of_saved)


@pytest.mark.parametrize(
    "key", ["weights", "ranges", "settings", "signature", "report", "files", "version", "versions"]
)
def test_a_manifest_without_a_part_is_refused_by_its_name(copy_of_saved, key):
    edit_manifest(copy_of_saved, lambda manifest: manifest.pop(key))
    with pytest.raises(ArtifactError, match=key):
        load(copy_of_saved)


def test_a_manifest_that_was_changed_is_refused(copy_of_saved):
    manifest = json.loads((copy_of_saved / MANIFEST).read_text())
    next(iter(manifest["ranges"].values()))["input"]["scale"] *= 1.01
    (copy_of_saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="digest"):
        load(copy_of_saved)


def test_checks_cannot_be_switched_off(copy_of_saved):
    flip(copy_of_saved / WEIGHTS, -100)
    edit_manifest(copy_of_saved, lambda manifest: manifest.update(files={}))
    with pytest.raises(ArtifactError, match=f"lists no {WEIGHTS}"):
        load(copy_of_saved)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("weights", "layers", 0, "shape"), [1_000_000_000, 1]),
        (("weights", "layers", 0, "shape"), [2**39, 2**39]),
        (("weights", "layers", 0, "shape"), [-1, 2]),
        (("weights", "layers", 0, "shape"), []),
        (("weights", "layers", 0, "bits"), 0),
        (("weights", "layers", 0, "bits"), 9),
        (("weights", "layers", 0, "levels"), "ternary"),
        (("weights", "layers", 0, "name"), "conv_out"),
        (("weights", "floats", 0, 3), [2**39]),
        (("weights", "floats", 0, 1), "load"),
        (("weights", "activation_bits"), 16),
        (("signature", "inputs", 0, "shape"), [2**20, 2**20]),
        (("signature", "inputs", 0, "dtype"), "load"),
        (("signature", "output_class"), "os.system"),
        (("signature", "output_class"), "this.s"),
        (("settings", "weight_bits"), 64),
        (("settings", "hidden"), 1),
        (("report", "layers", 0, "bytes"), "many"),
        (("report", "activations", 0, "kind"), "int4"),
        (("report", "activations", 0, "layers"), []),
        (("report", "judged", 0, "chosen"), 1),
        (("hidden",), 1),
    ],
)
def test_a_manifest_with_a_value_out_of_range_is_refused_before_anything_is_made_of_it(
    copy_of_saved, place, value
):
    def change(manifest):
        *path, last = place
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    edit_manifest(copy_of_saved, change)
    with pytest.raises(ArtifactError):
        load(copy_of_saved)


def test_a_missing_file_or_folder_is_refused(copy_of_saved, tmp_path):
    with pytest.raises(ArtifactError, match="nowhere"):
        load(tmp_path / "nowhere")
    (copy_of_saved / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS} does not exist"):
        load(copy_of_saved)


def test_a_failing_writer_leaves_neither_a_new_folder_nor_a_changed_old_one(tmp_path):
    target = tmp_path / "out"

    def write_half() -> None:
        with staged_directory(target, overwrite=True) as stage:
            (stage / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []
    with staged_directory(target) as stage:
        (stage / MANIFEST).write_text("{}")
    with pytest.raises(RuntimeError):
        write_half()
    assert (target / MANIFEST).read_text() == "{}"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_with_somebody_elses_files_is_not_replaced(quantized, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="other files"):
        save(quantized, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("above", [".", ".."])
def test_the_folder_that_the_process_works_in_is_not_replaced(tmp_path, monkeypatch, above):
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    with pytest.raises(ArtifactError, match="is the current folder, or holds it"):
        check_target(above, overwrite=True)
    assert check_target("other") == Path("other")
