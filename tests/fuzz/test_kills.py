"""A job that is killed at any moment and resumed gives the very bits, and leaves nothing beside."""

import json
import random
import signal
from pathlib import Path

import pytest
from kill_jobs import INTERRUPTED, JOBS, run_job, write_models

#: They tell times among all else; what else they tell is drawn from the files that are compared.
PAGES = {"report.json", "report.html"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: Of JSON files, what is a time or follows from one, or names the place: all else has to be equal.
TIMES = {
    "mpqdm.json": (
        "report.seconds",
        "digest",
        "files.summary.json",
        "files.report.json",
        "files.report.html",
    ),
    "pipeline.json": (
        "digest",
        "files.summary.json",
        "files.report.json",
        "files.report.html",
    ),
    "summary.json": (
        "seconds_to_quantize",
        "milliseconds_per_step",
        "peak_memory_bytes",
        "program.seconds",
        "command",
        "distilled.seconds",
        "files.mpqdm.json",
        "files.report.json",
        "files.report.html",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    ended = run_job("quantize", root, root / "quantized")
    assert ended.code == 0
    return root


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    """A job's folder and its end when nothing disturbs it, by name."""
    found = {}

    def of(job):
        if job not in found:
            output = tmp_path_factory.mktemp(job) / "out"
            ended = run_job(job, models, output)
            assert ended.code == 0
            found[job] = contents(output), ended
        return found[job]

    return of


def contents(folder):
    """All files by name: bytes, and of JSON files what is no time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in PAGES:
            name = path.relative_to(folder).as_posix()
            found[name] = _timeless(path) if name in TIMES else path.read_bytes()
    return found


def _timeless(path: Path):
    data = json.loads(path.read_text())
    for key in TIMES[path.name]:
        place, _, last = key.partition(".")
        holder = data.get(place) if last else data
        if holder:  # a folder without a program has none of its numbers
            holder.pop(last or place, None)
    return data


def kill_and_resume(job, models, output, whole, *, code, **killed):
    """Run a job that is killed, look at what is there, run it to its end, look again."""
    expected, _ = whole
    ended = run_job(job, models, output, **killed)
    assert ended.code in (0, *code)
    if output.exists():  # whole or not at all
        whole_ones = [expected]
        if job == "replace":
            whole_ones += [contents(models / name) for name in ("plain", "unet")]
        assert contents(output) in whole_ones
    assert run_job(job, models, output).code == 0
    assert contents(output) == expected
    beside = [path.name for path in output.parent.iterdir() if path.name not in ("out", "tmp")]
    assert beside == []
    assert list(output.with_name("tmp").iterdir()) == []
    return ended.code


def codes(chosen):
    return (INTERRUPTED,) if chosen == signal.SIGINT else (-chosen,)


@pytest.mark.parametrize(
    ("job", "share", "chosen"),
    [
        ("quantize", 0.6, signal.SIGKILL),
        pytest.param("distill", 0.5, signal.SIGTERM, marks=pytest.mark.matrix),
        pytest.param("export", 0.8, signal.SIGKILL, marks=pytest.mark.matrix),
        ("replace", 0.45, signal.SIGINT),
    ],
)
def test_a_job_that_is_killed_resumes_to_the_same_bits(
    job, share, chosen, models, undisturbed, tmp_path
):
    whole = undisturbed(job)
    event = max(1, int(share * whole[1].events))
    code = kill_and_resume(
        job, models, tmp_path / "out", whole, code=codes(chosen), killed_by=chosen, at_event=event
    )
    assert code in codes(chosen)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("job", JOBS)
def test_forty_kills_at_random_moments(job, seed, models, undisturbed, tmp_path):
    whole = undisturbed(job)
    draw = random.Random(f"{job} {seed}")
    chosen = SIGNALS[seed % len(SIGNALS)]
    share = draw.random()
    if seed % 2:  # where files change, which is little of the time
        moment = {"at_event": max(1, int(share * whole[1].events))}
    else:
        moment = {"after": share * whole[1].seconds}
    kill_and_resume(
        job, models, tmp_path / "out", whole, code=codes(chosen), killed_by=chosen, **moment
    )
