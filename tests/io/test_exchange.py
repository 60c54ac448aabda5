"""A result is the old one or the new one, at every moment and after every end of a run."""

import os
import subprocess
import sys
import threading

import pytest

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io import exchange, files
from mpqdm_fx.io.exchange import remove_folder, replace_folder, staged_folder, sweep_leftovers


def write(target, text):
    with staged_folder(target) as stage:
        (stage / "file").write_text(text)


def only(tmp_path, target, text):
    assert (target / "file").read_text() == text
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "out"
    write(target, "first")
    write(target, "second")
    only(tmp_path, target, "second")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_block_that_ends_badly_leaves_the_old_folder(tmp_path, error):
    target = tmp_path / "out"
    write(target, "first")

    def fail():
        with staged_folder(target) as stage:
            (stage / "file").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    only(tmp_path, target, "first")


@pytest.mark.parametrize("one_step", [True, False])
def test_a_replacement_that_fails_is_rolled_back(tmp_path, monkeypatch, one_step):
    target, stage = tmp_path / "out", tmp_path / "stage"
    write(target, "first")
    if not one_step:
        monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    with pytest.raises(ArtifactError, match="as it was"):
        replace_folder(stage, target)  # there is no stage
    only(tmp_path, target, "first")


def test_without_an_exchange_in_one_step_the_result_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    target = tmp_path / "out"
    write(target, "first")
    write(target, "second")
    only(tmp_path, target, "second")


def test_a_kill_between_two_renames_is_mended_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    target = tmp_path / "out"
    write(target, "first")
    target.rename(tmp_path / ".out.01234567.stage.old")  # what the kill leaves
    sweep_leftovers(target)
    only(tmp_path, target, "first")


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="needs an exchange in one step")
def test_a_reader_finds_a_whole_folder_at_every_moment(tmp_path):
    target = tmp_path / "out"
    write(target, "0")
    missed, done = [], threading.Event()

    def read():
        while not done.is_set():
            descriptor = os.open(target, os.O_RDONLY)  # fails if there is no folder
            os.close(descriptor)
            missed.append(not target.exists())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(150):
        write(target, str(number))
    done.set()
    reader.join()
    assert missed
    assert not any(missed)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    target, link = tmp_path / "real", tmp_path / "link"
    write(target, "first")
    link.symlink_to(target)
    write(link, "second")
    assert link.is_symlink()
    assert (target / "file").read_text() == "second"


KILLED = """
import os, pathlib, sys
from mpqdm_fx.io.exchange import staged_folder
with staged_folder(pathlib.Path(sys.argv[1])) as stage:
    (stage / "file").write_text("half")
    print(stage, flush=True)
    sys.stdin.read()
"""


def test_stages_of_killed_runs_are_swept_and_those_of_running_ones_are_not(tmp_path, caplog):
    target = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stage = run.stdout.readline().strip()
    write(target, "while the other one runs")
    assert (target.parent / stage / "file").read_text() == "half"
    assert stage not in caplog.text
    run.kill()
    run.wait()
    run.stdin.close()
    run.stdout.close()
    write(target, "next")
    only(tmp_path, target, "next")
    assert stage in caplog.text


def test_names_that_only_look_like_stages_are_left_alone(tmp_path):
    target = tmp_path / "out"
    (tmp_path / ".out.notahash.stage").mkdir()
    (tmp_path / ".other.01234567.stage").mkdir()
    (tmp_path / ".out.01234567.stage").symlink_to(tmp_path)
    before = sorted(tmp_path.iterdir())
    sweep_leftovers(target)
    assert sorted(tmp_path.iterdir()) == before


def test_a_removed_folder_is_never_seen_half(tmp_path, monkeypatch):
    target = tmp_path / "out"
    remove_folder(target)  # there is none
    write(target, "first")
    states = []
    remove = files.shutil.rmtree

    def watched(path, **options):
        states.append(target.exists())
        remove(path, **options)

    monkeypatch.setattr(files.shutil, "rmtree", watched)
    remove_folder(target)
    assert states == [False]
    assert list(tmp_path.iterdir()) == []
