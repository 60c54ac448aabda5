"""Every exception is one line and an exit status: the table of causes, all of them real."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typing_in import typed

from mpqdm_fx.cli.boundary import KINDS, tell
from mpqdm_fx.cli.usage import Command
from mpqdm_fx.errors import ConfigError


def below_a_file(folder):
    (folder / "file").write_text("mine")
    (folder / "file" / "new").mkdir()


def full_disk(folder):
    with open("/dev/full", "w") as file:
        file.write("x" * 10_000)


def read_only(folder):
    (Path("/proc") / folder.name).mkdir()


@contextmanager
def limited(kind, limit):
    old = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, old)


def file_size_limit(folder):
    with limited(resource.RLIMIT_FSIZE, 1000):
        (folder / "large").write_bytes(bytes(10_000))


def file_size_limit_for_tensors(folder):
    with limited(resource.RLIMIT_FSIZE, 1000):
        save_file({"a": torch.zeros(2**16)}, folder / "large")


def too_many_files(folder):
    with limited(resource.RLIMIT_NOFILE, 3):
        open(os.devnull)  # noqa: SIM115 - never opened


def long_name(folder):
    (folder / ("x" * 300)).write_text("x")


def missing_file(folder):
    (folder / "nothing").read_text()


def no_memory(folder):
    bytearray(2**60)


def no_memory_in_torch(folder):
    torch.empty(2**50)


def deep_nesting(folder):
    json.loads("[" * 100_000)


def damaged_tensors(folder):
    (folder / "a.safetensors").write_bytes(b"\xff" * 64)
    load_file(folder / "a.safetensors")


def name_that_is_no_text(folder):
    (folder / "list").write_text(os.fsdecode(b"caf\xe9"), encoding="utf-8")


def missing_package(folder):
    sys.modules["torchmetrics"], old = None, sys.modules.get("torchmetrics")
    try:
        import torchmetrics.image  # noqa: F401
    finally:
        del sys.modules["torchmetrics"]
        if old is not None:
            sys.modules["torchmetrics"] = old


def wrong_usage(folder):
    raise typer.BadParameter("--steps 0: give 1 or more")


def bad_setting(folder):
    raise ConfigError("steps=0: give 1 or more")


#: Cause, and what its line must hold: what happened, where, the remedy.
CAUSES = {
    below_a_file: ["{folder}/file/new", "Not a directory", "check this path"],
    full_disk: ["No space left", "writing {folder}/out", "free space"],
    read_only: ["/proc/", "No such file", "check this path"],
    file_size_limit: ["File too large", "ulimit -f"],
    file_size_limit_for_tensors: ["File too large", "writing {folder}/out", "ulimit -f"],
    too_many_files: ["/dev/null", "Too many open files", "ulimit -n"],
    long_name: ["{folder}/xxx", "File name too long", "give a shorter name"],
    missing_file: ["{folder}/nothing", "No such file"],
    no_memory: ["out of memory", "writing {folder}/out", "--max-memory"],
    no_memory_in_torch: ["out of memory", "writing {folder}/out", "--max-memory"],
    deep_nesting: ["nested", "damaged JSON"],
    damaged_tensors: ["safetensors", "damaged or truncated"],
    name_that_is_no_text: ["surrogates not allowed", "PYTHONUTF8"],
    missing_package: ["torchmetrics is not installed", r'pip install "mpqdm-fx\[report\]"'],
    wrong_usage: ["--steps 0: give 1 or more; see mpqdm-fx --help"],
    bad_setting: ["steps=0: give 1 or more"],
}


def command_of(work):
    app = typer.Typer()

    @app.command(cls=Command)
    def command(output: Path) -> None:
        work(output.parent)

    return app


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.__name__)
def test_a_cause_outside_this_package_is_one_line_with_place_and_remedy(
    cause, tmp_path, monkeypatch, capsys
):
    status, out, err = typed(monkeypatch, capsys, tmp_path / "out", app=command_of(cause))
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in CAUSES[cause]:
        assert re.search(part.replace("{folder}", re.escape(str(tmp_path))), err), err


def test_every_kind_of_the_table_has_a_cause(tmp_path):
    met = set()
    for number, cause in enumerate(CAUSES):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Exception) as raised:  # noqa: PT011 - of all kinds
            cause(folder)
        met.add(next(index for index, kind in enumerate(KINDS) if kind.holds(raised.value)))
    lost_peer = len(KINDS) - 1  # needs several processes
    refused = 4 if os.geteuid() == 0 else None  # permissions do not bind root
    assert set(range(len(KINDS))) - met <= {lost_peer, refused}


@pytest.mark.parametrize("number", [13, 1, 30])
def test_what_is_not_permitted_is_told_with_its_path(number):
    refusal = tell(OSError(number, os.strerror(number), "/srv/models"), {})
    assert refusal.status == 2
    assert "/srv/models" in refusal.line
    assert "permissions" in refusal.line


def test_a_process_that_lost_its_peers_points_to_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1")
    assert tell(error, {}).status == 70
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tell(error, {}).status == 2


def defect(folder):
    raise TypeError("a defect\nof two lines")


def log_of(line):
    match = re.fullmatch(
        r"internal error \(TypeError: a defect of two lines\), please report it with (.*)\n", line
    )
    assert match, line
    return Path(match[1])


def test_a_defect_is_one_line_and_a_log_with_all_that_a_report_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = typed(monkeypatch, capsys, tmp_path / "my out", app=command_of(defect))
    assert (status, out) == (70, "")
    log = log_of(err)
    assert log.parent == tmp_path
    text = log.read_text()
    assert f"mpqdm-fx '{tmp_path}/my out'" in text
    assert 'raise TypeError("a defect' in text
    assert f"torch: {torch.__version__.partition('+')[0]}" in text
    assert sys.version in text


def test_the_log_goes_to_the_temporary_folder_where_the_users_takes_none(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir("/proc")
    status, _, err = typed(monkeypatch, capsys, tmp_path / "out", app=command_of(defect))
    assert status == 70
    assert log_of(err).parent == tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_so_in_one_line(number, tmp_path, monkeypatch, capsys):
    app = command_of(lambda folder: signal.raise_signal(number))
    status, out, err = typed(monkeypatch, capsys, tmp_path / "out", app=app)
    assert (status, out) == (128 + number, "")
    assert err == f"stopped by {number.name}\n"


def test_what_typer_refuses_is_one_line_that_names_the_option_and_its_value(monkeypatch, capsys):
    status, _, err = typed(monkeypatch, capsys, "quantize", "digits", "--steps", "many")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: --steps many: give a valid integer; see mpqdm-fx quantize --help")
    assert typed(monkeypatch, capsys, "--help")[0] == 0


PRINT = """
import sys, typer
from mpqdm_fx.cli.boundary import run
from mpqdm_fx.cli.usage import Command
app = typer.Typer()
@app.command(cls=Command)
def show() -> None:
    print("x" * 100_000, flush=True)
    sys.stderr.write("told\\n")
run(app)
"""


@pytest.mark.parametrize(
    ("redirect", "status", "line"),
    [
        ("> /dev/full", 2, "standard output: it does not take what is printed: No space left"),
        (">&-", 2, "standard output is closed"),
        ("| true", 2, "its reader closed it before everything was printed (broken pipe)"),
        ("> /dev/null 2>&-", 0, ""),
        ("> /dev/null 2> /dev/full", 0, ""),
    ],
)
def test_streams_that_take_nothing_are_one_line_or_none(redirect, status, line):
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirect}; exit ${{PIPESTATUS[0]}}', sys.executable, PRINT],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert line in done.stderr
    assert done.stderr.count("\n") == (1 if line else 0), done.stderr


def test_names_that_the_terminal_cannot_show_are_printed_with_escapes(tmp_path, monkeypatch, capfd):
    app = command_of(lambda folder: typer.echo(os.fsdecode(b"caf\xe9")))
    monkeypatch.setattr("sys.stdout", open(1, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    status, out, _ = typed(monkeypatch, capfd, tmp_path / "out", app=app)
    assert (status, out) == (0, "caf\\udce9\n")
