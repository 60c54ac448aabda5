"""Mutants that are read in forked processes, since what reads them could end the process.

A fork of a process that holds torch takes longer than most mutants do, so that one process reads a
batch. Where a batch does not come to its end, each of its mutants is read again in a process of its
own, which tells the one that ended it.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from mutants import BYTES, SECONDS, Outcome, check_outcomes, outcome_of, peak_bytes

from mpqdm_fx.errors import ArtifactError

_BATCH = 100


def check_forked(
    mutants: Iterable[Any],
    read: Callable[[Any], Any],
    expected: Any,
    *,
    refused: float = 0.0,
    batch: int = _BATCH,
) -> None:
    """Read every mutant in a forked process: refused as an `ArtifactError`, or what is expected.

    Args:
        mutants: The mutants.
        read: Writes one and reads it; its result is pickled and compared by `==`.
        expected: What the original gives.
        refused: Least share of mutants that must be refused.
        batch: Mutants that a process reads.

    Raises:
        AssertionError: Something else came of one: another error, a signal, a silence, much memory.
    """
    check_outcomes(_outcomes(iter(mutants), read, batch), expected, refused=refused)


def read_forked(read: Callable[[Any], Any], original: Any) -> Any:
    """What the original gives, read in a forked process as mutants are."""
    (outcome,), fault = _in_child([original], read)
    assert outcome.fault is None, outcome.fault
    assert outcome.reason is None, outcome.reason
    assert fault is None, fault
    return outcome.found


def _outcomes(mutants: Iterator[Any], read: Callable[[Any], Any], size: int) -> Iterator[Outcome]:
    while batch := list(islice(mutants, size)):
        found, fault = _in_child(batch, read)
        yield from found if fault is None else _alone(batch, read, len(found), fault)


def _alone(
    batch: list[Any], read: Callable[[Any], Any], reached: int, fault: str
) -> Iterator[Outcome]:
    """Each mutant in a process of its own; what ended their common one is a fault in any case."""
    outcomes = []
    for mutant in batch:
        found, own = _in_child([mutant], read)
        outcomes.append(Outcome(fault=own) if own is not None else found[0])
    if all(outcome.fault is None for outcome in outcomes):
        blamed = min(reached, len(batch) - 1)
        told = f"{fault}, but only in one process with the {blamed} mutants before it"
        outcomes[blamed] = replace(outcomes[blamed], fault=told)
    yield from outcomes


def _in_child(batch: list[Any], read: Callable[[Any], Any]) -> tuple[list[Outcome], str | None]:
    """What came of the mutants that a forked process came to, and why it ended if not at theirs."""
    mine, theirs = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        mine.close()
        _answer(batch, read, theirs)
    theirs.close()
    found: list[Outcome] = []
    fault = None
    try:
        while len(found) < len(batch) and fault is None:
            if mine.poll(2 * SECONDS):
                found.append(mine.recv())
            else:
                fault = "the reader hangs"
        grown = mine.recv() if fault is None else 0
        if grown >= BYTES:
            fault = f"reading took {grown} bytes"
    except EOFError:
        fault = "the process ended"
    finally:
        mine.close()
        if fault == "the reader hangs":
            os.kill(child, signal.SIGKILL)
        _, ended = os.waitpid(child, 0)
    if os.WIFSIGNALED(ended) and fault != "the reader hangs":
        fault = f"signal {os.WTERMSIG(ended)}"
    elif fault is None and ended != 0:
        fault = f"exit status {os.WEXITSTATUS(ended)}"
    return found, fault


def _answer(batch: list[Any], read: Callable[[Any], Any], pipe: Connection) -> None:
    """The forked process: an outcome for each mutant, then how far memory grew."""
    status = 70
    try:
        before = peak_bytes()
        for mutant in batch:
            pipe.send(outcome_of(read, mutant, ArtifactError))
        pipe.send(peak_bytes() - before)
        pipe.close()
        status = 0
    finally:
        os._exit(status)
