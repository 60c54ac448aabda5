"""Run a program as a user sees it: in a terminal of its own, or with pipes."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

ERASE = "\r\x1b[2K"


def in_terminal(code, *arguments, columns=80):
    """Run Python code in a pseudo-terminal; return its status and all that it wrote there."""
    pid, descriptor = pty.fork()
    if pid == 0:
        # an environment of its own: readline sets COLUMNS past Python in the one that is inherited
        told = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        words = [sys.executable, "-c", code, *arguments]
        os.execve(sys.executable, words, told | {"TERM": "xterm-256color"})
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
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


def in_pipes(code, *arguments):
    """Run Python code with pipes; return its status, standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def standing(written):
    """The lines that stand on a terminal on which a line is erased and written again."""
    lines = written.replace("\r\n", "\n").split("\n")
    return [line.rpartition(ERASE)[2] for line in lines]


def drawn(written):
    """Every state of the line that is drawn again."""
    return [part.partition("\r\n")[0] for part in written.split(ERASE)]
