"""`mpqdm-fx passes` and `trace --passes`: what runs on a graph, and the graph after it."""

import json

import laws
import pytest
from test_cli import run

from mpqdm_fx.passes import NORMALIZE, name_of


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_pass_is_listed_within_the_terminal_and_in_running_order(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    status, text = run("passes")
    assert status == 0
    assert max(map(len, text.splitlines())) <= width
    places = [text.index(f"  {name_of(type(entry))} ") for entry in NORMALIZE]
    assert places == sorted(places)
    status, text = run("passes", "--json")
    listed = [name for stage in json.loads(text) for name in stage["passes"]]
    assert set(listed) == {name_of(pass_class) for pass_class in laws.discover_passes()}


def test_the_graph_is_printed_after_the_passes_that_were_named(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\n"
        "def model():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout()).eval()\n"
        "def calls():\n"
        "    yield {'input': torch.ones(2, 4)}\n"
    )
    words = ["trace", f"{file}:model", "--inputs", f"{file}:calls"]
    passes = ["--passes", "drop-dropout,fold-batch-norm"]
    status, text = run(*words, *passes, "--print-after", "drop-dropout")
    assert status == 0, text
    assert "after drop-dropout: 3 nodes, changed" in text
    assert "after fold-batch-norm: 3 nodes, left as it was" in text
    assert text.count("graph():") == 1
    status, text = run(*words, *passes, "--print-after", "all")
    assert (status, text.count("graph():")) == (0, 2)
    status, text = run(*words, *passes)
    assert (status, text.count("graph():")) == (0, 1)
    status, text = run(*words, *passes, "--json")
    assert (status, "dropout" in text.lower()) == (0, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--passes", "drop-dropot"], "did you mean drop-dropout"),
        (["--print-after", "all"], "--print-after needs --passes"),
        (["--passes", "drop-dropout", "--print-after", "x"], "give all, or one of: drop-dropout"),
    ],
)
def test_a_wrong_pass_is_refused_in_one_line(words, message):
    status, text = run("trace", "digits", *words)
    assert (status, message in text) == (2, True), text
