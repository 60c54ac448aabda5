"""The kernels' own test program: on this CPU, under sanitizers, and on ARM under an emulator."""

import os
import subprocess
import sys

import pytest
from native_builds import build, require_compiler, require_tool

#: (cases of each kind on each kernel set, changed blobs), by default and in the matrix. Under the
#: emulator 10,000 take about ten minutes of one core.
SHORT = {"linux": (150, 300), "sanitizer": (60, 300), "linux-aarch64-cross": (25, 300)}
LONG = {"linux": (10000, 5000), "sanitizer": (2000, 5000), "linux-aarch64-cross": (10000, 5000)}
#: Another number of cases in the matrix.
CASES = "MPQDM_EXACT_CASES"
ARM_SETS = ["i8mm", "dotprod", "neon", "scalar"]


def program(preset):
    """The command that runs the program of a preset."""
    require_compiler()
    if preset == "linux-aarch64-cross":
        require_tool("aarch64-linux-gnu-g++")
        emulator = [require_tool("qemu-aarch64", "qemu-aarch64-static"), "-cpu", "max"]
    else:
        emulator = []
    return [*emulator, build(preset, "mpqdm_exact") / "tests" / "mpqdm_exact"]


def run(preset, *arguments):
    command = [*map(str, (*program(preset), *arguments))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def check(preset, cases, changes):
    names = run(preset, "sets")
    if preset == "linux-aarch64-cross":
        assert names == ARM_SETS
    *of_sets, last = run(preset, "exact", 1, cases)
    assert of_sets == [f"{name}: {6 * cases} cases, 0 wrong" for name in names]
    assert last == "wrong: 0"
    assert run(preset, "mutations", 1, changes) == ["wrong: 0"]


@pytest.mark.parametrize("preset", SHORT)
def test_kernels_are_exact_and_changed_blobs_do_no_harm(preset):
    check(preset, *SHORT[preset])


@pytest.mark.matrix
@pytest.mark.parametrize("preset", LONG)
def test_many_more_cases(preset):
    cases, changes = LONG[preset]
    check(preset, int(os.environ.get(CASES, cases)), changes)


def test_a_wrong_call_of_the_program_fails():
    done = subprocess.run([*map(str, program("linux")), "exact"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: " in done.stderr


@pytest.mark.parametrize("wanted", ["scalar", "no such kernels"])
def test_an_environment_variable_names_the_kernels(native, wanted):
    # read once, so by a process of its own
    source = "import sys, native_kernels as n; print(n.NativeKernels(sys.argv[1]).best_kernels)"
    done = subprocess.run(
        [sys.executable, "-c", source, native.path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MPQDM_KERNELS": wanted},
        capture_output=True,
        text=True,
        check=True,
    )
    best = "scalar" if wanted == "scalar" else native.kernel_sets[0]
    assert done.stdout.strip() == best
    assert native.kernel_sets[-1] == "scalar"


def test_nothing_compiled_for_an_instruction_set_is_shared():
    # A function of a header, compiled twice, is linked once: it must not be the wrong one.
    require_compiler()
    folder = build("linux", "mpqdm_exact") / "src" / "CMakeFiles" / "mpqdm_kernels_core.dir"
    objects = sorted((*folder.glob("kernels_*.o"), *folder.glob("codes_avx2*.o")))
    assert len(objects) > 1
    for path in objects:
        symbols = subprocess.run(
            [require_tool("nm"), str(path)], capture_output=True, text=True, check=True
        )
        kinds = [line.split()[-2] for line in symbols.stdout.splitlines()]
        assert not set(kinds) & set("WVu"), path.name
