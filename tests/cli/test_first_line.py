"""The first line comes at once: it says what is about to be done, before torch is loaded."""

import json
import subprocess
import sys

REFUSED = """
import json, sys
from mpqdm_fx.cli.boundary import tell
from mpqdm_fx.cli.app import app

said = []
for words in json.loads(sys.argv[1]):
    try:
        app(words, standalone_mode=False)
    except Exception as error:
        said.append(tell(error, {}).line)
assert "torch" not in sys.modules
print(json.dumps(said))
"""

CODE = """
import json, sys
from importlib import import_module
from mpqdm_fx.cli.app import app

def first(text):
    said.append(str(text))
    raise SystemExit

said = []
for words in json.loads(sys.argv[1]):
    module = import_module(f"mpqdm_fx.cli.{words[0] if words[0] != 'plan' else 'quantize'}")
    module.announce = first
    try:
        app(words)
    except SystemExit:
        pass
assert "torch" not in sys.modules
print(json.dumps(said))
"""

WANTED = {
    "quantize digits --output x": "quantizing digits to x: 4-bit weights, 8-bit activations, "
    "xnnpack",
    "plan digits --weights 2 --activation-mode float --backend packed": "planning digits: 2-bit "
    "weights, float activations; nothing is written",
    "pareto digits --bits 2,2.5 --output x": "quantizing digits to x: 2, 2.5 bits a weight",
    "distill folder --budget 90s --output x": "training folder to x: 90s",
    "export folder --output x": "exporting folder to x: 8-bit weights, 8-bit activations",
    "verify folder": "verifying folder",
    "evaluate folder --num 8": "evaluating folder against its float model: 8 samples",
    "sample digits --num 4 --output x.png": "drawing 4 images of digits to x.png",
    "trace digits": "tracing digits",
    "doctor digits": "asking XNNPACK what it takes of digits",
    "report folder --output x.html": "reporting on folder to x.html",
}


IN_THE_WAY = {
    "quantize digits --output file": "this is a file; give a folder's name",
    "distill folder --output file": "this is a file; give a folder's name",
    "export folder --output file": "this is a file; give a folder's name",
    "export folder --keep-run file": "this is a file; give a folder's name",
    "pareto digits --output file": "this is a file; give a folder's name",
    "sample digits --output file.png": "it is there",
    "report folder --output file.html": "it is there",
    "compare folder other --output file.html": "it is there",
    "verify folder --output file": "it is there",
}


def test_what_is_in_the_way_is_refused_before_torch_is_loaded(tmp_path):
    words = json.dumps([text.split() for text in IN_THE_WAY])
    (tmp_path / "folder").mkdir()
    for name in ("file", "file.png", "file.html"):
        (tmp_path / name).write_text("mine")
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, words], capture_output=True, text=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text, said in zip(IN_THE_WAY, json.loads(done.stdout), strict=True):
        assert IN_THE_WAY[text] in said, text


def test_every_long_command_says_first_what_it_is_about_to_do(tmp_path):
    words = json.dumps([text.split() for text in WANTED])
    (tmp_path / "folder").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CODE, words], capture_output=True, text=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(WANTED.values())
