"""A first signal unwinds a command, a second one ends it; nothing outlives `main`."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mpqdm_fx.cli.signals import Stopped, stoppable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def heard():
    """Signals that the caller of the tests ignores (nohup does) stay ignored by a command too."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is signal.SIG_IGN else handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def installed():
    return [signal.getsignal(number) for number in SIGNALS], sys.unraisablehook


def stop_of(work):
    """The stop that ends a function."""

    def run():
        with stoppable():
            work()

    with pytest.raises(Stopped) as stopped:
        run()
    return stopped.value


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_runs_the_finally_blocks_and_all_handlers_are_restored(number):
    before, met = installed(), []

    def work():
        try:
            signal.raise_signal(number)
            time.sleep(5)
        except Exception:  # what a library does with errors
            met.append("taken for an error")
        finally:
            met.append("cleaned")

    assert stop_of(work).status == 128 + number
    assert met == ["cleaned"]
    assert installed() == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_block_without_a_signal_leaves_no_trace():
    before, threads = installed(), threading.active_count()
    with stoppable():
        assert installed() != before
    assert installed() == before
    assert threading.active_count() == threads


def test_an_error_on_the_way_out_of_a_stop_is_told_as_the_stop():
    def work():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise ConnectionError("the other processes are gone")

    assert stop_of(work).status == 143


def test_a_stop_that_a_finalizer_swallows_comes_again():
    class Held:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)

    def work(held):
        held.clear()
        time.sleep(5)

    begun = time.monotonic()
    assert stop_of(lambda: work([Held()])).status == 130
    assert time.monotonic() - begun < 4


def test_the_same_stop_said_twice_does_not_cut_the_cleaning_short():
    cleaned = []

    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)
            cleaned.append(True)

    assert stop_of(work).status == 130
    assert cleaned


def test_a_signal_that_was_ignored_stays_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, old)


def test_other_threads_install_nothing():
    before, handlers = installed(), []

    def work():
        with stoppable():
            handlers.append(installed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]


BUSY = """
import hashlib, os
from mpqdm_fx.cli.signals import stoppable
with stoppable():
    os.write(1, b"begun")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which Python delivers nothing
"""


def begin(process):
    assert process.stdout.read(5) == b"begun"
    time.sleep(1)  # from the word into the operation


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_long_operation_at_once(number):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        begin(process)
        process.send_signal(number)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number


def test_a_long_operation_that_goes_on_is_told():
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        begin(process)
        process.send_signal(signal.SIGINT)
        assert b"Ctrl-C again" in process.stderr.readline()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
