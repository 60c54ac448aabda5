"""Runs that were not finished: one rule for who may go on with a folder."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.unfinished import UnfinishedRun

RUN = {"settings": {"seed": 0}, "model": "a"}


def start(folder, identity=RUN, *, resume=False):
    return UnfinishedRun(folder, "run.json", identity, resume=resume, solved="part-*")


def test_a_run_begins_goes_on_and_is_told_from_others(tmp_path):
    folder = tmp_path / "new" / "run"
    begun = start(folder)
    assert json.loads((folder / "run.json").read_text()) == RUN
    assert start(folder).digest == begun.digest  # nothing is solved yet
    (folder / "part-1").touch()
    with pytest.raises(ConfigError, match="was not finished; resume it"):
        start(folder)
    assert start(folder, resume=True).digest == begun.digest
    with pytest.raises(ConfigError, match=r"other settings: settings\.seed was 0, is 1"):
        start(folder, {**RUN, "settings": {"seed": 1}}, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["part-1", "run.json"]


def test_a_setting_that_is_gone_makes_another_run_where_all_is_compared(tmp_path):
    start(tmp_path / "run", {**RUN, "older": True})
    with pytest.raises(ConfigError, match="older was True, is None"):
        start(tmp_path / "run", resume=True)
    assert UnfinishedRun.check(tmp_path / "run", "run.json", RUN, resume=True, solved="part-*")


def test_checking_writes_nothing_and_finds_no_run_where_none_is(tmp_path):
    assert not UnfinishedRun.check(tmp_path / "run", "run.json", RUN, resume=True, solved="*")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_somebody_elses_folder_or_file_is_left_alone(tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("run", "file"):
        with pytest.raises(ArtifactError, match=r"in the way: it holds no run\.json"):
            start(tmp_path / name, resume=resume)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@given(text=st.text(max_size=40))
def test_a_damaged_header_is_an_error_of_ours(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises((ArtifactError, ConfigError)):
        start(folder, resume=True)
