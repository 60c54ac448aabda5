"""Builds of the C++ kernels for tests: by the presets of native/, into build/native/, made once.

A build folder is kept between runs; only what changed is compiled again. Where a tool is missing
the test is skipped with the reason.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from source_tree import ROOT

NATIVE = ROOT.parent / "native"
_BUILDS = ROOT.parent / "build" / "native"


def require_tool(*names):
    """The path of the first of these programs that there is; skips the test if there is none."""
    for name in names:
        if path := shutil.which(name):
            return path
    return pytest.skip(f"needs {' or '.join(names)}, which is not installed")


def require_compiler():
    """Skips the test where C++ cannot be compiled."""
    require_tool("cmake")
    require_tool(os.environ.get("CXX", "c++"), "g++", "clang++")


@functools.cache
def build(preset, *targets):
    """Builds targets of a preset and returns the build folder.

    Fails the test with the compiler's output: code that does not compile is no reason to skip.
    """
    folder = _BUILDS / preset
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_suffix(".lock")):
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        settings = [f"-DPython_EXECUTABLE={sys.executable}"]
        if preset == "linux" and importlib.util.find_spec("executorch") is None:
            settings.append("-DMPQDM_OPERATORS=OFF")
        _run("cmake", "--preset", preset, "-B", folder, *generator, *settings)
        _run("cmake", "--build", folder, "--parallel", "2", "--target", *targets)
    return folder


def _run(*command):
    done = subprocess.run([*map(str, command)], cwd=NATIVE, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}", pytrace=False)


@contextlib.contextmanager
def _alone(path):
    """Holds a lock: test processes that want the same build wait for the one that makes it."""
    fcntl = pytest.importorskip("fcntl", reason="builds are shared by file locks")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
