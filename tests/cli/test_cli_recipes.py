"""`--preset` and `--config`: what stands for options that were not typed."""

import json

import pytest
from test_cli import run

from mpqdm_fx.cli import app as cli
from mpqdm_fx.jobs.presets import PRESET_NAMES, PRESETS, RECIPE, read_recipe, write_recipe
from mpqdm_fx.records.config import MPQConfig, Override

SETTINGS = MPQConfig(
    weight_bits=3, effective_bits=3.5, refinements=7, seed=5, activation_mode="dynamic",
    overrides=[Override(pattern="mid*", weight_bits=6)],
)  # fmt: skip


class Begun(BaseException):
    """The command began its work."""


@pytest.fixture
def start_of(monkeypatch):
    """What a command would start its work with."""

    def started(*arguments):
        values = {}

        def record(form, config, output, **options):
            values.update(form=form, config=config, output=output)
            raise Begun

        monkeypatch.setattr("mpqdm_fx.jobs.quantize.check_start", record)
        with pytest.raises(Begun):
            run("quantize", "digits", *arguments)
        return values

    return started


@pytest.fixture
def recipe(tmp_path):
    write_recipe(tmp_path, SETTINGS)
    return tmp_path / RECIPE


def test_a_recipe_reads_back_as_the_settings_that_were_written(recipe):
    assert read_recipe(recipe) == SETTINGS
    assert read_recipe(recipe.parent) == SETTINGS  # the folder that holds it


def test_a_recipe_stands_for_all_options_that_were_not_typed(start_of, recipe):
    assert start_of("--config", recipe)["config"] == SETTINGS


def test_options_that_are_typed_win_over_the_recipe(start_of, recipe):
    start = start_of(
        "--config", recipe, "--refinements", 4, "--seed", 0, "--activation-mode", "AUTO"
    )
    settings = {**SETTINGS.to_dict(), "refinements": 4, "seed": 0, "activation_mode": "dynamic"}
    assert start["config"].to_dict() == MPQConfig.from_dict(settings).to_dict()
    assert start_of("--config", recipe, "--override", "conv_in=8")["config"].overrides == (
        Override(pattern="conv_in", weight_bits=8),
    )


@pytest.mark.parametrize(
    ("typed", "budget"),
    [
        (["--weights", 4], (4, None, None)),
        (["--weight-bytes", 900000], (3, None, 900000)),
        (["--effective-bits", 4.5], (3, 4.5, None)),
    ],
)
def test_a_budget_that_is_typed_takes_the_place_of_the_recipes(start_of, recipe, typed, budget):
    config = start_of("--config", recipe, *typed)["config"]
    assert (config.weight_bits, config.effective_bits, config.weight_bytes) == budget


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_preset_gives_what_it_documents(start_of, name):
    start = start_of("--preset", name.upper(), "--backend", "packed")
    options = PRESETS[name].options
    assert start["config"].weight_bits == options["weights"]
    assert start["config"].allocation == options.get("allocation", "measured")
    assert not start["form"].compress


def test_a_presets_options_for_programs_are_for_programs_alone(start_of):
    assert start_of("--preset", "small")["form"].compress
    assert not start_of("--preset", "small", "--backend", "packed")["form"].compress


def test_options_that_are_typed_win_over_the_preset(start_of):
    config = start_of("--preset", "quick", "--weights", 8, "--allocation", "measured")["config"]
    assert (config.weight_bits, config.allocation, config.refinements) == (8, "measured", 0)
    # also where what is typed is the default
    assert start_of("--preset", "small", "--weights", 4)["config"].weight_bits == 4


def test_balanced_is_what_no_preset_is(start_of):
    assert start_of("--preset", "balanced") == start_of()


def test_every_preset_names_options_that_there_are():
    import inspect

    known = set(inspect.signature(cli.quantize).parameters)
    for preset in PRESETS.values():
        assert set(preset.options) | set(preset.program) <= known


@pytest.mark.parametrize("command", ["quantize", "export", "plan"])
def test_the_help_says_what_each_preset_is_for(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    status, text = run(command, "--help")
    assert status == 0
    assert all(preset.purpose[:40] in " ".join(text.split()) for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "corrupted or truncated"),
        ("[]", "recipe.json"),
        ('{"settings": {}}', "is no recipe"),
        ('{"format": "mpqdm-fx recipe", "version": 9, "settings": {}}', "update mpqdm-fx"),
        ('{"format": "mpqdm-fx recipe", "version": 1}', "is damaged: settings: Field required"),
        ('{"format": "mpqdm-fx recipe", "version": 1, "settings": 3}', "is damaged: settings"),
        (
            '{"format": "mpqdm-fx recipe", "version": 1, "settings": {"weight_bit": 3}}',
            "unknown setting 'weight_bit'; did you mean 'weight_bits'?",
        ),
        (
            '{"format": "mpqdm-fx recipe", "version": 1, "settings": {"weight_bits": 12}}',
            "from 1 to 8",
        ),
    ],
)
def test_a_damaged_or_foreign_recipe_is_refused_in_one_line(
    tmp_path, monkeypatch, content, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / RECIPE).write_text(content)
    status, text = run("quantize", "digits", "--config", RECIPE)
    assert (status, message in text) == (2, True), text
    assert "\n" not in text.strip()
    assert [path.name for path in tmp_path.iterdir()] == [RECIPE]


def test_a_missing_recipe_is_refused(tmp_path):
    status, text = run("quantize", "digits", "--config", tmp_path / "none.json")
    assert (status, "none.json" in text) == (2, True)


def test_preset_and_config_together_are_refused(recipe):
    status, text = run("quantize", "digits", "--config", recipe, "--preset", "small")
    assert (status, "give one of the two" in text) == (2, True)


def test_what_is_typed_has_to_fit_the_recipe(recipe):
    status, text = run("quantize", "digits", "--config", recipe, "--allocation", "uniform")
    assert (status, "--config" in text, "budget for" in text) == (2, True, True)


def test_the_recipe_of_a_folder_is_json_for_people(recipe):
    assert json.loads(recipe.read_text())["settings"]["refinements"] == 7
