"""Commands that are stopped by real signals: nothing half-written, and the rest can be resumed."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from small import tiny_unet
from typing_in import typed

QUANTIZE = ["quantize", "model", "--backend", "packed", "--weights", 2, "--allocation", "uniform"]
QUANTIZE += ["--trajectories", 2, "--steps", 2, "--samples", 1, "--refinements", 0]
#: Comes first where the step that runs takes more than three seconds, as on a busy machine.
NOTICE = "stopping after the step that runs now; Ctrl-C again ends it at once"
EXPECTED = {"config.json", "model.safetensors", "mpqdm.json", "parity.json"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    tiny_unet().save_pretrained(tmp_path / "model")
    DDIMScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def signal_in(file, number):
    """Send a signal to this process once its main thread is inside a file of the package."""
    main, done = threading.main_thread().ident, threading.Event()

    def is_there():
        frame = sys._current_frames().get(main)
        while frame is not None:
            if frame.f_code.co_filename.endswith(file):
                return True
            frame = frame.f_back
        return False

    def watch():
        while not done.wait(0.002):
            if is_there():
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, done


def stopped_in(monkeypatch, capsys, file, number, *words):
    thread, done = signal_in(file, number)
    try:
        return typed(monkeypatch, capsys, *words)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("calibration/trajectories.py", signal.SIGINT),
        ("sweep/solve.py", signal.SIGTERM),
        pytest.param("jobs/result_folder.py", signal.SIGTERM, marks=pytest.mark.matrix),
        pytest.param("parity/compare_forms.py", signal.SIGINT, marks=pytest.mark.matrix),
    ],
)
def test_a_stopped_run_says_so_and_leaves_nothing_half_written(
    place, monkeypatch, capsys, file, number
):
    status, out, err = stopped_in(monkeypatch, capsys, file, number, *QUANTIZE, "--output", "out")
    assert (status, out) == (128 + number, "")
    assert f"stopped by {number.name}; out holds nothing half-written; go on with --resume" in err
    assert {path.name for path in place.iterdir()} <= {"model", "out.checkpoint"}


@pytest.mark.matrix
def test_a_stopped_run_goes_on_with_resume(place, monkeypatch, capsys):
    words = [*QUANTIZE, "--output", "out"]
    assert stopped_in(monkeypatch, capsys, "sweep/solve.py", signal.SIGTERM, *words)[0] == 143
    status, _, err = typed(monkeypatch, capsys, *words, "--resume")
    assert status == 0, err
    assert {path.name for path in place.iterdir()} == {"model", "out"}
    assert {path.name for path in (place / "out").iterdir()} >= EXPECTED


@pytest.mark.xnnpack
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_run_that_is_stopped_while_it_lowers_leaves_nothing(place, monkeypatch, capsys, number):
    words = [*QUANTIZE, "--output", "out", "--backend", "xnnpack"]
    status, _, _ = stopped_in(monkeypatch, capsys, "xnnpack/lower.py", number, *words)
    assert status == 128 + number
    assert {path.name for path in place.iterdir()} <= {"model", "out.checkpoint"}


def test_the_process_itself_ends_with_one_line_and_the_status_of_the_signal(place):
    with subprocess.Popen(
        [sys.executable, "-m", "mpqdm_fx", *map(str, QUANTIZE), "--trajectories", "4000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        time.sleep(6)  # importing, or calibrating
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    lines = [line for line in err.splitlines() if line != NOTICE]
    messages = [
        line for line in lines if not re.match(r"quantizing |\[\d+/\d+\] |.*, after \d", line)
    ]  # progress
    assert (out, len(messages)) == ("", 1), err
    assert messages[0].startswith("stopped by SIGTERM; out holds nothing half-written")
    assert lines[-1] == messages[0]
    assert [path.name for path in place.iterdir()] == ["model"]


@pytest.mark.matrix
def test_torchrun_passes_a_stop_on_and_nothing_is_left(place):
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         "-m", "mpqdm_fx", *map(str, QUANTIZE), "--trajectories", "4000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        time.sleep(40)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert "stopped by SIGINT; out holds nothing half-written; go on with --resume" in err
    assert "stopped by SIGINT (process 1)" in err
    assert {path.name for path in place.iterdir()} <= {"model", "out.checkpoint"}
    assert not Path("out").exists()
