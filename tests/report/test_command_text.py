"""The command of a report asks for what was done."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpqdm_fx.cli.app import app
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.jobs import export as export_job
from mpqdm_fx.jobs import quantize as quantize_job
from mpqdm_fx.jobs.command_text import distill_command, export_command, quantize_command
from mpqdm_fx.jobs.export import ExportRuns, export_to_folder
from mpqdm_fx.records.config import MPQConfig


class AskedError(Exception):
    """Stands for the work: what the command would have done."""


def settings_of(command, monkeypatch):
    """The settings that a typed command gets as far as starting with."""

    def start(form, config, output, **_):
        raise AskedError(config, form, output)

    monkeypatch.setattr(quantize_job, "check_start", start)
    words = shlex.split(command)
    assert words.pop(0) == "mpqdm-fx"
    result = CliRunner().invoke(app, words, obj={})
    assert isinstance(result.exception, AskedError), (result.output, result.exception)
    return result.exception.args


SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_bits": 2, "activation_mode": "dynamic", "levels": "int4", "seed": 7},
        {"effective_bits": 3.5, "rounding": "nearest", "propagation": 0.5, "slowdown": 1.25},
        {"weight_bytes": 100_000, "refinements": 0, "noise_argument": "timestep"},
        {
            "allocation": "omq",
            "overrides": [
                {"pattern": "mid_block.*", "weight_bits": 5},
                {"pattern": "re:up.*conv[12]", "weight_bits": 3, "activation_bits": 4},
                {"pattern": "conv out", "skip": True},
                {"pattern": "a", "activation_bits": 8},
            ],
        },
    ],
)


@SETTINGS
def test_the_command_has_the_settings_that_it_was_made_of(settings, monkeypatch):
    config = MPQConfig(**settings)
    options = {"--backend": "packed", "--output": "some where", "--compress": False}
    command = quantize_command("digits", config, options)
    parsed, form, output = settings_of(command, monkeypatch)
    assert parsed == config
    assert (form.backend, output) == ("packed", Path("some where"))


def exported_with(monkeypatch, *arguments, **options):
    """What the command of an export's report asks for, when it is typed."""
    calls = []
    monkeypatch.setattr(
        export_job, "export_pipeline", lambda *_, **keywords: calls.append(keywords)
    )
    export_to_folder(*arguments, **options)
    words = shlex.split(calls.pop()["command"])

    def start(*arguments, **options):
        raise AskedError(*arguments, options)

    monkeypatch.setattr(export_job, "export_to_folder", start)
    assert words.pop(0) == "mpqdm-fx"
    result = CliRunner().invoke(app, words, obj={})
    assert isinstance(result.exception, AskedError), (result.output, result.exception)
    return result.exception.args


@SETTINGS
def test_the_command_of_an_export_has_its_settings_and_runs(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat")
    runs = ExportRuns(
        sizes=[(16, 24), (32, 32)], prompts=Path("prompts.txt"), steps=3, guidance=2.5,
        trajectories=5, samples=1,
    )  # fmt: skip
    form = {"minimum_sqnr_db": 12.5, "tabulate": True, "four_bit": "split"}
    form |= {"external_weights": True, "compress": True, "encoder_bits": 4}
    config = MPQConfig(**{"weight_bits": 8, **settings})  # unread where there is a budget
    name, parsed, output, parsed_runs, options = exported_with(
        monkeypatch, "my sd", config, Path("some where"), runs, **form
    )
    assert (name, parsed, output, parsed_runs) == ("my sd", config, Path("some where"), runs)
    assert {key: options[key] for key in form} == form


def test_the_command_of_an_export_in_float_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = exported_with(monkeypatch, "sd", None, Path("out"), ExportRuns())
    assert parsed[:4] == ("sd", None, Path("out"), ExportRuns())


def test_settings_without_an_option_have_no_command():
    assert quantize_command("digits", MPQConfig(max_rows=100), {}) is None
    assert export_command("sd", MPQConfig(max_rows=100), {}) is None
    assert distill_command(Path("a"), DistillConfig(updates=1, ema=0.5), {}) is None


def test_a_training_is_told_with_its_time_its_updates_and_what_differs():
    config = DistillConfig(seconds=90.0, updates=40, rank=4, seed=3, guidance_scale=2.5)
    command = distill_command(Path("a b"), config, {"--output": "c", "--model": None})
    assert command == (
        "mpqdm-fx distill 'a b' --budget 90s --updates 40 --rank 4 --guidance 2.5 --seed 3 "
        "--output c"
    )
