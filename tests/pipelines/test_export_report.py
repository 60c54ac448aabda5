"""What an export measures is judged by gates and told by a report, which can be told again."""

import json
import shutil

import pytest
import tiny_pipelines
from conditioned import run
from eager_programs import eager_export

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.schema import validated
from mpqdm_fx.jobs.export import ExportRuns, check_export_gates, judge_export
from mpqdm_fx.report.export_metrics import EXPORTED, expected_export, export_metrics
from mpqdm_fx.report.gates import parse_gates
from mpqdm_fx.report.page import packages
from mpqdm_fx.report.record import ReportRecord


def read(folder, name="report.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def record_of(folder):
    return validated(ReportRecord, read(folder), "report.json")


@pytest.mark.xnnpack
def test_gates_are_judged_by_what_was_measured_and_the_folder_stays(export_run):
    summary = read(export_run.result.directory, "summary.json")
    printed = export_run.printed
    assert {key: printed[key] for key in export_run.result.manifest} == export_run.result.manifest
    assert (export_run.status, printed["passed"]) == (1, False)
    gates = {entry["metric"]: (entry["measured"], entry["passed"]) for entry in printed["gates"]}
    sizes = [
        (export_run.result.directory / f"{name}.pte").stat().st_size for name in summary["parts"]
    ]
    assert gates["bytes"] == (sum(sizes), True)
    assert gates["ms"] == (2 * summary["parts"]["denoiser"]["milliseconds"]["program"], True)
    assert gates["psnr"] == (summary["pictures"]["psnr_db"], True)
    assert gates["x0_sqnr"] == (summary["pictures"]["x0_sqnr_db"], False)


@pytest.mark.xnnpack
def test_every_metric_that_is_promised_is_in_the_summary(exported):
    measured = export_metrics(exported[1].summary)
    everything = {"quantized": True, "drawn": True, "likened": True, "peaks": True}
    assert measured.keys() == set(expected_export(**everything)) == EXPORTED.keys()
    parts = exported[1].summary["parts"].values()
    assert measured["peak_memory"] == max(part["peak_memory_bytes"]["program"] for part in parts)
    assert measured["ssim"] <= 1
    assert measured["backend_sqnr"] == pytest.approx(measured["epsilon_sqnr"], abs=3)


@pytest.mark.xnnpack
def test_the_report_tells_every_part_with_what_was_measured(exported):
    result = exported[1]
    record, summary = record_of(result.directory), result.summary
    assert [part.name for part in record.parts] == ["denoiser", "vae_decoder"]
    assert [part.name for part in record.float_parts] == ["text_encoder"]
    for part in (*record.parts, *record.float_parts):
        costs, calls = summary["parts"][part.name], summary["parts"][part.name]["calls_per_step"]
        assert part.shipped_bytes == costs["bytes"]
        assert part.milliseconds == max(1, calls) * costs["milliseconds"]["program"]
        assert part.peak_bytes == costs["peak_memory_bytes"]["program"]
        assert {p.subgraphs for p in part.programs} <= {0, 1, 2, 3}
    denoiser, decoder = record.parts
    assert denoiser.epsilon_sqnr_db == summary["denoiser_sqnr_db"]
    assert denoiser.backend_epsilon_sqnr_db == summary["backend_denoiser_sqnr_db"]
    assert [p.method for p in denoiser.programs] == ["denoise", "encode_prompt"]
    assert all(level.backend_sqnr_db is None for level in denoiser.levels)  # it was not measured
    plan = result.quantized["denoiser"].plan
    assert [(la.name, la.mean_bits) for la in denoiser.layers] == [
        (la.name, la.mean_bits) for la in plan.layers
    ]
    assert all(layer.kurtosis for part in record.parts for layer in part.layers)
    assert any(layer.by_level for layer in denoiser.layers)
    assert all(layer.known_sqnr_db > 30 for layer in decoder.layers)
    assert decoder.missing["levels"] == "it runs once per image and is told no noise level"
    (left,) = record.float_parts
    ratio = summary["parts"]["text_encoder"]["quantized_sqnr_db"]
    assert left.why.startswith(f"quantized to 8 bits its output has {ratio:.1f} dB")
    assert "less than the 40 dB of --minimum-sqnr" in left.why
    assert record.pictures is not None
    assert record.pictures.labels == ("a cat", "a dog", "three pears on a table", "a map")


@pytest.mark.xnnpack
def test_the_page_shows_pictures_parts_and_the_command(exported):
    result = exported[1]
    html = (result.directory / "report.html").read_text(encoding="utf-8")
    for title in ("float", "programs", "difference"):
        assert f'alt="{title}' in html
    for name in ("parts", "denoiser-heat", "vae_decoder-bits", "text_encoder-float", "made"):
        assert f'id="{name}"' in html
    command = record_of(result.directory).command
    assert command is not None
    assert command.startswith("mpqdm-fx export ")
    assert "--minimum-sqnr 40" in command
    assert command.endswith(f"--output {result.directory}")


@pytest.fixture
def copied(export_run, tmp_path):
    return shutil.copytree(export_run.result.directory, tmp_path / "copy")


@pytest.mark.xnnpack
def test_a_report_told_again_says_the_same(export_run, copied, tmp_path):
    page = tmp_path / "page.html"
    status, text = run("report", copied, "--output", page)
    assert status == 0, text
    assert read(tmp_path, "page.json") == read(copied)
    drawn = (copied / "report.html").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == drawn
    assert read(copied, "pipeline.json") == export_run.result.manifest


@pytest.mark.xnnpack
def test_a_float_pipeline_that_is_gone_or_another_is_not_drawn(copied, tmp_path):
    page, altered = tmp_path / "page.html", tmp_path / "other"
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    pipeline.unet.conv_in.weight.data += 1
    pipeline.save_pretrained(altered)
    status, text = run("report", copied, "--output", page, "--model", altered, "--samples", 1)
    assert status == 0, text
    record = read(tmp_path, "page.json")
    assert record["missing"]["float"].startswith(
        f"{altered} is not what was exported: its denoiser is another"
    )
    assert record["pictures"]["x0_sqnr_db"] is None
    html = page.read_text(encoding="utf-8")
    assert 'alt="programs, picture 1' in html
    assert 'alt="float' not in html
    gone = ["--model", tmp_path / "gone", "--samples", 0, "--overwrite"]
    assert run("report", copied, "--output", page, *gone)[0] == 0
    record = read(tmp_path, "page.json")
    assert "give --model" in record["missing"]["float"]
    assert record["missing"]["gallery"] == "no samples were asked for (--samples 0)"


@pytest.mark.xnnpack
def test_nothing_of_an_export_is_measured_on_calls(copied, tmp_path):
    status, text = run("report", copied, "-o", tmp_path / "p.html", "--inputs", "my.py:calls")
    assert status == 2
    assert "is an exported pipeline, of which nothing is measured again" in text


def test_without_the_extra_the_numbers_are_kept_for_a_later_page(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(packages, "_PACKAGES", ("no_such_package",))
    pipeline = tiny_pipelines.ddpm(tmp_path)
    eager_export(pipeline, tmp_path / "out", monkeypatch, steps=2, trajectories=2)
    assert any("no_such_package is not installed" in line for line in caplog.messages)
    assert not (tmp_path / "out" / "report.html").exists()
    record = record_of(tmp_path / "out")
    assert [part.why for part in record.float_parts] == [
        "all parts were to stay in float (--float)"
    ]
    assert record.missing["gallery"] == "no pictures were asked for (--samples 0)"
    monkeypatch.undo()
    status, text = run("report", tmp_path / "out", "-o", tmp_path / "p.html", "--samples", 0)
    assert status == 0, text
    assert "no float model" not in (tmp_path / "p.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("gate", "config", "samples", "message"),
    [
        ("epsilon_sqnr>=20", None, 4, "is not measured of an export in float"),
        ("seconds<=9", None, 4, "is not measured of an export in float"),
        ("psnr>=20", "w8", 0, r"is not measured of an export without pictures \(--samples 0\)"),
        ("backend_sqnr>=20", "w8", 0, "is not measured of an export without pictures"),
        ("lpips<=1", "w8", 4, "is not measured of an export; measured are: epsilon_sqnr"),
        ("parameter_bytes<=1", "w8", 4, "is not measured of an export;"),
    ],
)
def test_a_gate_on_what_will_not_be_measured_is_refused(gate, config, samples, message):
    settings = None if config is None else tiny_pipelines.cheap_settings()
    with pytest.raises(ConfigError, match=message):
        check_export_gates(parse_gates([gate]), settings, ExportRuns(samples=samples))


def test_what_could_not_be_measured_after_all_fails_its_gate(tmp_path, monkeypatch):
    pipeline = tiny_pipelines.ddpm(tmp_path)
    result, _ = eager_export(pipeline, tmp_path / "out", monkeypatch, steps=2, trajectories=2)
    gates = parse_gates(["psnr>=1", "bytes<=1GB"])
    names = check_export_gates(gates, tiny_pipelines.cheap_settings(), ExportRuns())
    assert [gate.passed for gate in judge_export(gates, result, names)] == [False, True]
