"""Forked readers: what ends a process is told, and told of the mutant that did it."""

import os
import signal
import time

import forked
import pytest
from forked import check_forked, read_forked

from mpqdm_fx.errors import ArtifactError, ConfigError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes")


def crash(mutant):
    if mutant == "crash":
        os.kill(os.getpid(), signal.SIGKILL)  # no dump of the stack, as of SIGSEGV
    return 0


def test_refusals_and_what_was_read_come_back():
    def read(mutant):
        if mutant % 2:
            raise ArtifactError("odd")
        return os.getpid() != parent

    parent = os.getpid()
    assert read_forked(read, 0)
    check_forked(range(250), read, True, refused=0.5)
    with pytest.raises(AssertionError, match="125"):
        check_forked(range(250), read, True, refused=0.6)
    with pytest.raises(AssertionError, match="mutant 0 was read as something else"):
        check_forked(range(250), read, False)


@pytest.mark.parametrize(
    "error", [ConfigError, OSError, RuntimeError, SystemExit, KeyboardInterrupt]
)
def test_only_the_artefacts_own_error_is_a_refusal(error):
    def read(mutant):
        if mutant == 130:
            raise error("no refusal")
        return 0

    with pytest.raises(AssertionError, match=r"mutant 130: (.|\n)*no refusal"):
        check_forked(range(250), read, 0)


def test_the_mutant_that_ends_a_process_is_told_from_its_neighbours():
    with pytest.raises(AssertionError, match="mutant 7: signal 9"):
        check_forked(["sound"] * 7 + ["crash"] + ["sound"] * 5, crash, 0, batch=10)


def test_a_crash_that_mutants_prepare_together_is_told_too():
    seen = []

    def read(mutant):
        seen.append(mutant)
        return crash("crash" if len(seen) == 4 else "")

    with pytest.raises(AssertionError, match="mutant 3: signal 9, but only in one process"):
        check_forked(range(6), read, 0, batch=6)


def test_a_process_that_leaves_is_told():
    with pytest.raises(AssertionError, match="mutant 2: the process ended"):
        check_forked(range(4), lambda mutant: os._exit(0) if mutant == 2 else 0, 0)


def test_a_reader_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(forked, "SECONDS", 0.2)
    with pytest.raises(AssertionError, match="mutant 1: the reader hangs"):
        check_forked([0, 60], time.sleep, None)


def test_memory_of_the_process_counts(monkeypatch):
    monkeypatch.setattr(forked, "BYTES", 2**26)
    with pytest.raises(AssertionError, match="mutant 1: reading took"):
        check_forked([1, 2**27], lambda size: len(bytearray(b"a") * size) * 0, 0)


def test_a_reason_of_two_lines_is_none():
    def read(mutant):
        raise ArtifactError("one\ntwo")

    with pytest.raises(AssertionError, match="mutant 0: one"):
        check_forked([0], read, 0)
