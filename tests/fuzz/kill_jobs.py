"""Whole jobs in processes of their own that are killed, at a moment or at a file's event.

A server that has imported everything forks one process a job, so that a kill costs no import.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from small import plain_unet, tiny_unet

from mpqdm_fx import MPQConfig, RunOptions, export_pipeline
from mpqdm_fx.distill import train
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.io.exchange import staged_folder
from mpqdm_fx.jobs import result_folder
from mpqdm_fx.jobs.distill import distill_folder
from mpqdm_fx.jobs.quantize import quantize_to_folder
from mpqdm_fx.sources.sources import load_source

__all__ = ["JOBS", "Ended", "run_job", "write_models"]

INTERRUPTED = 130
_RUN: dict[str, Any] = {
    "trajectories": 2,
    "steps": 2,
    "samples": 1,
    "overwrite": True,
}
_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"})


def write_models(root: Path) -> None:
    """The models that the jobs take, as diffusers saves them."""
    for name, model in (("unet", tiny_unet()), ("plain", plain_unet())):
        model.save_pretrained(root / name)
        DDIMScheduler().save_pretrained(root / name / "scheduler")
    DDPMPipeline(plain_unet(), DDPMScheduler()).save_pretrained(root / "pipeline")


def quantize(models: Path, output: Path) -> None:
    """All of the recipe: sensitivities, solved layers, packed folder; activations spill to disk."""
    quantize_to_folder(
        load_source(str(models / "plain")),
        MPQConfig(weight_bits=3, refinements=0),
        backend="packed",
        output=output,
        run=RunOptions(resume=True, activation_memory=200_000),
        **_RUN,
    )


def quantize_program(models: Path, output: Path) -> None:
    """The same with a program, compressed and with weights of its own."""
    quantize_to_folder(
        load_source(str(models / "plain")),
        MPQConfig(weight_bits=4, allocation="uniform", activation_mode="dynamic", refinements=0),
        backend="xnnpack",
        output=output,
        run=RunOptions(resume=True),
        external_weights=True,
        compress=True,
        **_RUN,
    )


def distill(models: Path, output: Path) -> None:
    """A short training whose state is saved at every update."""
    train._SAVE_SECONDS = -1.0
    distill_folder(
        models / "quantized",
        DistillConfig(updates=12, trajectories=4, steps=2, batch_size=4, rank=2, on_policy=0.5,
                      refresh=4, relation="queue", pixels=8, memory=32),
        output=output,
        samples=1,
        resume=True,
        overwrite=True,
    )  # fmt: skip


def export(models: Path, output: Path) -> None:
    """A pipeline with one program."""
    export_pipeline(
        models / "pipeline",
        MPQConfig(weight_bits=4, allocation="uniform", activation_mode="dynamic", refinements=0),
        output,
        steps=2,
        trajectories=2,
        run=RunOptions(resume=True),
        overwrite=True,
        samples=1,
        measure=False,
    )


def replace(models: Path, output: Path) -> None:
    """A folder that is replaced by others again and again, and at last by the first."""
    for name in ("quantized", "plain", "unet") * 5 + ("quantized",):
        with staged_folder(output) as stage:
            shutil.copytree(models / name, stage, dirs_exist_ok=True)


JOBS: dict[str, Callable[[Path, Path], None]] = {
    job.__name__: job for job in (quantize, quantize_program, distill, export, replace)
}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job's process ended.

    Attributes:
        code: 0 when it was through, minus the signal that killed it, or `INTERRUPTED`.
        seconds: Wall time.
        events: Files' events that it came to.
        error: Traceback of what ended it, if that was no signal.
    """

    code: int
    seconds: float
    events: int
    error: str = ""


def run_job(
    name: str,
    models: Path,
    output: Path,
    *,
    killed_by: int | None = None,
    at_event: int | None = None,
    after: float | None = None,
) -> Ended:
    """Run a job in a process of its own, and kill it if asked to.

    Args:
        name: Of `JOBS`.
        models: Folder of `write_models`.
        output: The job's folder; its temporary files lie in `tmp` beside it.
        killed_by: Signal.
        at_event: Kill at this event.
        after: Kill after seconds.
    """
    context = _server()
    mine, theirs = context.Pipe()
    signal_at = (killed_by, at_event) if at_event is not None else None
    process = context.Process(target=_child, args=(name, models, output, signal_at, theirs))
    process.start()
    theirs.close()
    assert mine.recv() == "started"
    start = time.perf_counter()
    if after is not None:
        process.join(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, killed_by)
    process.join(300)
    assert process.exitcode is not None, f"{name} hangs"
    seconds, events, error = time.perf_counter() - start, 0, ""
    with contextlib.suppress(EOFError, ConnectionResetError):
        events, error = mine.recv()
    return Ended(code=process.exitcode, seconds=seconds, events=events, error=error)


@functools.cache
def _server() -> Any:
    """The process that has imported everything and forks the others, started once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_jobs"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # it is not told otherwise
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _child(
    name: str, models: Path, output: Path, signal_at: tuple[int, int] | None, pipe: Any
) -> None:
    torch.set_num_threads(1)
    temporary = output.with_name("tmp")
    temporary.mkdir(exist_ok=True)
    tempfile.tempdir = str(temporary)
    # a process of its own, which imports everything again to measure: nothing that a kill changes
    result_folder.peak_memory = lambda *_: 0  # type: ignore[assignment]
    count = _count_events(output.parent, signal_at)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - progress bars
    pipe.send("started")
    try:
        JOBS[name](models, output)
        gc.collect()
        pipe.send((count(), ""))
    except KeyboardInterrupt:  # in what follows the job, too
        sys.exit(INTERRUPTED)
    except Exception:
        pipe.send((count(), traceback.format_exc()))
        sys.exit(1)


def _count_events(root: Path, signal_at: tuple[int, int] | None) -> Callable[[], int]:
    """Count what is done to files below `root`, and send this process a signal at one of them."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _EVENTS and str(arguments[0]).startswith(str(root)):
            count += 1
            if signal_at is not None and count == signal_at[1]:
                signal.raise_signal(signal_at[0])

    sys.addaudithook(hook)
    return lambda: count
