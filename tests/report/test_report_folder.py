"""Reports of folders that exist: what they store, what is measured again, what cannot be."""

import json
import runpy
import shutil

import pytest
from PIL import Image
from unet_folders import saved_unet

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.schema import plain
from mpqdm_fx.jobs.compare import compare_folders
from mpqdm_fx.jobs.report_folder import report_folder
from mpqdm_fx.model.folder import open_folder, rewritten_folder
from mpqdm_fx.model.storage import load
from mpqdm_fx.report.comparison import compare
from mpqdm_fx.report.page import packages
from mpqdm_fx.report.page.packages import can_render, renders
from mpqdm_fx.sources.sources import load_source


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_report_is_part_of_the_sealed_folder(three_bits):
    folder = open_folder(three_bits)
    assert {"report.html", "report.json"} <= folder.files.entries.keys()
    folder.files.check()
    sizes = read(three_bits / "summary.json")["files"]
    assert sizes["report.html"] == (three_bits / "report.html").stat().st_size


def test_samples_are_two_labelled_rows_float_above_quantized(three_bits):
    picture = Image.open(three_bits / "samples.png")
    side, border = 64, 8  # images of 8 pixels are shown at 64
    assert picture.height == 2 * (side + 2 * border) + 2 * border
    assert picture.width > 3 * side


def test_a_folder_with_a_record_is_told_with_its_own_numbers(three_bits, tmp_path):
    page = tmp_path / "page.html"
    report_folder(three_bits, page)
    assert read(tmp_path / "page.json") == read(three_bits / "report.json")
    assert page.read_text() == (three_bits / "report.html").read_text()


def test_a_folder_without_a_record_is_measured_against_its_float_model(five_bits, tmp_path):
    record = report_folder(five_bits, tmp_path / "page.html", samples=2)
    (part,) = record.parts
    assert part.milliseconds is None
    assert "no summary" in part.missing["speed"]
    assert part.epsilon_sqnr_db > 20
    assert len(part.levels) == 8
    assert all(len(layer.by_level) == 8 for layer in part.layers if layer.kind != "Embedding")
    assert all(layer.kurtosis is not None for layer in part.layers)
    assert record.pictures.x0_sqnr_db > 0
    assert read(tmp_path / "page.json") == json.loads(json.dumps(plain(record.model_dump())))


CALLS = """
import torch

def calls():
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(3, 1, 8, 8, generator=generator)
    return [{"sample": sample, "timestep": torch.tensor([900, 500, 100])}]
"""


def test_all_numbers_of_a_report_on_own_calls_are_of_these(three_bits, model_folder, tmp_path):
    file = tmp_path / "own_calls.py"
    file.write_text(CALLS)
    calls = runpy.run_path(file)["calls"]()
    record = report_folder(three_bits, tmp_path / "page.html", inputs=f"{file}:calls", samples=0)
    (part,) = record.parts
    measured = compare(load_source(str(model_folder)).model, load(three_bits), calls)
    assert part.epsilon_sqnr_db == pytest.approx(measured.sqnr_db, abs=1e-6)
    assert part.epsilon_sqnr_db != read(three_bits / "summary.json")["epsilon_sqnr_db"]
    assert part.backend_epsilon_sqnr_db is None
    assert [point.sqnr_db for point in part.levels] == pytest.approx(
        [point.sqnr_db for point in measured.levels], abs=1e-6
    )


def test_without_its_float_model_a_folder_is_told_and_what_is_missing_is_said(
    three_bits, five_bits, model_folder, tmp_path
):
    gone = tmp_path / "gone"
    for folder in (three_bits, five_bits):
        moved = shutil.copytree(folder, tmp_path / folder.name)
        model_folder.rename(gone)
        try:
            record = report_folder(moved, tmp_path / "page.html", samples=2)
        finally:
            gone.rename(model_folder)
        assert "is gone" in record.missing["float"]
        assert record.pictures.count == 2
        assert record.pictures.x0_sqnr_db is None
        (part,) = record.parts
        stored = folder is three_bits
        assert bool(part.levels) is stored
        assert stored or "is gone" in part.missing["levels"]
        page = (tmp_path / "page.html").read_text()
        assert "Without the float model:" in page
        assert 'alt="quantized, picture 1' in page
        assert 'alt="float, picture 1' not in page


def test_a_damaged_folder_has_no_report(three_bits, tmp_path):
    broken = shutil.copytree(three_bits, tmp_path / "broken")
    with open(broken / "samples.png", "r+b") as file:
        file.seek(100)
        file.write(b"\0\1\2\3")
    with pytest.raises(ArtifactError, match=r"samples\.png"):
        report_folder(broken, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_without_the_extra_one_line_says_how_to_get_a_report(monkeypatch, caplog):
    monkeypatch.setattr(packages, "_PACKAGES", ("matplotlib", "no_such_package"))
    assert not renders()  # who foretells asks too, and says nothing
    assert not can_render()
    (line,) = caplog.messages
    assert line == (
        "no report is written, no_such_package is not installed: "
        'pip install "mpqdm-fx[report]", then mpqdm-fx report DIR'
    )


def test_folders_of_one_float_model_are_compared_on_the_same_noise(three_bits, five_bits, tmp_path):
    page = tmp_path / "compare.html"
    comparisons = compare_folders([three_bits, five_bits], page, samples=2)
    assert list(comparisons) == ["three", "five"]
    html = page.read_text(encoding="utf-8")
    for title in ("float", "three", "five", "three, difference", "five, difference"):
        assert f'alt="{title}' in html
    assert ">weight_bits<" in html.replace("<wbr>", "")
    assert "http" not in html


def test_folders_of_different_float_models_are_refused_by_name(three_bits, tmp_path):
    unet_folder = saved_unet(tmp_path / "other", seed=1)
    moved = shutil.copytree(three_bits, tmp_path / "moved")
    origin = read(moved / "source.json")
    with rewritten_folder(moved) as stage:
        (stage / "source.json").unlink()
        (stage / "source.json").write_text(json.dumps({**origin, "model": str(unet_folder)}))
    with pytest.raises(ArtifactError) as refusal:
        compare_folders([three_bits, moved], tmp_path / "compare.html")
    assert str(unet_folder) in str(refusal.value)
    assert origin["model"] in str(refusal.value)
    assert not (tmp_path / "compare.html").exists()
