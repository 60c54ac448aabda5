"""What surrounds a command: one line of progress, and silence of the libraries."""

import inspect
import logging
import os
import re
import sys
from pathlib import Path

import pytest
import typer
from terminal import ERASE, drawn, in_pipes, in_terminal, python
from typing_in import typed

from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli import streams
from mpqdm_fx.cli.running import QuietOption, VerboseOption, remember, takes_loudness
from mpqdm_fx.cli.usage import Command
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.progress import expect, stage

JOB = """
import logging, os, sys, time, typer
from pathlib import Path
from mpqdm_fx.cli import options as opt, streams
from mpqdm_fx.cli.boundary import run
from mpqdm_fx.cli.usage import Command
from mpqdm_fx.cli.running import QuietOption, VerboseOption, remember, takes_loudness
from mpqdm_fx.io.progress import expect, leave_log, stage

def noise(text):
    os.write(2, f"{text} in C\\n".encode())
    print(f"{text} in Python", file=sys.stderr, flush=True)
    logging.getLogger("stranger").warning("%s by a stranger", text)

app = typer.Typer()

@app.callback()
def options(context: typer.Context, verbose: VerboseOption = False, quiet: QuietOption = False):
    remember(context, verbose=verbose, quiet=quiet)

def job(
    output: str = "", how: str = "well", slow: bool = False, as_json: opt.JsonOption = False
) -> None:
    streams.announce("quantizing digits to out")
    expect(lambda: {"rounding": 2.0, "lowering": 2.0})
    noise("noise")
    with stage("rounding", total=100) as advance:
        advance(40)
        time.sleep(1.2 if slow else 0)
        print("a print of the user's", flush=True)
        logging.getLogger("mpqdm_fx.graph").warning("a warning of ours")
        logging.getLogger("mpqdm_fx.graph").info("an info of ours")
    console = opt.console()  # before the end, as some commands have it
    if how == "badly":
        raise TypeError("a defect")
    if how == "killed":
        os.abort()
    with stage("lowering"):
        time.sleep(2.3 if slow else 0)
    if output:
        leave_log(Path(output))
    if as_json:
        console.print_json('{"done": 1}')
    else:
        console.print("done")

app.command(cls=Command)(takes_loudness(job))
run(app)
"""


def standing(written):
    """The lines that stand on a terminal on which a line is erased and written again."""
    lines = written.replace("\r\n", "\n").split("\n")
    return [line.rpartition(ERASE)[2] for line in lines]


@pytest.fixture(scope="module")
def terminal():
    return in_terminal(python(JOB, "job", "--slow"))


def test_one_line_is_drawn_again_and_gone_at_the_end(terminal):
    status, written = terminal
    assert status == 0
    assert [line for line in standing(written) if line] == [
        "quantizing digits to out",
        "a print of the user's",
        "a warning of ours",
        "done",
    ]
    assert written.count("\n") == 4  # the line never goes on to another one


def test_the_line_has_stage_share_and_time_and_ticks_where_nothing_is_told(terminal):
    states = drawn(terminal[1])
    assert any(re.match(r"\[1/2\] rounding 40 % · 0:01( of about \d:\d\d)?$", s) for s in states)
    lowering = [s for s in states if re.match(r"\[2/2\] lowering · 0:0\d of about \d:\d\d$", s)]
    assert len(set(lowering)) >= 2


def test_the_line_of_a_narrow_terminal_is_not_wider_than_it():
    _, written = in_terminal(python(JOB, "job", "--slow"), columns=30)
    assert max(len(state) for state in drawn(written)[1:-1] if state.startswith("[")) <= 29


def test_a_pipe_gets_one_line_a_stage_and_no_control_characters():
    status, out, err = in_pipes(python(JOB, "job"))
    assert (status, out) == (0, "a print of the user's\ndone\n")
    lines = [re.sub(r"after 0:0\d.*", "after", line) for line in err.splitlines()]
    assert lines == [
        "quantizing digits to out",
        "[1/2] rounding, after",
        "a warning of ours",
        "[2/2] lowering, after",
    ]
    assert "\x1b" not in err
    assert "\r" not in err


@pytest.mark.parametrize("words", [["--quiet", "job"], ["job", "-q"]])
def test_quiet_prints_nothing_before_or_after_the_name(words):
    assert in_pipes(python(JOB, *words)) == (0, "a print of the user's\n", "")


def test_quiet_prints_what_json_asks_for_and_errors():
    status, out, err = in_pipes(python(JOB, "job", "--quiet", "--json"))
    assert (status, out, err) == (0, 'a print of the user\'s\n{\n  "done": 1\n}\n', "")
    status, _, err = in_pipes(python(JOB, "job", "--quiet", "--how", "badly"))
    assert (status, err.count("\n")) == (70, 1)
    Path(err.split()[-1]).unlink()


@pytest.mark.parametrize("words", [["-v", "job"], ["job", "--verbose"]])
def test_verbose_shows_all_before_or_after_the_name(words):
    status, _, err = in_pipes(python(JOB, *words))
    assert status == 0
    for text in ("noise in C", "noise in Python", "noise by a stranger", "an info of ours"):
        assert text in err.splitlines()


@pytest.mark.parametrize("more", [[], ["--quiet"]])
def test_what_libraries_print_is_a_file_of_the_result(tmp_path, more):
    assert in_pipes(python(JOB, "job", "--output", str(tmp_path), *more))[0] == 0
    text = (tmp_path / "log.txt").read_text()
    assert text == "noise in C\nnoise in Python\nnoise by a stranger\n"


def test_a_defect_has_what_libraries_printed_in_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = in_pipes(python(JOB, "job", "--how", "badly"))
    assert status == 70
    text = Path(err.split()[-1]).read_text()
    assert "TypeError: a defect" in text
    assert "noise in C" in text


def test_a_process_that_is_killed_says_where_and_leaves_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    status, _, err = in_pipes(python(JOB, "job", "--how", "killed"))
    assert status < 0
    assert "Fatal Python error: Aborted" in err
    (log,) = tmp_path.glob("mpqdm-fx-*.log")
    assert "noise in C" in log.read_text()


def test_a_command_that_needs_no_temporary_folder_runs_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkstemp", refused)
    with streams.diverted() as log:
        os.write(2, b"noise")
        assert log.text() == ""


def refused(*_, **__):
    raise OSError("no usable temporary directory")


# ---------------------------------------------------------------- in this process


def command_of(body):
    app = typer.Typer()

    @app.callback()
    def options(
        context: typer.Context, verbose: VerboseOption = False, quiet: QuietOption = False
    ) -> None:
        remember(context, verbose=verbose, quiet=quiet)

    def job(as_json: opt.JsonOption = False) -> None:
        body()

    app.command(cls=Command)(takes_loudness(job))
    return app


def state():
    root = logging.getLogger()
    return sys.stderr, sys.stdout, list(root.handlers), logging.getLogger("mpqdm_fx").level


@pytest.mark.parametrize("error", [None, ConfigError("no"), TypeError("a defect")])
def test_nothing_that_is_installed_outlives_the_command(tmp_path, monkeypatch, capfd, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, descriptors = state(), set(os.listdir("/proc/self/fd"))

    def body():
        os.write(2, b"noise")
        if error is not None:
            raise error

    typed(monkeypatch, capfd, "job", app=command_of(body))
    assert state() == before
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert not [path for path in tmp_path.iterdir() if "-error-" not in path.name]
    os.write(2, b"back")
    assert capfd.readouterr().err == "back"


def test_a_child_process_is_heard_too(monkeypatch, capfd):
    heard = []

    def body():
        os.system("echo noise >&2")
        heard.append(sys.stderr)

    status, out, err = typed(monkeypatch, capfd, "job", app=command_of(body))
    assert (status, out, err) == (0, "", "")
    assert heard[0] is not sys.stderr


def test_only_the_first_process_of_several_shows_progress(monkeypatch, capfd):
    def body():
        streams.announce("quantizing")
        with stage("rounding"):
            logging.getLogger("mpqdm_fx.sweep").warning("a warning")

    monkeypatch.setenv("RANK", "1")
    status, _, err = typed(monkeypatch, capfd, "job", app=command_of(body))
    assert (status, err) == (0, "a warning\n")


def test_a_guess_that_fails_does_not_end_the_work(monkeypatch, capfd):
    def guess():
        raise ZeroDivisionError

    def body():
        expect(guess)
        with stage("rounding"):
            pass

    status, _, err = typed(monkeypatch, capfd, "job", app=command_of(body))
    assert status == 0
    assert err.startswith("rounding, after")
    status, _, err = typed(monkeypatch, capfd, "job", "-v", app=command_of(body))
    assert "what is to come cannot be foretold: ZeroDivisionError()" in err


def test_no_command_prints_errors_where_libraries_print():
    # only the end of the command line does: there, nothing is led away any more
    folder = Path(inspect.getfile(streams)).parent
    names = {path.name for path in folder.rglob("*.py") if "stderr=True" in path.read_text()}
    assert names == {"boundary.py"}
