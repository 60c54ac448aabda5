"""What a process keeps on disk goes with it, however it ends, and nobody else's goes."""

import multiprocessing
import os
import signal

from mpqdm_fx.io.files import sweep_abandoned
from mpqdm_fx.io.scratch import Scratch


def test_a_folder_is_private_and_goes_with_its_object(tmp_path):
    scratch = Scratch("values", tmp_path)
    assert scratch.folder.stat().st_mode & 0o777 == 0o700
    (scratch.folder / "file").write_text("value")
    sweep_abandoned(tmp_path, "values", "scratch")
    assert (scratch.folder / "file").read_text() == "value"
    del scratch
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_closing(tmp_path):
    scratch = Scratch("values", tmp_path / "new")
    scratch.close()
    scratch.close()
    assert list((tmp_path / "new").iterdir()) == []


def _killed(root):
    scratch = Scratch("values", root)
    (scratch.folder / "file").write_text("value")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_stays(tmp_path, caplog):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    (tmp_path / ".values.0123abcd.scratch.txt").write_text("another's")
    (tmp_path / ".values.0123abcd.scratch").symlink_to(tmp_path.parent)
    first = Scratch("values", tmp_path)
    assert not left.exists()
    assert f"{left} was left by a run that was killed" in caplog.text
    second = Scratch("values", tmp_path)
    assert first.folder.is_dir()
    assert second.folder != first.folder
    assert (tmp_path / ".values.0123abcd.scratch").is_symlink()
    assert len(list(tmp_path.iterdir())) == 4
