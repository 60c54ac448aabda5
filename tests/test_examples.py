import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpqdm_fx.cli.app import app

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

LONG = {"quantize_digits"}
SAID = {
    "quantize_digits": r"3\.\d\d effective bits.*same numbers: True",
    "write_a_pass": r"modified: True; .*again: modified False.*untouched: True",
}


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.matrix] if path.stem in LONG else [])
        for path in EXAMPLES
        if path.stem in SAID
    ],
)
def test_an_example_runs_as_written_and_says_what_it_should(example, tmp_path):
    result = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.search(SAID[example.stem], result.stdout, re.DOTALL), result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.matrix
@pytest.mark.xnnpack
def test_the_strangers_model_becomes_a_program(tmp_path):
    """Downloads a wheel of 42 MB; takes minutes."""
    pytest.importorskip("onnx", reason="reads the model's file: pip install -e '.[bench]'")
    example, program = ROOT / "examples" / "stranger.py", tmp_path / "terrain.pte"
    options = ["--weights", "8", "--runs", "2", "--output", str(program)]
    result = subprocess.run(
        [sys.executable, str(example), *options], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"sigma 80: \d.*sigma 0\.3: \d.*terrains of the program: \d", result.stdout, re.S
    )
    assert program.exists()
    assert program.with_suffix(".png").exists()


@pytest.mark.matrix
@pytest.mark.xnnpack
def test_the_phone_example_draws_from_cpp_what_diffusers_draws(tmp_path):
    """Quantizes digits and compiles with g++; takes minutes."""
    folder = str(tmp_path / "out")
    quantize = ["-m", "mpqdm_fx", "quantize", "digits", "--preset", "quick", "-o", folder]
    compare = [str(ROOT / "examples" / "phone" / "run.py"), folder, "--label", "3"]
    for command in (quantize, compare):
        result = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
    assert "C++ and diffusers are" in result.stdout


def test_every_example_is_run_by_a_test():
    assert {example.stem for example in EXAMPLES} == {*SAID, "stranger"}


@pytest.mark.matrix
def test_the_readmes_python_runs_as_written(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} >= {"packed", "unet.pte"}


def test_the_readme_names_every_example_and_its_commands_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for example in EXAMPLES:
        assert f"examples/{example.name}" in readme
    commands = set(re.findall(r"mpqdm-fx ([a-z]+)", readme))
    assert commands == {
        command.name or command.callback.__name__ for command in app.registered_commands
    }
