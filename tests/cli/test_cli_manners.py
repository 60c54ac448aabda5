"""Help in panels, choices, short names, completion, and words of who typed the command."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from typing import get_args

import pytest
import typer
from typing_in import typed

import mpqdm_fx
from mpqdm_fx.cli import app as cli
from mpqdm_fx.cli.boundary import tell
from mpqdm_fx.cli.examples import EXAMPLES
from mpqdm_fx.cli.panels import BITS, CALIBRATION, MODEL, PROGRAM, RUN
from mpqdm_fx.cli.settings import SETTINGS
from mpqdm_fx.cli.spelling import as_typed, option_of
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import MPQConfig

GROUP = typer.main.get_command(cli.app)
COMMANDS = GROUP.commands


def parse(words):
    """What a command makes of its arguments, without running it."""
    command = COMMANDS[words[1]]
    return command.make_context(words[1], list(words[2:])).params


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_its_help_with_two_examples_that_parse(name):
    assert len(EXAMPLES[name]) >= 2
    for example in EXAMPLES[name]:
        words = shlex.split(example)
        assert words[:2] == ["mpqdm-fx", name]
        parse(words)
        assert example in COMMANDS[name].epilog


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_panel_and_a_help(name):
    command = COMMANDS[name]
    params = command.get_params(command.make_context(name, [] if name == "passes" else ["x"]))
    options = [param for param in params if param.opts[0].startswith("-")]
    assert options
    for param in options:
        assert param.rich_help_panel in (MODEL, BITS, CALIBRATION, PROGRAM, RUN), param.name
        assert param.help, param.name


def test_the_panels_stand_in_one_order_whatever_the_signature(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    _, text, _ = typed(monkeypatch, capsys, "quantize", "--help")
    panels = re.findall(r"─ (\w+) ─", text)
    assert panels == ["Arguments", MODEL, BITS, CALIBRATION, PROGRAM, RUN]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_written_has_a_short_name_and_a_word_for_replacing_it(name):
    options = {text for param in COMMANDS[name].params for text in param.opts}
    assert ("--output" in options) == ("-o" in options)
    assert ("--output" in options) <= ("--overwrite" in options)
    assert "--json" in options


@pytest.mark.parametrize(
    ("name", "option", "word"),
    [
        ("quantize", "--backend", "Packed"),
        ("quantize", "--activation-mode", "STATIC"),
        ("quantize", "--allocation", "Omq"),
        ("quantize", "--levels", "Int4"),
        ("quantize", "--rounding", "NEAREST"),
        ("quantize", "--four-bit", "Never"),
        ("export", "--levels", "Int4"),
        ("distill", "--relation", "TRD"),
        ("sample", "--from", "PTE"),
    ],
)
def test_choices_are_listed_taken_in_any_case_and_refused_by_name(
    monkeypatch, capsys, name, option, word
):
    parameter = next(param for param in COMMANDS[name].params if option in param.opts)
    assert parse(["mpqdm-fx", name, "digits", option, word])[parameter.name] == word.lower()
    status, _, err = typed(monkeypatch, capsys, name, "digits", option, "best")
    assert status == 2
    assert f"error: {option} best: choose one of " in err
    assert repr(word.lower()) in err


def test_bits_that_encoders_have_are_listed_and_others_refused(monkeypatch, capsys):
    assert parse(["mpqdm-fx", "export", "sd", "--encoder-bits", "4"])["encoder_bits"] == 4
    status, _, err = typed(monkeypatch, capsys, "export", "sd", "--encoder-bits", "5")
    assert status == 2
    assert "error: --encoder-bits 5: choose one of '4', '8'" in err


def test_the_words_of_options_are_those_of_the_library():
    from mpqdm_fx.cli.distill import Relation as TypedRelation
    from mpqdm_fx.cli.sample import Form
    from mpqdm_fx.distill.config import Relation
    from mpqdm_fx.sources.denoisers import FORMS

    assert get_args(TypedRelation) == get_args(Relation)
    assert get_args(Form) == FORMS


#: Of every setting a value that is out of range.
WRONG = {
    "weight_bits": 9,
    "activation_bits": 0,
    "activation_mode": "late",
    "activation_allocation": "best",
    "activation_levels": "odd",
    "weight_storage": "loose",
    "slowdown": 0.5,
    "allocation": "best",
    "effective_bits": 0.5,
    "weight_bytes": -3,
    "levels": "odd",
    "rounding": "up",
    "refinements": 65,
    "propagation": 1.5,
    "noise_argument": 3,
    "overrides": 3,
    "seed": -1,
}


@pytest.mark.parametrize("parameter", SETTINGS)
def test_a_setting_is_refused_by_the_name_of_its_option(parameter):
    field = SETTINGS[parameter][0]
    with pytest.raises(ConfigError) as raised:
        MPQConfig(**{field: WRONG[field]})
    line = tell(raised.value, {}).line
    value = str(WRONG[field])
    assert f"{option_of(parameter)} {value}: give " in line
    names = {entry.name for entry in dataclasses.fields(MPQConfig) if "_" in entry.name}
    assert not names & set(re.findall(r"\w+", line)), line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_told_as_it_is_typed(name):
    options = {param.name: max(param.opts, key=len) for param in COMMANDS[name].params}
    for parameter, option in options.items():
        field = SETTINGS[parameter][0] if parameter in SETTINGS else parameter
        text = as_typed(f"{field}=3 (int): give 'a' or 'b'", options)
        assert text == f"{option} 3: give 'a' or 'b'"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "give effective_bits or weight_bytes, not both",
            "give --effective-bits or --weight-bytes, not both",
        ),
        (
            'choose activation_mode="a" or "b" or backend="packed"',
            "choose --activation-mode a or b or --backend packed",
        ),
        (
            "effective_bits is a budget for allocation='measured'",
            "--effective-bits is a budget for --allocation measured",
        ),
        ("num_trajectories=2: too few; resume=True", "--trajectories 2: too few; --resume"),
        ("updates=..., seconds=..., or both", "--updates ..., --budget ..., or both"),
        ("override 'a*' matches no layer", "--override 'a*' matches no layer"),
        # words of the language, paths and keys of files are no options
        ("levels of noise in 3 steps; seed of it", "levels of noise in 3 steps; seed of it"),
        ("/tmp/weight_bits/x, a.weight_bits, 'weight_bits'", None),
    ],
)
def test_a_message_names_options_and_leaves_other_words(message, expected):
    names = ("trajectories", "resume", "updates", "budget")
    assert as_typed(message, {name: option_of(name) for name in names}) == (expected or message)


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    status, out, _ = typed(monkeypatch, capsys, "--version")
    assert (status, out) == (0, f"mpqdm-fx {mpqdm_fx.__version__}\n")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", mpqdm_fx.__version__)


def test_completion_can_be_installed():
    assert {"--install-completion", "--show-completion"} <= {
        text for param in GROUP.params for text in param.opts
    }


QUICK = {
    "help": ["--help"],
    "version": ["--version"],
    "help of a command": ["quantize", "--help"],
    "a command that is none": ["quantise", "digits"],
    "an option that is none": ["quantize", "digits", "--weigths", "3"],
    "a choice that is none": ["quantize", "digits", "--backend", "tflite"],
    "a setting out of range": ["quantize", "digits", "--weights", "9"],
    "a model that is none": ["quantize", "no/where"],
}
_TIMED = """
import sys, time, mpqdm_fx.cli.app as app
sys.argv = ["mpqdm-fx", *sys.argv[1:]]
try:
    app.main()
finally:
    heavy = [name for name in ("torch", "diffusers", "safetensors.torch") if name in sys.modules]
    print("loaded", heavy, "seconds", time.process_time(), file=sys.stderr)
"""


@pytest.mark.parametrize("words", QUICK.values(), ids=QUICK)
def test_an_answer_that_needs_no_model_loads_no_torch(words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _TIMED, *words],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert "loaded [] " in done.stderr, done.stderr
    # 0.2 to 0.4 s of a free core; twice that where neighbours share its caches
    assert float(done.stderr.split()[-1]) < 1.2
    assert list(tmp_path.iterdir()) == []
