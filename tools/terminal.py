"""Run a program as a user sees it: in a terminal of its own, or with pipes."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

ERASE = "\r\x1b[2K"
"""What is written before the line of progress is drawn again, or for the last time taken away."""

_ROWS = 40


def python(code: str, *arguments: str) -> list[str]:
    """The words that run Python code.

    Args:
        code: The code.
        arguments: What it finds in `sys.argv`.
    """
    return [sys.executable, "-c", code, *arguments]


def in_terminal(
    words: Sequence[str], *, columns: int = 80, folder: Path | None = None
) -> tuple[int, str]:
    """Run a command in a pseudo-terminal.

    Args:
        words: The program and its arguments.
        columns: Width of the terminal.
        folder: Where to run it; None for here.

    Returns:
        Its status, and all that it wrote there.
    """
    pid, descriptor = pty.fork()
    if pid == 0:
        if folder is not None:
            os.chdir(folder)
        # an environment of its own: readline sets COLUMNS past Python in the one that is inherited
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        os.execve(words[0], list(words), environment | {"TERM": "xterm-256color"})
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), b"".join(parts).decode()


def in_pipes(
    words: Sequence[str], *, folder: Path | None = None, together: bool = False
) -> tuple[int, str, str]:
    """Run a command with pipes.

    Args:
        words: The program and its arguments.
        folder: Where to run it; None for here.
        together: Lead both streams through the first pipe, in the order of writing.

    Returns:
        Its status, standard output and standard error.
    """
    errors = subprocess.STDOUT if together else subprocess.PIPE
    done = subprocess.run(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr or ""


def drawn(written: str) -> list[str]:
    """Every state of the line that is drawn again, behind what came before it.

    Args:
        written: Of `in_terminal`.
    """
    return [part.partition("\r\n")[0] for part in written.split(ERASE)]
