"""Commands that read a folder say their stages on a pipe: the ones that they foretold, in order."""

import re
import shutil
from dataclasses import replace

import pytest
from conditioned import source_in
from typing_in import typed

from mpqdm_fx.jobs.foretold import folder_stages


@pytest.fixture
def stages_of(monkeypatch, capfd, quantized, tmp_path):
    """The numbered lines of a command, which runs with the folder in the place of DIR."""
    monkeypatch.chdir(tmp_path)

    def lines(*words):
        arguments = [quantized if word == "DIR" else word for word in words]
        status, _, errors = typed(monkeypatch, capfd, *arguments)
        assert status == 0, errors
        matches = re.findall(r"^\[(\d+)/(\d+)\] (.*), after \d", errors, flags=re.M)
        return [(int(place), int(last), name) for place, last, name in matches]

    return lines


def check(lines, *names):
    """All of the stages come, each with its number; others may lie between them."""
    assert {last for _, last, _ in lines} == {len(names)}
    order = [name for place, _, name in lines if names[place - 1] == name]
    assert order == list(names)


def test_evaluate(stages_of):
    check(
        stages_of("evaluate", "DIR", "--num", 2, "--steps", 2),
        "loading", "float model's runs", "float outputs", "float samples", "quantized samples",
        "quantized outputs", "decoding", "metrics",
    )  # fmt: skip


def test_sample(stages_of):
    lines = stages_of("sample", "DIR", "--num", 2, "--steps", 2, "--output", "grid.png")
    check(lines, "loading", "drawing", "decoding")


def test_report(stages_of):
    lines = stages_of("report", "DIR", "--samples", 1, "--output", "page.html")
    check(lines, "loading", "drawing", "decoding", "page")
    check(stages_of("report", "DIR", "--samples", 0, "--output", "other.html"), "loading", "page")


def test_a_report_that_measures(stages_of, quantized, tmp_path):
    (tmp_path / "calls.py").write_text(
        "import torch\n"
        "def calls():\n"
        "    return [{'sample': torch.ones(1, 4, 8, 8), 'timestep': torch.tensor([3]),\n"
        "             'encoder_hidden_states': torch.ones(1, 12, 16)}]\n"
    )
    words = ["--samples", 0, "--inputs", tmp_path / "calls.py:calls"]
    lines = stages_of("report", "DIR", *words, "--output", "page.html")
    check(lines, "loading", "comparing outputs", "page")
    words = ["--inputs", tmp_path / "calls.py:calls"]
    check(stages_of("evaluate", "DIR", *words), "loading", "comparing outputs")


def test_compare(stages_of, quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "again")
    lines = stages_of(
        "compare", "DIR", "again", "--samples", 1, "--steps", 2, "--output", "page.html"
    )
    check(lines, "loading", "drawing", "decoding", "page")


def test_verify(stages_of):
    check(stages_of("verify", "DIR"), "loading", "tracing", "comparing forms")


def test_verify_that_stores(stages_of, quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "own")
    lines = stages_of("verify", "own", "--store")
    check(lines, "loading", "float model's runs", "tracing", "comparing forms")


def test_a_job_that_draws_latents_foretells_their_decoding(pipeline):
    source = source_in(pipeline[1])
    names = list(folder_stages(source, "packed", 2))
    assert names.index("decoding") == names.index("drawing") + 1
    alone = replace(source, components=None)
    assert set(names) - set(folder_stages(alone, "packed", 2)) == {"decoding"}
